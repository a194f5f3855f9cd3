//! Firecracker's API over its unix socket.
//!
//! Says only what the VMM's version knows, as it rejects unknown fields, and waits for nothing without a limit. One
//! connection per request: the socket is local, so a connection costs less than keeping track of a stale one, and a client
//! has no state to lose when the agent restarts. It refuses to interpret faults: their texts are no contract.

mod version;
mod wire;

use std::io;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, select};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::API_SOCKET;
use crate::process::{Exit, Process, Scratch};

pub use version::{Feature, Version};
pub use wire::{Boot, InstanceInfo, Load, Memory, SnapshotKind, VmState};

/// For calls that only change the VMM's tables.
const CONFIGURE_LIMIT: Duration = Duration::from_secs(10);
/// For reading the kernel and setting the guest off.
const START_LIMIT: Duration = Duration::from_secs(60);
/// For stopping or continuing all vCPUs.
const STATE_LIMIT: Duration = Duration::from_secs(30);
/// For mapping a snapshot; pages come later, when the guest touches them.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// For a snapshot, on top of the time to write the memory.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(30);
/// The slowest disk that a snapshot is still waited for, in MiB per second.
const SNAPSHOT_MIB_PER_SEC: u32 = 16;
/// Pause between two looks for a socket that is not there yet.
const CONNECT_PAUSE: Duration = Duration::from_millis(1);
/// No answer of the API is longer: the metadata store is the largest, and is held to 51200 bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Why the VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process ended before its socket answered.
    #[error("the VMM {0} before it answered")]
    Died(Exit),
    /// Nothing accepted on the socket in the time the caller gave.
    #[error("the VMM did not listen on its socket within {limit:?}")]
    NotListening {
        /// The time it had.
        limit: Duration,
        /// What the last attempt met.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be used.
    #[error("cannot connect to the VMM's socket")]
    Connect(#[source] io::Error),
    /// A call did not end in its time. Whether it had an effect is unknown.
    #[error("{request} did not answer within {limit:?}")]
    Timeout {
        /// Method and path.
        request: String,
        /// The time it had.
        limit: Duration,
    },
    /// The connection failed, or what came over it is not HTTP.
    #[error("{request} was not answered")]
    Http {
        /// Method and path.
        request: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The VMM refused.
    #[error("{request} failed with {status}: {message}")]
    Fault {
        /// Method and path.
        request: String,
        /// HTTP status.
        status: StatusCode,
        /// The VMM's own words.
        message: String,
    },
    /// The answer is not what the API promises.
    #[error("the answer to {request} makes no sense")]
    Malformed {
        /// Method and path.
        request: String,
        /// Where it stops making sense.
        #[source]
        source: serde_json::Error,
    },
    /// The VMM calls its version something that is not one.
    #[error("the VMM calls its version `{0}`, which is not of the form 1.2.3")]
    Version(String),
    /// The VMM is older than what this client can speak to.
    #[error("the VMM is version {found}; the oldest usable is {oldest}")]
    TooOld {
        /// Its version.
        found: Version,
        /// The first that will do.
        oldest: Version,
    },
    /// The caller asks for what this version cannot do.
    #[error("{feature} needs version {since} of the VMM; this is {found}")]
    Unsupported {
        /// What was asked.
        feature: Feature,
        /// The first version that has it.
        since: Version,
        /// The VMM's version.
        found: Version,
    },
}

/// A VMM that has said its version.
#[derive(Debug, Clone)]
pub struct Client {
    scratch: Scratch,
    version: Version,
}

impl Client {
    /// Waits until `process` listens, and learns its version. Gives up after `limit`, or when the process ends.
    pub async fn connect(limit: Duration, process: &Process) -> Result<Self, Error> {
        let Some(scratch) = process.scratch() else {
            // It had ended before it could be looked at; or it is none that was started here, and can be waited for in vain.
            let ended = timeout(limit, process.exited()).await;
            return Err(ended.map_or_else(|_| Error::Connect(io::ErrorKind::NotFound.into()), Error::Died));
        };
        let waiting = pin!(Self::listen(scratch, limit));
        match select(waiting, pin!(process.exited())).await {
            Either::Left((result, _)) => result,
            Either::Right((exit, _)) => Err(Error::Died(exit)),
        }
    }

    async fn listen(scratch: &Scratch, limit: Duration) -> Result<Self, Error> {
        let unknown = Self { scratch: scratch.clone(), version: Version::OLDEST };
        let end = Instant::now() + limit;
        let version: wire::VersionInfo = loop {
            let answer = timeout_at(end, unknown.get("/version")).await;
            match answer.map_err(|_| Error::Timeout { request: "GET /version".to_owned(), limit })? {
                Err(Error::Connect(source)) if not_yet(&source) => {
                    if Instant::now() >= end {
                        return Err(Error::NotListening { limit, source });
                    }
                    sleep(CONNECT_PAUSE).await;
                }
                answer => break answer?,
            }
        };
        let version: Version = version.firecracker_version.parse()?;
        if version < Version::OLDEST {
            return Err(Error::TooOld { found: version, oldest: Version::OLDEST });
        }
        Ok(Self { version, ..unknown })
    }

    /// What the VMM says it is.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Gives a fresh VMM its kernel, root disk, network, size, metadata service and entropy device.
    pub async fn configure(&self, boot: &Boot<'_>) -> Result<(), Error> {
        for (path, body) in boot.requests(self.version) {
            self.put(path, &body, CONFIGURE_LIMIT).await?;
        }
        Ok(())
    }

    /// Boots the configured guest.
    pub async fn start(&self) -> Result<(), Error> {
        self.put("/actions", &wire::Action { action_type: "InstanceStart" }, START_LIMIT).await
    }

    /// Stops all vCPUs.
    pub async fn pause(&self) -> Result<(), Error> {
        self.send(Method::PATCH, "/vm", &wire::StateChange { state: "Paused" }, STATE_LIMIT).await
    }

    /// Lets all vCPUs go on.
    pub async fn resume(&self) -> Result<(), Error> {
        self.send(Method::PATCH, "/vm", &wire::StateChange { state: "Resumed" }, STATE_LIMIT).await
    }

    /// Replaces what the guest reads from its metadata service; also needed after every restore, which forgets it.
    pub async fn put_mmds(&self, data: &impl Serialize) -> Result<(), Error> {
        self.put("/mmds", data, CONFIGURE_LIMIT).await
    }

    /// Writes the paused guest's state and memory to two files, named as the VMM sees them. `memory_mib` is the guest's
    /// size, on which the time that the VMM gets depends.
    pub async fn create_snapshot(
        &self,
        kind: SnapshotKind,
        state: &Path,
        memory: &Path,
        memory_mib: u32,
    ) -> Result<(), Error> {
        let body = wire::SnapshotCreate { snapshot_type: kind, snapshot_path: state, mem_file_path: memory };
        self.put("/snapshot/create", &body, snapshot_limit(memory_mib)).await
    }

    /// Restores a snapshot in a fresh VMM. When this fails the VMM ends itself.
    pub async fn load_snapshot(&self, load: &Load<'_>) -> Result<(), Error> {
        self.put("/snapshot/load", &load.request(self.version)?, LOAD_LIMIT).await
    }

    /// What the VMM says about itself and its guest.
    pub async fn instance_info(&self) -> Result<InstanceInfo, Error> {
        self.get("/").await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let answer = self.exchange(Method::GET, path, Bytes::new(), CONFIGURE_LIMIT).await?;
        serde_json::from_slice(&answer).map_err(|source| Error::Malformed { request: format!("GET {path}"), source })
    }

    async fn put(&self, path: &str, body: &impl Serialize, limit: Duration) -> Result<(), Error> {
        self.send(Method::PUT, path, body, limit).await
    }

    async fn send(&self, method: Method, path: &str, body: &impl Serialize, limit: Duration) -> Result<(), Error> {
        let request = || format!("{method} {path}");
        let body = serde_json::to_vec(body).map_err(|source| Error::Malformed { request: request(), source })?;
        self.exchange(method, path, body.into(), limit).await.map(drop)
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes, limit: Duration) -> Result<Bytes, Error> {
        let request = format!("{method} {path}");
        let stream = self.scratch.connect(API_SOCKET).await.map_err(Error::Connect)?;
        let (status, answer) = match timeout(limit, round_trip(stream, method, path, body)).await {
            Err(_) => return Err(Error::Timeout { request, limit }),
            Ok(Err(source)) => return Err(Error::Http { request, source }),
            Ok(Ok(answer)) => answer,
        };
        if status.is_success() {
            return Ok(answer);
        }
        let message = match serde_json::from_slice::<wire::Fault>(&answer) {
            Ok(fault) => fault.fault_message,
            Err(_) => String::from_utf8_lossy(&answer).into_owned(),
        };
        Err(Error::Fault { request, status, message })
    }
}

async fn round_trip(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(body))?;
    let exchange = pin!(async move {
        let (parts, body) = sender.send_request(request).await?.into_parts();
        Ok((parts.status, Limited::new(body, MAX_ANSWER).collect().await?.to_bytes()))
    });
    // The connection moves only while it is polled, and is closed by being dropped.
    match select(exchange, pin!(connection)).await {
        Either::Left((answer, _)) => answer,
        Either::Right((_, exchange)) => exchange.await,
    }
}

fn snapshot_limit(memory_mib: u32) -> Duration {
    SNAPSHOT_LIMIT + Duration::from_secs((memory_mib / SNAPSHOT_MIB_PER_SEC).into())
}

/// Whether a VMM that is just starting may still make this error go away.
fn not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests;
