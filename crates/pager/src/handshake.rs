//! What a VMM says when it hands its memory over. Pure.
//!
//! Firecracker's handshake is one JSON array with an element per memory region, sent with the userfaultfd. The sender is
//! not trusted: whatever it says is checked here, before any of it is used as an address.

use serde::Deserialize;

use crate::{HUGE_PAGE, PAGE};

/// More regions than any VMM has; each costs a look-up per fault.
pub const MAX_REGIONS: usize = 1024;

/// More bytes than that many regions need.
pub const MAX_BYTES: usize = 256 << 10;

/// Why a handshake is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More of it may follow.
    #[error("the handshake is cut off")]
    Incomplete,
    /// It goes on for ever.
    #[error("the handshake has more than {MAX_BYTES} bytes")]
    TooLong,
    /// It is not the JSON it should be.
    #[error("understand the handshake")]
    Json(#[source] serde_json::Error),
    /// An empty list.
    #[error("the handshake names no memory region")]
    NoRegions,
    /// A list that is too long.
    #[error("the handshake names {0} memory regions; {MAX_REGIONS} are the most")]
    TooManyRegions(usize),
    /// A page size that no memory has.
    #[error("region {index} has pages of {size:?} bytes; {PAGE} and {HUGE_PAGE} are supported")]
    PageSize {
        /// Place in the list.
        index: usize,
        /// Bytes, as far as it was said.
        size: Option<u64>,
    },
    /// A region without a byte.
    #[error("region {0} is empty")]
    Empty(usize),
    /// Not at a page border.
    #[error("region {0} does not begin and end at page borders")]
    Unaligned(usize),
    /// Beyond what 64 bits count.
    #[error("region {0} has no end")]
    Endless(usize),
    /// Two regions at one address.
    #[error("two regions have the address {0:#x}")]
    SameAddress(u64),
    /// Two regions with one place of the memory.
    #[error("two regions have the memory at {0:#x}")]
    SameMemory(u64),
    /// Memory that the snapshot does not have.
    #[error("a region ends at {end:#x} of a memory of {memory_size:#x} bytes")]
    BeyondMemory {
        /// Where the region ends.
        end: u64,
        /// Bytes of the snapshot's memory.
        memory_size: u64,
    },
}

/// A part of guest memory as the VMM has mapped it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address of its first byte in the VMM.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Where it is in guest memory as snapshots count it, in bytes.
    pub offset: u64,
    /// Bytes of one page: [`PAGE`] or [`HUGE_PAGE`].
    pub page_size: u64,
}

/// The regions of one VMM: at least one, aligned, disjoint both in addresses and in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    /// By address.
    regions: Vec<Region>,
}

/// As it is sent. Fields of later versions are ignored.
#[derive(Deserialize)]
struct Wire {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// The name in use until Firecracker 1.12. It was always bytes.
    page_size_kib: Option<u64>,
}

/// Reads a handshake. [`Error::Incomplete`] when it is the beginning of one.
pub fn parse(bytes: &[u8]) -> Result<Regions, Error> {
    let wire: Vec<Wire> =
        serde_json::from_slice(bytes).map_err(|e| if e.is_eof() { Error::Incomplete } else { Error::Json(e) })?;
    if wire.len() > MAX_REGIONS {
        return Err(Error::TooManyRegions(wire.len()));
    }
    let regions = wire.iter().enumerate().map(|(index, wire)| region(index, wire));
    let mut regions = regions.collect::<Result<Vec<_>, _>>()?;
    regions.sort_unstable_by_key(|region| region.offset);
    if let Some(pair) = regions.windows(2).find(|pair| pair[0].offset + pair[0].size > pair[1].offset) {
        return Err(Error::SameMemory(pair[1].offset));
    }
    regions.sort_unstable_by_key(|region| region.base);
    if let Some(pair) = regions.windows(2).find(|pair| pair[0].base + pair[0].size > pair[1].base) {
        return Err(Error::SameAddress(pair[1].base));
    }
    if regions.is_empty() { Err(Error::NoRegions) } else { Ok(Regions { regions }) }
}

fn region(index: usize, wire: &Wire) -> Result<Region, Error> {
    let size = wire.page_size.or(wire.page_size_kib);
    let page_size = size.filter(|size| matches!(*size, PAGE | HUGE_PAGE)).ok_or(Error::PageSize { index, size })?;
    let Wire { base_host_virt_addr: base, size, offset, .. } = *wire;
    if size == 0 {
        return Err(Error::Empty(index));
    }
    if [base, size, offset].iter().any(|number| !number.is_multiple_of(page_size)) {
        return Err(Error::Unaligned(index));
    }
    if base.checked_add(size).is_none() || offset.checked_add(size).is_none() {
        return Err(Error::Endless(index));
    }
    Ok(Region { base, size, offset, page_size })
}

impl Region {
    /// Where in the VMM a place of its memory is.
    pub fn address(&self, offset: u64) -> u64 {
        self.base + (offset - self.offset)
    }
}

impl Regions {
    /// Checks that a memory of so many bytes has all of them.
    pub fn fit(&self, memory_size: u64) -> Result<(), Error> {
        match self.regions.iter().map(|region| region.offset + region.size).max() {
            Some(end) if end > memory_size => Err(Error::BeyondMemory { end, memory_size }),
            _ => Ok(()),
        }
    }

    /// The region with an address of the VMM.
    pub fn at_address(&self, address: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.base <= address);
        let region = &self.regions[after.checked_sub(1)?];
        (address - region.base < region.size).then_some(region)
    }

    /// The region with a place of the memory.
    pub fn at_offset(&self, offset: u64) -> Option<&Region> {
        self.iter().find(|region| offset.checked_sub(region.offset).is_some_and(|within| within < region.size))
    }

    /// All of them, by address.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }
}

#[cfg(test)]
mod tests;
