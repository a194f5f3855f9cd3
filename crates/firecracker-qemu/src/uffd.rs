//! The other end of the plugin's socket: takes the handshake and, for a Uffd restore, passes it on.
//!
//! The client's page-fault handler talks to this process, not to QEMU, so a handler that cannot be reached is an
//! ordinary fault of the load, and its peer credentials name the process it knows.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::Deserialize;
use tokio::io::Interest;

/// QEMU maps its memory some 20 ms after it starts.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// A handler whose queue stays full for this long is not coming.
const CONNECT: Duration = Duration::from_secs(5);

/// Why guest memory was not handed over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("QEMU did not hand over its memory in time")]
    Timeout,
    #[error("cannot read QEMU's handshake")]
    Receive(#[source] io::Error),
    #[error("QEMU ended before handing over its memory")]
    Ended,
    #[error("QEMU's handshake is malformed")]
    Malformed,
    #[error("cannot reach the page-fault handler at {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("cannot pass the userfaultfd to the page-fault handler")]
    Forward(#[source] io::Error),
}

/// What the plugin sent.
pub struct Handshake {
    json: Vec<u8>,
    uffd: OwnedFd,
    /// Address of guest memory in QEMU, where it is one mapping.
    pub base: u64,
}

#[derive(Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
}

/// Waits for the plugin's one message.
pub async fn receive(socket: &tokio::net::UnixStream, memory_size: u64) -> Result<Handshake, Error> {
    let take = socket.async_io(Interest::READABLE, || {
        let mut json = vec![0; 64 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = rustix::net::recvmsg(socket.as_fd(), &mut [IoSliceMut::new(&mut json)], &mut ancillary, flags)?;
        json.truncate(got.bytes);
        let uffd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        Ok((json, uffd))
    });
    let (json, uffd) =
        tokio::time::timeout(HANDSHAKE, take).await.map_err(|_| Error::Timeout)?.map_err(Error::Receive)?;
    let uffd = uffd.ok_or(Error::Ended)?;
    let regions: Vec<Region> = serde_json::from_slice(&json).map_err(|_| Error::Malformed)?;
    // Adjacent mappings read as one: the memory is contiguous, whatever the kernel made of it.
    let first = regions.first().ok_or(Error::Malformed)?;
    let base = first.base_host_virt_addr;
    let contiguous = regions.iter().all(|region| region.base_host_virt_addr.checked_sub(base) == Some(region.offset));
    if !contiguous || regions.iter().map(|region| region.size).sum::<u64>() != memory_size {
        return Err(Error::Malformed);
    }
    Ok(Handshake { json, uffd, base })
}

/// Connects to the client's page-fault handler. Done before QEMU is started, so that a wrong path costs nothing.
pub async fn connect(path: &Path) -> Result<UnixStream, Error> {
    let connecting = async { tokio::time::timeout(CONNECT, tokio::net::UnixStream::connect(path)).await? };
    let blocking = |stream: tokio::net::UnixStream| {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    };
    connecting.await.and_then(blocking).map_err(|source| Error::Connect { path: path.to_owned(), source })
}

/// Sends the handshake on, as the one message Firecracker sends. The socket must stay open for the microVM's life.
pub fn forward(handler: &UnixStream, handshake: &Handshake) -> Result<(), Error> {
    let fds = [handshake.uffd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    let sent = rustix::net::sendmsg(handler, &[IoSlice::new(&handshake.json)], &mut ancillary, SendFlags::NOSIGNAL)
        .map_err(|e| Error::Forward(e.into()))?;
    if sent < handshake.json.len() {
        return Err(Error::Forward(io::ErrorKind::WriteZero.into()));
    }
    Ok(())
}
