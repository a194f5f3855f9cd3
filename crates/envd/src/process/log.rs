//! A process's output between its pipes and everyone who reads it.
//!
//! One writer (the process's owner) appends, any number of readers follow, each with a cursor of its own. The promises:
//!
//! - **Nothing is lost or reordered.** A reader gets every byte from where it joined to the end, then the outcome, once.
//! - **Readers do not stall each other.** The process keeps pace with the fastest: the writer waits while even that one is
//!   [`WINDOW`] bytes behind; the pipe fills, and the process blocks in `write` as it would on a slow terminal.
//! - **Memory is bounded.** Of what a slower reader still needs, the youngest [`MEMORY`] bytes stay in memory; the rest waits
//!   for it in an unlinked file ([`spill`]) and is given back as the slowest passes or leaves.
//! - **A full disk is not a loss either.** Then, and only then, the process waits for the slowest.
//! - **Without readers nothing waits.** The process runs on, and only the last [`WINDOW`] bytes are kept.
//! - **A reader that left does not count**, from the moment it is dropped.
//! - **Latecomers** start with what is in memory: at least the last [`WINDOW`] bytes, at first all there was.
//!
//! Positions count records as they are on disk: [`HEADER`] bytes before each run of bytes from one source. So many tiny runs
//! are not free, and one number says where a run is in memory or in the file.

mod spill;

use spill::Spill;
use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How far the process may run ahead of its fastest reader, and how much is kept for those who join later. Bytes.
pub const WINDOW: u64 = 256 * 1024;
/// How much of a backlog is kept in memory. Bytes.
pub const MEMORY: u64 = 1024 * 1024;
/// How much goes to disk, comes from there, and is given back there at once. Bytes.
const BATCH: u64 = 512 * 1024;
const READ_AHEAD: u64 = 64 * 1024;
/// A disk that was full is tried again so soon, though no reader moved: others may have made room.
const FULL_FOR: Duration = Duration::from_secs(1);
/// Most bytes in one item. A terminal's are smaller, so that a person sees them sooner.
const ITEM_BYTES: usize = 32 * 1024;
const TERMINAL_ITEM_BYTES: usize = 16 * 1024;
/// Before each run on disk: its source, its length.
const HEADER: u64 = 8;
/// Where a backlog may go. `/tmp` is memory.
const PLACES: [&str; 2] = ["/var/tmp", "/"];

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

