//! A client of the API's WebSockets.

use api::CapsuleId;
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::world::{PATIENCE, World};

pub struct Socket(pub WebSocketStream<MaybeTlsStream<TcpStream>>);

/// Opens one at that path below `/api/v1/capsules/`, or gives the answer that is no upgrade.
pub async fn dial(url: &str, key: Option<&str>, path: &str) -> Result<Socket, (u16, Value)> {
    let url = format!("{}/api/v1/capsules/{path}", url.replacen("http", "ws", 1));
    let mut request = url.into_client_request().unwrap();
    if let Some(key) = key {
        request.headers_mut().insert("x-api-key", key.parse().unwrap());
    }
    match connect_async(request).await {
        Ok((socket, _)) => Ok(Socket(socket)),
        Err(Error::Http(answer)) => {
            Err((answer.status().as_u16(), serde_json::from_slice(answer.body().as_ref().unwrap()).unwrap()))
        }
        Err(error) => panic!("{error}"),
    }
}

impl Socket {
    /// A capsule's socket, with the first message sent.
    pub async fn open(world: &World, id: CapsuleId, what: &str, hello: Value) -> Self {
        let mut socket = dial(&world.url, Some(&world.key), &format!("{id}/{what}")).await.unwrap();
        socket.say(hello).await;
        socket
    }

    pub async fn say(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }

    pub async fn write(&mut self, text: &str) {
        self.0.send(Message::binary(text.as_bytes().to_vec())).await.unwrap();
    }

    /// The next message that is not a ping.
    pub async fn next(&mut self) -> Message {
        loop {
            match timeout(PATIENCE, self.0.next()).await.expect("an answer").expect("no end").unwrap() {
                Message::Ping(_) => {}
                message => return message,
            }
        }
    }

    /// The binary messages until the next text, and that.
    pub async fn told(&mut self) -> (String, Value) {
        let mut shown = Vec::new();
        loop {
            match self.next().await {
                Message::Binary(bytes) => shown.extend_from_slice(&bytes),
                Message::Text(text) => {
                    return (String::from_utf8(shown).unwrap(), serde_json::from_str(&text).unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reads until `text` has been shown in binary messages.
    pub async fn shows(&mut self, text: &str) {
        let mut shown = String::new();
        while !shown.contains(text) {
            match self.next().await {
                Message::Binary(bytes) => shown.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} after {shown:?}"),
            }
        }
    }

    /// The next error, which must be of that kind.
    pub async fn fails(&mut self, code: &str, fatal: bool) -> String {
        let (_, error) = self.told().await;
        assert_eq!(
            (&error["type"], &error["code"], &error["fatal"]),
            (&json!("error"), &json!(code), &json!(fatal)),
            "{error}"
        );
        if fatal {
            self.closes().await;
        }
        error["data"].as_str().unwrap().to_owned()
    }

    pub async fn closes(&mut self) {
        let end = self.next().await;
        assert!(matches!(end, Message::Close(_)), "{end:?}");
    }
}
