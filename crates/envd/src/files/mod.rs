//! Whole files over plain HTTP: `GET|HEAD|POST /files` and `POST /files/compose`, as E2B's clients speak them.
//!
//! It owns what lies between a request and the file it names: who may ([`signature`]), where it is ([`place`]), how it comes
//! in ([`upload`], [`write`]) and goes out ([`download`]). Everything streams: a transfer holds a few megabytes whatever the
//! size of the file, and the disk is only touched on the runtime's blocking threads.
//!
//! # What becomes of a file that is uploaded
//!
//! A file has its final name only when it is whole, and a failed or broken-off upload leaves neither half of it nor anything
//! temporary. What E2B's watchers must see (one CREATE, one CHMOD, one WRITE) holds for files of every size.
//!
//! - A body of less than [`write::SMALL`] is taken in whole before anything is touched. A new file is then created, given to
//!   its user and written with one call; if that fails it is removed. An existing file keeps its inode, mode and other names
//!   (hard links); if writing fails, what was overwritten is put back.
//! - A larger body goes to a file without a name at the top of the target's mount, where hardly anybody watches, and is linked
//!   into place when it is complete. (Who does watch there sees writes to `#INODE`: the kernel reports them.) An existing file
//!   is replaced: its mode is kept, its other names keep the old contents, and whoever has it open goes on reading those. So is
//!   a program that is running, however small the body.
//! - A symbolic link is followed, also one that leads nowhere yet. A directory, a device, a pipe or a socket is refused.
//!
//! Parts of one form are files of their own: those before the one that failed are there.
//!
//! It refuses to check a user's permissions: the caller has the capsule's token, with which all of it may be had anyway. Files
//! belong to the user they were sent for.

mod compose;
mod download;
mod encoding;
pub mod form;
pub mod http;
mod incoming;
pub mod negotiate;
mod place;
pub mod signature;
pub mod upload;
mod write;

use crate::path;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a transfer came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Signature(#[from] signature::Error),
    #[error("invalid username: '{0}'")]
    User(String),
    #[error("cannot look up users")]
    Users(#[source] io::Error),
    #[error("query: {0}")]
    Query(String),
    #[error(transparent)]
    Path(#[from] path::Error),
    #[error("body: {0}")]
    Json(String),
    #[error("content type must be multipart/form-data or application/octet-stream")]
    ContentType,
    #[error("content encoding '{0}' is not supported: gzip or identity")]
    ContentEncoding(String),
    #[error("query parameter 'path' is required for application/octet-stream")]
    NoPath,
    #[error("a part named 'file' has no file name, and there is no query parameter 'path'")]
    NoFileName,
    #[error("no part is named 'file'")]
    NoFile,
    #[error("'{}' is sent more than once; only the first was written", .0.display())]
    Duplicate(PathBuf),
    #[error("form: {0}")]
    Form(multer::Error),
    #[error("form: the head of a part is longer than {0} bytes")]
    FormHead(usize),
    #[error("the body is not whole gzip data")]
    Gzip(#[source] io::Error),
    #[error("no byte of the body came for {} s", .0.as_secs_f64())]
    Idle(Duration),
    #[error("the body broke off")]
    Broken(#[source] axum::Error),
    #[error("header '{0}': {1}")]
    Metadata(String, &'static str),
    #[error("metadata: the file system of '{}' keeps none", .0.display())]
    NoMetadata(PathBuf),
    #[error("source_paths must not be empty")]
    NoSources,
    #[error("destination is required")]
    NoDestination,
    #[error("source '{0}' is the destination")]
    SourceIsDestination(String),
    #[error("'{}' does not exist", .0.display())]
    NotFound(PathBuf),
    #[error("'{}' is a directory", .0.display())]
    Directory(PathBuf),
    #[error("'{}' is not a regular file", .0.display())]
    NotRegular(PathBuf),
    #[error("no byte of the range is in the file, which has {0} bytes")]
    Range(u64),
    #[error("the file is not the one the condition names")]
    Precondition,
    #[error("neither gzip nor identity is acceptable")]
    NotAcceptable,
    #[error("{doing} '{}': {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

impl Error {
    /// For `map_err`: what failed while doing what to which path.
    fn io<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
        move |error| {
            let source: io::Error = error.into();
            match source.kind() {
                io::ErrorKind::NotFound => Error::NotFound(path.to_owned()),
                io::ErrorKind::IsADirectory => Error::Directory(path.to_owned()),
                _ => Error::Io { doing, path: path.to_owned(), source },
            }
        }
    }
}

/// Does what waits for the disk, away from the threads that serve. It runs to its end even if nobody waits for it any more.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(failure) => std::panic::resume_unwind(failure.into_panic()),
    }
}
