//! WebSockets: who may open one, and how one ends.
//!
//! A key in the header is checked before the upgrade, and a wrong one is an HTTP error. Browsers cannot send headers: without
//! one, the first message must be `{"type":"auth","token"}`. After the upgrade everything that goes wrong is a message, of the
//! same form on every socket.

use std::time::Duration;

use api::{CapsuleId, ErrorCode};
use axum::extract::FromRequestParts;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::request::Parts;
use axum::response::Response;
use futures::future::BoxFuture;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite;

use super::App;
use super::caller::{self, Caller};
use super::error::Error;
use crate::db;

pub type To = SplitSink<WebSocket, Message>;
pub type From = SplitStream<WebSocket>;

/// Both directions of an open socket.
pub struct Client {
    pub to: To,
    pub from: From,
}

/// How a session ended: with its last message, or because the client wants no more.
pub type Ended = Result<Option<Message>, Error>;

/// Bytes of one message from a client.
const MESSAGE: usize = 16 * 1024 * 1024;
/// How long a client may take to say who it is.
const AUTH: Duration = Duration::from_secs(5);
/// How long a client may take to say what it wants.
const FIRST: Duration = Duration::from_secs(30);
/// How long a client's last words may take: input on its way when it left, or its answer to our farewell.
pub const LAST: Duration = Duration::from_secs(5);

/// A socket about to be opened on the capsule the path names.
pub struct Socket {
    app: App,
    door: Door,
    upgrade: WebSocketUpgrade,
}

/// What is known of who wants to come in.
enum Door {
    /// The key in the header has this capsule.
    Open(Box<db::capsule::Capsule>),
    /// There was no key yet.
    Closed(CapsuleId),
}

impl FromRequestParts<App> for Socket {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Caller::of_headers(app, parts).await?;
        let id = caller::id(parts, app).await?;
        let door = match caller {
            Some(caller) => Door::Open(caller.capsule(app, id).await?.into()),
            None => Door::Closed(id),
        };
        let upgrade = WebSocketUpgrade::from_request_parts(parts, app).await;
        let invalid = |error| Error::new(ErrorCode::InvalidRequest, format!("this route is a WebSocket: {error}"));
        Ok(Self { app: app.clone(), door, upgrade: upgrade.map_err(invalid)? })
    }
}

/// The first message of a client without a header.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Hello {
    Auth { token: String },
}

/// What went wrong, on any socket. `exec/stream` and `pty` write theirs in the same form.
#[derive(Serialize)]
#[serde(tag = "type", rename = "error")]
struct Told {
    code: ErrorCode,
    data: String,
    fatal: bool,
}

impl Socket {
    /// Upgrades, lets the client in, and has `session` work with it. What the session ends with is the last message; an error
    /// is told as a fatal one. `None` means that there is nobody to tell, or nothing.
    pub fn open<S>(self, session: S) -> Response
    where
        S: for<'a> FnOnce(App, db::capsule::Capsule, &'a mut Client) -> BoxFuture<'a, Ended> + Send + 'static,
    {
        let Self { app, door, upgrade } = self;
        let attend = async move |socket: WebSocket| {
            let (to, from) = socket.split();
            let mut client = Client { to, from };
            let ended = match admit(&app, door, &mut client.from).await {
                Ok(Some(capsule)) => session(app, capsule, &mut client).await,
                Ok(None) => Ok(None),
                Err(error) => Err(error),
            };
            farewell(ended.unwrap_or_else(|error| Some(told(error, true))), client).await;
        };
        upgrade.max_message_size(MESSAGE).max_frame_size(MESSAGE).on_upgrade(attend)
    }
}

/// The capsule, once the client has said who it is; `None` when it leaves instead.
async fn admit(app: &App, door: Door, from: &mut From) -> Result<Option<db::capsule::Capsule>, Error> {
    let id = match door {
        Door::Open(capsule) => return Ok(Some(*capsule)),
        Door::Closed(id) => id,
    };
    let refused = || Error::new(ErrorCode::Unauthorized, "authentication failed");
    let Some(text) = timeout(AUTH, text_from(from)).await.map_err(|_| refused())?.map_err(|_| refused())? else {
        return Ok(None);
    };
    let Ok(Hello::Auth { token }) = serde_json::from_str(&text) else { return Err(refused()) };
    let caller = Caller::of_key(app, &token).await.map_err(|error| match error.code() {
        ErrorCode::Unauthorized => refused(),
        _ => error,
    })?;
    caller.capsule(app, id).await.map(Some)
}

/// The client's first message that is one; `None` when it leaves instead.
pub async fn first(client: &mut Client, wanted: &str) -> Result<Option<String>, Error> {
    let invalid = |message: String| Error::new(ErrorCode::InvalidRequest, message);
    match timeout(FIRST, text_from(&mut client.from)).await {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(Binary)) => Err(invalid(format!("input came before {wanted}"))),
        Err(_) => Err(invalid(format!("no {wanted} came"))),
    }
}

/// A binary message where a text was to come.
struct Binary;

async fn text_from(from: &mut From) -> Result<Option<String>, Binary> {
    loop {
        match from.next().await {
            Some(Ok(Message::Text(text))) => return Ok(Some(text.as_str().to_owned())),
            Some(Ok(Message::Binary(_))) => return Err(Binary),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(None),
        }
    }
}

async fn farewell(last: Option<Message>, Client { mut to, mut from }: Client) {
    let farewell = async {
        if let Some(last) = last {
            to.send(last).await?;
        }
        to.send(Message::Close(Some(CloseFrame { code: close_code::NORMAL, reason: "".into() }))).await?;
        // What the client still says must be read: closing on unread bytes would take our last message away from it.
        while let Some(Ok(_)) = from.next().await {}
        Ok::<_, axum::Error>(())
    };
    // A client that is gone, or does not read, misses it.
    let _ = timeout(LAST, farewell).await;
}

/// What a client is told of a message that could not be read; nothing when it is gone.
pub fn too_large(error: axum::Error) -> Option<Message> {
    let source = error.into_inner();
    let is_too_large = matches!(source.downcast_ref(), Some(tungstenite::Error::Capacity(_)));
    let message = format!("a message must be at most {MESSAGE} bytes long");
    is_too_large.then(|| told(Error::new(ErrorCode::TooLarge, message), true))
}

/// The error as a message.
pub fn told(error: Error, fatal: bool) -> Message {
    let detail = error.into_detail();
    text(&Told { code: detail.code, data: detail.message, fatal })
}

/// Anything as a message.
pub fn text(answer: &impl Serialize) -> Message {
    Message::Text(serde_json::to_string(answer).expect("an answer is plain data").into())
}
