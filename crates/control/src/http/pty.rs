//! `/v1/capsules/{id}/pty`: a terminal over a WebSocket.
//!
//! ```text
//! client ─► read ─► queue ─► deliver ─► guest      what is typed, in order
//! client ◄─ write ◄─────────────────── guest      what is shown
//! ```
//!
//! Nothing is dropped on the way and every queue is bounded: who does not read is waited for, on either side.

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use api::pty::{Answer, Request, Size};
use api::{ErrorBody, ErrorCode};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{interval, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::App;
use super::caller::Capsule;
use super::error::Error;
use crate::op::pty::{Event, Screen, Terminal};
use crate::{db, op};

/// Pieces of input that may wait for the process.
const QUEUE: usize = 256;
/// Bytes of such a piece; what comes larger is cut.
const PIECE: usize = 16 * 1024;
/// Bytes of input that go to the guest in one call, put together from what waits.
const BATCH: usize = 64 * 1024;
/// Bytes of one message from a client.
const MESSAGE: usize = 16 * 1024 * 1024;
/// Errors that may wait for a client that does not read.
const REMARKS: usize = 16;
/// How often a quiet connection is used, so that nothing between takes it for dead, and the kernel finds out if it is.
/// Silence by itself ends nothing: a client that has paused does not answer either.
const PING: Duration = Duration::from_secs(30);
/// How long a client may take to say what it wants.
const FIRST: Duration = Duration::from_secs(30);
/// How long a client's last words may take: input on its way when it left, or its answer to our farewell.
const LAST: Duration = Duration::from_secs(5);

type To = SplitSink<WebSocket, Message>;
type From = SplitStream<WebSocket>;

/// Open a terminal
///
/// A WebSocket. The client's first message is `{"type":"start","cmd","args","cols","rows","envs","cwd","tag"}`, all but the
/// type optional, or `{"type":"connect","tag"}` to come back. Then its binary messages are what is typed, and
/// `{"type":"resize","cols","rows"}` and `{"type":"kill"}` do what they say. The server answers `{"type":"started","pid","tag"}`;
/// then its binary messages are what the terminal shows, until `{"type":"exit","exit_code"}`. What goes wrong is told as
/// `{"type":"error","code","data","fatal"}`. A client that leaves does not end the process. A capsule that is starting is
/// waited for.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/pty", tag = "commands", operation_id = "pty", security(("apiKey" = [])),
    params(("id" = String, Path, description = "The capsule")),
    responses(
        (status = 101, description = "From here on, messages"),
        (status = 400, description = "`invalid_request`: the id is not one, or this is not the beginning of a WebSocket", body = ErrorBody),
        (status = 401, description = "`unauthorized`", body = ErrorBody),
        (status = 404, description = "`not_found`: the team has no such capsule", body = ErrorBody),
    )
)]
pub async fn pty(
    Capsule(capsule): Capsule,
    State(app): State<App>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Error> {
    let upgrade = upgrade
        .map_err(|error| Error::new(ErrorCode::InvalidRequest, format!("a terminal is a WebSocket: {error}")))?;
    Ok(upgrade.max_message_size(MESSAGE).max_frame_size(MESSAGE).on_upgrade(|socket| session(app, capsule, socket)))
}

/// One client's time at a terminal.
async fn session(app: App, capsule: db::capsule::Capsule, socket: WebSocket) {
    let (mut to, mut from) = socket.split();
    let last = match open(&app, capsule, &mut from).await {
        Ok(Some((terminal, screen))) => attend(&app, terminal, screen, &mut to, &mut from).await,
        Ok(None) => None,
        Err(error) => Some(told(error, true)),
    };
    let Some(last) = last else { return };
    let farewell = async {
        to.send(text(&last)).await?;
        to.send(Message::Close(Some(CloseFrame { code: close_code::NORMAL, reason: "".into() }))).await?;
        // What the client still says must be read: closing on unread bytes would take our last message away from it.
        while let Some(Ok(_)) = from.next().await {}
        Ok::<_, axum::Error>(())
    };
    // A client that is gone, or does not read, misses it.
    let _ = timeout(LAST, farewell).await;
}

/// The terminal that the first message asks for; `None` when the client leaves instead.
async fn open(app: &App, capsule: db::capsule::Capsule, from: &mut From) -> Result<Option<(Terminal, Screen)>, Error> {
    let invalid = |message: String| Error::new(ErrorCode::InvalidRequest, message);
    let first = async {
        loop {
            match from.next().await {
                Some(Ok(Message::Text(text))) => return Ok(Some(text)),
                Some(Ok(Message::Binary(_))) => return Err(invalid("input came before `start` or `connect`".into())),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(None),
            }
        }
    };
    let late = |_| Err(invalid("neither `start` nor `connect` came".into()));
    let Some(first) = timeout(FIRST, first).await.unwrap_or_else(late)? else { return Ok(None) };
    let request = serde_json::from_str(&first)
        .map_err(|error| invalid(format!("the first message is neither `start` nor `connect`: {error}")))?;
    Ok(Some(match request {
        Request::Start(start) => op::pty::start(&app.ctx, capsule, start).await?,
        Request::Connect { tag } => op::pty::connect(&app.ctx, capsule, tag).await?,
        Request::Input { .. } | Request::Resize { .. } | Request::Kill | Request::Pong => {
            return Err(invalid("the first message must be `start` or `connect`".into()));
        }
    }))
}

/// Carries both ways until the process ends, something fails, or the client leaves. What there is to say at the end.
async fn attend(app: &App, terminal: Terminal, screen: Screen, to: &mut To, from: &mut From) -> Option<Answer> {
    let started = Answer::Started { pid: terminal.pid, tag: terminal.tag.clone() };
    let terminal = Arc::new(terminal);
    let (typed, queue) = mpsc::channel(QUEUE);
    let (remarks, heard) = mpsc::channel(REMARKS);
    let delivery = AbortOnDropHandle::new(tokio::spawn(deliver(terminal.clone(), queue, remarks.clone())));
    let left = {
        let write = pin!(write(app, started, screen, heard, to));
        tokio::select! {
            last = write => return Some(last),
            () = read(&terminal, from, typed, remarks) => delivery,
        }
    };
    let _ = timeout(LAST, left).await;
    None
}

/// Carries what the client says, until it leaves.
async fn read(terminal: &Terminal, from: &mut From, typed: mpsc::Sender<Bytes>, remarks: mpsc::Sender<Answer>) {
    while let Some(Ok(message)) = from.next().await {
        let done = match message {
            Message::Binary(bytes) => {
                enqueue(&typed, bytes).await;
                Ok(())
            }
            Message::Text(text) => obey(terminal, &typed, &text).await,
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Close(_) => return,
        };
        if let Err(error) = done {
            // Nobody to tell: the session is over.
            let _ = remarks.send(told(error, false)).await;
        }
    }
}

async fn obey(terminal: &Terminal, typed: &mpsc::Sender<Bytes>, text: &str) -> Result<(), Error> {
    let invalid = |message: String| Error::new(ErrorCode::InvalidRequest, message);
    let request = serde_json::from_str(text).map_err(|error| invalid(format!("not understood: {error}")))?;
    match request {
        Request::Input { data } => {
            let bytes =
                BASE64_STANDARD.decode(data).map_err(|error| invalid(format!("data is not base64: {error}")))?;
            enqueue(typed, bytes.into()).await;
        }
        // What is typed later finds the new size: it is not even read before.
        Request::Resize { cols, rows } => {
            let size = Size::new(cols, rows).map_err(|error| invalid(error.to_string()))?;
            terminal.resize(size).await?;
        }
        // At once, past all that waits to be typed.
        Request::Kill => {
            terminal.kill().await?;
        }
        Request::Pong => {}
        Request::Start(_) | Request::Connect { .. } => return Err(invalid("this connection has its terminal".into())),
    }
    Ok(())
}

async fn enqueue(typed: &mpsc::Sender<Bytes>, mut bytes: Bytes) {
    while !bytes.is_empty() {
        let piece = bytes.split_to(bytes.len().min(PIECE));
        if typed.send(piece).await.is_err() {
            // The process has ended, as the client is about to learn.
            return;
        }
    }
}

/// Types into the terminal what is queued, in order, until the last of it or the process's end.
async fn deliver(terminal: Arc<Terminal>, mut queue: mpsc::Receiver<Bytes>, remarks: mpsc::Sender<Answer>) {
    let mut pieces = Vec::new();
    while queue.recv_many(&mut pieces, BATCH / PIECE).await > 0 {
        let batch = pieces.concat();
        pieces.clear();
        match terminal.input(batch).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error @ op::Error::Refused(_)) => drop(remarks.send(told(error.into(), false)).await),
            Err(error) => {
                // A process that ends breaks its input too; then its exit, which is on the way, is what matters.
                tokio::time::sleep(LAST).await;
                drop(remarks.send(told(error.into(), true)).await);
                return;
            }
        }
    }
}

