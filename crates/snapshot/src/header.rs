//! The header of a snapshot, and its bytes. Pure.
//!
//! All little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 8 | magic, `WRENNMEM` |
//! | 4 | version, 1 |
//! | 4 | page size, 4096 |
//! | 16 | id of the snapshot |
//! | 4 | pages of memory |
//! | 4 | generations, g |
//! | 4 | extents, n |
//! | 4 | 0 |
//! | 24 g | each generation: 16 id, 4 pages of data, 4 zeros |
//! | 12 n | each extent: 4 pages, 4 first page of data, 2 index of the generation (65535: zeros, and the first page is 0), 2 zeros |
//! | 4 | CRC-32 of all before |
//!
//! An extent says how long it is and not where it begins, so extents cannot overlap or leave something out; that they
//! end where memory does is checked. There is one encoding of a header: two extents that continue each other are an
//! error.

#[cfg(test)]
mod tests;

use std::collections::HashSet;

use crate::mapping::{self, Extent, Mapping, Source};
use crate::{Id, PAGE_SIZE};

const MAGIC: [u8; 8] = *b"WRENNMEM";
const VERSION: u32 = 1;
const FIXED: usize = 48;
const GENERATION: usize = 24;
const EXTENT: usize = 12;
const CHECKSUM: usize = 4;
/// In place of a generation's index.
const ZERO: u16 = u16::MAX;

/// A generation that a header refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Its name.
    pub id: Id,
    /// Pages of its data; never 0.
    pub pages: u32,
}

/// Where every page of a snapshot's memory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    id: Id,
    generations: Vec<Generation>,
    mapping: Mapping,
}

/// Why bytes or parts are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There are no bytes.
    #[error("the header is empty")]
    Empty,
    /// It does not begin as a header does.
    #[error("this is no snapshot header")]
    Foreign,
    /// A later version of Wrenn wrote it.
    #[error("the header has version {0}; this program reads version {VERSION}")]
    Version(u32),
    /// The bytes end too early.
    #[error("the header is cut off: {len} of {expected} bytes")]
    Truncated {
        /// How many there should be, at least.
        expected: usize,
        /// How many there are.
        len: usize,
    },
    /// There are more bytes than it says.
    #[error("the header has {len} bytes in place of {expected}")]
    Trailing {
        /// How many there should be.
        expected: usize,
        /// How many there are.
        len: usize,
    },
    /// Some byte is not what was written.
    #[error("the header's checksum is wrong")]
    Checksum,
    /// Pages of another size than ours.
    #[error("pages of {0} bytes are not supported")]
    PageSize(u32),
    /// A field that has no meaning yet is not zero.
    #[error("a reserved field is not zero")]
    Reserved,
    /// A generation has no pages.
    #[error("generation {0} is empty")]
    EmptyGeneration(usize),
    /// A generation is listed twice.
    #[error("generation {0} is listed twice")]
    RepeatedGeneration(usize),
    /// More generations than an extent can name.
    #[error("{0} generations are too many")]
    TooManyGenerations(usize),
    /// The extents are no mapping.
    #[error("map the memory")]
    Mapping(#[from] mapping::Error),
    /// The extents are not in the one form that a mapping is written in.
    #[error("extents that belong together are separate")]
    NotNormal,
    /// The extents leave the end of memory out, or go beyond it.
    #[error("the extents cover {covered} pages of a memory of {pages}")]
    Uncovered {
        /// Pages that the extents have.
        covered: u32,
        /// Pages of memory.
        pages: u32,
    },
    /// An extent refers to a generation that is not listed.
    #[error("an extent refers to generation {0}, which is not listed")]
    UnknownGeneration(u16),
    /// An extent refers to pages that its generation does not have.
    #[error("an extent ends at page {end} of generation {generation}, which has {pages}")]
    BeyondGeneration {
        /// Index of the generation.
        generation: u16,
        /// Where the extent ends.
        end: u32,
        /// What the generation has.
        pages: u32,
    },
}

impl Header {
    /// The header of a memory. Every extent must lie within its generation.
    pub fn new(id: Id, generations: Vec<Generation>, mapping: Mapping) -> Result<Self, Error> {
        if generations.len() >= usize::from(ZERO) {
            return Err(Error::TooManyGenerations(generations.len()));
        }
        let mut seen = HashSet::new();
        for (index, generation) in generations.iter().enumerate() {
            if generation.pages == 0 {
                return Err(Error::EmptyGeneration(index));
            }
            if !seen.insert(generation.id) {
                return Err(Error::RepeatedGeneration(index));
            }
        }
        for extent in mapping.extents() {
            let Source::Stored { generation, page } = extent.source else { continue };
            let Generation { pages, .. } =
                *generations.get(usize::from(generation)).ok_or(Error::UnknownGeneration(generation))?;
            // Mapping::new checked that this does not overflow.
            let end = page.saturating_add(extent.pages);
            if end > pages {
                return Err(Error::BeyondGeneration { generation, end, pages });
            }
        }
        Ok(Self { id, generations, mapping })
    }

