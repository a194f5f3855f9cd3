//! Uploads: a multipart body whose `path` says where its `file` goes, carried on as it comes.
//!
//! A task of its own reads the client, so that the guest's answer is heard at any time. The file's bytes go through a queue of a
//! few pieces: a slow guest slows its client. Only a file that came whole ends as one; anything else breaks off, and the guest
//! keeps nothing of it.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use api::{ErrorCode, limits};
use axum::body::BodyDataStream;
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use bytes::Bytes;
use connectrpc::ConnectError;
use connectrpc::client::ClientBody;
use futures::{Stream, StreamExt};
use http_body_util::combinators::BoxBody;
use hyper::body::{Body, Frame};
use multer::{Field, Multipart};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::error::Error;

/// Pieces of a file that may wait for the guest.
const QUEUE: usize = 4;
/// Bytes of a multipart body beside the file: the path, and what frames them.
const FRAMING: u64 = 64 * 1024;
/// How long a client may pause. The guest gives an upload up before that.
const IDLE: Duration = Duration::from_secs(90);

/// A file on its way.
pub struct Upload {
    pub path: String,
    pub body: ClientBody,
    /// Why the client's side broke off, if it did.
    pub broken: Broken,
}

/// What was wrong with the client's side of an upload.
#[derive(Clone, Default)]
pub struct Broken(Arc<OnceLock<(ErrorCode, String)>>);

impl Broken {
    /// The error the client made, or else `other`.
    pub fn or(&self, other: impl Into<Error>) -> Error {
        match self.0.get() {
            Some((code, message)) => Error::new(*code, message.clone()),
            None => other.into(),
        }
    }

    fn with(&self, code: ErrorCode, message: String) {
        // The first reason is the one.
        let _ = self.0.set((code, message));
    }
}

/// Begins to read an upload whose file may have so many bytes.
pub async fn open(request: Request, limit: Option<u64>) -> Result<Upload, Error> {
    let claimed = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let boundary =
        request.headers().get(CONTENT_TYPE).and_then(|kind| multer::parse_boundary(kind.to_str().ok()?).ok());
    let stream = request.into_body().into_data_stream();
    let boundary = boundary.ok_or_else(|| invalid("the body must be multipart/form-data with a boundary"))?;
    if let (Some(limit), Some(claimed)) = (limit, claimed)
        && claimed > limit + FRAMING
    {
        return Err(Error::new(ErrorCode::TooLarge, too_large(limit)));
    }
    let mut parts = Multipart::new(impatient(stream), boundary);
    let (path, file) = head(&mut parts).await?;
    let (to, pieces) = mpsc::channel(QUEUE);
    let broken = Broken::default();
    tokio::spawn(carry(file, limit, to, broken.clone()));
    Ok(Upload { path, body: BoxBody::new(Pieces { pieces, whole: false }), broken })
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidRequest, message)
}

fn too_large(limit: u64) -> String {
    format!("file must be at most {limit} bytes long; files/stream/write has no such bound")
}

/// The parts before the file, and the file.
async fn head(parts: &mut Multipart<'static>) -> Result<(String, Field<'static>), Error> {
    let mut path = None;
    loop {
        let part = parts.next_field().await.map_err(|error| invalid(format!("the body is not multipart: {error}")))?;
        let Some(mut part) = part else {
            return Err(invalid(if path.is_some() { "the part file is missing" } else { "the part path is missing" }));
        };
        match part.name() {
            Some("path") => path = Some(small(&mut part).await?),
            Some("file") => {
                let path = path.ok_or_else(|| invalid("the part path must come before the part file"))?;
                limits::path(&path)?;
                return Ok((path, part));
            }
            // Forms have parts we do not know.
            _ => drop(small(&mut part).await?),
        }
    }
}

/// The text of a part that is not the file.
async fn small(part: &mut Field<'static>) -> Result<String, Error> {
    let name = part.name().unwrap_or_default().to_owned();
    let mut bytes = Vec::new();
    while let Some(chunk) = part.chunk().await.map_err(|error| invalid(format!("the body breaks off: {error}")))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > limits::PATH_BYTES {
            return Err(invalid(format!("{name} must be at most {} bytes long", limits::PATH_BYTES)));
        }
    }
    String::from_utf8(bytes).map_err(|_| invalid(format!("{name} must be UTF-8")))
}

enum Piece {
    Bytes(Bytes),
    /// The file is whole. Without it, it is not.
    End,
}

/// Carries the file to its end.
async fn carry(mut file: Field<'static>, limit: Option<u64>, to: mpsc::Sender<Piece>, broken: Broken) {
    let mut size: u64 = 0;
    loop {
        let chunk = tokio::select! {
            chunk = file.chunk() => chunk,
            // The guest has answered already, and wants no more.
            () = to.closed() => return,
        };
        let piece = match chunk {
            Ok(Some(bytes)) => {
                size += bytes.len() as u64;
                if let Some(limit) = limit.filter(|limit| size > *limit) {
                    return broken.with(ErrorCode::TooLarge, too_large(limit));
                }
                Piece::Bytes(bytes)
            }
            Ok(None) => Piece::End,
            Err(error) => return broken.with(ErrorCode::InvalidRequest, format!("the body breaks off: {error}")),
        };
        let whole = matches!(piece, Piece::End);
        if to.send(piece).await.is_err() || whole {
            return;
        }
    }
}

/// The body of a client that must not pause for long.
fn impatient(body: BodyDataStream) -> impl Stream<Item = Result<Bytes, Stalled>> + Send + 'static {
    futures::stream::unfold(body, |mut body| async {
        match timeout(IDLE, body.next()).await {
            Ok(next) => Some((next?.map_err(Stalled::Broken), body)),
            Err(_) => Some((Err(Stalled::Idle), body)),
        }
    })
}

/// Why no more comes from a client.
#[derive(Debug, thiserror::Error)]
enum Stalled {
    #[error("nothing came for {} seconds", IDLE.as_secs())]
    Idle,
    #[error("the connection broke")]
    Broken(#[source] axum::Error),
}

/// The file as the body of a request to the guest.
struct Pieces {
    pieces: mpsc::Receiver<Piece>,
    whole: bool,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = ConnectError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ConnectError>>> {
        if self.whole {
            return Poll::Ready(None);
        }
        self.pieces.poll_recv(context).map(|piece| match piece {
            Some(Piece::Bytes(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(Piece::End) => {
                self.get_mut().whole = true;
                None
            }
            // Whoever reads the client is gone: this must not look like the file's end.
            None => Some(Err(ConnectError::aborted("the upload broke off"))),
        })
    }
}
