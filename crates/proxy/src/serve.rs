//! Serving HTTP/1.1 on a listener: strict about time where a client costs something, patient where it does not.
//!
//! ```text
//!   connected ─► head ─► exchange ─► idle ─► head …        head: HEAD_LIMIT, idle: IDLE_LIMIT
//!                           └─► another protocol           exchange and other protocols: as long as they take
//! ```

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Extensions, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tower::{Service, ServiceExt};

use crate::dial::{Io, keep_alive};
use crate::lane::{Aside, Lane, Roaming};
use crate::{BUFFER, BodyError, HEADERS};

/// How long the head of a request may take.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection may be without a request; longer than any load balancer in front of us keeps it.
const IDLE_LIMIT: Duration = Duration::from_secs(620);
/// Pause after a failure to accept that says nothing about the next one, such as too many open files.
const BREATH: Duration = Duration::from_secs(1);

/// The address of the client, in the extensions of a request that came by TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// In the extensions of a request that came by TLS.
#[derive(Debug, Clone, Default)]
pub struct Secure(Arc<OnceLock<String>>);

impl Secure {
    /// The name of whom the client wanted to speak to, in lower case, if it gave one (SNI).
    pub fn name(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// Says the name, which is known only once there has been a handshake.
    pub(crate) fn wants(&self, name: &str) {
        let _ = self.0.set(name.to_owned());
    }
}

/// A connection that was taken.
pub struct Accepted {
    pub stream: Box<dyn Io>,
    /// Who is at its other end.
    pub peer: Option<Peer>,
    /// There if nobody on the way can read it.
    pub secure: Option<Secure>,
}

/// Where connections come from.
pub trait Listener: Send {
    /// The next connection.
    fn accept(&mut self) -> impl Future<Output = io::Result<Accepted>> + Send;
}

impl Listener for TcpListener {
    async fn accept(&mut self) -> io::Result<Accepted> {
        let (stream, peer) = TcpListener::accept(self).await?;
        // Answers are written whole; waiting to fill a segment would only delay them. A socket that refuses is closed anyway.
        let _ = stream.set_nodelay(true).and_then(|()| keep_alive(&stream));
        let peer = Some(Peer(peer.ip().to_canonical()));
        Ok(Accepted { stream: Box::new(Roaming::new(stream)), peer, secure: None })
    }
}

impl Listener for UnixListener {
    async fn accept(&mut self) -> io::Result<Accepted> {
        let (stream, _) = UnixListener::accept(self).await?;
        Ok(Accepted { stream: Box::new(Roaming::new(stream)), peer: None, secure: None })
    }
}

/// Serves until `stop`, then lets the exchanges that are open come to their end. Whoever drops this future cuts them, and
/// what became of them on the lane aside. Every request has its connection's [`Lane`] in its extensions.
pub async fn serve<L, S, B>(mut listener: L, service: S, stop: impl Future<Output = ()>)
where
    L: Listener,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible, Future: Send> + Clone + Send + 'static,
    B: Body<Data = Bytes, Error: Into<BodyError>> + Send + Unpin + 'static,
{
    let (stopping, stopped) = watch::channel(());
    let mut connections = JoinSet::new();
    let aside = Arc::new(Aside::default());
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            // One that panicked has said so where it did.
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok(Accepted { stream, peer, secure }) => {
                    let lane = Lane::new(&aside);
                    let known = Known { peer, secure, lane: lane.clone() };
                    let serving = connection(stream, known, service.clone(), stopped.clone());
                    connections.spawn(lane.drive(Box::pin(serving)));
                }
                // A client that was gone before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => tokio::time::sleep(BREATH).await,
            },
        }
    }
    drop(listener);
    drop(stopping);
    while connections.join_next().await.is_some() {}
}

/// What every request of a connection is told of it.
struct Known {
    peer: Option<Peer>,
    secure: Option<Secure>,
    lane: Lane,
}

