//! A VMM as far as its memory goes: maps it, registers it, hands it over, touches it.

use std::io::{IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr::NonNull;

use pager::{HUGE_PAGE, PAGE};
use rustix::fs::MemfdFlags;
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// What kind of memory it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As Firecracker has it.
    Anonymous,
    /// As `firecracker-qemu` has it.
    Shared,
    /// As `firecracker-qemu` has it when it tracks writes.
    Tracked,
    /// As Firecracker has it with huge pages.
    Huge,
}

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

const API: Opcode = opcode::read_write::<Api>(0xAA, 0x3F);
const REGISTER: Opcode = opcode::read_write::<Register>(0xAA, 0x00);
const WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(0xAA, 0x06);
const UNREGISTER: Opcode = opcode::read::<[u64; 2]>(0xAA, 0x01);
const EVENT_REMOVE: u64 = 1 << 3;
/// WP faults, WP of shared memory, of what is not there, and without faults.
const TRACK: u64 = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15;

/// Memory under userfaultfd.
pub struct Vmm {
    pub kind: Kind,
    address: NonNull<u8>,
    size: usize,
    uffd: OwnedFd,
    /// Kept open, as VMMs do.
    stream: Option<UnixStream>,
}

// SAFETY: the memory is shared by design, and threads access it through volatile copies only.
unsafe impl Sync for Vmm {}
// SAFETY: nothing of it belongs to a thread.
unsafe impl Send for Vmm {}

