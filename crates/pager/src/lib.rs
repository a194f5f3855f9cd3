//! Serves the memory of one resumed microVM from its snapshot, page by page as the guest touches it.
//!
//! A VMM that resumes lazily maps empty memory, registers it with userfaultfd and sends the descriptor over a socket
//! ([`handshake`]). From then on every touch of an absent page waits for this process to fill it. It is a process of its
//! own, so that it outlives the agent that started it, and one per resume, so that a VMM that misbehaves harms no other.
//!
//! Threads, and what each may wait for:
//! - the one that called [`Pager::serve`] waits for the end: of the VMM, of the need for it, or by request;
//! - the *reader* takes events off the descriptor and serves the faults itself, the faulted page first and its neighbours
//!   after it, and looks for new faults between any two copies;
//! - the *fetchers* wait for pages that are not in their files yet ([`Fetch`]), where there may be such;
//! - the *helpers* take what the reader has no time for, and then the pages a resume like this one needed last time
//!   ([`WorkingSet`]).
//!
//! What is removed (a balloon, free page reporting) is zeros from then on. The kernel lets a removal go on as soon as its
//! event is read, so nothing is filled while events are read: whoever fills a page knows all removals there have been.
//!
//! A VMM may track writes by marks in its page table, as `firecracker-qemu` does. There a page with the snapshot's content
//! is filled with a mark in the same step, zeros too, and a page that was removed is filled without one: it differs from
//! the snapshot, so it is a written page.
//!
//! It refuses to serve what it cannot vouch for: a page that cannot be read or whose checksum is wrong ends it, and its
//! owner ends the VMM.

mod bitmap;
mod crew;
mod fetch;
mod fill;
pub mod handshake;
mod peer;
mod serve;
mod uffd;
mod working_set;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use fetch::{Fetch, FetchError};
pub use serve::Pager;
pub use uffd::AdoptError;
pub use working_set::{Error as WorkingSetError, WorkingSet};

/// Bytes of a page.
pub const PAGE: u64 = snapshot::PAGE_SIZE;

/// Bytes of a huge page, the other size that guest memory may be in.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Bytes, aligned, that are filled around a page that was asked for: what a fault costs beyond copying buys its
/// neighbours, and guests touch neighbours.
pub const CHUNK: u64 = 64 << 10;

/// What to serve, and to whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen for the VMM. Made, and removed when the VMM has connected.
    pub socket: PathBuf,
    /// The snapshot's header.
    pub header: PathBuf,
    /// The directory with the snapshot's generations.
    pub generations: PathBuf,
    /// The user that the VMM runs as: the socket becomes that user's, and no other may connect. `None` for whoever can.
    pub vmm_uid: Option<u32>,
    /// Pages to fill before they are asked for. A file that is not there or not usable is no error.
    pub prefetch: Option<PathBuf>,
    /// Where to write what was needed during [`record_for`](Self::record_for).
    pub record: Option<PathBuf>,
    /// How long after the handshake faults are recorded.
    pub record_for: Duration,
    /// How long the VMM may take to connect, and then to say what it has to say.
    pub patience: Duration,
}

/// Why a pager was no longer needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All of the snapshot's pages are in the VMM, and the rest is the kernel's to serve.
    Whole,
    /// The VMM is gone.
    VmmGone,
    /// It was asked to end.
    Stopped,
}

/// Why a pager could not go on. Whatever of the VMM is left has to be ended: it would wait for pages for ever.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The snapshot cannot be used at all.
    #[error("open the snapshot")]
    Open(#[source] snapshot::OpenError),
    /// The socket could not be made.
    #[error("listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The process lacks something of its own.
    #[error("set up the pager")]
    SetUp(#[source] io::Error),
    /// Nobody connected in time, or the one who did said nothing.
    #[error("the VMM did not hand over its memory in time")]
    Patience,
    /// The VMM's end was closed before all was said.
    #[error("the VMM hung up before it handed over its memory")]
    HungUp,
    /// The socket failed.
    #[error("take the VMM's handshake")]
    Receive(#[source] io::Error),
    /// Somebody else connected.
    #[error("user {0} connected, who is not the VMM")]
    Stranger(u32),
    /// What was sent is not acceptable.
    #[error("accept the VMM's handshake")]
    Handshake(#[from] handshake::Error),
    /// There must be one descriptor.
    #[error("the handshake came with {0} descriptors in place of one")]
    Descriptors(usize),
    /// The descriptor is not what it should be.
    #[error("use the VMM's descriptor")]
    Descriptor(#[from] AdoptError),
    /// The kernel gave no events.
    #[error("read the VMM's page faults")]
    Events(#[source] io::Error),
    /// A fault where there is no guest memory.
    #[error("a page fault at {0:#x}, outside of guest memory")]
    Outside(u64),
    /// An event that is none of ours to answer.
    #[error("event {number:#x} with flags {flags:#x}, which is not answered here")]
    Unexpected {
        /// As the kernel numbers events.
        number: u8,
        /// Of a page fault.
        flags: u64,
    },
    /// A stored page is unreadable or damaged.
    #[error("read {len} bytes of the snapshot at {offset:#x}")]
    Read {
        /// Where in guest memory.
        offset: u64,
        /// Bytes.
        len: usize,
        #[source]
        source: snapshot::OpenError,
    },
    /// A stored page is not in its file yet, and did not come.
    #[error("fetch the page of guest memory at {offset:#x}")]
    Fetch {
        /// Where in guest memory.
        offset: u64,
        #[source]
        source: FetchError,
    },
    /// The kernel did not take a page.
    #[error("fill the page of guest memory at {offset:#x}")]
    Fill {
        /// Where in guest memory.
        offset: u64,
        #[source]
        source: io::Error,
    },
    /// A thread of ours met a bug.
    #[error("a thread of the pager panicked")]
    Panicked,
    /// There was no memory for a page, for long.
    #[error("there is no memory for the page of guest memory at {0:#x}")]
    NoMemory(u64),
}

impl Error {
    /// What the process exits with: 10 for the snapshot, 11 for the host's side, 12 for what the VMM did, 13 for what did
    /// not come from elsewhere.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Open(_) | Self::Read { .. } => 10,
            Self::Listen { .. }
            | Self::SetUp(_)
            | Self::Receive(_)
            | Self::Events(_)
            | Self::Fill { .. }
            | Self::Panicked
            | Self::NoMemory(_) => 11,
            Self::Patience
            | Self::HungUp
            | Self::Stranger(_)
            | Self::Handshake(_)
            | Self::Descriptors(_)
            | Self::Descriptor(_)
            | Self::Outside(_)
            | Self::Unexpected { .. } => 12,
            Self::Fetch { .. } => 13,
        }
    }
}
