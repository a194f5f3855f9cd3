//! A file descriptor of ours that the runtime polls.

use rustix::fd::OwnedFd;
use std::io;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A non-blocking descriptor. Its inside is never handed out mutably, so it stays what was registered.
pub struct Polled(AsyncFd<OwnedFd>);

impl Polled {
    /// Makes the descriptor non-blocking (its open file description, that is: a pipe's other end is not affected).
    pub fn new(fd: OwnedFd, interest: Interest) -> io::Result<Polled> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: an `OwnedFd` is open and stays the same descriptor until it is dropped, which `AsyncFd` does after
        // deregistering it; nobody gets at it mutably in between.
        Ok(Polled(unsafe { AsyncFd::register_with_interest(fd, interest)? }))
    }

    /// Reads once, waiting for data. Dropping the future loses nothing.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?)).await
    }

    /// Writes once, waiting for room.
    pub async fn write(&self, data: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.ready(Interest::WRITABLE).await?;
            let closed = ready.ready().is_write_closed();
            match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
                Ok(result) => return result,
                // A full terminal whose other side is closed counts as writable, takes nothing and never will: waiting for
                // it would be asking again and again.
                Err(_) if closed => return Err(io::ErrorKind::BrokenPipe.into()),
                Err(_) => {}
            }
        }
    }

    /// The descriptor itself, for everything that does not wait.
    pub fn get(&self) -> &OwnedFd {
        self.0.get_ref()
    }
}
