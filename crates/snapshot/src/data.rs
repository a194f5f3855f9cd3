//! The data file of a generation.
//!
//! | bytes | |
//! |---|---|
//! | 4096 | head: magic `WRENNGEN`, u32 version 1, u32 page size 4096, 16 id, u32 pages n, zeros, and in the last four bytes the CRC-32 of the rest |
//! | 4096 n | the pages |
//! | 4 n | the CRC-32 of each page |
//!
//! Pages begin page-aligned, so a reader can map them or copy whole runs. Every page has a checksum of its own, so what
//! is read is checked and nothing else has to be read for it: no state of what was checked before, and no page that is
//! checked once and then trusted for good. The checksums cost a thousandth of the space, 0.2 µs a page, and are read
//! whole when the file is opened. They need no checksum themselves: a wrong one makes its page wrong.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{Generation, Id, PAGE_SIZE};

const MAGIC: [u8; 8] = *b"WRENNGEN";
const VERSION: u32 = 1;
const CHECKSUM: usize = 4;
const PAGE: usize = PAGE_SIZE as usize;
/// What is read at once when everything is.
const BUFFER: usize = 1 << 20;

/// What is wrong with a generation's file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened.
    #[error("open {}", path.display())]
    Open {
        /// The data file.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file could not be read.
    #[error("read generation {id}")]
    Read {
        /// Whose file.
        id: Id,
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error("{} is no generation's data", .0.display())]
    Foreign(PathBuf),
    /// A later version of Wrenn wrote it.
    #[error("{} has version {version}; this program reads version {VERSION}", path.display())]
    Version {
        /// The data file.
        path: PathBuf,
        /// What it says.
        version: u32,
    },
    /// Some byte of the head is not what was written.
    #[error("the head of {} is damaged", .0.display())]
    Head(PathBuf),
    /// The file has not the length that its header knows.
    #[error("{} has {len} bytes in place of {expected}", path.display())]
    Length {
        /// The data file.
        path: PathBuf,
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        len: u64,
    },
    /// The file holds another generation than its name says.
    #[error("{} holds {found:?}", path.display())]
    Another {
        /// The data file.
        path: PathBuf,
        /// What it says it is.
        found: Generation,
    },
    /// A page is not what was written.
    #[error("page {page} of generation {id} is damaged")]
    Page {
        /// Whose file.
        id: Id,
        /// The page, counted in the file's data.
        page: u64,
    },
    /// Only whole pages of the data can be read and checked.
    #[error("{len} bytes at {offset} are not whole pages of generation {id}")]
    NotPages {
        /// Whose file.
        id: Id,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: usize,
    },
}

/// A generation's data, open for reading.
#[derive(Debug)]
pub struct DataFile {
    generation: Generation,
    file: File,
    /// As in the file.
    checksums: Box<[u8]>,
}

impl DataFile {
    /// Opens the file at `path`, which must be whole and hold `generation`. Its pages are not read.
    pub fn open(path: &Path, generation: Generation) -> Result<Self, Error> {
        let id = generation.id;
        let read = |source| Error::Read { id, source };
        let file = File::open(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
        let len = file.metadata().map_err(read)?.len();
        let mut head = [0; PAGE];
        // A file shorter than the head reads as one that ends in zeros, and is none.
        let there = usize::try_from(len).map_or(PAGE, |len| len.min(PAGE));
        file.read_exact_at(&mut head[..there], 0).map_err(read)?;
        let found = parse_head(&head, there, path)?;
        if found != generation {
            return Err(Error::Another { path: path.to_owned(), found });
        }
        let expected = file_len(generation.pages);
        if len != expected {
            return Err(Error::Length { path: path.to_owned(), expected, len });
        }
        let mut checksums = vec![0; generation.pages as usize * CHECKSUM].into_boxed_slice();
        file.read_exact_at(&mut checksums, offset_of(generation.pages)).map_err(read)?;
        Ok(Self { generation, file, checksums })
    }

    /// What of a file of `len` bytes is read when it is opened.
    pub fn read_at_open(len: u64) -> [Range<u64>; 2] {
        let pages = len.saturating_sub(PAGE_SIZE) / (PAGE_SIZE + CHECKSUM as u64);
        [0..PAGE_SIZE.min(len), (PAGE_SIZE + pages * PAGE_SIZE).min(len)..len]
    }

    /// Which generation, and how many pages.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The file, for reading or mapping. Its content never changes.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of the file up to the end of its pages: what a mapping of it has to span.
    pub fn data_end(&self) -> u64 {
        offset_of(self.generation.pages)
    }

    /// Whether `bytes`, whole pages found at `offset` of the file, are what was written.
    pub fn check(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let first = self.page_at(offset, bytes.len())?;
        for (page, content) in (first..).zip(bytes.chunks_exact(PAGE)) {
            let at = page as usize * CHECKSUM;
            if crc32fast::hash(content).to_le_bytes() != self.checksums[at..at + CHECKSUM] {
                return Err(Error::Page { id: self.generation.id, page });
            }
        }
        Ok(())
    }

    /// Reads whole pages from `offset` of the file and checks them.
    pub fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), Error> {
        self.page_at(offset, bytes.len())?;
        self.file.read_exact_at(bytes, offset).map_err(|source| Error::Read { id: self.generation.id, source })?;
        self.check(offset, bytes)
    }

