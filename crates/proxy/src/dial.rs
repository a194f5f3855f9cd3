//! Dialling a destination, with the patience a program needs that was started a moment ago.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
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

fn readied(stream: TcpStream) -> io::Result<Box<dyn Io>> {
    stream.set_nodelay(true)?;
    keep_alive(&stream)?;
    Ok(Box::new(Roaming::new(stream)))
}

/// A connection of any kind.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// A connector that knows one destination, whatever the URI says.
#[derive(Clone)]
pub struct Dial {
    target: Arc<Target>,
    /// A connection that stands already: the next dial is this one.
    ready: Arc<Mutex<Option<TcpStream>>>,
}

impl Dial {
    pub fn new(target: Arc<Target>) -> Self {
        Self { target, ready: Arc::default() }
    }

    pub fn begin_with(&self, stream: TcpStream) {
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
    }
}

impl tower::Service<Uri> for Dial {
    type Response = TokioIo<Wire>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<Wire>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let target = self.target.clone();
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(async move {
            let stream = match ready {
                Some(stream) => readied(stream)?,
                None => dial(&target).await?,
            };
            Ok(TokioIo::new(Wire { stream, heard: Heard::default() }))
        })
    }
}

/// Bytes that ever came out of a connection. It travels with the errors of its exchanges.
#[derive(Debug, Clone, Default)]
pub struct Heard(Arc<AtomicU64>);

impl Heard {
    /// Whether nothing ever came.
    pub fn nothing(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

/// A connection that remembers whether anything came out of it.
pub struct Wire {
    stream: Box<dyn Io>,
    heard: Heard,
}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.heard.clone())
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.heard.0.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
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