impl Known {
    fn tell(&self, extensions: &mut Extensions) {
        if let Some(peer) = self.peer {
            extensions.insert(peer);
        }
        if let Some(secure) = &self.secure {
            extensions.insert(secure.clone());
        }
        extensions.insert(self.lane.clone());
    }
}

async fn connection<S, B>(stream: Box<dyn Io>, known: Known, service: S, mut stopped: watch::Receiver<()>)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible, Future: Send> + Clone + Send + 'static,
    B: Body<Data = Bytes, Error: Into<BodyError>> + Send + Unpin + 'static,
{
    let phase = Phase::default();
    let stream =
        TokioIo::new(Patient { stream, phase: phase.clone(), sleep: Box::pin(tokio::time::sleep(HEAD_LIMIT)) });
    let service = service_fn(move |mut request: Request<Incoming>| {
        let busy = phase.begin();
        known.tell(request.extensions_mut());
        let answer = service.clone().oneshot(request);
        async move {
            let answer = answer.await?;
            if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
                // Never idle again: what is spoken now is not ours.
                busy.for_good();
                return Ok::<_, Infallible>(answer.map(|body| During { body, _busy: None }));
            }
            Ok(answer.map(|body| During { body, _busy: Some(busy) }))
        }
    });
    // How long a head may take we measure ourselves: hyper has one limit for it and for idleness.
    let serving = http1::Builder::new()
        .header_read_timeout(None)
        .max_headers(HEADERS)
        .max_buf_size(BUFFER)
        .serve_connection(stream, service)
        .with_upgrades();
    let mut serving = pin!(serving);
    // What goes wrong here the client knows best: it left, or does not speak HTTP.
    tokio::select! {
        biased;
        _ = serving.as_mut() => return,
        _ = stopped.changed() => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = serving.await;
}

/// What a connection is doing, and since when.
#[derive(Clone)]
struct Phase(Arc<Mutex<Doing>>);

#[derive(Clone, Copy)]
enum Doing {
    Idle(Instant),
    Head(Instant),
    Exchange,
}

impl Default for Phase {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Doing::Head(Instant::now()))))
    }
}

impl Phase {
    fn lock(&self) -> MutexGuard<'_, Doing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) -> Busy {
        *self.lock() = Doing::Exchange;
        Busy(Some(self.clone()))
    }
}

/// An exchange, until it is dropped.
struct Busy(Option<Phase>);

impl Busy {
    fn for_good(mut self) {
        self.0 = None;
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(phase) = &self.0 {
            *phase.lock() = Doing::Idle(Instant::now());
        }
    }
}

/// A body that keeps its connection's exchange open.
struct During<B> {
    body: B,
    _busy: Option<Busy>,
}

impl<B: Body + Unpin> Body for During<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream on which nothing may be awaited for longer than what it is doing may take.
struct Patient {
    stream: Box<dyn Io>,
    phase: Phase,
    /// Until when there is nothing to be looked at, or earlier: nobody sets it anew for every exchange.
    sleep: Pin<Box<Sleep>>,
}

impl AsyncRead for Patient {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, phase, sleep } = self.get_mut();
        let polled = Pin::new(stream).poll_read(cx, buf);
        let mut doing = phase.lock();
        if polled.is_ready() {
            if let Doing::Idle(_) = *doing {
                *doing = Doing::Head(Instant::now());
            }
            return polled;
        }
        loop {
            let until = match *doing {
                Doing::Idle(since) => Some(since + IDLE_LIMIT),
                Doing::Head(since) => Some(since + HEAD_LIMIT),
                Doing::Exchange => None,
            };
            if let Some(until) = until.filter(|until| *until < sleep.deadline()) {
                sleep.as_mut().reset(until);
            }
            ready!(sleep.as_mut().poll(cx));
            let now = Instant::now();
            match until {
                Some(until) if until <= now => return Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                Some(until) => sleep.as_mut().reset(until),
                // However it goes on, it may be idle from now on for so long.
                None => sleep.as_mut().reset(now + IDLE_LIMIT),
            }
        }
    }
}

impl AsyncWrite for Patient {
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
