//! The userfaultfd calls: create, agree on features, register, write-protect, send.

use std::fmt::Write as _;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};

use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::UserfaultfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::maps::{self, Mapping};

/// What to register guest memory for.
#[derive(Clone, Copy, Default)]
pub struct Modes {
    /// Faults on absent pages are delivered to whoever holds the descriptor.
    pub missing: bool,
    /// Writes are recorded in the page table, for PAGEMAP_SCAN.
    pub track: bool,
}

/// Why guest memory could not be put under userfaultfd.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read /proc/self/maps: {0}")]
    Maps(io::Error),
    #[error("no mapping of the memfd {0}")]
    NoMemory(String),
    #[error("cannot create a userfaultfd: {0}")]
    Create(io::Error),
    #[error("{0}: {1}")]
    Ioctl(&'static str, io::Error),
    #[error("cannot send the handshake: {0}")]
    Send(io::Error),
}

/// Firecracker names the page size twice, the second time under a name that says KiB and means bytes.
const PAGE_SIZE: u64 = 4096;

const UFFD_API: u64 = 0xAA;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

const IOC_NEW: Opcode = opcode::none(0xAA, 0x00);
const IOC_API: Opcode = opcode::read_write::<Api>(0xAA, 0x3F);
const IOC_REGISTER: Opcode = opcode::read_write::<Register>(0xAA, 0x00);
const IOC_WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(0xAA, 0x06);

/// Registers the memory of the memfd called `memory` and sends the handshake over `socket`.
pub fn hand_over(socket: &OwnedFd, memory: &str, modes: Modes) -> Result<OwnedFd, Error> {
    let text = std::fs::read_to_string("/proc/self/maps").map_err(Error::Maps)?;
    let mappings = maps::find(&text, memory);
    if mappings.is_empty() {
        return Err(Error::NoMemory(memory.to_owned()));
    }
    let uffd = create()?;
    agree(&uffd, modes)?;
    for mapping in &mappings {
        register(&uffd, mapping, modes)?;
    }
    send(socket, &uffd, &handshake(&mappings))?;
    Ok(uffd)
}

/// The system call needs a privilege that a jailed VMM lacks; the device node is how it gets one all the same.
fn create() -> Result<OwnedFd, Error> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: the descriptor is used on memory whose owner, QEMU, is told of nothing but absent pages being filled.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Err(rustix::io::Errno::PERM) => {
            let device = std::fs::File::open("/dev/userfaultfd").map_err(Error::Create)?;
            // SAFETY: USERFAULTFD_IOC_NEW takes the flags by value and returns a new descriptor.
            let number = unsafe { rustix::ioctl::ioctl(device.as_fd(), NewUffd(flags.bits())) };
            // SAFETY: the descriptor was just made for us.
            number.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).map_err(|e| Error::Create(e.into()))
        }
        made => made.map_err(|e| Error::Create(e.into())),
    }
}

/// `USERFAULTFD_IOC_NEW`: the argument is a value, the result is the return value.
struct NewUffd(u32);

// SAFETY: the opcode takes an integer argument and touches no memory of ours.
unsafe impl rustix::ioctl::Ioctl for NewUffd {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::without_provenance_mut(self.0 as usize)
    }

    unsafe fn output_from_ptr(result: i32, _: *mut std::ffi::c_void) -> rustix::io::Result<i32> {
        Ok(result)
    }
}

fn agree(uffd: &OwnedFd, modes: Modes) -> Result<(), Error> {
    let mut features = FEATURE_MISSING_SHMEM;
    if modes.missing {
        // A removal blocks until somebody reads the event, so it is asked for only where a handler will.
        features |= FEATURE_EVENT_REMOVE;
    }
    if modes.track {
        features |= FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;
    }
    let mut api = Api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`.
    unsafe { rustix::ioctl::ioctl(uffd, Updater::<IOC_API, Api>::new(&mut api)) }
        .map_err(|e| Error::Ioctl("UFFDIO_API", e.into()))
}

fn register(uffd: &OwnedFd, mapping: &Mapping, modes: Modes) -> Result<(), Error> {
    let (start, len) = (mapping.start, mapping.size);
    let mode = if modes.missing { REGISTER_MODE_MISSING } else { 0 } | if modes.track { REGISTER_MODE_WP } else { 0 };
    let mut request = Register { start, len, mode, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER reads and writes one `uffdio_register`; the range is guest memory, which no Rust
    // reference points into.
    unsafe { rustix::ioctl::ioctl(uffd, Updater::<IOC_REGISTER, Register>::new(&mut request)) }
        .map_err(|e| Error::Ioctl("UFFDIO_REGISTER", e.into()))?;
    if !modes.track {
        return Ok(());
    }
    // From here on a page without the mark is a written page, also one that was swapped out since.
    let mut request = WriteProtect { start, len, mode: WRITEPROTECT_MODE_WP };
    // SAFETY: UFFDIO_WRITEPROTECT reads one `uffdio_writeprotect`; with WP_ASYNC a write clears the mark and goes on.
    unsafe { rustix::ioctl::ioctl(uffd, Updater::<IOC_WRITEPROTECT, WriteProtect>::new(&mut request)) }
        .map_err(|e| Error::Ioctl("UFFDIO_WRITEPROTECT", e.into()))
}

fn handshake(mappings: &[Mapping]) -> String {
    let mut json = String::from("[");
    for (index, Mapping { start, size, offset }) in mappings.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(
            json,
            r#"{comma}{{"base_host_virt_addr":{start},"size":{size},"offset":{offset},"page_size":{PAGE_SIZE},"page_size_kib":{PAGE_SIZE}}}"#
        );
    }
    json.push(']');
    json
}

fn send(socket: &OwnedFd, uffd: &OwnedFd, message: &str) -> Result<(), Error> {
    let fds = [uffd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(socket, &[IoSlice::new(message.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)
        .map_err(|e| Error::Send(e.into()))?;
    Ok(())
}
