//! Which page of guest memory comes from where. Pure. All numbers are pages.

use std::ops::Range;

/// Where a run of pages begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The pages are zeros and stored nowhere.
    Zero,
    /// The pages follow each other in a data file.
    Stored {
        /// Index into the header's list of generations.
        generation: u16,
        /// First page in that generation's data.
        page: u32,
    },
}

impl Source {
    /// Where the run goes on `pages` later.
    fn after(self, pages: u32) -> Self {
        match self {
            Self::Zero => Self::Zero,
            // Mapping::new refused whatever overflows.
            Self::Stored { generation, page } => Self::Stored { generation, page: page.wrapping_add(pages) },
        }
    }
}

/// Pages of guest memory that follow each other and come from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How many; never 0.
    pub pages: u32,
    /// Where the first comes from.
    pub source: Source,
}

/// Why extents are no mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There are no pages at all.
    #[error("the mapping is empty")]
    Empty,
    /// An extent has no pages.
    #[error("extent {0} is empty")]
    EmptyExtent(usize),
    /// The extents have more pages than 32 bits count, in memory or in a data file.
    #[error("extent {0} goes beyond the last page")]
    TooLarge(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Start {
    page: u32,
    source: Source,
}

/// All of a guest's memory, each page once, in the fewest extents that describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pages: u32,
    /// Sorted; the first starts at 0 and each ends where the next starts, the last at `pages`.
    starts: Vec<Start>,
}

impl Mapping {
    /// The mapping with these extents one after the other from page 0. Neighbours that continue each other become one.
    pub fn new(extents: impl IntoIterator<Item = Extent>) -> Result<Self, Error> {
        let mut pages = 0_u32;
        let mut starts: Vec<Start> = Vec::new();
        for (index, extent) in extents.into_iter().enumerate() {
            if extent.pages == 0 {
                return Err(Error::EmptyExtent(index));
            }
            if let Source::Stored { page, .. } = extent.source {
                page.checked_add(extent.pages).ok_or(Error::TooLarge(index))?;
            }
            let continues = starts.last().is_some_and(|last| last.source.after(pages - last.page) == extent.source);
            if !continues {
                starts.push(Start { page: pages, source: extent.source });
            }
            pages = pages.checked_add(extent.pages).ok_or(Error::TooLarge(index))?;
        }
        if pages == 0 {
            return Err(Error::Empty);
        }
        Ok(Self { pages, starts })
    }

    /// Guest memory in pages.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Where `page` comes from, and for how many pages from it on that goes on; `None` beyond the end of memory.
    pub fn lookup(&self, page: u32) -> Option<Extent> {
        self.extents_in(page..self.pages).next()
    }

    /// Every extent, in order.
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        self.extents_in(0..self.pages)
    }

    /// The extents of a part of memory, cut to it.
    pub fn extents_in(&self, part: Range<u32>) -> impl Iterator<Item = Extent> {
        let end = part.end.min(self.pages);
        let mut at = part.start;
        // The last run that starts at or before the part; there is one, as the first starts at 0.
        let mut index = self.starts.partition_point(|start| start.page <= at).saturating_sub(1);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let Start { page, source } = self.starts[index];
            index += 1;
            let run_end = self.starts.get(index).map_or(self.pages, |next| next.page);
            let extent = Extent { pages: run_end.min(end) - at, source: source.after(at - page) };
            at += extent.pages;
            Some(extent)
        })
    }

    /// How many extents there are.
    pub fn extent_count(&self) -> usize {
        self.starts.len()
    }
}
