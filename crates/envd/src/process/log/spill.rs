//! A backlog's part on disk: an unlinked file, so that nothing is left behind however envd ends.
//!
//! Records lie at their position in the log less a base, which is what makes a look-up arithmetic. What every reader has
//! passed is given back to the file system by punching it out.

use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Room that is left to the capsule's own programs. Bytes.
const RESERVE: u64 = 128 * 1024 * 1024;
/// `f_type` of what lives in memory: tmpfs and ramfs.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// The file. All of its calls may block for a disk's time.
pub(super) struct Spill {
    file: File,
    /// The log's position of the file's first byte.
    base: u64,
}

impl Spill {
    /// A file in the first of `places` that is on a disk.
    pub(super) fn create(places: &[PathBuf], base: u64) -> io::Result<Spill> {
        let mut failure = io::Error::from(io::ErrorKind::NotFound);
        for place in places {
            match unlinked(place) {
                Ok(file) => return Ok(Spill { file, base }),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Writes whole records.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let disk = rustix::fs::fstatvfs(&self.file)?;
        if disk.f_bavail * disk.f_frsize < RESERVE + bytes.len() as u64 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(bytes, at - self.base)
    }

    /// Reads `length` bytes, all of which were written.
    pub(super) fn read(&self, at: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at - self.base)?;
        Ok(bytes)
    }

    /// Gives back what lies before `at`. A file system that cannot keeps it until the file is closed.
    pub(super) fn free_before(&self, at: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = rustix::fs::fallocate(&self.file, flags, 0, at - self.base) {
            tracing::debug!(%error, "cannot give back disk space early");
        }
    }

    /// Bytes the file system holds for the file.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&self.file.metadata().unwrap()) * 512
    }
}

fn unlinked(place: &PathBuf) -> io::Result<File> {
    if IN_MEMORY.contains(&{ rustix::fs::statfs(place)?.f_type }) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(place, flags, Mode::RUSR | Mode::WUSR)?))
}
