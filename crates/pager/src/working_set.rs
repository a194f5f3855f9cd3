//! Which parts of memory a resume needed first, in what order: recorded, kept in a file, and fetched the next time.
//!
//! | bytes, little-endian | |
//! |---|---|
//! | 8 | magic, `WRENNWSS` |
//! | 4 | version, 1 |
//! | 4 | bytes of a chunk, [`CHUNK`] |
//! | 8 | bytes of memory |
//! | 8 n | each run, in the order it was needed: 4 first chunk, 2 chunks, 2 age |
//! | 4 | CRC-32 of all before |
//!
//! What was fetched ahead causes no fault, so nobody knows whether it was needed. It stays in the record for
//! [`MAX_AGE`] resumes more, after which it has to be missed to come back: a record follows what the guest does and does
//! not only grow.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::ops::Range;
use std::path::Path;

use crate::CHUNK;

const MAGIC: [u8; 8] = *b"WRENNWSS";
const VERSION: u32 = 1;
const FIXED: usize = 24;
const RUN: usize = 8;
const CHECKSUM: usize = 4;

/// Resumes that a run outlives without a fault.
pub const MAX_AGE: u16 = 3;

/// Runs in a file at most: a prefetch of more would be no working set.
const MAX_RUNS: usize = 64 << 10;

/// Why a working set is not usable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read or written.
    #[error("use the working set's file")]
    File(#[from] io::Error),
    /// Something else, or of another version.
    #[error("the file is no working set that this program reads")]
    Foreign,
    /// Cut off or changed.
    #[error("the working set is damaged")]
    Damaged,
    /// Of another guest.
    #[error("the working set is of a memory of {0} bytes")]
    MemorySize(u64),
}

/// Parts of a memory, in the order they were needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    memory_size: u64,
    runs: Vec<Run>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    chunks: u16,
    age: u16,
}

impl WorkingSet {
    /// Reads the file at `path`, which must be of a memory of so many bytes.
    pub fn read(path: &Path, memory_size: u64) -> Result<Self, Error> {
        let mut bytes = Vec::new();
        let most = FIXED + MAX_RUNS * RUN + CHECKSUM;
        File::open(path)?.take(most as u64 + 1).read_to_end(&mut bytes)?;
        Self::decode(&bytes, memory_size)
    }

    /// Understands what [`encode`](Self::encode) wrote, if it is of a memory of so many bytes.
    pub fn decode(bytes: &[u8], memory_size: u64) -> Result<Self, Error> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes.len() < FIXED || bytes[..8] != MAGIC || word(8) != VERSION || u64::from(word(12)) != CHUNK {
            return Err(Error::Foreign);
        }
        let end = bytes.len().checked_sub(CHECKSUM).filter(|end| *end >= FIXED).ok_or(Error::Damaged)?;
        let runs = (end - FIXED) / RUN;
        if runs > MAX_RUNS || !(end - FIXED).is_multiple_of(RUN) || crc32fast::hash(&bytes[..end]) != word(end) {
            return Err(Error::Damaged);
        }
        let found = u64::from(word(16)) | u64::from(word(20)) << 32;
        if found != memory_size {
            return Err(Error::MemorySize(found));
        }
        let runs = (0..runs).map(|run| FIXED + run * RUN);
        let runs: Vec<_> = runs.map(|at| Run { first: word(at), chunks: half(at + 4), age: half(at + 6) }).collect();
        let chunks = memory_size.div_ceil(CHUNK);
        let is_inside = |run: &Run| run.chunks > 0 && u64::from(run.first) + u64::from(run.chunks) <= chunks;
        if runs.iter().all(is_inside) { Ok(Self { memory_size, runs }) } else { Err(Error::Damaged) }
    }

    /// The bytes of its file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED + self.runs.len() * RUN + CHECKSUM);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((CHUNK as u32).to_le_bytes());
        bytes.extend(self.memory_size.to_le_bytes());
        for run in &self.runs {
            bytes.extend(run.first.to_le_bytes());
            bytes.extend(run.chunks.to_le_bytes());
            bytes.extend(run.age.to_le_bytes());
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Puts it at `path` in one step, over what is there.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        Ok(fs::write(path, self.encode())?)
    }

    /// The parts, in order, as bytes of memory.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().map(|run| {
            let start = u64::from(run.first) * CHUNK;
            start..(start + u64::from(run.chunks) * CHUNK).min(self.memory_size)
        })
    }
}

/// Notes what is needed.
#[derive(Debug)]
pub struct Recorder {
    memory_size: u64,
    /// Chunks, in order.
    missed: Vec<u32>,
    seen: HashSet<u32>,
}

impl Recorder {
    pub fn new(memory_size: u64) -> Self {
        Self { memory_size, missed: Vec::new(), seen: HashSet::new() }
    }

    /// A page was missed.
    pub fn missed(&mut self, offset: u64) {
        // Memory has fewer than 2^32 pages, so fewer chunks.
        let chunk = (offset / CHUNK) as u32;
        if self.missed.len() < MAX_RUNS && self.seen.insert(chunk) {
            self.missed.push(chunk);
        }
    }

    /// What the next resume should fetch, given what this one fetched.
    pub fn finish(self, fetched: Option<&WorkingSet>) -> WorkingSet {
        let mut runs: Vec<Run> = Vec::new();
        let mut push = |chunk: u32, age: u16| match runs.last_mut() {
            Some(run) if run.age == age && run.first + u32::from(run.chunks) == chunk && run.chunks < u16::MAX => {
                run.chunks += 1;
            }
            _ => runs.push(Run { first: chunk, chunks: 1, age }),
        };
        let mut done = HashSet::new();
        for run in fetched.iter().flat_map(|fetched| &fetched.runs) {
            for chunk in run.first..run.first + u32::from(run.chunks) {
                let was_missed = self.seen.contains(&chunk);
                if (was_missed || run.age < MAX_AGE) && done.insert(chunk) {
                    push(chunk, if was_missed { 0 } else { run.age + 1 });
                }
            }
        }
        for chunk in self.missed.into_iter().filter(|chunk| !done.contains(chunk)) {
            push(chunk, 0);
        }
        runs.truncate(MAX_RUNS);
        WorkingSet { memory_size: self.memory_size, runs }
    }
}

#[cfg(test)]
mod tests;
