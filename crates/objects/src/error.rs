use std::io;

use crate::{Hash, ManifestError};

/// What failed, by what we were doing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address of the object store is not one that is understood.
    #[error("`{0}` is not the address of an object store: file:///path or s3://bucket/prefix")]
    Address(String),
    /// The object store cannot be used as it is configured.
    #[error("use the object store {address}")]
    Open {
        /// Its address.
        address: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The name of an upload leads elsewhere.
    #[error("`{0}` cannot be the name of an upload")]
    Name(String),
    /// The object store did not do what it was asked.
    #[error("{doing} {object} in the object store")]
    Ask {
        /// What it was asked.
        doing: &'static str,
        /// For which object.
        object: String,
        #[source]
        source: object_store::Error,
    },
    /// A chunk that a manifest names is not there.
    #[error("chunk {0} is not in the object store")]
    Missing(Hash),
    /// A chunk is not what its name says.
    #[error("chunk {hash} is damaged in the object store")]
    Damaged {
        /// Its name.
        hash: Hash,
        #[source]
        why: Unreadable,
    },
    /// A manifest cannot be used.
    #[error("read the manifest of {name}")]
    Manifest {
        /// Of which upload.
        name: String,
        #[source]
        source: ManifestError,
    },
    /// A manifest cannot be written.
    #[error("write a manifest")]
    Encode(#[source] ManifestError),
    /// A local file could not be read or written.
    #[error("{doing} the file `{file}`")]
    File {
        /// What we were doing.
        doing: &'static str,
        /// Which.
        file: String,
        #[source]
        source: io::Error,
    },
    /// A file changed though it must not.
    #[error("the file `{0}` changed while it was uploaded")]
    Changed(String),
    /// Garbage is being collected, and uploads wait for that.
    #[error("the object store is being cleaned; try again later")]
    Collecting,
    /// Uploads are under way, and garbage is not collected beside them.
    #[error("uploads to the object store are under way; try again later")]
    Uploading,
    /// The object store was out of reach, or this process stood still, for so long that others may have taken it for dead.
    #[error("the object store was not reached for too long")]
    Lapsed,
    /// The kernel has no random numbers for a name.
    #[error("make a name")]
    Random(#[source] getrandom::Error),
}

/// Why bytes are not the chunk that they should be.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// More than any chunk takes.
    #[error("it has {0} bytes")]
    TooLong(u64),
    /// They do not decompress to something that is as long as a chunk at most.
    #[error("decompress it")]
    Decompress(#[source] io::Error),
    /// They are something else.
    #[error("its content has another hash")]
    Hash,
    /// They are as named, but of another length than the file has there.
    #[error("it has {len} bytes in place of {expected}")]
    Length {
        /// What it has.
        len: u64,
        /// What it should have.
        expected: u64,
    },
}

impl Error {
    pub(crate) fn ask(doing: &'static str, object: impl ToString) -> impl FnOnce(object_store::Error) -> Self {
        move |source| Self::Ask { doing, object: object.to_string(), source }
    }

    pub(crate) fn file(doing: &'static str, file: &str) -> impl Fn(io::Error) -> Self + use<> {
        let file = file.to_owned();
        move |source| Self::File { doing, file: file.clone(), source }
    }

    /// Whether the same may succeed later: the object store is out of reach, or busy.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Ask { .. } | Self::Collecting | Self::Uploading | Self::Lapsed => true,
            Self::Address(_)
            | Self::Open { .. }
            | Self::Name(_)
            | Self::Missing(_)
            | Self::Damaged { .. }
            | Self::Manifest { .. }
            | Self::Encode(_)
            | Self::File { .. }
            | Self::Changed(_)
            | Self::Random(_) => false,
        }
    }
}
