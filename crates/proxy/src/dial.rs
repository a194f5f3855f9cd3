//! Dialling a destination, with the patience a program needs that was started a moment ago.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::lane::Roaming;

/// Dials of one connection; after the n-th failure n × [`PAUSE`] passes.
const DIALS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(100);
/// How long one dial may take. A guest on the same host answers in microseconds or not at all.
const LIMIT: Duration = Duration::from_secs(5);
/// A connection this quiet is asked whether its other end is still there.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A host by its name, with a port.
    Name(String),
    /// A socket file.
    Socket(PathBuf),
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}

/// Has the kernel notice that the other end of a connection is gone, however quiet it is.
pub fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE)?;
    Ok(())
}

/// A connection to the destination, once one of [`DIALS`] succeeds.
pub async fn dial(target: &Target) -> io::Result<Box<dyn Io>> {
    let mut attempt = 1;
    loop {
        let result = match tokio::time::timeout(LIMIT, once(target)).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        match result {
            Ok(stream) => return Ok(stream),
            Err(error) if attempt == DIALS => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE * attempt).await,
        }
        attempt += 1;
    }
}

async fn once(target: &Target) -> io::Result<Box<dyn Io>> {
    let stream = match target {
        Target::Address(address) => TcpStream::connect(address).await?,
        Target::Name(name) => TcpStream::connect(name.as_str()).await?,
        Target::Socket(path) => return Ok(Box::new(Roaming::new(UnixStream::connect(path).await?))),
    };
    readied(stream)
}

/// A connection that stands, as those are that we dial.
pub fn readied(stream: TcpStream) -> io::Result<Box<dyn Io>> {
    stream.set_nodelay(true)?;
    keep_alive(&stream)?;
    Ok(Box::new(Roaming::new(stream)))
}

/// A connection of any kind.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Whether anything ever came out of a connection.
#[derive(Clone, Default)]
pub struct Heard(Arc<AtomicBool>);

impl Heard {
    /// Whether nothing ever came.
    pub fn nothing(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }
}

/// A connection that remembers whether anything came out of it.
pub struct Wire {
    pub stream: Box<dyn Io>,
    pub heard: Heard,
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.heard.0.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
