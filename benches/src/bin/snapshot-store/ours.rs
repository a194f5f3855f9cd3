//! Our side.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use snapshot::{Merged, PAGE_SIZE, Snapshot, Store};

use super::guest::Guest;
use super::table::Pause;

/// Single pages that a reading takes, and how many pages lie between them.
pub const READS: u64 = 50_000;
pub const STRIDE: u64 = 251;

pub struct Ours {
    store: Store,
    header: PathBuf,
}

impl Ours {
    pub fn open(dir: &Path) -> Result<Self> {
        let (store, _) = Store::open(dir, [])?;
        Ok(Self { store, header: dir.join("header") })
    }

    /// One pause, and then what a pause does not wait for: removing what nothing refers to.
    pub fn pause(&mut self, guest: &Guest) -> Result<Pause> {
        let diff = File::open(guest.diff())?;
        let start = Instant::now();
        let packed = self.store.pack(&diff, self.header.exists().then_some(&*self.header))?;
        self.store.commit(&packed, &self.header)?;
        let time = start.elapsed();
        let bytes = packed.bytes_written() + self.header.metadata()?.len();
        drop(packed);
        self.store.collect()?;
        Ok(Pause { time, bytes })
    }

    /// How long a merge took and what it wrote, if one was due.
    pub fn merge(&self) -> Result<Option<Pause>> {
        let start = Instant::now();
        let merged = self.store.merge(&self.header, &AtomicBool::new(false))?;
        let time = start.elapsed();
        self.store.collect()?;
        Ok(match merged {
            Merged::Done(bytes) => Some(Pause { time, bytes }),
            _ => None,
        })
    }

    fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot::open(self.store.generations(), &self.header)?)
    }

    pub fn generations(&self) -> Result<usize> {
        Ok(self.snapshot()?.files().len())
    }

    /// Time of one read of a page, with its checksum, from the page cache.
    pub fn read(&self, size: u64) -> Result<Duration> {
        let snapshot = self.snapshot()?;
        let mut page = vec![0; PAGE_SIZE as usize];
        let start = Instant::now();
        for read in 0..READS {
            snapshot.read_exact_at(&mut page, read * STRIDE * PAGE_SIZE % size)?;
        }
        Ok(start.elapsed() / READS as u32)
    }

    /// Bytes of all generations.
    pub fn on_disk(&self) -> Result<u64> {
        let audit = self.store.audit()?;
        ensure!(audit.broken.is_empty() && audit.garbage.files == 0, "{audit:?}");
        Ok(audit.used.bytes)
    }

    /// A benchmark of something that loses memory is none.
    pub fn check(&self, guest: &Guest) -> Result<()> {
        let mut memory = vec![0; guest.memory().len()];
        self.snapshot()?.read_exact_at(&mut memory, 0)?;
        ensure!(memory == guest.memory(), "the snapshot holds another memory");
        Ok(())
    }
}
