//! Guest memory in the VMM, and filling it: which pages, with what, and in one step with respect to removals.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::io::Errno;
use snapshot::{Content, Id, Snapshot};

use crate::bitmap::Bitmap;
use crate::handshake::{Region, Regions};
use crate::uffd::{Event, Filled, Uffd};
use crate::{Error, Fetch, HUGE_PAGE, PAGE};

/// Bytes filled by one call at most, huge pages aside. Events wait for as long as that takes.
pub const PIECE: u64 = 128 << 10;

/// Faults taken before the first of them is served.
const MANY_FAULTS: usize = 1024;

/// The memory of one VMM, and what of it was filled.
pub struct Guest {
    pub uffd: Uffd,
    pub regions: Regions,
    snapshot: Snapshot,
    /// What brings pages that are not in the snapshot's files.
    fetch: Option<Arc<dyn Fetch>>,
    /// Pages that nobody has to fill unasked: filled already, or removed.
    settled: Bitmap,
    /// Pages that are zeros, whatever the snapshot says.
    removed: Bitmap,
    /// Pages of the snapshot's data that are not settled.
    owed: AtomicU64,
    marks: AtomicU8,
    /// Held for reading while a page is filled, for writing while events are read.
    events: RwLock<()>,
    zeros: Vec<u8>,
}

/// Whether the VMM tracks writes by marks: as many values as `Guest::marks` has.
const MARKS_UNKNOWN: u8 = 0;
const MARKED: u8 = 1;
const UNMARKED: u8 = 2;

/// Who wants a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Somebody waits for it: it is absent, whatever was filled before.
    Fault,
    /// Somebody may want it soon.
    Ahead,
}

/// How far filling came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// All of it is there.
    Done,
    /// A removal is under way: events have to be read before anything can be filled.
    Busy,
    /// There is no memory.
    NoMemory,
    /// Some of it is not in the snapshot's files: [`Guest::fetch`] waits for that.
    Absent,
    /// The VMM is gone.
    Gone,
}

/// What one call fills: pages of one region with one kind of content.
struct Span {
    region: Region,
    range: Range<u64>,
    content: Fill,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fill {
    Stored,
    Zero,
    Removed,
}

impl Guest {
    pub fn new(uffd: Uffd, regions: Regions, snapshot: Snapshot, fetch: Option<Arc<dyn Fetch>>) -> Self {
        let pages = snapshot.memory_size() / PAGE;
        let widest = if regions.iter().any(|region| region.page_size == HUGE_PAGE) { HUGE_PAGE } else { PIECE };
        let guest = Self {
            uffd,
            settled: Bitmap::new(pages),
            removed: Bitmap::new(pages),
            owed: AtomicU64::new(0),
            marks: AtomicU8::new(MARKS_UNKNOWN),
            events: RwLock::new(()),
            // Never written, so it takes no memory.
            zeros: vec![0; widest as usize],
            regions,
            snapshot,
            fetch,
        };
        let stored = |region: &Region| -> u64 {
            let runs = guest.runs(region.offset..region.offset + region.size);
            runs.filter(|(_, content)| *content == Fill::Stored).map(|(run, _)| (run.end - run.start) / PAGE).sum()
        };
        let owed = guest.regions.iter().map(stored).sum();
        guest.owed.store(owed, Ordering::Relaxed);
        guest
    }

    pub fn memory_size(&self) -> u64 {
        self.snapshot.memory_size()
    }

    /// Takes all events there are. Adds the offset of each page that somebody waits for to `faults`.
    pub fn take_events(&self, faults: &mut Vec<u64>) -> Result<(), Error> {
        let mut events = Vec::new();
        let _nothing_is_filled = self.events.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            events.clear();
            let more = self.uffd.read(&mut events).map_err(|e| Error::Events(e.into()))?;
            for event in &events {
                match *event {
                    Event::Missing(address) => {
                        let region = self.regions.at_address(address).ok_or(Error::Outside(address))?;
                        let within = address - region.base;
                        faults.push(region.offset + within - within % region.page_size);
                    }
                    Event::Removed(start, end) => self.remove(start..end),
                    Event::Other(number, flags) => return Err(Error::Unexpected { number, flags }),
                }
            }
            if !more || faults.len() >= MANY_FAULTS {
                return Ok(());
            }
        }
    }

    fn remove(&self, addresses: Range<u64>) {
        for region in self.regions.iter() {
            let start = addresses.start.max(region.base);
            let end = addresses.end.min(region.base + region.size);
            if start < end {
                let range = start - region.base + region.offset..end - region.base + region.offset;
                self.removed.set(pages(&range));
                self.settle(&range);
            }
        }
    }

