//! Guest memory: a memfd this process owns and QEMU inherits, and the files it is saved to.
//!
//! Memory is only ever read and written through descriptors. Reading it through a mapping would put zero pages where a
//! page-fault handler still owes the guest its data.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::fs::{MemfdFlags, SeekFrom};

/// The memfd's name, by which the plugin finds it among QEMU's mappings.
pub const NAME: &str = "firecracker-qemu-memory";

const CHUNK: u64 = 1 << 20;

/// Why guest memory could not be made, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot create {0} bytes of guest memory")]
    Create(u64, #[source] io::Error),
    #[error("cannot find the used parts of {0}")]
    Scan(&'static str, #[source] io::Error),
    #[error("cannot open the memory file")]
    Open(#[source] io::Error),
    #[error("the memory file has {found} bytes and the snapshot says {expected}")]
    WrongSize { found: u64, expected: u64 },
    #[error("cannot read guest memory at {at:#x}")]
    Read { at: u64, source: io::Error },
    #[error("cannot write the memory at {at:#x}")]
    Write { at: u64, source: io::Error },
    #[error("the page-fault handler did not supply the page at {at:#x}")]
    Fault { at: u64, source: io::Error },
}

/// Guest memory.
pub struct Memory {
    file: File,
    size: u64,
}

/// Where QEMU has guest memory mapped; guest offset 0 is at `base`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub pid: u32,
    pub base: u64,
}

impl Memory {
    /// Makes `size` bytes of memory, all of it absent.
    pub fn create(size: u64) -> Result<Self, Error> {
        let fd = rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC).map_err(|e| Error::Create(size, e.into()))?;
        let file = File::from(fd);
        file.set_len(size).map_err(|e| Error::Create(size, e))?;
        Ok(Self { file, size })
    }

    /// Makes `size` bytes of memory with the contents of the file at `path`; what is a hole there is absent here.
    pub fn restore(path: &Path, size: u64) -> Result<Self, Error> {
        let source = File::open(path).map_err(Error::Open)?;
        let found = source.metadata().map_err(Error::Open)?.len();
        if found != size {
            return Err(Error::WrongSize { found, expected: size });
        }
        let memory = Self::create(size)?;
        for range in used(&source, size).map_err(|e| Error::Scan("the memory file", e))? {
            copy(range, |buffer, at| read_exact(&source, buffer, at), &memory.file)?;
        }
        Ok(memory)
    }

    /// The memfd, for QEMU to inherit.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another handle of the same memory.
    pub fn share(&self) -> Result<Self, Error> {
        let file = self.file.try_clone().map_err(|e| Error::Create(self.size, e))?;
        Ok(Self { file, size: self.size })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The parts that hold data, in order. What was never touched is not among them.
    pub fn present(&self) -> Result<Vec<Range<u64>>, Error> {
        used(&self.file, self.size).map_err(|e| Error::Scan("guest memory", e))
    }

    /// Writes `ranges` of memory to a new file at `path`, as long as memory is; the rest of it is holes.
    pub fn save(&self, path: &Path, ranges: &[Range<u64>]) -> Result<(), Error> {
        let target = self.target(path)?;
        for range in ranges {
            copy(range.clone(), |buffer, at| read_exact(&self.file, buffer, at), &target)?;
        }
        Ok(())
    }

    /// Writes all memory to a new file at `path`, asking the guest's page-fault handler for what is absent. Pages it
    /// answers with zeros become holes.
    pub fn save_with_faults(&self, path: &Path, mapped: Mapped) -> Result<(), Error> {
        let target = self.target(path)?;
        let mut absent_from = 0;
        for range in self.present()? {
            fetch(absent_from..range.start, mapped, &target)?;
            absent_from = range.end;
            copy(range, |buffer, at| read_exact(&self.file, buffer, at), &target)?;
        }
        fetch(absent_from..self.size, mapped, &target)
    }

    fn target(&self, path: &Path) -> Result<File, Error> {
        let target = File::options().write(true).create(true).truncate(true).open(path).map_err(Error::Open)?;
        target.set_len(self.size).map_err(|source| Error::Write { at: self.size, source })?;
        Ok(target)
    }
}

/// Copies `range` from wherever `read` finds it to the same place in `target`.
fn copy(range: Range<u64>, read: impl Fn(&mut [u8], u64) -> Result<(), Error>, target: &File) -> Result<(), Error> {
    let mut buffer = vec![0; usize::try_from(CHUNK.min(range.end - range.start)).unwrap_or(usize::MAX)];
    let mut at = range.start;
    while at < range.end {
        let count = CHUNK.min(range.end - at);
        let part = &mut buffer[..usize::try_from(count).unwrap_or(usize::MAX)];
        read(part, at)?;
        target.write_all_at(part, at).map_err(|source| Error::Write { at, source })?;
        at += count;
    }
    Ok(())
}

/// Reads `range` through QEMU's own mapping, which faults absent pages in, and writes what is not zero.
fn fetch(range: Range<u64>, mapped: Mapped, target: &File) -> Result<(), Error> {
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(usize::MAX)];
    let mut at = range.start;
    while at < range.end {
        let count = usize::try_from(CHUNK.min(range.end - at)).unwrap_or(usize::MAX);
        let fault = |source: io::Error| Error::Fault { at, source };
        let base = usize::try_from(mapped.base + at).map_err(|e| fault(io::Error::other(e)))?;
        let pid = i32::try_from(mapped.pid).map_err(|e| fault(io::Error::other(e)))?;
        let mut local = [IoSliceMut::new(&mut buffer[..count])];
        let got = process_vm_readv(Pid::from_raw(pid), &mut local, &[RemoteIoVec { base, len: count }])
            .map_err(|e| fault(e.into()))?;
        if got == 0 {
            return Err(fault(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut page_at = at;
        for page in buffer[..got].chunks(4096) {
            if page.iter().any(|byte| *byte != 0) {
                target.write_all_at(page, page_at).map_err(|source| Error::Write { at: page_at, source })?;
            }
            page_at += page.len() as u64;
        }
        at = page_at;
    }
    Ok(())
}

fn read_exact(file: &File, buffer: &mut [u8], at: u64) -> Result<(), Error> {
    file.read_exact_at(buffer, at).map_err(|source| Error::Read { at, source })
}

/// The ranges of a sparse file that hold data.
fn used(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // There is no data from here to the end.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests;
