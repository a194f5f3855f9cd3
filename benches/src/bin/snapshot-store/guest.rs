//! A memory, and what its VMM writes at a pause.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::Result;
use snapshot::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;

/// A guest's memory and the diff of its last pause.
pub struct Guest {
    memory: Vec<u8>,
    random: u64,
    /// On a tmpfs, as a diff is.
    dir: tempfile::TempDir,
    /// Pages that the last run wrote, in order; zeros or not.
    pub dirty: Vec<u32>,
}

impl Guest {
    /// A guest that has half of its memory, `size` bytes, in use.
    pub fn boot(size: u64) -> Result<Self> {
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let mut guest = Self { memory: vec![0; size as usize], random: 1, dir, dirty: Vec::new() };
        let pages = guest.pages();
        guest.write((0..pages / 2).collect(), false)?;
        Ok(guest)
    }

    pub fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    fn pages(&self) -> u32 {
        (self.memory.len() / PAGE) as u32
    }

    /// The sparse file that a VMM writes at a pause.
    pub fn diff(&self) -> PathBuf {
        self.dir.path().join("diff")
    }

    pub fn memory(&self) -> &[u8] {
        &self.memory
    }

    pub fn page(&self, page: u32) -> &[u8] {
        &self.memory[page as usize * PAGE..][..PAGE]
    }

    /// What a pause has to tell, in bytes.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.len() as u64 * PAGE_SIZE
    }

    /// Goes on until `dirty` bytes of pages are written: runs of 1 to 16 pages anywhere in the half that is in use.
    pub fn run(&mut self, dirty: u64) -> Result<()> {
        let mut pages = std::collections::BTreeSet::new();
        while (pages.len() as u64) < dirty / PAGE_SIZE {
            let start = self.next() as u32 % (self.pages() / 2);
            let len = self.next() as u32 % 16 + 1;
            pages.extend(start..(start + len).min(self.pages()));
        }
        self.write(pages.into_iter().collect(), true)
    }

    fn write(&mut self, dirty: Vec<u32>, with_zeros: bool) -> Result<()> {
        let diff = File::create(self.diff())?;
        diff.set_len(self.size())?;
        for page in &dirty {
            let is_zero = with_zeros && self.next().is_multiple_of(8);
            let mut seed = self.next();
            let content = &mut self.memory[*page as usize * PAGE..][..PAGE];
            // Half of it random, half of it repeating: memory compresses to about half.
            for (index, word) in content.chunks_exact_mut(8).enumerate() {
                if index % 2 == 0 {
                    seed = step(seed);
                }
                let value = if is_zero { 0 } else { seed };
                word.copy_from_slice(&value.to_le_bytes());
            }
            diff.write_all_at(content, u64::from(*page) * PAGE_SIZE)?;
        }
        self.dirty = dirty;
        Ok(())
    }

    fn next(&mut self) -> u64 {
        self.random = step(self.random);
        self.random >> 16
    }
}

/// The same numbers in every run (a linear congruential generator with Knuth's constants).
fn step(random: u64) -> u64 {
    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
}