    /// Fills what is missing of `range`, which begins and ends at page borders. `buffer` is the thread's own.
    pub fn fill(&self, range: Range<u64>, why: Why, buffer: &mut Vec<u8>) -> Result<Step, Error> {
        let mut at = range.start;
        while at < range.end {
            let Some(span) = self.span(at..range.end, why) else { break };
            // It is empty if another thread filled or removed its first page while it was looked at.
            at = span.range.start;
            let len = (span.range.end - at) as usize;
            if span.content == Fill::Stored && self.absent(&span.range).is_some() {
                return Ok(Step::Absent);
            }
            let bytes = match span.content {
                Fill::Stored => self.read(at, len, buffer)?,
                Fill::Zero | Fill::Removed => &self.zeros[..len],
            };
            while at < span.range.end {
                match self.put(&span, at, &bytes[(at - span.range.start) as usize..])? {
                    // Some of it was removed since it was looked at.
                    None => break,
                    Some(Filled::Done(filled)) => at += filled,
                    Some(Filled::Present) => {
                        if why == Why::Fault {
                            // It came between the fault and us; who waits may not know. Fails only where there is nobody
                            // left to wake.
                            let _ = self.uffd.wake(span.region.address(at), span.region.page_size);
                        }
                        at += span.region.page_size;
                    }
                    Some(Filled::Unregistered) => at = span.range.end,
                    Some(Filled::Busy) => return Ok(Step::Busy),
                    Some(Filled::NoMemory) => return Ok(Step::NoMemory),
                    Some(Filled::Gone) => return Ok(Step::Gone),
                }
            }
        }
        Ok(Step::Done)
    }

    /// Whether pages may have to be fetched.
    pub fn is_lazy(&self) -> bool {
        self.fetch.is_some()
    }

    /// Waits until what `range` has in the snapshot's files is there.
    pub fn fetch(&self, range: Range<u64>) -> Result<(), Error> {
        let page = self.regions.at_offset(range.start).map_or(PAGE, |region| region.page_size);
        let range = range.start - range.start % page..range.end.next_multiple_of(page).min(self.memory_size());
        let Some(fetch) = &self.fetch else { return Ok(()) };
        while let Some((offset, generation, bytes)) = self.absent(&range) {
            fetch.fetch(generation, bytes).map_err(|source| Error::Fetch { offset, source })?;
        }
        Ok(())
    }

    /// The first part of `range` that is not in the snapshot's files: where it is in memory, and where it should be.
    fn absent(&self, range: &Range<u64>) -> Option<(u64, Id, Range<u64>)> {
        let fetch = self.fetch.as_ref()?;
        let mut at = range.start;
        while at < range.end {
            let run = self.snapshot.lookup(at)?;
            let len = run.len.min(range.end - at);
            if let Content::Stored { data, offset, .. } = run.content {
                let (generation, bytes) = (data.generation().id, offset..offset + len);
                if !fetch.is_present(generation, bytes.clone()) {
                    return Some((at, generation, bytes));
                }
            }
            at += len;
        }
        None
    }