    /// Names the content of memory. Every pause makes a new one; a merge, which moves pages and changes none, keeps it.
    pub fn id(&self) -> Id {
        self.id
    }

    /// The generations that the mapping refers to by index.
    pub fn generations(&self) -> &[Generation] {
        &self.generations
    }

    /// Where each page is.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Guest memory in bytes.
    pub fn memory_size(&self) -> u64 {
        u64::from(self.mapping.pages()) * PAGE_SIZE
    }

    /// The header's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (generations, extents) = (self.generations.len(), self.mapping.extent_count());
        let mut bytes = Vec::with_capacity(encoded_len(generations, extents).unwrap_or_default());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((PAGE_SIZE as u32).to_le_bytes());
        bytes.extend(self.id.0);
        // Neither is more than 32 bits count: extents are not more than pages.
        for count in [self.mapping.pages(), generations as u32, extents as u32, 0] {
            bytes.extend(count.to_le_bytes());
        }
        for generation in &self.generations {
            bytes.extend(generation.id.0);
            bytes.extend(generation.pages.to_le_bytes());
            bytes.extend([0; 4]);
        }
        for extent in self.mapping.extents() {
            let (generation, page) = match extent.source {
                Source::Zero => (ZERO, 0),
                Source::Stored { generation, page } => (generation, page),
            };
            bytes.extend(extent.pages.to_le_bytes());
            bytes.extend(page.to_le_bytes());
            bytes.extend(generation.to_le_bytes());
            bytes.extend([0; 2]);
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// The header that `bytes` encode. Whatever they are, it neither panics nor allocates more than a few times their
    /// length.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let len = bytes.len();
        if len == 0 {
            return Err(Error::Empty);
        }
        if !bytes.starts_with(&MAGIC[..len.min(MAGIC.len())]) {
            return Err(Error::Foreign);
        }
        let mut fields = Fields(bytes.get(MAGIC.len()..FIXED).ok_or(Error::Truncated { expected: FIXED, len })?);
        // A later version may be anything from here on.
        match fields.u32() {
            VERSION => {}
            version => return Err(Error::Version(version)),
        }
        let page_size = fields.u32();
        let id = Id(fields.array());
        let [pages, generations, extents, reserved] = [fields.u32(), fields.u32(), fields.u32(), fields.u32()];
        let expected = encoded_len(generations as usize, extents as usize).unwrap_or(usize::MAX);
        if len < expected {
            return Err(Error::Truncated { expected, len });
        }
        if len > expected {
            return Err(Error::Trailing { expected, len });
        }
        let (body, checksum) = bytes.split_at(len - CHECKSUM);
        if crc32fast::hash(body) != Fields(checksum).u32() {
            return Err(Error::Checksum);
        }
        if u64::from(page_size) != PAGE_SIZE {
            return Err(Error::PageSize(page_size));
        }
        let (generations, extents) = body[FIXED..].split_at(generations as usize * GENERATION);
        let generations: Vec<_> = generations.chunks_exact(GENERATION).map(generation).collect::<Result<_, _>>()?;
        let extents: Vec<_> = extents.chunks_exact(EXTENT).map(extent).collect::<Result<_, _>>()?;
        if reserved != 0 {
            return Err(Error::Reserved);
        }
        let count = extents.len();
        let mapping = Mapping::new(extents)?;
        if mapping.extent_count() != count {
            return Err(Error::NotNormal);
        }
        if mapping.pages() != pages {
            return Err(Error::Uncovered { covered: mapping.pages(), pages });
        }
        Self::new(id, generations, mapping)
    }
}

fn encoded_len(generations: usize, extents: usize) -> Option<usize> {
    let extents = extents.checked_mul(EXTENT)?.checked_add(FIXED + CHECKSUM)?;
    generations.checked_mul(GENERATION)?.checked_add(extents)
}

fn generation(bytes: &[u8]) -> Result<Generation, Error> {
    let mut fields = Fields(bytes);
    let generation = Generation { id: Id(fields.array()), pages: fields.u32() };
    if fields.u32() != 0 { Err(Error::Reserved) } else { Ok(generation) }
}

fn extent(bytes: &[u8]) -> Result<Extent, Error> {
    let mut fields = Fields(bytes);
    let (pages, page, generation) = (fields.u32(), fields.u32(), u16::from_le_bytes(fields.array()));
    let source = match generation {
        ZERO if page != 0 => return Err(Error::Reserved),
        ZERO => Source::Zero,
        generation => Source::Stored { generation, page },
    };
    if fields.array() != [0; 2] { Err(Error::Reserved) } else { Ok(Extent { pages, source }) }
}

/// Reads fields one after the other from bytes that are known to be enough.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the length was checked");
        self.0 = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
}
