//! QEMU's monitor: one command at a time, each with a deadline, and the events that come between.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, oneshot};
use tokio::time::timeout;

/// Every command QEMU is given answers in milliseconds; this is for a host in trouble.
const COMMAND: Duration = Duration::from_secs(20);

/// The longest line QEMU may send; its answers here are far shorter.
const MAX_LINE: usize = 4 << 20;

/// Why a conversation with QEMU failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("QEMU closed its monitor")]
    Closed,
    #[error("QEMU did not answer {0} in time")]
    Timeout(&'static str),
    #[error("QEMU refused {command}: {reason}")]
    Refused { command: &'static str, reason: String },
    #[error("cannot write to QEMU's monitor")]
    Write(#[source] io::Error),
    #[error("QEMU's greeting is not one")]
    Greeting,
}

/// What QEMU says unasked.
#[derive(Clone, Debug)]
pub enum Event {
    /// The state of a migration in either direction changed.
    Migration { status: String },
}

/// A connected monitor.
pub struct Qmp {
    shared: Arc<Shared>,
    /// QEMU's version, as `major.minor.micro`.
    pub version: String,
}

struct Shared {
    stream: UnixStream,
    next: AtomicU64,
    pending: Mutex<HashMap<u64, oneshot::Sender<Result<Value, String>>>>,
    events: Mutex<Option<broadcast::Sender<Event>>>,
    guest_shut_down: AtomicBool,
    closed: tokio::sync::watch::Sender<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Return {
        #[serde(rename = "return")]
        value: Value,
        id: u64,
    },
    Error {
        error: Refusal,
        id: Option<u64>,
    },
    Event {
        event: String,
        #[serde(default)]
        data: Value,
    },
    Greeting {
        #[serde(rename = "QMP")]
        greeting: Value,
    },
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Waits for the greeting and leaves negotiation mode.
    pub async fn connect(stream: UnixStream) -> Result<Self, Error> {
        let (events, _) = broadcast::channel(64);
        let shared = Arc::new(Shared {
            stream,
            next: AtomicU64::new(0),
            pending: Mutex::default(),
            events: Mutex::new(Some(events)),
            guest_shut_down: AtomicBool::new(false),
            closed: tokio::sync::watch::channel(false).0,
        });
        let (greeted, greeting) = oneshot::channel();
        tokio::spawn(read(Arc::clone(&shared), greeted));
        let greeting = timeout(COMMAND, greeting).await.map_err(|_| Error::Timeout("a greeting"))?;
        let qemu = &greeting.map_err(|_| Error::Closed)?["version"]["qemu"];
        let number = |part: &str| qemu[part].as_u64().ok_or(Error::Greeting);
        let version = format!("{}.{}.{}", number("major")?, number("minor")?, number("micro")?);
        let qmp = Self { shared, version };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs one command and returns what it returned.
    pub async fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        self.run(command, arguments, None).await
    }

    /// Gives QEMU a descriptor under a name, for a later command to use.
    pub async fn give(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.run("getfd", json!({ "fdname": name }), Some(fd)).await.map(drop)
    }

    /// Events from now on.
    pub fn events(&self) -> Result<broadcast::Receiver<Event>, Error> {
        lock(&self.shared.events).as_ref().map(broadcast::Sender::subscribe).ok_or(Error::Closed)
    }

    /// Resolves once QEMU has closed the monitor and every event before that was seen; says whether the guest had shut
    /// itself down.
    pub fn ended(&self) -> impl Future<Output = bool> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move {
            let mut closed = shared.closed.subscribe();
            // The sender lives in `shared`, which this future holds.
            let _ = closed.wait_for(|closed| *closed).await;
            shared.guest_shut_down.load(Ordering::Acquire)
        }
    }

    async fn run(&self, command: &'static str, arguments: Value, fd: Option<BorrowedFd<'_>>) -> Result<Value, Error> {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        lock(&self.shared.pending).insert(id, answer);
        if *self.shared.closed.borrow() {
            return Err(Error::Closed);
        }
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        tracing::debug!(line = line.trim_end(), "to QEMU");
        let exchange = async {
            self.shared.send(line.as_bytes(), fd).await.map_err(Error::Write)?;
            answered.await.map_err(|_| Error::Closed)
        };
        let outcome = timeout(COMMAND, exchange).await;
        lock(&self.shared.pending).remove(&id);
        outcome.map_err(|_| Error::Timeout(command))??.map_err(|reason| Error::Refused { command, reason })
    }
}

impl Shared {
    async fn send(&self, mut bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = self
                .stream
                .async_io(Interest::WRITABLE, || {
                    let fds = fd.as_slice();
                    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                    let mut ancillary = SendAncillaryBuffer::new(&mut space);
                    if !fds.is_empty() {
                        ancillary.push(SendAncillaryMessage::ScmRights(fds));
                    }
                    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                    Ok(rustix::net::sendmsg(self.stream.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, flags)?)
                })
                .await?;
            bytes = &bytes[sent..];
            // The descriptor travels with the first byte.
            fd = None;
        }
        Ok(())
    }

    fn deliver(&self, line: &[u8], greeted: &mut Option<oneshot::Sender<Value>>) {
        tracing::debug!(line = %String::from_utf8_lossy(line), "from QEMU");
        match serde_json::from_slice(line) {
            // A command whose caller gave up has no receiver any more.
            Ok(Message::Return { value, id }) => drop(lock(&self.pending).remove(&id).map(|to| to.send(Ok(value)))),
            Ok(Message::Error { error, id: Some(id) }) => {
                drop(lock(&self.pending).remove(&id).map(|to| to.send(Err(error.desc))));
            }
            Ok(Message::Error { error, id: None }) => tracing::warn!("QEMU complains: {}", error.desc),
            Ok(Message::Event { event, data }) => self.note(&event, &data),
            Ok(Message::Greeting { greeting }) => drop(greeted.take().map(|to| to.send(greeting))),
            Err(error) => tracing::warn!("QEMU said something unknown: {error}"),
        }
    }

    fn note(&self, event: &str, data: &Value) {
        match event {
            "MIGRATION" => {
                let status = data["status"].as_str().unwrap_or_default().to_owned();
                if let Some(events) = lock(&self.events).as_ref() {
                    // Nobody may be waiting.
                    let _ = events.send(Event::Migration { status });
                }
            }
            "SHUTDOWN" if data["guest"] == true => self.guest_shut_down.store(true, Ordering::Release),
            _ => {}
        }
    }
}

async fn read(shared: Arc<Shared>, greeted: oneshot::Sender<Value>) {
    let mut greeted = Some(greeted);
    let mut buffer = Vec::new();
    let mut scanned = 0;
    loop {
        match buffer[scanned..].iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                let line: Vec<u8> = buffer.drain(..=scanned + end).collect();
                scanned = 0;
                shared.deliver(&line, &mut greeted);
                continue;
            }
            None => scanned = buffer.len(),
        }
        if buffer.len() > MAX_LINE {
            tracing::error!("QEMU's monitor sent an endless line");
            break;
        }
        let mut chunk = [0; 16 << 10];
        let read = match shared.stream.readable().await {
            Ok(()) => shared.stream.try_read(&mut chunk),
            Err(error) => Err(error),
        };
        match read {
            Ok(0) => break,
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    // Whoever waits learns that nothing will come.
    lock(&shared.pending).clear();
    *lock(&shared.events) = None;
    shared.closed.send_replace(true);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}
