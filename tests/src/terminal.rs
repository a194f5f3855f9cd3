//! A client of one WebSocket of the API: what it is told, and what a screen would show of it.

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::Api;

/// Patience for what should come soon: what does not come is told with what came in its place.
const PATIENCE: Duration = Duration::from_secs(60);

/// An open terminal or command stream.
pub struct Terminal {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    screen: vt100::Parser,
    shown: Vec<u8>,
}

impl Terminal {
    /// Opens `path` below a capsule and says `hello`, unless that is null.
    pub async fn open(api: &Api, id: &str, path: &str, hello: Value) -> Self {
        let url = format!("{}/v1/capsules/{id}/{path}", api.url().replacen("http", "ws", 1));
        let mut request = url.into_client_request().unwrap();
        request.headers_mut().insert("x-api-key", api.api_key().parse().unwrap());
        let (socket, _) = connect_async(request).await.unwrap();
        let size = |name: &str, default| hello[name].as_u64().unwrap_or(default) as u16;
        let screen = vt100::Parser::new(size("rows", 24), size("cols", 80), 0);
        let mut terminal = Self { socket, screen, shown: Vec::new() };
        if !hello.is_null() {
            terminal.say(hello).await;
        }
        terminal
    }

    /// Sends a JSON message.
    pub async fn say(&mut self, message: Value) {
        self.socket.send(Message::text(message.to_string())).await.unwrap();
    }

    /// Sends what is typed.
    pub async fn write(&mut self, text: &str) {
        self.socket.send(Message::binary(text.as_bytes().to_vec())).await.unwrap();
    }

    /// Changes the size of the process's terminal and of the screen.
    pub async fn resize(&mut self, rows: u16, cols: u16) {
        self.say(json!({"type": "resize", "rows": rows, "cols": cols})).await;
        self.screen.screen_mut().set_size(rows, cols);
    }

    /// The next JSON message but pings, or `None` where the connection ends. What is shown before it is kept.
    pub async fn told(&mut self) -> Option<Value> {
        loop {
            match self.next().await? {
                Some(message) if message["type"] != "ping" => return Some(message),
                _ => {}
            }
        }
    }

    /// Waits until that is shown, and forgets what was shown before it.
    pub async fn until(&mut self, text: &str) {
        loop {
            let found = self.shown.windows(text.len()).position(|window| window == text.as_bytes());
            if let Some(at) = found {
                self.shown.drain(..at + text.len());
                return;
            }
            let more = tokio::time::timeout(PATIENCE, self.next()).await.is_ok_and(|message| message.is_some());
            assert!(more, "no {text:?} in {:?}", String::from_utf8_lossy(&self.shown));
        }
    }

    /// Waits until the screen is as it should be.
    pub async fn screen(&mut self, what: &str, is: impl Fn(&[String]) -> bool) {
        loop {
            let screen = self.screen.screen();
            let rows: Vec<String> = screen.rows(0, screen.size().1).collect();
            if is(&rows) {
                return;
            }
            let more = tokio::time::timeout(PATIENCE, self.next()).await.is_ok_and(|message| message.is_some());
            assert!(more, "no {what} on {rows:#?}");
        }
    }

    /// One message: `Some(None)` for what is shown, `None` for the end of the connection.
    async fn next(&mut self) -> Option<Option<Value>> {
        loop {
            match self.socket.next().await?.ok()? {
                Message::Text(text) => return Some(Some(serde_json::from_str(&text).unwrap())),
                Message::Binary(bytes) => {
                    self.screen.process(&bytes);
                    self.shown.extend_from_slice(&bytes);
                    return Some(None);
                }
                Message::Close(_) => return None,
                _ => {}
            }
        }
    }
}
