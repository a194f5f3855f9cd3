//! From the file that the VMM wrote at a pause to a generation.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::Error;
use super::write::Writer;
use crate::data::DataFile;
use crate::mapping::{Extent, Source};
use crate::merge::Written;
use crate::{Generation, Header, PAGE_SIZE};

const PAGE: usize = PAGE_SIZE as usize;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// What the memory was before, as far as it can be read.
pub(super) struct Before<'a> {
    header: &'a Header,
    /// In the header's order; of one that cannot be opened nothing is known.
    files: Vec<Option<DataFile>>,
}

impl<'a> Before<'a> {
    /// Opens what `header` refers to, in the directory `generations`.
    pub(super) fn open(generations: &Path, header: &'a Header) -> Self {
        let open = |of: &Generation| DataFile::open(&generations.join(of.id.to_string()), *of).ok();
        Self { header, files: header.generations().iter().map(open).collect() }
    }

    /// Whether a page is stored as that already. One that cannot be read is not, so that it is written again.
    fn has(&self, page: u32, content: &[u8]) -> bool {
        match self.header.mapping().lookup(page) {
            Some(Extent { source: Source::Stored { generation, page }, .. }) => {
                self.files[usize::from(generation)].as_ref().is_some_and(|file| file.is_page(page, content))
            }
            Some(Extent { source: Source::Zero, .. }) | None => false,
        }
    }
}

/// Pages of the memory that `diff` is of.
///
/// Refuses a file in which a hole could not be told from written zeros: with blocks larger than a page (a tmpfs of huge
/// pages) what was never written comes out as zeros beside what was.
pub(super) fn memory_pages(diff: &File) -> Result<u32, Error> {
    let metadata = diff.metadata().map_err(Error::Diff)?;
    if metadata.blksize() > PAGE_SIZE {
        return Err(Error::CoarseDiff(metadata.blksize()));
    }
    let len = metadata.len();
    match u32::try_from(len / PAGE_SIZE) {
        Ok(pages) if pages > 0 && len.is_multiple_of(PAGE_SIZE) => Ok(pages),
        _ => Err(Error::DiffLength(len)),
    }
}

/// Writes the pages of `diff` that are data, not zeros, and not what they were `before`. Says what every page that is another
/// now came to.
pub(super) fn pack(
    diff: &File,
    pages: u32,
    before: Option<&Before<'_>>,
    writer: &mut Writer,
) -> Result<Vec<Written>, Error> {
    let mut written = Vec::new();
    let mut at = 0;
    while let Some(data) = next_data(diff, at, pages)? {
        pack_run(diff, data.clone(), before, writer, &mut written)?;
        at = data.end;
    }
    Ok(written)
}

/// The first run of pages at or after `at` that has data.
fn next_data(diff: &File, at: u32, pages: u32) -> Result<Option<Range<u32>>, Error> {
    let failed = |error: Errno| Error::Diff(error.into());
    if at >= pages {
        return Ok(None);
    }
    let start = match rustix::fs::seek(diff, SeekFrom::Data(u64::from(at) * PAGE_SIZE)) {
        // Only a hole is left.
        Err(Errno::NXIO) => return Ok(None),
        start => start.map_err(failed)?,
    };
    let end = rustix::fs::seek(diff, SeekFrom::Hole(start)).map_err(failed)?;
    // Neither is beyond the end of the file unless it grew, and what grew is no part of it.
    let page = |offset: u64| u32::try_from(offset).unwrap_or(pages).min(pages);
    let (start, end) = (page(start / PAGE_SIZE), page(end.div_ceil(PAGE_SIZE)));
    Ok((start < end).then_some(start.max(at)..end))
}

fn pack_run(
    diff: &File,
    run: Range<u32>,
    before: Option<&Before<'_>>,
    writer: &mut Writer,
    written: &mut Vec<Written>,
) -> Result<(), Error> {
    let mut at = run.start;
    while at < run.end {
        let first = writer.pages();
        let room = writer.room(u64::from(run.end - at) * PAGE_SIZE)?;
        diff.read_exact_at(room, u64::from(at) * PAGE_SIZE).map_err(Error::Diff)?;
        let mut kept = 0;
        for read in 0..room.len() / PAGE {
            let content = read * PAGE..(read + 1) * PAGE;
            // Compared as a whole, which is memcmp: as fast as memory is read, and done at the first other byte.
            let is_zero = room[content.clone()] == ZEROS;
            // A VMM may report more than was written: KVM takes a page that was only read after a restore for one. And guests
            // write what is there already.
            let is_same = !is_zero && before.is_some_and(|before| before.has(at, &room[content.clone()]));
            if !is_same {
                if !is_zero {
                    if kept != read {
                        room.copy_within(content, kept * PAGE);
                    }
                    kept += 1;
                }
                note(written, at, (!is_zero).then(|| first + kept as u32 - 1));
            }
            at += 1;
        }
        writer.accept(kept);
    }
    Ok(())
}

/// Adds a page to the runs, to the last of them where it continues it.
fn note(written: &mut Vec<Written>, page: u32, stored: Option<u32>) {
    if let Some(last) = written.last_mut()
        && last.page + last.pages == page
        && last.stored.map(|stored| stored + last.pages) == stored
    {
        last.pages += 1;
    } else {
        written.push(Written { page, pages: 1, stored });
    }
}
