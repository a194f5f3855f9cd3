//! Memory as a VMM has it, and the userfaultfd calls of both ends that the minimal handler needs.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr::NonNull;

use anyhow::{Context as _, Result};
use pager::PAGE;
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

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

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

const API: Opcode = opcode::read_write::<Api>(0xAA, 0x3F);
const REGISTER: Opcode = opcode::read_write::<Register>(0xAA, 0x00);
const COPY: Opcode = opcode::read_write::<Copy>(0xAA, 0x03);
const EVENT_REMOVE: u64 = 1 << 3;
const MISSING: u64 = 1 << 0;

/// A mapping, unmapped when dropped.
pub struct Memory {
    address: NonNull<u8>,
    size: u64,
    uffd: Option<OwnedFd>,
}

impl Memory {
    /// Anonymous memory whose absent pages somebody else supplies.
    pub fn anonymous(size: u64) -> Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let mapped =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), size as usize, access, MapFlags::PRIVATE) };
        let address: NonNull<u8> =
            NonNull::new(mapped.context("mapping memory")?.cast()).context("memory at address 0")?;
        // SAFETY: only the mapping above is registered with it.
        let uffd = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) };
        let uffd = uffd.context("creating a userfaultfd")?;
        let start = address.as_ptr().expose_provenance() as u64;
        let mut api = Api { api: 0xAA, features: EVENT_REMOVE, ioctls: 0 };
        let mut register = Register { start, len: size, mode: MISSING, ioctls: 0 };
        // SAFETY: each call reads and writes the one structure it is given.
        unsafe {
            rustix::ioctl::ioctl(&uffd, Updater::<API, Api>::new(&mut api)).context("UFFDIO_API")?;
            rustix::ioctl::ioctl(&uffd, Updater::<REGISTER, Register>::new(&mut register))
                .context("UFFDIO_REGISTER")?;
        }
        Ok(Self { address, size, uffd: Some(uffd) })
    }

    /// A private mapping of a file.
    pub fn of_file(path: &Path, size: u64) -> Result<Self> {
        let file = File::open(path)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes; nobody changes the file.
        let mapped =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), size as usize, access, MapFlags::PRIVATE, &file, 0) };
        let address: NonNull<u8> =
            NonNull::new(mapped.context("mapping a file")?.cast()).context("a file at address 0")?;
        Ok(Self { address, size, uffd: None })
    }

    /// Hands it over; the stream has to stay open.
    pub fn hand_over(&self, stream: &UnixStream) -> Result<()> {
        let base = self.address.as_ptr().expose_provenance();
        let size = self.size;
        let json = format!(
            r#"[{{"base_host_virt_addr":{base},"size":{size},"offset":0,"page_size":{PAGE},"page_size_kib":{PAGE}}}]"#
        );
        let fds = [self.uffd.as_ref().context("no userfaultfd")?.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(stream, &[IoSlice::new(json.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The first eight bytes of a page.
    pub fn first_word(&self, page: u64) -> u64 {
        assert!((page + 1) * PAGE <= self.size);
        // SAFETY: the page is inside the mapping, which begins at a page border.
        unsafe { self.address.add((page * PAGE) as usize).cast::<u64>().read_volatile() }
    }

    /// A page, for the minimal handler to copy.
    pub fn page(&self, page: u64) -> *const u8 {
        assert!((page + 1) * PAGE <= self.size);
        // SAFETY: the page is inside the mapping.
        unsafe { self.address.add((page * PAGE) as usize) }.as_ptr()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more. It is never at fault: whole pages are unmapped.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.size as usize) };
    }
}

/// Copies one page of `memory` to an address of another process.
pub fn copy_page(uffd: &OwnedFd, address: u64, memory: &Memory, page: u64) -> rustix::io::Result<()> {
    let src = memory.page(page).expose_provenance() as u64;
    let mut request = Copy { dst: address, src, len: PAGE, mode: 0, copy: 0 };
    // SAFETY: the kernel reads one page at `src`, where there is one, and writes another process's memory.
    unsafe { rustix::ioctl::ioctl(uffd, Updater::<COPY, Copy>::new(&mut request)) }
}
