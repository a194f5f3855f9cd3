use std::io;
use std::path::{Path, PathBuf};

use crate::{Id, data, merge, open};

/// Why the store could not do what was asked. Nothing that was committed before has changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system below `path` is full, or its quota is used up.
    #[error("no space left for {}", path.display())]
    NoSpace {
        /// The file that could not be written.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A directory could not be made or listed.
    #[error("use the directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file could not be written, named or made durable.
    #[error("write {}", path.display())]
    Write {
        /// The file that was to appear.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file could not be removed.
    #[error("remove {}", path.display())]
    Remove {
        /// The file.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The kernel has no random numbers for an id.
    #[error("make an id")]
    Random(#[source] getrandom::Error),
    /// The diff could not be read.
    #[error("read the guest's memory")]
    Diff(#[source] io::Error),
    /// The diff has a length that no guest memory has. Bytes.
    #[error("a guest memory of {0} bytes cannot be stored")]
    DiffLength(u64),
    /// The diff is where holes are not as fine as pages, so that a hole may look like zeros that were written.
    #[error("the diff is on a file system with blocks of {0} bytes, which hide what was written")]
    CoarseDiff(u64),
    /// The header is not one that this store was opened with or has committed.
    #[error("the store does not know the header {}", .0.display())]
    Unknown(PathBuf),
    /// A snapshot could not be opened or read.
    #[error("read the snapshot {}", path.display())]
    Open {
        /// Its header.
        path: PathBuf,
        #[source]
        source: open::Error,
    },
    /// A generation could not be read.
    #[error("read what is to be merged")]
    Generation(#[source] data::Error),
    /// The new header could not be made.
    #[error("make the new header")]
    Merge(#[from] merge::Error),
    /// A generation that the header refers to is not there.
    #[error("generation {id} of {} is missing", path.display())]
    Missing {
        /// The header.
        path: PathBuf,
        /// The generation.
        id: Id,
    },
    /// A header cannot be read, so what it refers to is unknown, and nothing may be collected before it is removed.
    #[error("collect nothing while {} cannot be read", .0.display())]
    Blocked(PathBuf),
}

impl Error {
    pub(super) fn directory(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| Self::Directory { path: path.to_owned(), source }
    }

    /// For everything that writes: a full file system has its own variant.
    pub(super) fn write(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { path: path.to_owned(), source }
            }
            _ => Self::Write { path: path.to_owned(), source },
        }
    }
}
