//! Terminals.

use api::{CapsuleId, ErrorCode};
use axum::http::StatusCode;
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::world::{PATIENCE, World, on_both, refused};

on_both![
    what_is_typed_and_shown_and_the_exit_code,
    a_client_that_leaves_and_comes_back,
    a_kill_passes_what_waits,
    input_that_is_not_read_holds_its_client,
    what_is_wrong_before_and_after_the_upgrade,
    a_capsule_that_starts_is_waited_for,
];

struct Terminal(WebSocketStream<MaybeTlsStream<TcpStream>>);

async fn dial(url: &str, key: Option<&str>, id: &str) -> Result<Terminal, (u16, Value)> {
    let mut request =
        format!("{}/api/v1/capsules/{id}/pty", url.replacen("http", "ws", 1)).into_client_request().unwrap();
    if let Some(key) = key {
        request.headers_mut().insert("x-api-key", key.parse().unwrap());
    }
    match connect_async(request).await {
        Ok((socket, _)) => Ok(Terminal(socket)),
        Err(Error::Http(answer)) => {
            Err((answer.status().as_u16(), serde_json::from_slice(answer.body().as_ref().unwrap()).unwrap()))
        }
        Err(error) => panic!("{error}"),
    }
}

impl Terminal {
    async fn open(world: &World, id: CapsuleId, hello: Value) -> Self {
        let mut terminal = dial(&world.url, Some(&world.key), &id.to_string()).await.unwrap();
        terminal.say(hello).await;
        terminal
    }

    async fn say(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }

    async fn write(&mut self, text: &str) {
        self.0.send(Message::binary(text.as_bytes().to_vec())).await.unwrap();
    }

