//! What an upload consists of, and its bytes. Pure.
//!
//! All little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 8 | magic, `WRENNOBJ` |
//! | 4 | version, 1 |
//! | 4 | bytes of a chunk, 1048576 |
//! | 4 | bytes of the description, d |
//! | 4 | files, n |
//! | d | the description, whatever the one who uploaded wants to know again |
//! | n files | each: 2 length of the name, the name, 8 size, then its chunks in order |
//! | 32 | SHA-256 of all before |
//!
//! A chunk is one byte: 0 for zeros, 1 for what the image underneath has at this place, 2 for a stored one, whose SHA-256
//! follows. A file has as many chunks as its size needs.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::CHUNK;

const MAGIC: [u8; 8] = *b"WRENNOBJ";
const VERSION: u32 = 1;
const FIXED: usize = 24;
const DIGEST: usize = 32;
const ZERO: u8 = 0;
const BASE: u8 = 1;
const STORED: u8 = 2;
/// Longest name of a file.
const MAX_NAME: usize = 128;

/// SHA-256 of a chunk's content: its name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; DIGEST]);

impl Hash {
    /// That of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }

    /// The hash that `text` shows, when it is exactly what [`Display`](fmt::Display) writes.
    pub fn parse(text: &str) -> Option<Self> {
        let mut hash = [0; DIGEST];
        hex::decode_to_slice(text, &mut hash).ok()?;
        let hash = Self(hash);
        (hash.to_string() == text).then_some(hash)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where the content of a chunk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// It is zeros.
    Zero,
    /// It is what the image underneath has at the same place.
    Base,
    /// It is in the object store.
    Stored(Hash),
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is called: 1 to 128 of `A-Z a-z 0-9 . _ -`, not beginning with a dot.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its content.
    pub chunks: Vec<Chunk>,
}

impl Entry {
    /// The bytes of the file that are its chunk `index`.
    pub fn range(&self, index: usize) -> Range<u64> {
        let start = index as u64 * CHUNK;
        start..self.size.min(start + CHUNK)
    }
}

/// All that was uploaded under one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// What the one who uploaded wants to know again.
    pub description: Vec<u8>,
    /// The files.
    pub files: Vec<Entry>,
}

/// Why bytes or parts are no manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There are no bytes.
    #[error("the manifest is empty")]
    Empty,
    /// It does not begin as a manifest does.
    #[error("this is no manifest")]
    Foreign,
    /// A later version of Wrenn wrote it.
    #[error("the manifest has version {0}; this program reads version {VERSION}")]
    Version(u32),
    /// The bytes end too early.
    #[error("the manifest is cut off after {0} bytes")]
    Truncated(usize),
    /// There are more bytes than it says.
    #[error("the manifest has {0} bytes too many")]
    Trailing(usize),
    /// Some byte is not what was written.
    #[error("the manifest's checksum is wrong")]
    Checksum,
    /// Chunks of another size than ours.
    #[error("chunks of {0} bytes are not supported")]
    ChunkSize(u32),
    /// A file's name is none.
    #[error("file {0} has a name that is not acceptable")]
    Name(usize),
    /// Two files have one name.
    #[error("file `{0}` is listed twice")]
    Repeated(String),
    /// A chunk is of a kind that there is not.
    #[error("a chunk of file `{name}` is of the unknown kind {kind}")]
    Kind {
        /// The file.
        name: String,
        /// What it says.
        kind: u8,
    },
    /// A file has not the chunks that its size needs.
    #[error("file `{name}` has {chunks} chunks, which is not what its size needs")]
    Chunks {
        /// The file.
        name: String,
        /// How many it has.
        chunks: usize,
    },
    /// A part is longer than its length can say.
    #[error("the manifest is too large")]
    TooLarge,
}

impl Manifest {
    /// The file of that name.
    pub fn file(&self, name: &str) -> Option<&Entry> {
        self.files.iter().find(|file| file.name == name)
    }

    /// Every stored chunk, as often as it is in a file.
    pub fn stored(&self) -> impl Iterator<Item = Hash> {
        self.files.iter().flat_map(|file| &file.chunks).filter_map(|chunk| match chunk {
            Chunk::Stored(hash) => Some(*hash),
            Chunk::Zero | Chunk::Base => None,
        })
    }