    /// Whether a page of the data is that, byte for byte. Its checksum says most noes without reading it; what cannot be
    /// read is a no too.
    pub(crate) fn is_page(&self, page: u32, content: &[u8]) -> bool {
        let at = page as usize * CHECKSUM;
        let mut there = [0; PAGE];
        self.checksums.get(at..at + CHECKSUM).is_some_and(|sum| sum == crc32fast::hash(content).to_le_bytes())
            && self.file.read_exact_at(&mut there, offset_of(page)).is_ok()
            && there == content
    }

    /// Reads and checks every page.
    pub fn verify(&self) -> Result<(), Error> {
        let mut buffer = vec![0; BUFFER];
        let mut offset = offset_of(0);
        while offset < self.data_end() {
            let rest = usize::try_from(self.data_end() - offset).unwrap_or(usize::MAX);
            let part = &mut buffer[..BUFFER.min(rest)];
            self.read_exact_at(part, offset)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// The page at an offset of the file, if `len` bytes from there are pages of the data.
    fn page_at(&self, offset: u64, len: usize) -> Result<u64, Error> {
        let is_in_data = offset >= PAGE_SIZE
            && offset.is_multiple_of(PAGE_SIZE)
            && len.is_multiple_of(PAGE)
            && offset.checked_add(len as u64).is_some_and(|end| end <= self.data_end());
        if is_in_data {
            Ok(offset / PAGE_SIZE - 1)
        } else {
            Err(Error::NotPages { id: self.generation.id, offset, len })
        }
    }
}

/// Where in the file a page of the data is, in bytes.
pub(crate) fn offset_of(page: u32) -> u64 {
    (u64::from(page) + 1) * PAGE_SIZE
}

/// Bytes of a whole file with so many pages.
pub(crate) fn file_len(pages: u32) -> u64 {
    offset_of(pages) + u64::from(pages) * CHECKSUM as u64
}

pub(crate) fn encode_head(generation: Generation) -> [u8; PAGE] {
    let mut head = [0; PAGE];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head[12..16].copy_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
    head[16..32].copy_from_slice(&generation.id.0);
    head[32..36].copy_from_slice(&generation.pages.to_le_bytes());
    let checksum = crc32fast::hash(&head[..PAGE - CHECKSUM]);
    head[PAGE - CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
    head
}

/// What a head says; `there` bytes of it are from the file.
fn parse_head(head: &[u8; PAGE], there: usize, path: &Path) -> Result<Generation, Error> {
    if there < MAGIC.len() || head[..8] != MAGIC {
        return Err(Error::Foreign(path.to_owned()));
    }
    let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    match u32_at(8) {
        VERSION => {}
        version if there >= 12 => return Err(Error::Version { path: path.to_owned(), version }),
        _ => return Err(Error::Head(path.to_owned())),
    }
    let mut id = Id([0; 16]);
    id.0.copy_from_slice(&head[16..32]);
    let generation = Generation { id, pages: u32_at(32) };
    if head[..] != encode_head(generation)[..] { Err(Error::Head(path.to_owned())) } else { Ok(generation) }
}