    /// What is shown until the next other message, and that.
    async fn told(&mut self) -> (String, Value) {
        let mut shown = Vec::new();
        loop {
            match timeout(PATIENCE, self.0.next()).await.expect("an answer").expect("no end").unwrap() {
                Message::Binary(bytes) => shown.extend_from_slice(&bytes),
                Message::Text(text) => {
                    return (String::from_utf8(shown).unwrap(), serde_json::from_str(&text).unwrap());
                }
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next error, which must be of that kind.
    async fn fails(&mut self, code: &str, fatal: bool) -> String {
        let (_, error) = self.told().await;
        assert_eq!(
            (&error["type"], &error["code"], &error["fatal"]),
            (&json!("error"), &json!(code), &json!(fatal)),
            "{error}"
        );
        if fatal {
            assert!(matches!(timeout(PATIENCE, self.0.next()).await.unwrap(), Some(Ok(Message::Close(_)))));
        }
        error["data"].as_str().unwrap().to_owned()
    }
}

async fn what_is_typed_and_shown_and_the_exit_code(world: World) {
    let id = world.capsule().await;
    let mut terminal = Terminal::open(&world, id, json!({ "type": "start", "cols": 0, "rows": 0 })).await;
    // Before the process is there, in both forms, and with a resize between them.
    terminal.write("size\n").await;
    terminal.say(json!({ "type": "pong" })).await;
    let (_, started) = terminal.told().await;
    assert_eq!((&started["type"], &started["pid"]), (&json!("started"), &json!(1001)));
    let tag = started["tag"].as_str().unwrap();
    assert!(tag.len() == 12 && tag.starts_with("pty-"), "{tag}");
    let running = world.agent.processes(id).remove(&1001).unwrap();
    assert_eq!((running.cmd.as_str(), running.tag.as_deref()), ("/bin/bash", Some(tag)));
    assert!(!running.has_deadline);
    terminal.say(json!({ "type": "resize", "cols": 132, "rows": 43 })).await;
    terminal.say(json!({ "type": "input", "data": "c2l6ZQo=" })).await;
    terminal.write("exit 7\n").await;
    let (shown, exit) = terminal.told().await;
    // The first may find either size; what follows the resize finds the new one.
    let sizes: Vec<_> = shown.lines().filter(|line| line.contains(' ') && !line.starts_with("exit")).collect();
    assert!(shown.starts_with("size\n") && sizes.len() == 2 && sizes[1] == "43 132", "{shown}");
    assert_eq!(exit, json!({ "type": "exit", "exit_code": 7 }));
    assert!(matches!(timeout(PATIENCE, terminal.0.next()).await.unwrap(), Some(Ok(Message::Close(_)))));
    world.until_idle(id).await;
}

async fn a_client_that_leaves_and_comes_back(world: World) {
    let id = world.capsule().await;
    let mut terminal = Terminal::open(&world, id, json!({ "type": "start", "cmd": "sh", "tag": "mine" })).await;
    terminal.told().await;
    // Its last words arrive.
    terminal.write("last words\n").await;
    terminal.0.close(None).await.unwrap();
    drop(terminal);
    let mut terminal = Terminal::open(&world, id, json!({ "type": "connect", "tag": "mine" })).await;
    assert_eq!(terminal.told().await.1, json!({ "type": "started", "pid": 1001, "tag": "mine" }));
    terminal.write("exit 0\n").await;
    assert_eq!(terminal.told().await, ("last words\nexit 0\n".into(), json!({ "type": "exit", "exit_code": 0 })));
    world.until_idle(id).await;
    let mut terminal = Terminal::open(&world, id, json!({ "type": "connect", "tag": "mine" })).await;
    assert!(terminal.fails("not_found", true).await.contains("`mine`"));
}

async fn a_kill_passes_what_waits(world: World) {
    let id = world.capsule().await;
    let mut terminal = Terminal::open(&world, id, json!({ "type": "start", "cmd": "stuck" })).await;
    terminal.told().await;
    for _ in 0..10 {
        terminal.write("never read\n").await;
    }
    terminal.say(json!({ "type": "kill" })).await;
    assert_eq!(terminal.told().await, ("stuck\n".into(), json!({ "type": "exit", "exit_code": -1 })));
}

async fn input_that_is_not_read_holds_its_client(world: World) {
    let id = world.capsule().await;
    let mut terminal = Terminal::open(&world, id, json!({ "type": "start", "cmd": "stuck", "tag": "full" })).await;
    terminal.told().await;
    // More than all buffers between here and there hold.
    let piece = "x".repeat(1024 * 1024);
    let flood = async {
        for _ in 0..256 {
            terminal.write(&piece).await;
        }
    };
    assert!(timeout(std::time::Duration::from_secs(5), flood).await.is_err(), "everything was taken");
    drop(terminal);
    let mut other = Terminal::open(&world, id, json!({ "type": "connect", "tag": "full" })).await;
    other.told().await;
    other.say(json!({ "type": "kill" })).await;
    assert_eq!(other.told().await.1["exit_code"], -1);
}

async fn what_is_wrong_before_and_after_the_upgrade(world: World) {
    let id = world.capsule().await;
    let path = id.to_string();
    let refuse = |(status, body): (u16, Value), expected, code| {
        refused((StatusCode::from_u16(status).unwrap(), body), expected, code)
    };
    for key in [None, Some("wrn_"), Some("wrn_00000000000000000000000000000000")] {
        refuse(dial(&world.url, key, &path).await.err().unwrap(), 401, ErrorCode::Unauthorized);
    }
    refuse(dial(&world.url, Some(&world.key), "cl-1").await.err().unwrap(), 400, ErrorCode::InvalidRequest);
    let nobodys = CapsuleId::random().to_string();
    refuse(dial(&world.url, Some(&world.key), &nobodys).await.err().unwrap(), 404, ErrorCode::NotFound);
    refuse(dial(&world.url, Some(&world.stranger().await), &path).await.err().unwrap(), 404, ErrorCode::NotFound);
    let plain = world.get(&format!("/v1/capsules/{id}/pty")).await;
    assert!(refused(plain, 400, ErrorCode::InvalidRequest).contains("WebSocket"));

    for (hello, field) in [
        (json!({ "type": "resize", "cols": 1, "rows": 1 }), "start"),
        (json!({ "type": "dance" }), "start"),
        (json!({ "type": "start", "cols": 70_000 }), "cols"),
        (json!({ "type": "start", "cwd": "/missing" }), "/missing"),
        (json!({ "type": "connect", "tag": "" }), "tag"),
    ] {
        let message = Terminal::open(&world, id, hello).await.fails("invalid_request", true).await;
        assert!(message.contains(field), "{message}");
    }
    assert!(world.agent.processes(id).is_empty());

    let mut terminal = Terminal::open(&world, id, json!({ "type": "start" })).await;
    terminal.told().await;
    for (message, word) in [
        (json!({ "type": "resize", "cols": 0, "rows": 1 }), "cols"),
        (json!({ "type": "input", "data": "!" }), "base64"),
        (json!({ "type": "start" }), "its terminal"),
        (json!("hello"), "understood"),
    ] {
        terminal.say(message).await;
        let message = terminal.fails("invalid_request", false).await;
        assert!(message.contains(word), "{message}");
    }
    terminal.write("vanish\n").await;
    terminal.fails("agent_error", true).await;
    world.agent.lose(id);
    world.until(id, "missing").await;
    Terminal::open(&world, id, json!({ "type": "start" })).await.fails("invalid_state", true).await;
}

async fn a_capsule_that_starts_is_waited_for(world: World) {
    world.agent.hold();
    let mut creates = world.agent.creates();
    let body = world.post("/v1/capsules", json!({}));
    let begun = async {
        creates.wait_for(|count| *count == 1).await.unwrap();
        let (_, capsules) = world.get("/v1/capsules").await;
        let id: CapsuleId = capsules[0]["id"].as_str().unwrap().parse().unwrap();
        let mut terminal = Terminal::open(&world, id, json!({ "type": "start" })).await;
        terminal.write("exit 3\n").await;
        world.agent.release();
        assert_eq!(terminal.told().await.1["type"], "started");
        assert_eq!(terminal.told().await.1["exit_code"], 3);
    };
    tokio::join!(body, begun);
}
