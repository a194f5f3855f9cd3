//! The connections to one destination. None has a task of its own: who has sent a request drives its connection until the answer
//! has come to its end, and puts it back then, so that a request wakes nobody but the task that asked.
//!
//! ```text
//!   kept, or dialled ─► request ─► head of the answer ─┬► all of it is there already ───────────────► kept
//!                                                      ├► the rest, driven by who reads it ─► its end ─► kept
//!                                                      └► the request goes on ─► a task, then closed
//! ```
//!
//! An answer that comes before its request is at its end is the exception: who reads the one may wait for who sends the other.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::dial::{self, Heard, Target, Wire};
use crate::{BUFFER, BodyError, BoxBody, Error, HEADERS, boxed};

/// How often a request is sent on a connection that was kept, and may turn out to be closed.
const TRIES: usize = 3;

/// A destination, and the connections to it on which nothing is going on.
pub struct Pool {
    target: Target,
    /// How long they are kept.
    idle: Duration,
    kept: Mutex<Kept>,
    /// A connection that stands already: the next dial is this one.
    ready: Mutex<Option<TcpStream>>,
}

#[derive(Default)]
struct Kept {
    /// Those that have waited for longest are first, and used last.
    connections: Vec<(Instant, Box<Connection>)>,
    sweeper: Option<AbortHandle>,
}

impl Pool {
    pub fn new(target: Target, idle: Duration) -> Self {
        Self { target, idle, kept: Mutex::default(), ready: Mutex::default() }
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    pub fn begin_with(&self, stream: TcpStream) {
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
    }

    /// Sends a request and hands back its answer as soon as the head is there. What a connection that was kept did not take
    /// is sent on another; what it took without an answer is too, if nothing is lost by it.
    pub async fn send(
        self: &Arc<Self>,
        request: Request<BoxBody>,
        may_repeat: bool,
    ) -> Result<Response<BoxBody>, Error> {
        let (mut request, open) = Sending::of(request);
        for _ in 0..TRIES {
            let Some(connection) = self.take() else { break };
            let again = may_repeat.then(|| Sending::without_body(&request));
            let mut error = match connection.exchange(request, &open, self).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            request = match (error.take_message(), again) {
                (Some(unsent), _) => unsent,
                (None, Some(again)) if crate::was_closed(error.error()) => again,
                (None, _) => return Err(Error::Exchange(self.target.clone(), error.into_error())),
            };
        }
        let connection = self.open().await?;
        let heard = connection.heard.clone();
        connection.exchange(request, &open, self).await.map_err(|error| {
            let error = error.into_error();
            if heard.nothing() && crate::was_reset(&error) {
                Error::Nobody(self.target.clone(), error)
            } else {
                Error::Exchange(self.target.clone(), error)
            }
        })
    }

    async fn open(&self) -> Result<Box<Connection>, Error> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = match ready {
            Some(stream) => dial::readied(stream),
            None => dial::dial(&self.target).await,
        };
        let stream = stream.map_err(|source| Error::Connect(self.target.clone(), source))?;
        let heard = Heard::default();
        let wire = TokioIo::new(Wire { stream, heard: heard.clone() });
        let begun = Builder::new().max_headers(HEADERS).max_buf_size(BUFFER).handshake(wire).await;
        let (sender, driver) = begun.map_err(|error| Error::Exchange(self.target.clone(), error))?;
        Ok(Box::new(Connection { sender, driver: Some(Box::pin(driver.with_upgrades())), heard }))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Box<Connection>> {
        self.kept().connections.pop().map(|(_, connection)| connection)
    }

    /// Keeps a connection on which nothing goes on any more.
    fn keep(self: &Arc<Self>, mut connection: Box<Connection>) {
        // Whoever uses it next shall not wake who used it last.
        connection.drive(&mut Context::from_waker(Waker::noop()));
        if !connection.sender.is_ready() {
            return;
        }
        let mut kept = self.kept();
        kept.connections.push((Instant::now(), connection));
        if kept.sweeper.as_ref().is_none_or(AbortHandle::is_finished) {
            kept.sweeper = Some(tokio::spawn(sweep(Arc::downgrade(self))).abort_handle());
        }
    }
}

/// Closes connections that were kept for long enough, for as long as there are any.
async fn sweep(pool: Weak<Pool>) {
    loop {
        let next = {
            let Some(pool) = pool.upgrade() else { return };
            let mut kept = pool.kept();
            kept.connections.retain(|(since, _)| since.elapsed() < pool.idle);
            match kept.connections.first() {
                Some((since, _)) => *since + pool.idle,
                None => {
                    kept.sweeper = None;
                    return;
                }
            }
        };
        tokio::time::sleep_until(next).await;
    }
}

/// One connection, for one exchange after the other. It is closed when it is dropped.
struct Connection {
    sender: SendRequest<Sending>,
    /// `None` once it has come to its end.
    driver: Option<Driver>,
    heard: Heard,
}

type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

impl Connection {
    /// Has it do what can be done now, and its task woken for the rest. What goes wrong is told to who waits for an answer.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if self.driver.as_mut().is_some_and(|driver| driver.as_mut().poll(cx).is_ready()) {
            self.driver = None;
        }
    }

    async fn exchange(
        mut self: Box<Self>,
        request: Request<Sending>,
        open: &Weak<()>,
        pool: &Arc<Pool>,
    ) -> Result<Response<BoxBody>, TrySendError<Request<Sending>>> {
        let mut answer = pin!(tokio::task::unconstrained(self.sender.try_send_request(request)));
        let answer = poll_fn(|cx| {
            self.drive(cx);
            // It comes of the driving and of nothing else, so that nobody has to be woken for it.
            answer.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        })
        .await?;
        let switches = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
        Ok(answer.map(|body| {
            if self.sender.is_ready() {
                pool.keep(self);
                return boxed(body);
            }
            match self.driver.take_if(|_| open.strong_count() > 0 || switches) {
                Some(driver) => {
                    tokio::spawn(driver);
                    boxed(body)
                }
                None => boxed(Driven { body, connection: Some(self), pool: Arc::downgrade(pool) }),
            }
        }))
    }
}

