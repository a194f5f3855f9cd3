//! The userfaultfd calls: read events, fill pages, let go. All that this crate needs of `unsafe` is here.

use std::fs;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, opcode};

/// Why a descriptor is not usable.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Something else than a userfaultfd.
    #[error("the descriptor is {0:?} and no userfaultfd")]
    Foreign(String),
    /// It cannot be looked at or set up.
    #[error("look at the descriptor")]
    Inspect(#[source] std::io::Error),
}

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

/// What the kernel reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something waits for the page at this address.
    Missing(u64),
    /// The process gives up what is in these addresses.
    Removed(u64, u64),
    /// Something that no VMM asks to be told of: the number of the event and, if it is a fault, its flags.
    Other(u8, u64),
}

/// What became of a request to fill pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes are there now; not 0, and maybe fewer than asked for.
    Done(u64),
    /// The first page was there already.
    Present,
    /// A removal is under way. Events have to be read first.
    Busy,
    /// The process has nothing registered there any more.
    Unregistered,
    /// There is no memory for it.
    NoMemory,
    /// The process is gone.
    Gone,
}

/// Bytes of `struct uffd_msg`.
const MESSAGE: usize = 32;

/// Events taken by one call.
const BATCH: usize = 32;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;
const FLAG_WP: u64 = 1 << 1;
const FLAG_MINOR: u64 = 1 << 2;
const COPY_MODE_WP: u64 = 1 << 1;

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroPage {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}

const UNREGISTER: Opcode = opcode::read::<Range>(0xAA, 0x01);
const WAKE: Opcode = opcode::read::<Range>(0xAA, 0x02);
const COPY: Opcode = opcode::read_write::<Copy>(0xAA, 0x03);
const ZEROPAGE: Opcode = opcode::read_write::<ZeroPage>(0xAA, 0x04);

impl Uffd {
    /// Takes over a descriptor that somebody sent.
    pub fn adopt(fd: OwnedFd) -> Result<Self, AdoptError> {
        let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(AdoptError::Inspect)?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(AdoptError::Foreign(link.to_string_lossy().into_owned()));
        }
        // The sender shares this flag. If it clears it again, only its own faults suffer.
        let inspect = |e: Errno| AdoptError::Inspect(e.into());
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(inspect)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(inspect)?;
        Ok(Self(fd))
    }

    /// Takes events, as many as one call gives, and adds them to `events`. `true` if there may be more.
    pub fn read(&self, events: &mut Vec<Event>) -> rustix::io::Result<bool> {
        let mut messages = [0; MESSAGE * BATCH];
        let read = match rustix::io::read(&self.0, &mut messages) {
            Err(Errno::AGAIN | Errno::INTR) => 0,
            read => read?,
        };
        events.extend(messages[..read].chunks_exact(MESSAGE).map(event));
        Ok(read == messages.len())
    }

    /// Fills the pages from `address` with `bytes`, marked as not written if `protect`. The kernel refuses that with
    /// EINVAL where nobody registered for such marks.
    pub fn copy(&self, address: u64, bytes: &[u8], protect: bool) -> rustix::io::Result<Filled> {
        let mode = if protect { COPY_MODE_WP } else { 0 };
        let src = bytes.as_ptr().expose_provenance() as u64;
        let mut request = Copy { dst: address, src, len: bytes.len() as u64, mode, copy: 0 };
        // SAFETY: the kernel reads `len` bytes at `src`, which `bytes` has, and writes only `copy` and the memory of the
        // process that made the descriptor, where the addresses it named are not ours to keep sound.
        let result = unsafe { rustix::ioctl::ioctl(&self.0, Updater::<COPY, Copy>::new(&mut request)) };
        filled(result, request.len, request.copy)
    }

    /// Fills pages with zeros, unmarked. Not for huge pages.
    pub fn zero(&self, address: u64, len: u64) -> rustix::io::Result<Filled> {
        let mut request = ZeroPage { start: address, len, mode: 0, zeropage: 0 };
        // SAFETY: the kernel writes only `zeropage` and the memory of the process that made the descriptor.
        let result = unsafe { rustix::ioctl::ioctl(&self.0, Updater::<ZEROPAGE, ZeroPage>::new(&mut request)) };
        filled(result, len, request.zeropage)
    }

    /// Lets whoever waits for these pages look again.
    pub fn wake(&self, address: u64, len: u64) -> rustix::io::Result<()> {
        // SAFETY: UFFDIO_WAKE reads one `uffdio_range`, despite the direction in its number.
        unsafe { rustix::ioctl::ioctl(&self.0, Setter::<WAKE, Range>::new(Range { start: address, len })) }
    }

    /// Gives these addresses back to the kernel: what is absent is zeros from now on, and no event comes.
    pub fn unregister(&self, address: u64, len: u64) -> rustix::io::Result<()> {
        // SAFETY: UFFDIO_UNREGISTER reads one `uffdio_range`, despite the direction in its number.
        unsafe { rustix::ioctl::ioctl(&self.0, Setter::<UNREGISTER, Range>::new(Range { start: address, len })) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn event(message: &[u8]) -> Event {
    let word = |at: usize| message[at..at + 8].iter().rev().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
    match message[0] {
        EVENT_PAGEFAULT if word(8) & (FLAG_WP | FLAG_MINOR) == 0 => Event::Missing(word(16)),
        EVENT_REMOVE | EVENT_UNMAP => Event::Removed(word(8), word(16)),
        other => Event::Other(other, word(8)),
    }
}

/// `done` is what the kernel wrote: bytes, or an error again; where it stopped early it says EAGAIN and how far it came.
fn filled(result: rustix::io::Result<()>, len: u64, done: i64) -> rustix::io::Result<Filled> {
    match (result, u64::try_from(done)) {
        (Ok(()), _) => Ok(Filled::Done(len)),
        (Err(Errno::AGAIN), Ok(done)) if done > 0 => Ok(Filled::Done(done.min(len))),
        (Err(Errno::AGAIN), _) => Ok(Filled::Busy),
        (Err(Errno::EXIST), _) => Ok(Filled::Present),
        (Err(Errno::NOENT), _) => Ok(Filled::Unregistered),
        (Err(Errno::NOMEM), _) => Ok(Filled::NoMemory),
        (Err(Errno::SRCH), _) => Ok(Filled::Gone),
        (Err(error), _) => Err(error),
    }
}
