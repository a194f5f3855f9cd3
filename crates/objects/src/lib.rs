//! What is paused, in an object store: an S3 bucket, or a folder.
//!
//! A saved capsule or template is a handful of files. They are cut into *chunks* of 1 MiB, each named by the SHA-256 of what
//! is in it and stored once, compressed, whoever else has the same; zeros, and what the image underneath has at the same
//! place, are not stored. A [`Manifest`] lists the chunks of each file, and says with bytes that this crate does not look
//! into what the whole is. It is written last: what has no manifest is not there.
//!
//! [`Objects::upload`] sends what is not there yet. What is fetched is checked against its name, always:
//! [`Objects::download`] makes a file whole, [`Lazy`] files are filled as they are read. [`Objects::collect`] removes the
//! chunks that no manifest names, and waits for uploads that are under way.
//!
//! This crate does not know what a capsule is, nor what its files mean.

mod collect;
mod config;
mod error;
mod lazy;
mod lease;
mod manifest;
mod store;
mod upload;

pub use collect::{Audit, Count};
pub use config::Config;
pub use error::{Error, Unreadable};
pub use lazy::Lazy;
pub use lease::STALE;
pub use manifest::{Chunk, Entry, Error as ManifestError, Hash, Manifest};
pub use store::Objects;
pub use upload::{Base, Sent, Source};

/// Bytes of a chunk, the last of a file aside.
pub const CHUNK: u64 = 1 << 20;
