//! The tracker on memory of this process, marked by the plugin's own code.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;

use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags};

use super::*;
use crate::memory::Memory;

#[path = "../plugin/maps.rs"]
mod maps;
#[path = "../plugin/register.rs"]
mod register;

const PAGE: u64 = 4096;
const PAGES: u64 = 16;
const NONE: [u64; 0] = [];

/// Guest memory as QEMU has it: mapped, and registered by the plugin.
struct Guest {
    memory: Memory,
    address: NonNull<u8>,
    _uffd: OwnedFd,
}

impl Guest {
    /// With page 3 written before it is tracked.
    fn new() -> (Self, Tracker) {
        let memory = Memory::create(PAGES * PAGE).unwrap();
        let length = usize::try_from(memory.size()).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let mapped =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, access, MapFlags::SHARED, memory.file(), 0) };
        let address = NonNull::new(mapped.unwrap().cast()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        write(address, 3);
        let modes = register::Modes { missing: false, track: true };
        let uffd = register::hand_over(&OwnedFd::from(theirs), crate::memory::NAME, modes).unwrap();
        ours.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().unwrap();
        let handshake = runtime.block_on(async {
            let socket = tokio::net::UnixStream::from_std(ours).unwrap();
            crate::uffd::receive(&socket, PAGES * PAGE).await.unwrap()
        });
        assert_eq!(handshake.base, address.as_ptr().expose_provenance() as u64);
        let mapped = Mapped { pid: std::process::id(), base: handshake.base };
        let tracker = Tracker::new(mapped, memory.size()).unwrap();
        (Self { memory, address, _uffd: uffd }, tracker)
    }

    fn write(&self, page: usize) {
        write(self.address, page);
    }

    fn read(&self, page: usize) -> u8 {
        // SAFETY: the page is inside the mapping, which lives as long as `self`.
        unsafe { self.address.add(page * 4096).read_volatile() }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let length = usize::try_from(self.memory.size()).unwrap();
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), length) }.unwrap();
    }
}

fn write(address: NonNull<u8>, page: usize) {
    // SAFETY: the page is inside a mapping that is still there.
    unsafe { address.add(page * 4096).write_volatile(7) };
}

fn pages(ranges: &[Range<u64>]) -> Vec<u64> {
    ranges.iter().flat_map(|range| range.start / PAGE..range.end / PAGE).collect()
}

#[test]
fn written_pages_are_told_until_they_are_saved() {
    let (guest, mut tracker) = Guest::new();
    assert_eq!(pages(&tracker.written().unwrap()), NONE, "what was there before is not written");
    guest.write(1);
    guest.write(3);
    assert_eq!(guest.read(5), 0);
    assert_eq!(guest.read(3), 7);
    assert_eq!(pages(&tracker.written().unwrap()), [1, 3], "reading is not writing");
    guest.write(4);
    assert_eq!(pages(&tracker.written().unwrap()), [1, 3, 4], "nobody has saved the first two");
    tracker.saved();
    assert_eq!(pages(&tracker.written().unwrap()), NONE);
    guest.write(4);
    assert_eq!(pages(&tracker.written().unwrap()), [4], "a page can be written again");
}

#[test]
fn written_pages_that_lost_their_place_are_written_all_the_same() {
    let (guest, mut tracker) = Guest::new();
    guest.write(3);
    guest.write(9);
    // Reclaim does this to a page under pressure, but not on demand.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for page in [3, 9] {
        rustix::fs::fallocate(guest.memory.file().as_fd(), punch, page * PAGE, PAGE).unwrap();
    }
    assert_eq!(pages(&tracker.written().unwrap()), [3, 9]);
    tracker.saved();
    assert_eq!(pages(&tracker.written().unwrap()), NONE);
    guest.write(3);
    assert_eq!(pages(&tracker.written().unwrap()), [3]);
}

#[test]
fn union_is_sorted_and_disjoint() {
    assert_eq!(union(vec![8..12, 0..4, 4..6, 10..20, 30..31]), vec![0..6, 8..20, 30..31]);
    assert_eq!(union(Vec::new()), Vec::new());
}