/// The body of an answer, and the connection that it comes from.
struct Driven {
    body: Incoming,
    connection: Option<Box<Connection>>,
    pool: Weak<Pool>,
}

impl Body for Driven {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let Self { body, connection, pool } = &mut *self;
        // As with the head: what there is of it has come of the driving.
        let quietly = &mut Context::from_waker(Waker::noop());
        let mut polled = Pin::new(&mut *body).poll_frame(quietly);
        if polled.is_pending()
            && let Some(connection) = connection
        {
            connection.drive(cx);
            polled = Pin::new(&mut *body).poll_frame(quietly);
        }
        if body.is_end_stream() || matches!(polled, Poll::Ready(None)) {
            let connection = connection.take().filter(|connection| connection.sender.is_ready());
            if let (Some(connection), Some(pool)) = (connection, pool.upgrade()) {
                pool.keep(connection);
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a request, of which can be told from outside whether more of it is to come.
struct Sending {
    body: BoxBody,
    _open: Option<Arc<()>>,
}

impl Sending {
    /// The request, and what there is something strong of for as long as its body has not come to its end.
    fn of(request: Request<BoxBody>) -> (Request<Self>, Weak<()>) {
        let open = if request.body().is_end_stream() { None } else { Some(Arc::new(())) };
        let told = open.as_ref().map(Arc::downgrade).unwrap_or_default();
        (request.map(|body| Self { body, _open: open }), told)
    }

    fn without_body(request: &Request<Self>) -> Request<Self> {
        let mut copy = Request::new(Self { body: boxed(Empty::new()), _open: None });
        copy.method_mut().clone_from(request.method());
        copy.uri_mut().clone_from(request.uri());
        copy.headers_mut().clone_from(request.headers());
        copy
    }
}

impl Body for Sending {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
