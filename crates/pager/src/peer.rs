//! The VMM's end of the socket: waiting for it, taking its handshake, noticing its death.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketAddrUnix, SocketFlags,
    SocketType, sockopt,
};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::Error;
use crate::handshake::{self, Regions};
use crate::uffd::Uffd;

/// Descriptors taken from one message at most. One is right; the rest are counted and closed.
const MAX_DESCRIPTORS: usize = 16;

/// A socket that waits for one VMM. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

/// A VMM that has connected.
pub struct Peer {
    stream: UnixStream,
    /// The process that connected, if it is in sight.
    process: Option<OwnedFd>,
}

/// What became of a wait.
pub enum Waited<T> {
    Came(T),
    /// The caller was asked to end instead.
    Stopped,
}

/// Until when to wait, and for what else.
pub struct Wait<'a> {
    pub deadline: Instant,
    pub stop: BorrowedFd<'a>,
}

impl Wait<'_> {
    /// Waits until `fd` can be read.
    fn readable(&self, fd: BorrowedFd<'_>) -> Result<Waited<()>, Error> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Patience);
            }
            let mut ready = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            match poll(&mut ready, Some(&timeout(left))) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::SetUp(error.into())),
                Ok(_) if !ready[1].revents().is_empty() => return Ok(Waited::Stopped),
                Ok(_) if !ready[0].revents().is_empty() => return Ok(Waited::Came(())),
                Ok(_) => {}
            }
        }
    }
}

impl Listener {
    /// Makes the socket, for the VMM's user alone from its first moment on.
    pub fn bind(path: &Path, vmm_uid: Option<u32>) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::Listen { path: path.to_owned(), source };
        let of_kernel = |e: Errno| failed(e.into());
        let address = SocketAddrUnix::new(path).map_err(of_kernel)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(of_kernel)?;
        // The file takes the mode that its socket has.
        rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600)).map_err(of_kernel)?;
        rustix::net::bind(&socket, &address).map_err(of_kernel)?;
        // From here on dropping it removes the file.
        let listener = Self { socket: UnixListener::from(socket), path: path.to_owned() };
        std::os::unix::fs::chown(path, vmm_uid, None).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        rustix::net::listen(&listener.socket, 1).map_err(of_kernel)?;
        Ok(listener)
    }

    /// Waits for the VMM, and lets nobody else connect after it.
    pub fn accept(self, vmm_uid: Option<u32>, wait: &Wait<'_>) -> Result<Waited<Peer>, Error> {
        loop {
            if let Waited::Stopped = wait.readable(self.socket.as_fd())? {
                return Ok(Waited::Stopped);
            }
            let stream = match self.socket.accept() {
                Ok((stream, _)) => stream,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(error) => return Err(Error::Receive(error)),
            };
            let peer = sockopt::socket_peercred(&stream).map_err(|e| Error::Receive(e.into()))?;
            let uid = peer.uid.as_raw();
            if vmm_uid.is_some_and(|expected| expected != uid) {
                return Err(Error::Stranger(uid));
            }
            // It may be in a namespace from which it cannot be seen, or gone already; then the socket tells.
            let process = pidfd_open(peer.pid, PidfdFlags::empty()).ok();
            return Ok(Waited::Came(Peer { stream, process }));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody else may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Peer {
    /// Waits for the whole handshake.
    pub fn receive(&self, wait: &Wait<'_>) -> Result<Waited<(Uffd, Regions)>, Error> {
        let mut json = Vec::new();
        let mut descriptors = Vec::new();
        loop {
            if let Waited::Stopped = wait.readable(self.stream.as_fd())? {
                return Ok(Waited::Stopped);
            }
            if self.receive_some(&mut json, &mut descriptors)? == 0 {
                return Err(Error::HungUp);
            }
            if descriptors.len() > 1 {
                return Err(Error::Descriptors(descriptors.len()));
            }
            match handshake::parse(&json) {
                Err(handshake::Error::Incomplete) if json.len() < handshake::MAX_BYTES => {}
                Err(handshake::Error::Incomplete) => return Err(handshake::Error::TooLong.into()),
                regions => {
                    let regions = regions?;
                    let descriptor = descriptors.pop().ok_or(Error::Descriptors(0))?;
                    return Ok(Waited::Came((Uffd::adopt(descriptor)?, regions)));
                }
            }
        }
    }

    /// Takes what has come. How many bytes.
    fn receive_some(&self, json: &mut Vec<u8>, descriptors: &mut Vec<OwnedFd>) -> Result<usize, Error> {
        let mut bytes = [0; 16 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = loop {
            match rustix::net::recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                got => break got.map_err(|e| Error::Receive(e.into()))?,
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(sent) = message {
                descriptors.extend(sent);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) {
            // The kernel has dropped those for which there was no room.
            return Err(Error::Descriptors(descriptors.len() + 1));
        }
        json.extend(&bytes[..got.bytes]);
        Ok(got.bytes)
    }

    /// Descriptors of which one becomes ready, as asked for here, when the VMM may be gone.
    pub fn signs_of_death(&self) -> impl Iterator<Item = PollFd<'_>> {
        // What it sends is nothing to us, so only a hang-up is waited for. A VMM that closes its socket and lives on is
        // no dead one, so where the process itself can be watched the socket is not.
        let process = self.process.as_ref().map(|process| PollFd::new(process, PollFlags::IN));
        let stream = self.process.is_none().then(|| PollFd::new(&self.stream, PollFlags::RDHUP));
        process.into_iter().chain(stream)
    }
}

/// For poll(2).
pub fn timeout(left: Duration) -> Timespec {
    // Longer than anyone waits.
    Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}
