//! What a header becomes by a pause or a merge. Pure.

#[cfg(test)]
mod tests;

use crate::header::{self, Generation, Header};
use crate::mapping::{self, Extent, Mapping, Source};
use crate::{Id, PAGE_SIZE};

/// With so many generations a header is to be merged: each costs every reader an open file.
pub const MERGE_AT: usize = 8;

/// A run of pages that the guest wrote since the snapshot it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The first page.
    pub page: u32,
    /// How many; never 0.
    pub pages: u32,
    /// The first page in the new generation's data; `None` when they are zeros now.
    pub stored: Option<u32>,
}

/// A run of stored pages that a merge copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Index of the generation in the old header.
    pub generation: u16,
    /// First page in its data.
    pub page: u32,
    /// How many.
    pub pages: u32,
}

/// Why a header cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The memory has not the size that its parent has.
    #[error("a memory of {memory} bytes cannot follow one of {parent}")]
    MemorySize {
        /// Bytes of this memory.
        memory: u64,
        /// Bytes of the parent's.
        parent: u64,
    },
    /// Written runs must be in order, apart, and in the memory.
    #[error("written run {0} is not after the one before, or not in the memory")]
    Order(usize),
    /// The extents that came out are no mapping.
    #[error("map the memory")]
    Mapping(#[from] mapping::Error),
    /// The parts that came out are no header.
    #[error("make the header")]
    Header(#[from] header::Error),
}

/// The header of a memory of `pages` in which `written` lies over `parent`, or over zeros. What was written is in
/// `generation`, the rest is where it was. Generations that no page is in any more are left out.
pub fn overlay(
    id: Id,
    pages: u32,
    parent: Option<&Header>,
    written: &[Written],
    generation: Generation,
) -> Result<Header, Error> {
    let zeros;
    let (below, mut generations) = match parent {
        Some(parent) if parent.mapping().pages() != pages => {
            let memory = u64::from(pages) * PAGE_SIZE;
            return Err(Error::MemorySize { memory, parent: parent.memory_size() });
        }
        Some(parent) => (parent.mapping(), parent.generations().to_vec()),
        None => {
            zeros = Mapping::new([Extent { pages, source: Source::Zero }])?;
            (&zeros, Vec::new())
        }
    };
    let new = index(generations.len())?;
    let mut extents = Vec::with_capacity(below.extent_count() + written.len());
    let mut at = 0;
    for (number, run) in written.iter().enumerate() {
        let end = run.page.checked_add(run.pages).filter(|end| *end <= pages && run.page >= at);
        let end = end.ok_or(Error::Order(number))?;
        extents.extend(below.extents_in(at..run.page));
        let source = run.stored.map_or(Source::Zero, |page| Source::Stored { generation: new, page });
        extents.push(Extent { pages: run.pages, source });
        at = end;
    }
    extents.extend(below.extents_in(at..pages));
    generations.push(generation);
    used_only(id, &generations, extents)
}

/// Whether `header` is to be merged.
pub fn is_due(header: &Header) -> bool {
    header.generations().len() >= MERGE_AT
}

/// How to merge: what to copy, in this order and back to back, into a new generation, and how to read it then.
#[derive(Debug)]
pub struct Fold {
    /// In the order of guest memory.
    pub copied: Vec<Copied>,
    /// Pages of all that is copied.
    pub pages: u32,
    /// By index in the old header: whether the generation is folded.
    folded: Vec<bool>,
}

/// What of `header` to merge: all generations but at most one. That one stays when rewriting it would more than double
/// the work, and at least half of it is still in use: a capsule's merges then cost what it writes and not what its
/// template holds, and the template's pages stay shared.
pub fn fold(header: &Header) -> Result<Fold, Error> {
    let mut used = vec![0_u64; header.generations().len()];
    for extent in header.mapping().extents() {
        if let Source::Stored { generation, .. } = extent.source {
            used[usize::from(generation)] += u64::from(extent.pages);
        }
    }
    let all: u64 = used.iter().sum();
    let stays = |(used, generation): (&u64, &Generation)| *used > all - used && used * 2 >= u64::from(generation.pages);
    let folded: Vec<bool> = used.iter().zip(header.generations()).map(|of| !stays(of)).collect();
    let mut pages = 0_u32;
    let mut copied = Vec::new();
    for extent in header.mapping().extents() {
        if let Source::Stored { generation, page } = extent.source
            && folded[usize::from(generation)]
        {
            pages = pages.checked_add(extent.pages).ok_or(mapping::Error::TooLarge(copied.len()))?;
            copied.push(Copied { generation, page, pages: extent.pages });
        }
    }
    Ok(Fold { copied, pages, folded })
}

impl Fold {
    /// The header that reads as `header` does, once everything was copied to the generation `id`.
    pub fn apply(&self, header: &Header, id: Id) -> Result<Header, Error> {
        let mut generations = header.generations().to_vec();
        let new = index(generations.len())?;
        generations.push(Generation { id, pages: self.pages });
        let mut next = 0;
        let extents = header.mapping().extents().map(|mut extent| {
            if let Source::Stored { generation, .. } = extent.source
                && self.folded[usize::from(generation)]
            {
                extent.source = Source::Stored { generation: new, page: next };
                next += extent.pages;
            }
            extent
        });
        used_only(header.id(), &generations, extents.collect())
    }
}

/// A header of only those generations that an extent refers to.
fn used_only(id: Id, generations: &[Generation], mut extents: Vec<Extent>) -> Result<Header, Error> {
    const UNSEEN: u16 = u16::MAX;
    let mut new_index = vec![UNSEEN; generations.len()];
    for extent in &extents {
        if let Source::Stored { generation, .. } = extent.source {
            new_index[usize::from(generation)] = 0;
        }
    }
    let mut kept = Vec::new();
    for (new, generation) in new_index.iter_mut().zip(generations).filter(|(new, _)| **new != UNSEEN) {
        *new = index(kept.len())?;
        kept.push(*generation);
    }
    for extent in &mut extents {
        if let Source::Stored { generation, .. } = &mut extent.source {
            *generation = new_index[usize::from(*generation)];
        }
    }
    Ok(Header::new(id, kept, Mapping::new(extents)?)?)
}

fn index(generations: usize) -> Result<u16, Error> {
    Ok(u16::try_from(generations).map_err(|_| header::Error::TooManyGenerations(generations))?)
}
