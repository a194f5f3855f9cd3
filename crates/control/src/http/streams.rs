//! `/v1/capsules/{id}/exec/stream` and `/v1/capsules/{id}/processes/{selector}/stream`: processes followed over a WebSocket.

use std::time::Duration;

use api::ErrorCode;
use api::stream::{Answer, Encoding, Request};
use axum::extract::FromRequestParts;
use axum::extract::ws::Message;
use axum::http::request::Parts;
use axum::response::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;

use super::App;
use super::answers::{InCapsule, InProcess, OfSocket};
use super::caller::{Selector, query};
use super::error::Error;
use super::session::{self, Dialect, Said};
use super::socket::{self, Client, Ended, Socket, text};
use super::utf8::Decoder;
use crate::db;
use crate::op::guest;
use crate::op::process::{self, Manner, Output, Process};
use crate::op::usable::patience;

/// Run a command and follow it
///
/// A WebSocket. Without a key in the header, the first message must be `{"type":"auth","token"}`, within 5 seconds. Then comes
/// `{"type":"start","cmd","args","envs","cwd","user","tag","timeout_sec","stdin","encoding"}`, all but the type and `cmd`
/// optional. The server answers `{"type":"start","pid"}`, then `{"type":"stdout","data"}` and `{"type":"stderr","data"}` as they
/// are written, and last `{"type":"exit","exit_code"}`. `data` is text: characters are never cut, and what is not UTF-8 becomes
/// U+FFFD; with the encoding `base64` it is the exact bytes. With `"stdin":true`, binary messages and
/// `{"type":"stdin","data"}` are standard input and `{"type":"eof"}` is its end. `{"type":"stop"}` ends the stream and leaves
/// the process; so does a client that leaves. What goes wrong is told as `{"type":"error","code","data","fatal"}`. A capsule
/// that is starting is waited for.
#[utoipa::path(
    get,
    path = "/v1/capsules/{id}/exec/stream",
    tag = "commands",
    operation_id = "execStream",
    params(InCapsule),
    responses(OfSocket)
)]
pub async fn exec(socket: Socket) -> Response {
    socket.open(|app, capsule, client| Box::pin(command(app, capsule, client)))
}

/// Follow a process
///
/// A WebSocket. Without a key in the header, the first message must be `{"type":"auth","token"}`, within 5 seconds. The server's
/// messages are those of `exec/stream`; output from before, up to 256 KiB, comes first. What a terminal shows is `stdout`. With
/// the encoding `base64` output is the exact bytes. A client that leaves does not end the process.
#[utoipa::path(
    get,
    path = "/v1/capsules/{id}/processes/{selector}/stream",
    tag = "commands",
    operation_id = "processStream",
    params(InProcess, ("encoding" = Option<Encoding>, Query, description = "Of output; `utf-8` when absent")),
    responses(OfSocket)
)]
pub async fn follow(socket: Socket, Selector(selector): Selector, Asked(encoding): Asked) -> Response {
    socket.open(move |app, capsule, client| Box::pin(process(app, capsule, selector, encoding, client)))
}

/// The encoding the query names.
pub struct Asked(Encoding);

impl FromRequestParts<App> for Asked {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Error> {
        query(parts, "encoding").map(Self)
    }
}

async fn process(
    app: App,
    capsule: db::capsule::Capsule,
    selector: api::Selector,
    encoding: Encoding,
    client: &mut Client,
) -> Ended {
    let guest = guest::enter(&app.ctx, capsule, patience()).await?;
    let (process, events) = process::connect(&guest, selector).await?;
    let overheard: session::Understand = |_| Ok(Said::Nothing);
    Ok(session::attend(process, events, Command::new(encoding), overheard, client).await)
}

async fn command(app: App, capsule: db::capsule::Capsule, client: &mut Client) -> Ended {
    let wanted = || invalid("first message must be type 'start' with a 'cmd' field".into());
    let Some(first) = socket::first(client, "`start`").await? else { return Ok(None) };
    let request = serde_json::from_str(&first).map_err(|error| invalid(format!("{}: {error}", wanted().message())))?;
    let Request::Start(start) = request else { return Err(wanted()) };
    let (encoding, stdin) = (start.encoding, start.stdin);
    let mut spec = start.validate()?;
    spec.tag.get_or_insert_with(|| process::random_tag("proc"));
    let limit = spec.timeout_sec.map(|seconds| Duration::from_secs(seconds.into()));
    let guest = guest::enter(&app.ctx, capsule, patience()).await?;
    let (process, events) = process::start(&guest, &spec, Manner { terminal: None, stdin, limit }).await?;
    Ok(session::attend(process, events, Command::new(encoding), understand, client).await)
}

fn understand(text: &str) -> Result<Said, Error> {
    let request = serde_json::from_str(text).map_err(|error| invalid(format!("not understood: {error}")))?;
    Ok(match request {
        Request::Stdin { data } => Said::Input(data.into()),
        Request::Eof => Said::Eof,
        Request::Stop => Said::Stop,
        Request::Start(_) => return Err(invalid("this connection has its command".into())),
    })
}

fn invalid(message: String) -> Error {
    Error::new(ErrorCode::InvalidRequest, message)
}

/// How a command's client is spoken to.
struct Command {
    encoding: Encoding,
    stdout: Decoder,
    stderr: Decoder,
}

impl Command {
    fn new(encoding: Encoding) -> Self {
        Self { encoding, stdout: Decoder::default(), stderr: Decoder::default() }
    }
}

impl Dialect for Command {
    fn started(&self, process: &Process) -> Message {
        text(&Answer::Start { pid: process.pid })
    }

    fn output(&mut self, from: Output, bytes: Bytes) -> Option<Message> {
        let decoder = match from {
            Output::Stdout | Output::Terminal => &mut self.stdout,
            Output::Stderr => &mut self.stderr,
        };
        let data = match self.encoding {
            Encoding::Utf8 => decoder.push(&bytes),
            Encoding::Base64 => BASE64_STANDARD.encode(bytes),
        };
        (!data.is_empty()).then(|| said(from, data))
    }

    fn rest(&mut self) -> Vec<Message> {
        let rest = [(Output::Stdout, self.stdout.finish()), (Output::Stderr, self.stderr.finish())];
        rest.into_iter().filter(|(_, data)| !data.is_empty()).map(|(from, data)| said(from, data)).collect()
    }

    fn exit(&self, exit_code: i32) -> Message {
        text(&Answer::Exit { exit_code })
    }
}

fn said(from: Output, data: String) -> Message {
    text(&match from {
        Output::Stdout | Output::Terminal => Answer::Stdout { data },
        Output::Stderr => Answer::Stderr { data },
    })
}
