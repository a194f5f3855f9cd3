//! One client's time with a process over a socket, whatever words the socket uses.
//!
//! ```text
//! client ─► read ─► queue ─► deliver ─► guest      what is typed, in order
//! client ◄─ write ◄─────────────────── guest      what is shown
//! ```
//!
//! Nothing is dropped on the way and every queue is bounded: who does not read is waited for, on either side.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use api::pty::Size;
use axum::extract::ws::Message;
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{interval, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::error::Error;
use super::socket::{Client, From, LAST, To, told, too_large};
use crate::op;
use crate::op::process::{Event, Events, Output, Process};

/// Pieces of input that may wait for the process.
const QUEUE: usize = 256;
/// Bytes of such a piece; what comes larger is cut.
const PIECE: usize = 16 * 1024;
/// Bytes of input that go to the guest in one call, put together from what waits.
const BATCH: usize = 64 * 1024;
/// Errors that may wait for a client that does not read.
const REMARKS: usize = 16;
/// How often a quiet connection is used, so that nothing between takes it for dead, and the kernel finds out if it is.
/// Silence by itself ends nothing: a client that has paused does not answer either.
const PING: Duration = Duration::from_secs(15);

/// The words of one kind of socket.
pub trait Dialect: Send {
    /// Says that the process runs.
    fn started(&self, process: &Process) -> Message;
    /// Says what the process wrote; `None` when that is not yet worth a message.
    fn output(&mut self, from: Output, bytes: Bytes) -> Option<Message>;
    /// Says what was held back of the output, once no more comes.
    fn rest(&mut self) -> Vec<Message>;
    /// Says how the process ended.
    fn exit(&self, code: i32) -> Message;
}

/// What a client says.
pub enum Said {
    Input(Bytes),
    /// No more input follows.
    Eof,
    Resize(Size),
    Kill,
    /// The client wants no more, as if it had left.
    Stop,
    Nothing,
}

/// How a text message is understood.
pub type Understand = fn(&str) -> Result<Said, Error>;

/// Input on its way to the process.
enum Piece {
    Bytes(Bytes),
    Eof,
}

/// Carries both ways until the process ends, something fails, or the client leaves. What there is to say at the end.
pub async fn attend(
    process: Process,
    events: Events,
    dialect: impl Dialect,
    understand: Understand,
    Client { to, from }: &mut Client,
) -> Option<Message> {
    let started = dialect.started(&process);
    let process = Arc::new(process);
    let (typed, queue) = mpsc::channel(QUEUE);
    let (remarks, heard) = mpsc::channel(REMARKS);
    let delivery = AbortOnDropHandle::new(tokio::spawn(deliver(process.clone(), queue, remarks.clone())));
    let mut read = pin!(read(&process, understand, from, typed, remarks));
    let last = tokio::select! {
        last = write(started, events, dialect, heard, to) => match last {
            Some(last) => return Some(last),
            // The client is gone; what it still had to say may lie here.
            None => timeout(LAST, read).await.ok().flatten(),
        },
        last = read.as_mut() => last,
    };
    let _ = timeout(LAST, delivery).await;
    last
}

/// Something to tell a client beside its process's output.
enum Remark {
    Small(Message),
    Fatal(Message),
}

/// Carries what the client says, until it leaves, or says what cannot be taken: then, what it is told at last.
async fn read(
    process: &Process,
    understand: Understand,
    from: &mut From,
    typed: mpsc::Sender<Piece>,
    remarks: mpsc::Sender<Remark>,
) -> Option<Message> {
    loop {
        let said = match from.next().await?.map_err(too_large) {
            Err(told) => return told,
            Ok(message) => message,
        };
        let said = match said {
            Message::Binary(bytes) => Ok(Said::Input(bytes)),
            Message::Text(text) => understand(&text),
            Message::Ping(_) | Message::Pong(_) => Ok(Said::Nothing),
            Message::Close(_) => return None,
        };
        let done = match said {
            Ok(Said::Input(bytes)) => {
                enqueue(&typed, bytes).await;
                Ok(())
            }
            Ok(Said::Eof) => {
                // Like input, it means nothing to a process that has ended.
                let _ = typed.send(Piece::Eof).await;
                Ok(())
            }
            // What is typed later finds the new size: it is not even read before.
            Ok(Said::Resize(size)) => process.resize(size).await.map(drop).map_err(Error::from),
            // At once, past all that waits to be typed.
            Ok(Said::Kill) => process.kill().await.map_err(Error::from),
            Ok(Said::Stop) => return None,
            Ok(Said::Nothing) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            // Nobody to tell: the session is over.
            let _ = remarks.send(Remark::Small(told(error, false))).await;
        }
    }
}

async fn enqueue(typed: &mpsc::Sender<Piece>, mut bytes: Bytes) {
    while !bytes.is_empty() {
        let piece = bytes.split_to(bytes.len().min(PIECE));
        if typed.send(Piece::Bytes(piece)).await.is_err() {
            // The process has ended, as the client is about to learn.
            return;
        }
    }
}

/// Types into the process what is queued, in order, until the last of it or the process's end.
async fn deliver(process: Arc<Process>, mut queue: mpsc::Receiver<Piece>, remarks: mpsc::Sender<Remark>) {
    let mut pieces = Vec::new();
    while queue.recv_many(&mut pieces, BATCH / PIECE).await > 0 {
        let (mut batch, mut eof) = (Vec::new(), false);
        for piece in pieces.drain(..) {
            match piece {
                Piece::Bytes(bytes) => batch.extend_from_slice(&bytes),
                Piece::Eof => eof = true,
            }
        }
        let mut delivered = if batch.is_empty() { Ok(true) } else { process.input(batch).await };
        if eof && matches!(delivered, Ok(true)) {
            delivered = process.end_input().await;
        }
        match delivered {
            Ok(true) => {}
            Ok(false) => return,
            Err(error @ op::Error::Refused(_)) => drop(remarks.send(Remark::Small(told(error.into(), false))).await),
            Err(error) => {
                // A process that ends breaks its input too; then its exit, which is on the way, is what matters.
                tokio::time::sleep(LAST).await;
                drop(remarks.send(Remark::Fatal(told(error.into(), true))).await);
                return;
            }
        }
    }
}

/// Carries what the process does, and what `heard` has to remark. The last message to the client, which is not sent yet; nothing
/// when the client is gone.
async fn write(
    started: Message,
    mut events: Events,
    mut dialect: impl Dialect,
    mut heard: mpsc::Receiver<Remark>,
    to: &mut To,
) -> Option<Message> {
    let mut pings = interval(PING);
    let mut message = Some(started);
    loop {
        if let Some(message) = message
            && to.send(message).await.is_err()
        {
            return None;
        }
        let ended = tokio::select! {
            event = events.next() => match event {
                Ok(Event::Output(from, bytes)) => {
                    message = dialect.output(from, bytes);
                    continue;
                }
                Ok(Event::Exit(exit)) => Ok(exit),
                Err(error) => Err(error),
            },
            Some(remark) = heard.recv() => match remark {
                Remark::Small(remark) => {
                    message = Some(remark);
                    continue;
                }
                Remark::Fatal(remark) => return Some(remark),
            },
            _ = pings.tick() => {
                message = Some(Message::Ping(Bytes::new()));
                continue;
            }
        };
        for rest in dialect.rest() {
            if to.send(rest).await.is_err() {
                return None;
            }
        }
        return Some(match ended {
            Ok(exit) => {
                events.close().await;
                dialect.exit(exit.code)
            }
            Err(error) => told(error.into(), true),
        });
    }
}
