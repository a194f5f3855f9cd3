//! Two lanes through one listener, so that much does not slow what is urgent.
//!
//! A runtime's threads take turns between their tasks, and a task that carries a flood uses all of each turn: whoever shares
//! the threads waits for it, a terminal's key as well. So floods have threads of their own, and the kernel, which can
//! interrupt them, takes the turns. A connection changes its lane as a whole, between two polls, when what it is asked for
//! turns out to be of the other kind; its socket follows it ([`Roaming`]).
//!
//! ```text
//!   connection ─► request for the platform ─► stays ─────────► its runtime's threads
//!        └──────► request for a user's port ─► aside() ──────► the threads aside, until back()
//! ```

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use http::Extensions;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

/// A number for every lane aside; [`HOME`] is every other thread.
type Number = u32;
const HOME: Number = 0;

thread_local! {
    static HERE: Cell<Number> = const { Cell::new(HOME) };
}

fn here() -> Number {
    HERE.get()
}

/// The threads aside of one listener, made when they are first needed.
pub(crate) struct Aside {
    number: Number,
    runtime: OnceLock<Option<Runtime>>,
}

impl Default for Aside {
    fn default() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(HOME + 1);
        Self { number: NEXT.fetch_add(1, Ordering::Relaxed), runtime: OnceLock::new() }
    }
}

impl Aside {
    /// `None` where the machine has no more threads to give: everything stays on the one lane then.
    fn handle(&self) -> Option<&Handle> {
        let number = self.number;
        let made = self.runtime.get_or_init(|| {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(threads_aside());
            builder.thread_name("wrenn-ports").on_thread_start(move || HERE.set(number)).enable_all().build().ok()
        });
        made.as_ref().map(Runtime::handle)
    }
}

/// How many threads a listener has aside: half as many as there are processors, so that no flood has all of them.
pub fn threads_aside() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().div_ceil(2))
}

impl Drop for Aside {
    fn drop(&mut self) {
        // Not by its own drop, which would wait for its threads where nothing may be waited for.
        if let Some(runtime) = self.runtime.take().flatten() {
            runtime.shutdown_background();
        }
    }
}

/// Has the work of the connection of this request done aside from now on; what is spawned after this is there too. Nothing
/// where no [`Lane`] is among the extensions.
pub async fn aside(extensions: &Extensions) {
    if let Some(lane) = extensions.get::<Lane>() {
        lane.aside().await;
    }
}

/// Has it done where the listener is.
pub async fn back(extensions: &Extensions) {
    if let Some(lane) = extensions.get::<Lane>() {
        lane.on(false).await;
    }
}

/// Where a connection's work is done. It is in the extensions of every request that [`serve`](crate::serve()) hands out, to be
/// used by the service itself and not by a task that it spawned.
#[derive(Clone)]
pub struct Lane {
    aside: Arc<Aside>,
    home: Handle,
    wants_aside: Arc<AtomicBool>,
}

impl Lane {
    /// Of a connection that begins here.
    pub(crate) fn new(aside: &Arc<Aside>) -> Self {
        Self { aside: aside.clone(), home: Handle::current(), wants_aside: Arc::default() }
    }

    async fn aside(&self) {
        if self.aside.handle().is_some() {
            self.on(true).await;
        }
    }

    /// Does this where the listener is, wherever the connection is, so that nothing that outlives it is bound to the threads
    /// aside. It goes on if the caller leaves.
    pub async fn at_home<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        if here() != self.aside.number {
            return work.await;
        }
        match self.home.spawn(work).await {
            Ok(done) => done,
            // It was not cancelled, for nobody else has it; and a panic is its caller's.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    async fn on(&self, aside: bool) {
        poll_fn(|_| {
            if (here() == self.aside.number) == aside {
                return Poll::Ready(());
            }
            // Seen by who polls us, as soon as we return; then we are polled again, over there.
            self.wants_aside.store(aside, Ordering::Relaxed);
            Poll::Pending
        })
        .await;
    }

    /// Runs a connection to its end, on whichever lane it wants to be.
    pub(crate) async fn drive(self, mut connection: Connection) {
        loop {
            let is_aside = self.wants_aside.load(Ordering::Relaxed);
            let leg = Leg { connection: Some(connection), wants: self.wants_aside.clone(), is_aside };
            let left = match self.aside.handle().filter(|_| is_aside) {
                None => leg.await,
                // One that panicked has said so where it did, and is over.
                Some(handle) => Aborting(handle.spawn(leg)).await,
            };
            match left {
                Some(unfinished) => connection = unfinished,
                None => return,
            }
        }
    }
}

type Connection = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A connection on one lane: until its end, or until it wants to be on the other.
struct Leg {
    connection: Option<Connection>,
    wants: Arc<AtomicBool>,
    is_aside: bool,
}

impl Future for Leg {
    type Output = Option<Connection>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Connection>> {
        let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
        if connection.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        if self.wants.load(Ordering::Relaxed) == self.is_aside {
            Poll::Pending
        } else {
            Poll::Ready(self.connection.take())
        }
    }
}

/// A task that ends with whoever waits for it.
struct Aborting(JoinHandle<Option<Connection>>);

impl Future for Aborting {
    type Output = Option<Connection>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Connection>> {
        Pin::new(&mut self.0).poll(cx).map(|left| left.ok().flatten())
    }
}

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A socket that is woken by the runtime that uses it, whichever it is. Only for sockets of which one task does both, reading and
/// writing, when it comes to another runtime.
pub(crate) struct Roaming<S> {
    /// `None` only if a move failed.
    stream: Option<S>,
    place: Number,
}

/// A socket that can be taken out of one runtime and put into another.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Unpin + Send + Sized {
    fn moved_here(self) -> io::Result<Self>;
}

impl Socket for TcpStream {
    fn moved_here(self) -> io::Result<Self> {
        Self::from_std(self.into_std()?)
    }
}

impl Socket for UnixStream {
    fn moved_here(self) -> io::Result<Self> {
        Self::from_std(self.into_std()?)
    }
}

impl<S: Socket> Roaming<S> {
    /// A socket that was made on this thread's runtime.
    pub(crate) fn new(stream: S) -> Self {
        Self { stream: Some(stream), place: here() }
    }

    fn here(&mut self) -> io::Result<Pin<&mut S>> {
        let here = here();
        if self.place != here {
            self.stream = self.stream.take().map(S::moved_here).transpose()?;
            self.place = here;
        }
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl<S: Socket> AsyncRead for Roaming<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.here()?.poll_read(cx, buf)
    }
}

impl<S: Socket> AsyncWrite for Roaming<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.here()?.poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.here()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.here()?.poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.here()?.poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }
}
