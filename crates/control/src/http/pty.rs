//! `/v1/capsules/{id}/pty`: a terminal over a WebSocket.

use api::ErrorCode;
use api::pty::{Answer, Encoding, Request, Size};
use axum::extract::ws::Message;
use axum::response::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;

use super::App;
use super::answers::{InCapsule, OfSocket};
use super::error::Error;
use super::session::{self, Dialect, Said};
use super::socket::{self, Client, Ended, Socket, text};
use crate::db;
use crate::op::guest;
use crate::op::process::{self, Events, Manner, Output, Process};
use crate::op::usable::patience;

/// Open a terminal
///
/// A WebSocket. Without a key in the header, the first message must be `{"type":"auth","token"}`, within 5 seconds. Then comes
/// `{"type":"start","cmd","args","cols","rows","envs","cwd","user","tag","encoding"}`, all but the type optional, or
/// `{"type":"connect","tag","encoding"}` to come back: what the terminal showed last, up to 256 KiB, is shown again. Binary
/// messages are what is typed, or `{"type":"input","data"}` with base64; `{"type":"resize","cols","rows"}` and
/// `{"type":"kill"}` do what they say. The server answers `{"type":"started","pid","tag"}`; then its binary messages are what
/// the terminal shows, or with the encoding `base64` its `{"type":"output","data"}`, until `{"type":"exit","exit_code"}`. What
/// goes wrong is told as `{"type":"error","code","data","fatal"}`. A client that leaves does not end the process. A capsule
/// that is starting is waited for.
#[utoipa::path(
    get,
    path = "/v1/capsules/{id}/pty",
    tag = "commands",
    operation_id = "pty",
    params(InCapsule),
    responses(OfSocket)
)]
pub async fn pty(socket: Socket) -> Response {
    socket.open(|app, capsule, client| Box::pin(terminal(app, capsule, client)))
}

async fn terminal(app: App, capsule: db::capsule::Capsule, client: &mut Client) -> Ended {
    let Some(first) = socket::first(client, "`start` or `connect`").await? else { return Ok(None) };
    let (tag, encoding, (process, events)) = begin(&app, capsule, &first).await?;
    let dialect = Terminal { tag, encoding };
    Ok(session::attend(process, events, dialect, understand, client).await)
}

/// The terminal that the first message asks for.
async fn begin(
    app: &App,
    capsule: db::capsule::Capsule,
    first: &str,
) -> Result<(String, Encoding, (Process, Events)), Error> {
    let request = serde_json::from_str(first)
        .map_err(|error| invalid(format!("the first message is neither `start` nor `connect`: {error}")))?;
    match request {
        Request::Start(start) => {
            let encoding = start.encoding;
            let (mut spec, size) = start.validate()?;
            let tag = spec.tag.get_or_insert_with(|| process::random_tag("pty")).clone();
            let guest = guest::enter(&app.ctx, capsule, patience()).await?;
            let manner = Manner { terminal: Some(size), stdin: true, limit: None };
            Ok((tag, encoding, process::start(&guest, &spec, manner).await?))
        }
        Request::Connect { tag, encoding } => {
            api::pty::check_tag(&tag)?;
            let guest = guest::enter(&app.ctx, capsule, patience()).await?;
            let joined = process::connect(&guest, api::Selector::Tag(tag.clone())).await?;
            Ok((tag, encoding, joined))
        }
        Request::Input { .. } | Request::Resize { .. } | Request::Kill | Request::Pong => {
            Err(invalid("the first message must be `start` or `connect`".into()))
        }
    }
}

fn understand(text: &str) -> Result<Said, Error> {
    let request = serde_json::from_str(text).map_err(|error| invalid(format!("not understood: {error}")))?;
    Ok(match request {
        Request::Input { data } => {
            let bytes =
                BASE64_STANDARD.decode(data).map_err(|error| invalid(format!("data is not base64: {error}")))?;
            Said::Input(bytes.into())
        }
        Request::Resize { cols, rows } => Said::Resize(Size::new(cols, rows)?),
        Request::Kill => Said::Kill,
        Request::Pong => Said::Nothing,
        Request::Start(_) | Request::Connect { .. } => return Err(invalid("this connection has its terminal".into())),
    })
}

fn invalid(message: String) -> Error {
    Error::new(ErrorCode::InvalidRequest, message)
}

/// How a terminal's client is spoken to.
struct Terminal {
    tag: String,
    encoding: Encoding,
}

impl Dialect for Terminal {
    fn started(&self, process: &Process) -> Message {
        text(&Answer::Started { pid: process.pid, tag: self.tag.clone() })
    }

    /// Who comes back by tag may find a process without a terminal, and sees what it prints.
    fn output(&mut self, _: Output, bytes: Bytes) -> Option<Message> {
        Some(match self.encoding {
            Encoding::Binary => Message::Binary(bytes),
            Encoding::Base64 => text(&Answer::Output { data: BASE64_STANDARD.encode(bytes) }),
        })
    }

    fn rest(&mut self) -> Vec<Message> {
        Vec::new()
    }

    fn exit(&self, exit_code: i32) -> Message {
        text(&Answer::Exit { exit_code })
    }
}
