//! The suite's own page-fault handler: one page per fault, out of a memory file.

use std::collections::HashSet;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::Value;

const PAGE: u64 = 4096;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

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

const COPY_MODE_WP: u64 = 1 << 1;
const COPY: Opcode = opcode::read_write::<Copy>(0xAA, 0x03);
const ZEROPAGE: Opcode = opcode::read_write::<ZeroPage>(0xAA, 0x04);

/// A handler that waits for one microVM and serves it until that ends.
pub struct Pager {
    socket: PathBuf,
    faults: Arc<AtomicU64>,
    handshake: Arc<Mutex<Option<Value>>>,
}

impl Pager {
    pub fn start(socket: PathBuf, memory: &Path) -> Self {
        let listener = UnixListener::bind(&socket).unwrap();
        let memory = File::open(memory).unwrap();
        let (faults, handshake) = (Arc::<AtomicU64>::default(), Arc::<Mutex<Option<Value>>>::default());
        let (count, regions) = (Arc::clone(&faults), Arc::clone(&handshake));
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let (uffd, json) = receive(&stream);
            *regions.lock().unwrap() = Some(json.clone());
            serve(&uffd, &stream, &json, &memory, &count);
        });
        Self { socket, faults, handshake }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Pages supplied so far.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// What the microVM sent.
    pub fn handshake(&self) -> Value {
        self.handshake.lock().unwrap().clone().expect("the handshake was received")
    }
}

/// One message: the regions in JSON and exactly one descriptor.
fn receive(stream: &UnixStream) -> (OwnedFd, Value) {
    let mut json = vec![0; 64 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut json)];
    let got = rustix::net::recvmsg(stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(descriptors.len(), 1, "exactly one descriptor comes with the handshake");
    let json = serde_json::from_slice(&json[..got.bytes]).unwrap();
    (descriptors.pop().unwrap(), json)
}

fn serve(uffd: &OwnedFd, stream: &UnixStream, regions: &Value, memory: &File, faults: &AtomicU64) {
    let mut removed = HashSet::new();
    let mut waiting = Vec::new();
    loop {
        let mut ready = [PollFd::new(uffd, PollFlags::IN), PollFd::new(stream, PollFlags::IN)];
        // What was refused is tried again though no event comes: the kernel refuses until whoever removed has gone on, and
        // that is after its event was read.
        let soon = (!waiting.is_empty()).then_some(Timespec { tv_sec: 0, tv_nsec: 1_000_000 });
        poll(&mut ready, soon.as_ref()).unwrap();
        if !ready[1].revents().is_empty() {
            return;
        }
        let mut events = [0; 32 * 64];
        let read = match rustix::io::read(uffd, &mut events) {
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN) => 0,
            Err(_) => return,
        };
        let word = |event: &[u8], at: usize| u64::from_ne_bytes(event[at..at + 8].try_into().unwrap());
        for event in events[..read].chunks_exact(32) {
            match event[0] {
                EVENT_PAGEFAULT => waiting.push(word(event, 16) & !(PAGE - 1)),
                EVENT_REMOVE => removed.extend((word(event, 8)..word(event, 16)).step_by(PAGE as usize)),
                other => panic!("unexpected event {other:#x}"),
            }
        }
        // An unread removal makes the kernel refuse; the page waits for the next round.
        waiting.retain(|address| {
            let supplied = match removed.contains(address) {
                true => zero(uffd, *address),
                false => copy(uffd, *address, &page(regions, memory, *address)),
            };
            faults.fetch_add(u64::from(supplied), Ordering::Relaxed);
            !supplied
        });
    }
}

/// The contents of the page at `address`.
fn page(regions: &Value, memory: &File, address: u64) -> [u8; PAGE as usize] {
    let field = |region: &Value, name: &str| region[name].as_u64().unwrap();
    let inside = |region: &Value| {
        let offset = address.checked_sub(field(region, "base_host_virt_addr"))?;
        (offset < field(region, "size")).then(|| field(region, "offset") + offset)
    };
    let at = regions.as_array().unwrap().iter().find_map(inside).expect("the fault is in a region");
    let mut page = [0; PAGE as usize];
    memory.read_exact_at(&mut page, at).unwrap();
    page
}

fn copy(uffd: &OwnedFd, address: u64, page: &[u8; PAGE as usize]) -> bool {
    let src = page.as_ptr().expose_provenance() as u64;
    let mut outcome = Ok(());
    // Write-protected, so that a page the guest only reads does not count as written; where nobody tracks by that, the
    // kernel refuses.
    for mode in [COPY_MODE_WP, 0] {
        let mut request = Copy { dst: address, src, len: PAGE, mode, copy: 0 };
        // SAFETY: UFFDIO_COPY reads `len` bytes at `src`, which is that long, into another process.
        outcome = unsafe { rustix::ioctl::ioctl(uffd, Updater::<COPY, Copy>::new(&mut request)) };
        if outcome != Err(rustix::io::Errno::INVAL) {
            break;
        }
    }
    done(outcome)
}

fn zero(uffd: &OwnedFd, address: u64) -> bool {
    let mut request = ZeroPage { start: address, len: PAGE, mode: 0, zeropage: 0 };
    // SAFETY: UFFDIO_ZEROPAGE touches only the other process's memory.
    done(unsafe { rustix::ioctl::ioctl(uffd, Updater::<ZEROPAGE, ZeroPage>::new(&mut request)) })
}

fn done(outcome: rustix::io::Result<()>) -> bool {
    match outcome {
        // Somebody else faulted it in at the same time, or its process is ending.
        Ok(()) | Err(rustix::io::Errno::EXIST | rustix::io::Errno::SRCH) => true,
        Err(rustix::io::Errno::AGAIN) => false,
        Err(error) => panic!("cannot supply a page: {error}"),
    }
}