impl Vmm {
    /// `None` if the machine has no such memory, which is said.
    pub fn new(kind: Kind, size: u64) -> Option<Self> {
        let length = usize::try_from(size).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let null = std::ptr::null_mut();
        let mapped = match kind {
            Kind::Anonymous | Kind::Huge => {
                let huge = if kind == Kind::Huge { MapFlags::HUGETLB } else { MapFlags::empty() };
                // SAFETY: a new mapping where the kernel likes.
                unsafe { rustix::mm::mmap_anonymous(null, length, access, MapFlags::PRIVATE | huge) }
            }
            Kind::Shared | Kind::Tracked => {
                let memory = rustix::fs::memfd_create("pager-test", MemfdFlags::CLOEXEC).unwrap();
                rustix::fs::ftruncate(&memory, size).unwrap();
                // SAFETY: a new mapping where the kernel likes.
                unsafe { rustix::mm::mmap(null, length, access, MapFlags::SHARED, &memory, 0) }
            }
        };
        let address: NonNull<u8> = match mapped {
            Err(error) if kind == Kind::Huge => {
                let why = format!("skipped for {kind:?}: no {size} bytes of huge pages here ({error})\n");
                std::io::stderr().write_all(why.as_bytes()).unwrap();
                return None;
            }
            mapped => NonNull::new(mapped.unwrap().cast()).unwrap(),
        };
        // SAFETY: only the mapping above is registered with it.
        let uffd = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }.unwrap();
        let tracked = kind == Kind::Tracked;
        let features = EVENT_REMOVE | if tracked { TRACK } else { 0 };
        let start = address.as_ptr().expose_provenance() as u64;
        let mut api = Api { api: 0xAA, features, ioctls: 0 };
        let mut register = Register { start, len: size, mode: 1 | u64::from(tracked) << 1, ioctls: 0 };
        // SAFETY: each call reads and writes the one structure it is given.
        unsafe {
            rustix::ioctl::ioctl(&uffd, Updater::<API, Api>::new(&mut api)).unwrap();
            rustix::ioctl::ioctl(&uffd, Updater::<REGISTER, Register>::new(&mut register)).unwrap();
            if tracked {
                let mut protect = WriteProtect { start, len: size, mode: 1 };
                rustix::ioctl::ioctl(&uffd, Updater::<WRITEPROTECT, WriteProtect>::new(&mut protect)).unwrap();
            }
        }
        Some(Self { kind, address, size: length, uffd, stream: None })
    }

    pub fn page_size(&self) -> u64 {
        if self.kind == Kind::Huge { HUGE_PAGE } else { PAGE }
    }

    fn base(&self) -> u64 {
        self.address.as_ptr().expose_provenance() as u64
    }

    /// One region.
    pub fn handshake(&self) -> String {
        let (base, size, page) = (self.base(), self.size as u64, self.page_size());
        format!(
            r#"[{{"base_host_virt_addr":{base},"size":{size},"offset":0,"page_size":{page},"page_size_kib":{page}}}]"#
        )
    }

    /// Two regions: the lower addresses have the upper half of the memory.
    pub fn crossed_handshake(&self) -> String {
        let (low, high, half) = (self.base(), self.base() + self.size as u64 / 2, self.size as u64 / 2);
        let region = |base, offset| {
            format!(r#"{{"base_host_virt_addr":{base},"size":{half},"offset":{offset},"page_size":{PAGE}}}"#)
        };
        format!("[{},{}]", region(low, half), region(high, 0))
    }

    /// Gives the memory back to the kernel, so that nobody waits for a pager any more.
    pub fn unregister(&self) {
        let mut range = [self.base(), self.size as u64];
        // SAFETY: UFFDIO_UNREGISTER reads one `uffdio_range`, which is two words.
        unsafe { rustix::ioctl::ioctl(&self.uffd, Updater::<UNREGISTER, [u64; 2]>::new(&mut range)) }.unwrap();
    }

    pub fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Connects and hands the memory over.
    pub fn connect(&mut self, socket: &Path) {
        let handshake = self.handshake();
        self.connect_with(socket, &handshake);
    }

    pub fn connect_with(&mut self, socket: &Path, handshake: &str) {
        let stream = UnixStream::connect(socket).unwrap();
        send(&stream, handshake.as_bytes(), &[self.uffd()]);
        self.stream = Some(stream);
    }

    /// Reads a page, which waits for the pager if it is absent.
    pub fn read(&self, page: u64) -> [u8; PAGE as usize] {
        let mut content = [0; PAGE as usize];
        let from = self.at(page);
        for (at, byte) in content.iter_mut().enumerate() {
            // SAFETY: the page is inside the mapping, which lives as long as `self`.
            *byte = unsafe { from.add(at).read_volatile() };
        }
        content
    }

    /// Reads the first byte of a page.
    pub fn touch(&self, page: u64) -> u8 {
        // SAFETY: the page is inside the mapping, which lives as long as `self`.
        unsafe { self.at(page).read_volatile() }
    }

    /// Fills a page with a byte.
    pub fn write(&self, page: u64, byte: u8) {
        // SAFETY: the page is inside the mapping, which lives as long as `self`.
        (0..PAGE as usize).for_each(|at| unsafe { self.at(page).add(at).write_volatile(byte) });
    }

    /// Writes the first byte of a page, which need not be there before.
    pub fn poke(&self, page: u64, byte: u8) {
        // SAFETY: the page is inside the mapping, which lives as long as `self`.
        unsafe { self.at(page).write_volatile(byte) };
    }

    /// Gives pages up, as a balloon does: the next access finds zeros.
    pub fn remove(&self, first: u64, pages: u64) {
        let length = usize::try_from(pages * PAGE).unwrap();
        let advice = match self.kind {
            Kind::Anonymous | Kind::Huge => Advice::LinuxDontNeed,
            Kind::Shared | Kind::Tracked => Advice::LinuxRemove,
        };
        // SAFETY: the pages are inside the mapping, and nothing refers into it.
        unsafe { rustix::mm::madvise(self.at(first).as_ptr().cast(), length, advice) }.unwrap();
    }

    fn at(&self, page: u64) -> NonNull<u8> {
        let at = usize::try_from(page * PAGE).unwrap();
        assert!(at < self.size);
        // SAFETY: it is inside the mapping.
        unsafe { self.address.add(at) }
    }

    /// Pages that are in memory.
    pub fn resident(&self) -> u64 {
        let mut status = vec![0_u8; self.size.div_ceil(PAGE as usize)];
        // SAFETY: mincore writes a byte for each page.
        let done = unsafe { libc::mincore(self.address.as_ptr().cast(), self.size, status.as_mut_ptr()) };
        assert_eq!(done, 0);
        status.iter().map(|byte| u64::from(byte & 1)).sum()
    }

    /// Pages without the mark, in order: what a tracker takes for written.
    pub fn written(&self) -> Vec<u64> {
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut found = vec![[0_u64; 3]; self.size / PAGE as usize];
        // size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, return
        let mut request = [0_u64; 12];
        request[0] = size_of_val(&request) as u64;
        (request[2], request[3]) = (self.base(), self.base() + self.size as u64);
        (request[5], request[6]) = (found.as_mut_ptr().expose_provenance() as u64, found.len() as u64);
        (request[9], request[11]) = (1 << 1, 1 << 1);
        // SAFETY: PAGEMAP_SCAN reads one `pm_scan_arg` and writes at most `vec_len` regions of three words.
        let count = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&pagemap), 0xC060_6610, &mut request) };
        let count = usize::try_from(count).expect("PAGEMAP_SCAN");
        let base = self.base();
        found[..count].iter().flat_map(|[start, end, _]| (start - base) / PAGE..(end - base) / PAGE).collect()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.size) }.unwrap();
    }
}

/// One message with descriptors.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}
