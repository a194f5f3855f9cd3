//! Memory snapshots: which page of a paused guest's memory is where, and the files that hold it.
//!
//! A pause writes one *generation*: a data file with the pages that were written since the last one and are not zero. A
//! [`Header`] maps the whole memory to runs of pages in generations, or to zeros, so a read is one look-up whatever
//! the number of pauses. Generations never change once committed; headers are replaced by rename.
//!
//! `header`, `mapping` and `merge` are pure: no IO, no clock. The rest of the crate reads and writes files, and blocks.
//!
//! This crate does not know what a capsule is: who owns a header says where it lives. It serves no page faults, and it
//! never maps a file into memory; the pager does both, with what [`Snapshot`] tells it.

mod data;
mod header;
mod id;
mod mapping;
mod merge;
mod open;
mod store;

pub use data::{DataFile, Error as DataError};
pub use header::{Error as HeaderError, Generation, Header};
pub use id::Id;
pub use mapping::{Error as MappingError, Extent, Mapping, Source};
pub use merge::{Error as MergeError, MERGE_AT, is_due};
pub use open::{Content, Error as OpenError, Run, Snapshot};
pub use store::{Audit, Broken, Collected, Error, Held, Merged, Packed, Store, TEMPORARY};

/// Bytes of a page: the unit of the mapping, of storage and of checksums.
pub const PAGE_SIZE: u64 = 4096;
