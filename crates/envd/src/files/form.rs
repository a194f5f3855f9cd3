//! The body of an upload that is a form (`multipart/form-data`): which of its parts are files, and what is in them.
//!
//! It touches no disk; what it holds of a body is bounded, however the body is made.

use super::Error;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The bytes of a body, or of a part of one, as they come.
pub type Contents<'a> = Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send + 'a>>;

/// What may be in memory before it is known what it is: the head of a part, with whatever came together with it.
const HEAD: usize = 8 << 20;

/// A form on its way in.
pub struct Form<'a> {
    parts: multer::Multipart<'a>,
    /// How much the parser was fed since it last understood something.
    held: Arc<AtomicUsize>,
}

/// A file of a form.
pub struct File<'a> {
    /// The name that the client says it has, if any.
    pub name: Option<String>,
    pub contents: Contents<'a>,
}

impl<'a> Form<'a> {
    /// The form that a body of this type carries.
    pub fn new(content_type: &str, contents: Contents<'a>) -> Result<Form<'a>, Error> {
        let boundary = multer::parse_boundary(content_type).map_err(Error::Form)?;
        // The parser keeps what it has not yet understood, and knows no limit.
        let held = Arc::new(AtomicUsize::new(0));
        let fed = Arc::clone(&held);
        let contents = contents.map(move |bytes| {
            let bytes = bytes?;
            match fed.fetch_add(bytes.len(), Ordering::Relaxed) {
                held if held > HEAD => Err(Error::FormHead(HEAD)),
                _ => Ok(bytes),
            }
        });
        Ok(Form { parts: multer::Multipart::new(contents, boundary), held })
    }

    /// The next part that is a file; what was left of the one before is passed over.
    pub async fn next(&mut self) -> Result<Option<File<'a>>, Error> {
        while let Some(mut part) = self.parts.next_field().await.map_err(of_form)? {
            self.held.store(0, Ordering::Relaxed);
            let is_file = part.name() == Some("file");
            let name = part.file_name().filter(|name| !name.is_empty()).map(str::to_owned);
            let held = Arc::clone(&self.held);
            let mut contents = futures::stream::poll_fn(move |context| {
                let next = part.poll_next_unpin(context);
                if next.is_ready() {
                    held.store(0, Ordering::Relaxed);
                }
                next.map(|next| next.map(|bytes| bytes.map_err(of_form)))
            });
            if is_file {
                return Ok(Some(File { name, contents: Box::pin(contents) }));
            }
            while contents.next().await.transpose()?.is_some() {}
        }
        Ok(None)
    }
}

/// What the body said, if it was the body and not the form that is wrong.
fn of_form(error: multer::Error) -> Error {
    match error {
        multer::Error::StreamReadFailed(source) => match source.downcast() {
            Ok(error) => *error,
            Err(source) => Error::Form(multer::Error::StreamReadFailed(source)),
        },
        error => Error::Form(error),
    }
}