    fn read<'b>(&self, offset: u64, len: usize, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], Error> {
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let read = self.snapshot.read_exact_at(&mut buffer[..len], offset);
        read.map_err(|source| Error::Read { offset, len, source })?;
        Ok(&buffer[..len])
    }

    /// The first part of `range` that has to be filled and can be by one call.
    fn span(&self, range: Range<u64>, why: Why) -> Option<Span> {
        let start = match why {
            Why::Fault => range.start,
            Why::Ahead => self.settled.first_clear(pages(&range))? * PAGE,
        };
        let region = *self.regions.at_offset(start)?;
        let page = region.page_size;
        let start = start - start % page;
        let first = start..start + page;
        if self.removed.first_set(pages(&first)).is_some() {
            return Some(Span { region, range: first, content: Fill::Removed });
        }
        if page == HUGE_PAGE {
            let range = first;
            let mut runs = self.runs(range.clone());
            let content = if runs.all(|(_, content)| content == Fill::Zero) { Fill::Zero } else { Fill::Stored };
            return Some(Span { region, range, content });
        }
        let end = range.end.min(region.offset + region.size).min(start + self.zeros.len() as u64);
        let (run, content) = self.runs(start..end).next()?;
        let set = match why {
            Why::Fault => self.removed.first_set(pages(&run)),
            // What is removed is settled.
            Why::Ahead => self.settled.first_set(pages(&run)),
        };
        Some(Span { region, range: run.start..set.map_or(run.end, |page| page * PAGE), content })
    }

    /// Puts `bytes`, the rest of the span, at `at`; `None` if a part of it has been removed since it was looked at.
    fn put(&self, span: &Span, at: u64, bytes: &[u8]) -> Result<Option<Filled>, Error> {
        let Span { region, range, content } = span;
        let address = region.address(at);
        let _no_event_is_read = self.events.read().unwrap_or_else(PoisonError::into_inner);
        if *content != Fill::Removed && self.removed.first_set(pages(&(at..range.end))).is_some() {
            return Ok(None);
        }
        let can_map_zeros = self.marks.load(Ordering::Relaxed) == UNMARKED && region.page_size == PAGE;
        let filled = match content {
            // The kernel cannot map zeros with a mark, and a mark set afterwards could undo that of a write.
            Fill::Zero | Fill::Removed if can_map_zeros => self.uffd.zero(address, bytes.len() as u64),
            Fill::Stored | Fill::Zero => self.copy_marked(address, bytes),
            Fill::Removed => self.uffd.copy(address, bytes, false),
        };
        let filled = filled.map_err(|e| Error::Fill { offset: at, source: e.into() })?;
        match filled {
            Filled::Done(filled) => self.settle(&(at..at + filled)),
            Filled::Present => self.settle(&(at..at + region.page_size)),
            _ => {}
        }
        Ok(Some(filled))
    }

    /// Copies with a mark where there are marks. Whether there are is found out by the first copy.
    fn copy_marked(&self, address: u64, bytes: &[u8]) -> rustix::io::Result<Filled> {
        let marks = self.marks.load(Ordering::Relaxed);
        if marks != UNMARKED {
            match self.uffd.copy(address, bytes, true) {
                Err(Errno::INVAL) if marks == MARKS_UNKNOWN => {}
                filled => {
                    if matches!(filled, Ok(Filled::Done(_) | Filled::Present)) {
                        self.marks.store(MARKED, Ordering::Relaxed);
                    }
                    return filled;
                }
            }
        }
        let filled = self.uffd.copy(address, bytes, false)?;
        if matches!(filled, Filled::Done(_) | Filled::Present) {
            self.marks.store(UNMARKED, Ordering::Relaxed);
        }
        Ok(filled)
    }

    fn settle(&self, range: &Range<u64>) {
        for (run, content) in self.runs(range.clone()) {
            let new = self.settled.set(pages(&run));
            if content == Fill::Stored {
                self.owed.fetch_sub(new, Ordering::Relaxed);
            }
        }
    }

    /// The runs that `range` is in, cut to it.
    fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Fill)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let run = (at < range.end).then(|| self.snapshot.lookup(at))??;
            let start = at;
            at = range.end.min(start + run.len);
            let content = if matches!(run.content, Content::Zero) { Fill::Zero } else { Fill::Stored };
            Some((start..at, content))
        })
    }

    /// Whether the kernel could serve what is left: no page of the snapshot's data is owed. Where writes are marked it
    /// cannot, since it would take the marks away with the rest.
    pub fn is_whole(&self) -> bool {
        self.owed.load(Ordering::Relaxed) == 0 && self.marks.load(Ordering::Relaxed) == UNMARKED
    }

    /// Leaves the memory to the kernel, for which absent pages are zeros. Nobody waits for us after this; `false` if the
    /// kernel does not take all of it and we still have to be there.
    pub fn release(&self) -> Result<bool, Error> {
        for region in self.regions.iter() {
            // The rule does not depend on how far this comes: what is not given back is served as before.
            if self.uffd.unregister(region.base, region.size).is_err() {
                return Ok(false);
            }
            // The kernel wakes who waits, and only then keeps out who is about to wait (seen on 6.18, with the locks of single
            // mappings): whoever came in between would sleep for ever. Fails only where there is nobody left to wake.
            let _ = self.uffd.wake(region.base, region.size);
        }
        // A removal that began before still waits for its event to be read. As long as there is one, filling is refused
        // as busy; afterwards it is because nothing is registered.
        let probe = self.regions.iter().next().map_or(0, |region| region.base);
        let mut faults = Vec::new();
        while self.uffd.copy(probe, &self.zeros[..PAGE as usize], false) == Ok(Filled::Busy) {
            faults.clear();
            self.take_events(&mut faults)?;
            std::thread::yield_now();
        }
        Ok(true)
    }
}

fn pages(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE..range.end / PAGE
}
