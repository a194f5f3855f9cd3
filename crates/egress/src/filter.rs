//! The filter of one capsule: a thread in its network namespace.

mod connection;
mod questions;

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use api::egress::Policy;
use rustix::thread::LinkNameSpaceType;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::Resolver;
use crate::answers::Answers;

/// Where connections are sent to.
pub const TCP_PORT: u16 = 15001;
/// Where questions are sent to, by datagrams and by connections.
pub const DNS_PORT: u16 = 15053;

/// After the kernel would not hand out what came, for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(50);

/// Why a filter does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no thread for it.
    #[error("starting the filter's thread")]
    Thread(#[source] io::Error),
    /// The capsule's namespace cannot be entered.
    #[error("entering the capsule's network namespace")]
    Namespace(#[source] io::Error),
    /// Its ports cannot be listened on.
    #[error("listening in the capsule's network namespace")]
    Listen(#[source] io::Error),
}

/// A filter that runs. Dropping it ends it, with everything that goes through it, and waits for that.
#[derive(Debug)]
pub struct Filter {
    shared: Arc<Shared>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// What all tasks of a filter know.
#[derive(Debug)]
struct Shared {
    policy: watch::Sender<Arc<Policy>>,
    answers: Mutex<Answers>,
    resolver: Resolver,
}

impl Shared {
    fn policy(&self) -> Arc<Policy> {
        self.policy.borrow().clone()
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Filter {
    /// Listens on `address` in the namespace that is mounted at `netns`. Blocks until it does.
    pub fn start(netns: &Path, address: Ipv4Addr, policy: Policy, resolver: Resolver) -> Result<Self, Error> {
        let shared =
            Arc::new(Shared { policy: watch::Sender::new(Arc::new(policy)), answers: Mutex::default(), resolver });
        let stop = CancellationToken::new();
        let netns = File::open(netns).map_err(Error::Namespace)?;
        let (tell, told) = std::sync::mpsc::channel();
        let (of_thread, until) = (shared.clone(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("egress".into())
            .spawn(move || run(&netns, address, of_thread, until, &tell));
        let filter = Self { shared, stop, thread: Some(thread.map_err(Error::Thread)?) };
        match told.recv() {
            Ok(listening) => listening.map(|()| filter),
            Err(_) => Err(Error::Thread(io::Error::other("it ended"))),
        }
    }

    /// Filters by another list from now on. What it does not allow any more is cut.
    pub fn set(&self, policy: Policy) {
        self.shared.answers().retain(|name| policy.allows_name(name));
        self.shared.policy.send_replace(Arc::new(policy));
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so, and is gone.
            let _ = thread.join();
        }
    }
}

/// Serves what connects, at most so many at the same time, for as long as it is polled.
async fn accept<F>(listener: TcpListener, at_once: usize, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(at_once));
    loop {
        let permit = room.clone().acquire_owned().await;
        let Ok((guest, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let served = serve(guest);
        tokio::spawn(async move {
            let _permit = permit;
            served.await;
        });
    }
}

/// The thread, which never leaves the namespace.
fn run(
    netns: &File,
    address: Ipv4Addr,
    shared: Arc<Shared>,
    stop: CancellationToken,
    tell: &std::sync::mpsc::Sender<Result<(), Error>>,
) {
    let entered = rustix::thread::move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network));
    let runtime = entered
        .map_err(|errno| Error::Namespace(errno.into()))
        .and_then(|()| tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread));
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            // Whoever started this waits for it.
            let _ = tell.send(Err(error));
            return;
        }
    };
    runtime.block_on(async move {
        let bound = async {
            let connections = TcpListener::bind((address, TCP_PORT)).await?;
            let datagrams = UdpSocket::bind((address, DNS_PORT)).await?;
            let streams = TcpListener::bind((address, DNS_PORT)).await?;
            Ok((connections, datagrams, streams))
        };
        let (connections, datagrams, streams) = match bound.await {
            Ok(bound) => bound,
            Err(error) => {
                let _ = tell.send(Err(Error::Listen(error)));
                return;
            }
        };
        let _ = tell.send(Ok(()));
        let serve = async {
            tokio::join!(
                connection::serve(connections, &shared),
                questions::datagrams(datagrams, &shared),
                questions::streams(streams, &shared),
            )
        };
        tokio::select! {
            _ = serve => {}
            () = stop.cancelled() => {}
        }
    });
    // Dropping the runtime ends every task that is left, and with them their connections.
}