    /// The manifest's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        self.check()?;
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((CHUNK as u32).to_le_bytes());
        for count in [self.description.len(), self.files.len()] {
            bytes.extend(u32::try_from(count).map_err(|_| Error::TooLarge)?.to_le_bytes());
        }
        bytes.extend(&self.description);
        for file in &self.files {
            // Names were checked to be short.
            bytes.extend((file.name.len() as u16).to_le_bytes());
            bytes.extend(file.name.as_bytes());
            bytes.extend(file.size.to_le_bytes());
            for chunk in &file.chunks {
                match chunk {
                    Chunk::Zero => bytes.push(ZERO),
                    Chunk::Base => bytes.push(BASE),
                    Chunk::Stored(hash) => {
                        bytes.push(STORED);
                        bytes.extend(hash.0);
                    }
                }
            }
        }
        let digest: [u8; DIGEST] = Sha256::digest(&bytes).into();
        bytes.extend(digest);
        Ok(bytes)
    }

    /// The manifest that `bytes` encode. Whatever they are, it neither panics nor allocates more than some forty times
    /// their length.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.is_empty() {
            return Err(Error::Empty);
        }
        if !bytes.starts_with(&MAGIC[..bytes.len().min(MAGIC.len())]) {
            return Err(Error::Foreign);
        }
        if bytes.len() < FIXED + DIGEST {
            return Err(Error::Truncated(bytes.len()));
        }
        let (body, digest) = bytes.split_at(bytes.len() - DIGEST);
        let mut fields = Fields { rest: &body[MAGIC.len()..], len: bytes.len() };
        // A later version may be anything from here on.
        match fields.u32()? {
            VERSION => {}
            version => return Err(Error::Version(version)),
        }
        let (chunk, description, files) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if Sha256::digest(body)[..] != *digest {
            // What is cut off has no checksum at its end either, and is the commoner thing.
            return Err(if fields.is_cut_off(description, files) {
                Error::Truncated(bytes.len())
            } else {
                Error::Checksum
            });
        }
        if u64::from(chunk) != CHUNK {
            return Err(Error::ChunkSize(chunk));
        }
        let description = fields.take(description as usize)?.to_vec();
        let files = (0..files).map(|index| fields.file(index as usize)).collect::<Result<Vec<_>, _>>()?;
        if !fields.rest.is_empty() {
            return Err(Error::Trailing(fields.rest.len()));
        }
        let manifest = Self { description, files };
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), Error> {
        let mut names = HashSet::new();
        for (index, file) in self.files.iter().enumerate() {
            if !is_name(&file.name) {
                return Err(Error::Name(index));
            }
            if !names.insert(&file.name) {
                return Err(Error::Repeated(file.name.clone()));
            }
            if file.size.div_ceil(CHUNK) != file.chunks.len() as u64 {
                return Err(Error::Chunks { name: file.name.clone(), chunks: file.chunks.len() });
            }
        }
        Ok(())
    }
}

/// Whether it is always one harmless path component.
fn is_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_NAME).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(is_plain)
}

/// Reads fields one after the other.
struct Fields<'a> {
    rest: &'a [u8],
    /// Of all bytes.
    len: usize,
}

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Error::Truncated(self.len))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn file(&mut self, index: usize) -> Result<Entry, Error> {
        let len = u16::from_le_bytes(self.array()?);
        let name = std::str::from_utf8(self.take(usize::from(len))?).map_err(|_| Error::Name(index))?.to_owned();
        let size = u64::from_le_bytes(self.array()?);
        let count = usize::try_from(size.div_ceil(CHUNK)).map_err(|_| Error::TooLarge)?;
        if count > self.rest.len() {
            // Each takes a byte at least.
            return Err(Error::Truncated(self.len));
        }
        let mut chunks = Vec::with_capacity(count);
        for _ in 0..count {
            chunks.push(match self.array()? {
                [ZERO] => Chunk::Zero,
                [BASE] => Chunk::Base,
                [STORED] => Chunk::Stored(Hash(self.array()?)),
                [kind] => return Err(Error::Kind { name, kind }),
            });
        }
        Ok(Entry { name, size, chunks })
    }

    /// Whether what these bytes announce is more than there is, so that the end was lost.
    fn is_cut_off(&self, description: u32, files: u32) -> bool {
        let mut fields = Fields { rest: self.rest, len: self.len };
        let read = fields.take(description as usize).map(|_| ());
        let read = read.and_then(|()| (0..files as usize).try_for_each(|index| fields.file(index).map(drop)));
        matches!(read, Err(Error::Truncated(_)))
    }
}
