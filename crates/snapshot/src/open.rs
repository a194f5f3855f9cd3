//! A snapshot that is open for reading.

use std::io;
use std::path::{Path, PathBuf};

use crate::data::{self, DataFile, offset_of};
use crate::header::{self, Header};
use crate::mapping::Source;
use crate::{Id, PAGE_SIZE};

/// Why a snapshot cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The header's file could not be read.
    #[error("read the header {}", path.display())]
    ReadHeader {
        /// The header's file.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The header's file is no whole header of ours.
    #[error("understand the header {}", path.display())]
    Header {
        /// The header's file.
        path: PathBuf,
        #[source]
        source: header::Error,
    },
    /// A generation is missing, damaged or unreadable.
    #[error("use a generation of the snapshot")]
    Generation(#[from] data::Error),
    /// Only whole pages within the memory can be read.
    #[error("{len} bytes at {offset} are not whole pages of a memory of {memory_size} bytes")]
    NotPages {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// Bytes of the memory.
        memory_size: u64,
    },
}

/// A snapshot's memory, readable at any place with one look-up. Shared between threads as it is.
///
/// It keeps every data file open, so what it reads stays readable when the snapshot is merged or removed.
#[derive(Debug)]
pub struct Snapshot {
    header: Header,
    /// In the header's order.
    files: Vec<DataFile>,
}

/// Bytes of guest memory that follow each other and come from one place.
#[derive(Debug)]
pub struct Run<'a> {
    /// How many bytes; never 0.
    pub len: u64,
    /// What they are.
    pub content: Content<'a>,
}

/// What is at a place of the memory.
#[derive(Debug)]
pub enum Content<'a> {
    /// Zeros.
    Zero,
    /// Bytes of a file. Who reads them elsewhere than through [`Snapshot::read_exact_at`] checks them with
    /// [`DataFile::check`].
    Stored {
        /// The file they are in.
        data: &'a DataFile,
        /// The index of that file in [`Snapshot::files`].
        index: usize,
        /// Where in [`DataFile::file`] they begin, in bytes.
        offset: u64,
    },
}

impl Snapshot {
    /// Opens the snapshot of the header at `header`, with generations in the directory `generations`
    /// ([`Store::generations`](crate::Store::generations)). Heads and lengths of every file are checked; pages are when
    /// they are read.
    ///
    /// Needs no [`Store`](crate::Store), so another process than the one that owns the store may do it; should a merge
    /// replace the header and free its generations meanwhile, the new one is opened.
    pub fn open(generations: &Path, header: &Path) -> Result<Self, Error> {
        let mut current = read_header(header)?;
        loop {
            let error = match Self::with_header(generations, current.clone()) {
                Ok(snapshot) => return Ok(snapshot),
                Err(error) => error,
            };
            let now = read_header(header)?;
            if now == current {
                return Err(error.into());
            }
            current = now;
        }
    }

    pub(crate) fn with_header(generations: &Path, header: Header) -> Result<Self, data::Error> {
        let files = header
            .generations()
            .iter()
            .map(|generation| DataFile::open(&generations.join(generation.id.to_string()), *generation));
        Ok(Self { files: files.collect::<Result<_, _>>()?, header })
    }

    /// Names this content of memory.
    pub fn id(&self) -> Id {
        self.header.id()
    }

    /// The header it was opened with.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Guest memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.header.memory_size()
    }

    /// Bytes of the smallest part that has its own place, [`PAGE_SIZE`]: runs begin and end at multiples of it.
    pub fn page_size(&self) -> u64 {
        PAGE_SIZE
    }

    /// The data files, in the order that [`Content::Stored::index`] counts.
    pub fn files(&self) -> &[DataFile] {
        &self.files
    }

    /// What is at `offset` of the memory, and for how long that goes on; `None` beyond its end.
    pub fn lookup(&self, offset: u64) -> Option<Run<'_>> {
        let (page, within) = (u32::try_from(offset / PAGE_SIZE).ok()?, offset % PAGE_SIZE);
        let extent = self.header.mapping().lookup(page)?;
        let content = match extent.source {
            Source::Zero => Content::Zero,
            Source::Stored { generation, page } => {
                let index = usize::from(generation);
                Content::Stored { data: &self.files[index], index, offset: offset_of(page) + within }
            }
        };
        Some(Run { len: u64::from(extent.pages) * PAGE_SIZE - within, content })
    }

    /// Reads whole pages from `offset` of the memory, from as many runs as they are in, and checks them.
    pub fn read_exact_at(&self, mut bytes: &mut [u8], mut offset: u64) -> Result<(), Error> {
        let (memory_size, len) = (self.memory_size(), bytes.len());
        let is_pages = offset.is_multiple_of(PAGE_SIZE) && (len as u64).is_multiple_of(PAGE_SIZE);
        if !is_pages || offset.checked_add(len as u64).is_none_or(|end| end > memory_size) {
            return Err(Error::NotPages { offset, len, memory_size });
        }
        while !bytes.is_empty() {
            let run = self.lookup(offset).ok_or(Error::NotPages { offset, len, memory_size })?;
            let (part, rest) = bytes.split_at_mut(bytes.len().min(usize::try_from(run.len).unwrap_or(usize::MAX)));
            match run.content {
                Content::Zero => part.fill(0),
                Content::Stored { data, offset, .. } => data.read_exact_at(part, offset)?,
            }
            offset += part.len() as u64;
            bytes = rest;
        }
        Ok(())
    }
}

pub(crate) fn read_header(path: &Path) -> Result<Header, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::ReadHeader { path: path.to_owned(), source })?;
    Header::decode(&bytes).map_err(|source| Error::Header { path: path.to_owned(), source })
}
