//! Which pages of guest memory were written, from the marks in QEMU's page table.
//!
//! The plugin write-protected every page asynchronously: a write clears a page's mark and goes on. PAGEMAP_SCAN finds
//! pages without the mark and sets it again, in one step per page, so nothing is missed while the guest runs.
//!
//! A page that the balloon gives back keeps its mark if it had one: nobody wrote it, and what a Diff leaves in its place
//! is as good as anything for a page the guest does not own.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::ioctl::{Updater, opcode};

use crate::memory::Mapped;

/// Why the written pages could not be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open QEMU's page map")]
    Open(#[source] io::Error),
    #[error("cannot scan QEMU's page map")]
    Scan(#[source] io::Error),
}

/// The tracker of one microVM.
pub struct Tracker {
    pagemap: File,
    mapped: Mapped,
    size: u64,
    /// Written pages whose marks were set again but which no snapshot has saved yet.
    pending: Vec<Range<u64>>,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: u32 = opcode::read_write::<ScanArg>(b'f', 16);
const SCAN_WP_MATCHING: u64 = 1 << 0;
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// Runs found per call.
const REGIONS: usize = 4096;

impl Tracker {
    /// Tracks the `size` bytes of guest memory that QEMU has mapped and the plugin has marked.
    pub fn new(mapped: Mapped, size: u64) -> Result<Self, Error> {
        let pagemap = File::open(format!("/proc/{}/pagemap", mapped.pid)).map_err(Error::Open)?;
        Ok(Self { pagemap, mapped, size, pending: Vec::new() })
    }

    /// The parts of memory written since the last [`saved`](Self::saved), in order. The marks are set again, so the
    /// guest must be stopped from here until they are saved.
    pub fn written(&mut self) -> Result<Vec<Range<u64>>, Error> {
        // Written and present, or written and in swap.
        self.scan(0, PAGE_IS_WRITTEN)?;
        // Neither a page nor a mark: written, then unmapped by reclaim. A mark without a page counts as swapped.
        self.scan(PAGE_IS_PRESENT | PAGE_IS_SWAPPED, PAGE_IS_PRESENT | PAGE_IS_SWAPPED)?;
        self.pending = union(std::mem::take(&mut self.pending));
        Ok(self.pending.clone())
    }

    /// What [`written`](Self::written) returned is in a snapshot.
    pub fn saved(&mut self) {
        self.pending.clear();
    }

    fn scan(&mut self, category_inverted: u64, category_mask: u64) -> Result<(), Error> {
        let end = self.mapped.base + self.size;
        let mut regions = [PageRegion::default(); REGIONS];
        let mut start = self.mapped.base;
        while start < end {
            let mut request = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
                start,
                end,
                vec: regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: REGIONS as u64,
                category_inverted,
                category_mask,
                return_mask: category_mask,
                ..ScanArg::default()
            };
            let found = self.call(&mut request)?;
            let base = self.mapped.base;
            self.pending.extend(regions[..found].iter().map(|region| region.start - base..region.end - base));
            if request.walk_end <= start {
                return Err(Error::Scan(io::Error::other("the scan does not advance")));
            }
            start = request.walk_end;
        }
        Ok(())
    }

    fn call(&self, request: &mut ScanArg) -> Result<usize, Error> {
        // SAFETY: the kernel reads one `pm_scan_arg`, writes its `walk_end` and at most `vec_len` regions to `vec`,
        // which points to that many; it touches no memory of ours otherwise.
        unsafe { rustix::ioctl::ioctl(&self.pagemap, Scan(Updater::new(request))) }.map_err(|e| Error::Scan(e.into()))
    }
}

/// PAGEMAP_SCAN also returns a count, which rustix's own pattern drops.
struct Scan<'a>(Updater<'a, PAGEMAP_SCAN, ScanArg>);

// SAFETY: opcode and argument are those of the wrapped pattern; only the result is read differently.
unsafe impl rustix::ioctl::Ioctl for Scan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> u32 {
        self.0.opcode()
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        self.0.as_ptr()
    }

    unsafe fn output_from_ptr(found: i32, _: *mut std::ffi::c_void) -> rustix::io::Result<usize> {
        Ok(usize::try_from(found).unwrap_or_default())
    }
}

/// Sorts ranges and joins those that touch or overlap.
fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests;
