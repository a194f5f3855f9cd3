//! A process's output between its pipes and everyone who reads it.
//!
//! One writer (the process's owner) appends, any number of readers follow, each with a cursor of its own. The promises:
//!
//! - **Nothing is lost or reordered.** A reader gets every byte from where it joined to the end, then the outcome, once.
//! - **Memory is bounded, by backpressure.** The writer waits while even the fastest reader is [`WINDOW`] bytes behind; the
//!   pipe fills, and the process blocks in `write` as it would on a slow terminal.
//! - **Without readers nothing waits.** The process runs on, and only the last [`WINDOW`] bytes are kept.
//! - **A reader that left does not count**, from the moment it is dropped.
//! - **Readers do not stall each other.** The process keeps pace with the fastest. A reader that falls [`MAX_LAG`] behind
//!   (which takes a faster one beside it, for the process waits for the fastest) is told so with [`Lagged`] instead of
//!   silently skipping bytes; it may join again. Until then its backlog is kept in memory.
//! - **Latecomers** start with what is kept: at least the last [`WINDOW`] bytes, at first all there was.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// How far the process may run ahead of its fastest reader, and how much is kept for those who join later. Bytes.
pub const WINDOW: u64 = 256 * 1024;
/// How far a reader may fall behind where a faster one draws the process on. Bytes.
pub const MAX_LAG: u64 = 8 * 1024 * 1024;
/// Most bytes in one item. A terminal's are smaller, so that a person sees them sooner.
const ITEM_BYTES: usize = 32 * 1024;
const TERMINAL_ITEM_BYTES: usize = 16 * 1024;

/// Where output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
    Terminal,
}

impl Source {
    /// Most bytes that one item from here holds.
    pub fn item_bytes(self) -> usize {
        match self {
            Source::Stdout | Source::Stderr => ITEM_BYTES,
            Source::Terminal => TERMINAL_ITEM_BYTES,
        }
    }
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item<T> {
    Data(Source, Vec<u8>),
    /// The last item.
    End(T),
}

/// The reader fell further behind than is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the reader fell more than {MAX_LAG} bytes behind another one")]
pub struct Lagged;

/// The output of one process; `T` is how it ended.
pub struct Log<T> {
    state: Mutex<State<T>>,
    /// There is more to read.
    grown: Notify,
    /// There may be more room to write.
    drained: Notify,
}

struct State<T> {
    chunks: VecDeque<Chunk>,
    /// Bytes ever appended.
    end: u64,
    outcome: Option<T>,
    /// Where each reader is; one that lagged is no longer here.
    cursors: HashMap<u64, u64>,
    next_reader: u64,
}

/// A run of bytes from one source.
struct Chunk {
    at: u64,
    source: Source,
    data: Vec<u8>,
}

/// One reader. Dropping it leaves.
pub struct Reader<T> {
    log: Arc<Log<T>>,
    id: u64,
}

impl<T> Default for Log<T> {
    fn default() -> Log<T> {
        let state = State { chunks: VecDeque::new(), end: 0, outcome: None, cursors: HashMap::new(), next_reader: 0 };
        Log { state: Mutex::new(state), grown: Notify::new(), drained: Notify::new() }
    }
}

impl<T: Clone> Log<T> {
    /// Joins, at the oldest byte kept.
    pub fn subscribe(self: &Arc<Self>) -> Reader<T> {
        let mut state = self.lock();
        let id = state.next_reader;
        state.next_reader += 1;
        let oldest = state.chunks.front().map_or(state.end, |chunk| chunk.at);
        state.cursors.insert(id, oldest);
        Reader { log: Arc::clone(self), id }
    }

    /// Resolves when [`Log::append`] may be called.
    pub async fn room(&self) {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            if self.lock().has_room() {
                return;
            }
            drained.await;
        }
    }

    /// Adds output. The caller asked for [`Log::room`] first; asking is what bounds memory.
    pub fn append(&self, source: Source, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let mut state = self.lock();
        match state.chunks.back_mut() {
            Some(last) if last.source == source && last.data.len() + data.len() <= source.item_bytes() => {
                last.data.extend_from_slice(data);
            }
            _ => {
                let at = state.end;
                state.chunks.push_back(Chunk { at, source, data: data.to_vec() });
            }
        }
        state.end += data.len() as u64;
        state.trim();
        drop(state);
        self.grown.notify_waiters();
    }

    /// Adds the outcome; nothing may be appended after it.
    pub fn finish(&self, outcome: T) {
        let mut state = self.lock();
        for chunk in &mut state.chunks {
            chunk.data.shrink_to_fit();
        }
        state.outcome = Some(outcome);
        drop(state);
        self.grown.notify_waiters();
    }

    /// Bytes kept at present.
    pub fn kept(&self) -> u64 {
        let state = self.lock();
        state.end - state.chunks.front().map_or(state.end, |chunk| chunk.at)
    }
}

impl<T> Log<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone> State<T> {
    fn has_room(&self) -> bool {
        self.cursors.values().max().is_none_or(|fastest| self.end - fastest < WINDOW)
    }

    /// Cuts readers that lag, and forgets what neither a reader nor a latecomer needs.
    fn trim(&mut self) {
        let end = self.end;
        self.cursors.retain(|_, at| end - *at <= MAX_LAG);
        let slowest = self.cursors.values().min().copied().unwrap_or(end);
        let needed = slowest.min(end.saturating_sub(WINDOW));
        while self.chunks.front().is_some_and(|chunk| chunk.at + chunk.data.len() as u64 <= needed) {
            self.chunks.pop_front();
        }
    }

    /// What comes next for a reader, if anything does yet.
    fn advance(&mut self, reader: u64) -> Option<Result<Item<T>, Lagged>> {
        let Some(cursor) = self.cursors.get_mut(&reader) else { return Some(Err(Lagged)) };
        if *cursor == self.end {
            return self.outcome.clone().map(|outcome| Ok(Item::End(outcome)));
        }
        // The chunk that holds the cursor: the last that starts at or before it.
        let chunk = &self.chunks[self.chunks.partition_point(|chunk| chunk.at <= *cursor) - 1];
        let data = chunk.data[(*cursor - chunk.at) as usize..].to_vec();
        *cursor += data.len() as u64;
        let item = Item::Data(chunk.source, data);
        self.trim();
        Some(Ok(item))
    }
}

impl<T: Clone> Reader<T> {
    /// The next item. After [`Item::End`] it is that again. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Item<T>, Lagged> {
        loop {
            let grown = self.log.grown.notified();
            tokio::pin!(grown);
            grown.as_mut().enable();
            let item = self.log.lock().advance(self.id);
            if let Some(item) = item {
                self.log.drained.notify_waiters();
                return item;
            }
            grown.await;
        }
    }
}

impl<T> Drop for Reader<T> {
    fn drop(&mut self) {
        self.log.lock().cursors.remove(&self.id);
        self.log.drained.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