/// The disk did not give back what was written to it.
#[derive(Debug, thiserror::Error)]
#[error("reading output back from disk")]
pub struct Unreadable(#[source] std::io::Error);

/// The output of one process; `T` is how it ended.
pub struct Log<T> {
    state: Mutex<State<T>>,
    /// There is more to read.
    grown: Notify,
    /// There may be more room to write.
    drained: Notify,
    places: Vec<PathBuf>,
}

struct State<T> {
    /// What is in memory, oldest first and without gaps.
    chunks: VecDeque<Chunk>,
    /// What is on disk, which ends where the memory begins.
    disk: Option<Disk>,
    /// A batch is on its way to disk.
    spilling: bool,
    /// When the disk last refused a batch.
    full: Option<Instant>,
    /// The position after the last byte.
    end: u64,
    outcome: Option<T>,
    cursors: HashMap<u64, Cursor>,
    next_reader: u64,
}

/// A run of bytes from one source.
struct Chunk {
    at: u64,
    source: Source,
    data: Vec<u8>,
}

#[derive(Clone)]
struct Disk {
    spill: Arc<Spill>,
    end: u64,
    /// What lies before was given back.
    freed: u64,
}

/// Where a reader is.
#[derive(Clone, Copy)]
struct Cursor {
    /// The run it reads, or where the next one will begin.
    chunk: u64,
    /// Bytes of the run it has.
    had: usize,
}

/// One reader. Dropping it leaves.
pub struct Reader<T> {
    log: Arc<Log<T>>,
    id: u64,
    ahead: Ahead,
}

/// Records that were read from disk at once.
#[derive(Default)]
struct Ahead {
    at: u64,
    bytes: Vec<u8>,
}

/// What [`Log::room`] has to do.
enum Room {
    Enough,
    /// Take this to disk: the file if there is one yet, a position, and records.
    Spill(Option<Arc<Spill>>, u64, Vec<u8>),
    Wait,
    WaitForDisk,
}

/// What [`Reader::next`] has to do.
enum Step<T> {
    Give(Item<T>),
    Load(Arc<Spill>, u64, usize),
    Wait,
}

impl<T> Default for Log<T> {
    fn default() -> Log<T> {
        Log::spilling_to(PLACES.map(PathBuf::from).into())
    }
}

impl<T> Log<T> {
    /// A log whose backlog may go to the first of `places` that is a directory on a disk.
    pub fn spilling_to(places: Vec<PathBuf>) -> Log<T> {
        let state = State {
            chunks: VecDeque::new(),
            disk: None,
            spilling: false,
            full: None,
            end: 0,
            outcome: None,
            cursors: HashMap::new(),
            next_reader: 0,
        };
        Log { state: Mutex::new(state), grown: Notify::new(), drained: Notify::new(), places }
    }

    /// Joins, at the oldest byte in memory.
    pub fn subscribe(self: &Arc<Self>) -> Reader<T> {
        let mut state = self.lock();
        let id = state.next_reader;
        state.next_reader += 1;
        let oldest = state.memory_start();
        state.cursors.insert(id, Cursor { chunk: oldest, had: 0 });
        Reader { log: Arc::clone(self), id, ahead: Ahead::default() }
    }

    /// Adds output. The caller asked for [`Log::room`] first; asking is what bounds memory.
    pub fn append(&self, source: Source, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let mut state = self.lock();
        let end = state.end;
        match state.chunks.back_mut() {
            Some(last) if last.source == source && last.data.len() + data.len() <= source.item_bytes() => {
                last.data.extend_from_slice(data);
            }
            _ => {
                state.chunks.push_back(Chunk { at: end, source, data: data.to_vec() });
                state.end += HEADER;
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

    /// Bytes in memory at present.
    pub fn kept(&self) -> u64 {
        self.lock().in_memory()
    }

    /// Bytes on disk at present.
    pub fn spilled(&self) -> u64 {
        self.lock().disk.as_ref().map_or(0, |disk| disk.end - disk.freed)
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Send + 'static> Log<T> {
    /// Resolves when [`Log::append`] may be called. Dropping the future loses nothing.
    pub async fn room(self: &Arc<Self>) {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            let room = self.lock().room();
            match room {
                Room::Enough => return,
                // It finishes by itself, whoever stops waiting; the wait below is for its notification.
                Room::Spill(spill, at, records) => {
                    let log = Arc::clone(self);
                    tokio::task::spawn_blocking(move || log.take_to_disk(spill, at, &records));
                    drained.await;
                }
                Room::Wait => drained.await,
                Room::WaitForDisk => {
                    let _ = tokio::time::timeout(FULL_FOR, drained).await;
                }
            }
        }
    }

    fn take_to_disk(&self, spill: Option<Arc<Spill>>, at: u64, records: &[u8]) {
        let opened = spill.map_or_else(|| Spill::create(&self.places, at).map(Arc::new), Ok);
        let result = opened.and_then(|spill| spill.write(at, records).map(|()| spill));
        let mut state = self.lock();
        state.spilling = false;
        match result {
            Ok(spill) => {
                let end = at + records.len() as u64;
                state.full = None;
                state.disk.get_or_insert(Disk { spill, end, freed: at }).end = end;
                while state.chunks.front().is_some_and(|chunk| chunk.at < end) {
                    state.chunks.pop_front();
                }
                // The readers may have passed all of it meanwhile.
                state.trim();
            }
            Err(error) => {
                if state.full.replace(Instant::now()).is_none() {
                    tracing::warn!(%error, "no room on disk for a slow reader's backlog: the process waits for it");
                }
            }
        }
        drop(state);
        self.drained.notify_waiters();
    }
}

impl Chunk {
    fn end(&self) -> u64 {
        self.at + HEADER + self.data.len() as u64
    }
}

impl Cursor {
    /// Where it is, for comparing who is ahead.
    fn position(self) -> u64 {
        if self.had == 0 { self.chunk } else { self.chunk + HEADER + self.had as u64 }
    }
}

impl<T> State<T> {
    fn memory_start(&self) -> u64 {
        self.chunks.front().map_or(self.end, |chunk| chunk.at)
    }

    fn in_memory(&self) -> u64 {
        self.end - self.memory_start()
    }

    fn room(&mut self) -> Room {
        let fastest = self.cursors.values().map(|cursor| cursor.position()).max();
        if fastest.is_some_and(|fastest| self.end - fastest >= WINDOW) {
            return Room::Wait;
        }
        if self.in_memory() < MEMORY {
            return Room::Enough;
        }
        if self.spilling {
            return Room::Wait;
        }
        if self.full.is_some_and(|when| when.elapsed() < FULL_FOR) {
            return Room::WaitForDisk;
        }
        let at = self.memory_start();
        let mut records = Vec::with_capacity(BATCH as usize + ITEM_BYTES);
        // Never the last, which may still grow.
        let whole = self.chunks.len().saturating_sub(1);
        for chunk in self.chunks.iter().take(whole).take_while(|chunk| chunk.at < at + BATCH) {
            records.extend((chunk.source as u32).to_le_bytes());
            records.extend((chunk.data.len() as u32).to_le_bytes());
            records.extend(&chunk.data);
        }
        self.spilling = true;
        Room::Spill(self.disk.as_ref().map(|disk| Arc::clone(&disk.spill)), at, records)
    }

    /// Forgets what neither a reader nor a latecomer needs.
    fn trim(&mut self) {
        let slowest = self.cursors.values().map(|cursor| cursor.chunk).min().unwrap_or(self.end);
        match &mut self.disk {
            Some(disk) if slowest >= disk.end => {
                let spent = self.disk.take();
                in_background(move || drop(spent));
            }
            Some(disk) if slowest >= disk.freed + BATCH => {
                disk.freed = slowest;
                let spill = Arc::clone(&disk.spill);
                in_background(move || spill.free_before(slowest));
            }
            Some(_) | None => {}
        }
        let needed = slowest.min(self.end.saturating_sub(WINDOW));
        while self.chunks.front().is_some_and(|chunk| chunk.end() <= needed) {
            self.chunks.pop_front();
        }
    }

    /// What comes next for a reader.
    fn advance(&mut self, reader: u64, ahead: &Ahead) -> Step<T>
    where
        T: Clone,
    {
        let memory_start = self.memory_start();
        // A reader is entered as long as it exists.
        let Some(cursor) = self.cursors.get_mut(&reader) else { return Step::Wait };
        loop {
            let (source, data, end) = if cursor.chunk < memory_start {
                let Some(disk) = &self.disk else { return Step::Wait };
                match ahead.record(cursor.chunk) {
                    Some(record) => record,
                    None => {
                        let length = (disk.end - cursor.chunk).min(READ_AHEAD);
                        return Step::Load(Arc::clone(&disk.spill), cursor.chunk, length as usize);
                    }
                }
            } else {
                match self.chunks.binary_search_by_key(&cursor.chunk, |chunk| chunk.at) {
                    Ok(found) => {
                        let chunk = &self.chunks[found];
                        (chunk.source, chunk.data.as_slice(), chunk.end())
                    }
                    Err(_) => break,
                }
            };
            if cursor.had < data.len() {
                let item = Item::Data(source, data[cursor.had..].to_vec());
                *cursor = match end == self.end {
                    // It may grow.
                    true => Cursor { had: data.len(), ..*cursor },
                    false => Cursor { chunk: end, had: 0 },
                };
                self.trim();
                return Step::Give(item);
            }
            if end == self.end {
                break;
            }
            *cursor = Cursor { chunk: end, had: 0 };
        }
        match self.outcome.clone() {
            Some(outcome) => Step::Give(Item::End(outcome)),
            None => Step::Wait,
        }
    }
}

impl Ahead {
    /// The record at `at`, and where it ends, if all of it is here.
    fn record(&self, at: u64) -> Option<(Source, &[u8], u64)> {
        let bytes = self.bytes.get(usize::try_from(at.checked_sub(self.at)?).ok()?..)?;
        let (source, rest) = bytes.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        let source = match u32::from_le_bytes(*source) {
            0 => Source::Stdout,
            1 => Source::Stderr,
            _ => Source::Terminal,
        };
        let data = rest.get(..u32::from_le_bytes(*length) as usize)?;
        Some((source, data, at + HEADER + data.len() as u64))
    }
}

impl<T: Clone> Reader<T> {
    /// The next item. After [`Item::End`] it is that again. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Item<T>, Unreadable> {
        loop {
            let grown = self.log.grown.notified();
            tokio::pin!(grown);
            grown.as_mut().enable();
            let step = self.log.lock().advance(self.id, &self.ahead);
            match step {
                Step::Give(item) => {
                    self.log.drained.notify_waiters();
                    return Ok(item);
                }
                Step::Load(spill, at, length) => {
                    let read = tokio::task::spawn_blocking(move || spill.read(at, length)).await;
                    let bytes = read.map_err(std::io::Error::other).flatten().map_err(Unreadable)?;
                    self.ahead = Ahead { at, bytes };
                }
                Step::Wait => {
                    // What was read from disk is behind us.
                    self.ahead = Ahead::default();
                    grown.await;
                }
            }
        }
    }
}

impl<T> Drop for Reader<T> {
    fn drop(&mut self) {
        let mut state = self.log.lock();
        state.cursors.remove(&self.id);
        state.trim();
        drop(state);
        self.log.drained.notify_waiters();
    }
}

/// Off the runtime's workers, if this is one: a file system takes its time over a large file.
fn in_background(work: impl FnOnce() + Send + 'static) {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(work)),
        Err(_) => work(),
    }
}

#[cfg(test)]
mod tests;