/// Carries what the terminal shows, and what `heard` has to remark. The last message to the client, which is not sent yet.
async fn write(
    app: &App,
    started: Answer,
    mut screen: Screen,
    mut heard: mpsc::Receiver<Answer>,
    to: &mut To,
) -> Answer {
    let mut pings = interval(PING);
    let mut message = text(&started);
    loop {
        if to.send(message).await.is_err() {
            // Whoever reads from the client finds it gone too, after what it still had to say.
            drop(screen);
            return pending().await;
        }
        message = tokio::select! {
            event = screen.next(&app.ctx) => match event {
                Ok(Event::Output(bytes)) => Message::Binary(bytes),
                Ok(Event::Exit(exit_code)) => return Answer::Exit { exit_code },
                Ok(Event::Begun(_)) => return told(op::Error::GuestAnswer("a second start").into(), true),
                Err(error) => return told(error.into(), true),
            },
            Some(remark) = heard.recv() => match remark {
                Answer::Error { fatal: true, .. } => return remark,
                _ => text(&remark),
            },
            _ = pings.tick() => Message::Ping(Bytes::new()),
        };
    }
}

fn told(error: Error, fatal: bool) -> Answer {
    let detail = error.into_detail();
    Answer::Error { code: detail.code, data: detail.message, fatal }
}

fn text(answer: &Answer) -> Message {
    Message::Text(serde_json::to_string(answer).expect("an answer is plain data").into())
}
