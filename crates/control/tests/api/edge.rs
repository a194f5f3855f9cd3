//! Capsules under their own hosts: what a client and a program in a capsule see of each other.

use std::net::SocketAddr;
use std::time::Duration;

use api::CapsuleId;
use futures::{SinkExt, StreamExt};
use reqwest::{Method, StatusCode, redirect};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::world::{Store, World, on_both};

on_both![
    a_program_sees_what_was_asked_and_nothing_of_ours,
    a_capsules_host_is_never_the_apis,
    addresses_in_answers_lead_back,
    sockets_and_events_pass,
    who_is_not_there_is_told_in_words,
    a_private_capsule_wants_its_token,
    forks_are_as_private_as_their_parent,
    a_paused_capsule_wakes_if_it_wants_to,
    a_pause_that_nobody_knew_of_costs_a_moment,
    what_has_ended_is_gone_at_once,
    the_steering_of_a_capsule_is_not_for_visitors,
];

/// A program in a capsule: answers every connection's first request with `answer`, and hands out the requests.
pub struct Program {
    pub port: u16,
    requests: tokio::sync::mpsc::UnboundedReceiver<String>,
}

impl Program {
    pub async fn answering(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sent, requests) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let sent = sent.clone();
                tokio::spawn(async move {
                    let mut request = Vec::new();
                    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                        if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    stream.shutdown().await.unwrap();
                    // All that there is to the connection, whatever it was taken for.
                    let _ = stream.read_to_end(&mut request).await;
                    let _ = sent.send(String::from_utf8_lossy(&request).into_owned());
                });
            }
        });
        Self { port, requests }
    }

    pub async fn saying_ok() -> Self {
        Self::answering("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await
    }

    /// The next request, as it came.
    pub async fn request(&mut self) -> String {
        self.requests.recv().await.unwrap()
    }

    /// Nothing more has come.
    pub fn is_quiet(&mut self) -> bool {
        self.requests.try_recv().is_err()
    }
}

pub fn host(id: CapsuleId, port: u16) -> String {
    format!("{port}-{id}.wrenn.test")
}

impl World {
    /// A request to a port of a capsule, without a key.
    pub fn visit(&self, method: Method, id: CapsuleId, port: u16, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url)).header("host", host(id, port))
    }

    pub fn address(&self) -> SocketAddr {
        self.url.strip_prefix("http://").unwrap().parse().unwrap()
    }

    async fn private(&self) -> (CapsuleId, String) {
        let body = json!({"network": {"allow_public_traffic": false}});
        let (status, capsule) = self.post("/v1/capsules", body).await;
        assert_eq!((status, &capsule["allow_public_traffic"]), (StatusCode::CREATED, &json!(false)), "{capsule}");
        let token = capsule["traffic_access_token"].as_str().unwrap().to_owned();
        (capsule["id"].as_str().unwrap().parse().unwrap(), token)
    }

    async fn visited(&self, id: CapsuleId, port: u16, token: &str) -> StatusCode {
        self.visit(Method::GET, id, port, "/").header("E2B-Traffic-Access-Token", token).send().await.unwrap().status()
    }
}

async fn a_program_sees_what_was_asked_and_nothing_of_ours(world: World) {
    let id = world.capsule().await;
    let mut program = Program::saying_ok().await;
    let request = world
        .visit(Method::GET, id, program.port, "/a%2Fb//c/?x=%20&y")
        .header("x-api-key", &world.key)
        .header("authorization", format!("Bearer {}", world.key))
        .header("cookie", "mine=1; wrenn_session=2")
        .header("x-forwarded-host", "elsewhere")
        .header("x-mine", "kept");
    let answer = request.send().await.unwrap();
    assert_eq!((answer.status(), answer.text().await.unwrap().as_str()), (StatusCode::OK, "ok"));
    let seen = program.request().await;
    let host = host(id, program.port);
    assert!(seen.starts_with("GET /a%2Fb//c/?x=%20&y HTTP/1.1\r\n"), "{seen}");
    for line in [
        format!("host: {host}\r\n"),
        format!("x-forwarded-host: {host}\r\n"),
        "x-forwarded-for: 127.0.0.1\r\n".into(),
        "x-forwarded-proto: http\r\n".into(),
        "cookie: mine=1\r\n".into(),
        "x-mine: kept\r\n".into(),
    ] {
        assert!(seen.contains(&line), "{line} is not in {seen}");
    }
    for word in [world.key.as_str(), "wrenn_session", "authorization", "elsewhere"] {
        assert!(!seen.contains(word), "{word} is in {seen}");
    }
    // By E2B's headers, where a name cannot say it.
    let routed = world.client.get(format!("{}/by-header", world.url)).header("e2b-sandbox-id", id.to_string());
    assert_eq!(routed.try_clone().unwrap().send().await.unwrap().status(), StatusCode::BAD_REQUEST);
    let answer = routed.header("e2b-sandbox-port", program.port).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let seen = program.request().await;
    assert!(seen.starts_with("GET /by-header ") && !seen.contains("e2b-sandbox"), "{seen}");
}

async fn a_capsules_host_is_never_the_apis(world: World) {
    let id = world.capsule().await;
    let mut program = Program::saying_ok().await;
    for path in ["/v1/capsules", "/health", "/api/v1/capsules", "/"] {
        let answer =
            world.visit(Method::GET, id, program.port, path).header("x-api-key", &world.key).send().await.unwrap();
        assert_eq!(answer.text().await.unwrap(), "ok");
        assert!(program.request().await.starts_with(&format!("GET {path} ")));
    }
    for host in [format!("0-{id}.x"), "80-cl-1.x".to_owned(), format!("99999-{id}")] {
        let answer = world.request(Method::GET, "/v1/capsules").header("host", host).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
        assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "invalid_request");
    }
    assert!(program.is_quiet());
}

async fn addresses_in_answers_lead_back(world: World) {
    let id = world.capsule().await;
    let client = reqwest::Client::builder().redirect(redirect::Policy::none()).build().unwrap();
    for (said, told) in [
        ("/dir/", "/dir/"),
        ("dir/", "dir/"),
        ("https://elsewhere.test/x", "https://elsewhere.test/x"),
        ("http://localhost:PORT/x?y", "/x?y"),
        ("http://PORT-ID.wrenn.test/x", "/x"),
        ("http://PORT-ID.wrenn.test//elsewhere.test", "/.//elsewhere.test"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let location = said.replace("PORT", &port.to_string()).replace("ID", &id.to_string());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            let answer = format!(
                "HTTP/1.1 302 Found\r\nLocation: {location}\r\nSet-Cookie: a=1; Domain=wrenn.test\r\n\
                 X-Wrenn-Refusal: closed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let answer = client.get(&world.url).header("host", host(id, port)).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::FOUND, "a guest does not speak for its host");
        assert_eq!(answer.headers()["location"], told);
        assert_eq!(answer.headers()["set-cookie"], "a=1");
    }
}

async fn sockets_and_events_pass(world: World) {
    let id = world.capsule().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_text() || message.is_binary() {
                        socket.send(message).await.unwrap();
                    }
                }
            });
        }
    });
    let stream = TcpStream::connect(world.address()).await.unwrap();
    let request = format!("ws://{}/echo", host(id, port)).into_client_request().unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await.unwrap();
    for message in [Message::text("hello"), Message::binary(vec![7; 1 << 20]), Message::text("")] {
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
    socket.send(Message::Ping("p".into())).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::Pong("p".into()));
    socket.close(None).await.unwrap();
    while let Some(Ok(_)) = socket.next().await {}

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (seen, mut see) = tokio::sync::mpsc::channel::<()>(1);
    let program = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n").await.unwrap();
        for _ in 0..3 {
            stream.write_all(b"data: x\n\n").await.unwrap();
            // The next is sent when the one before has been read.
            see.recv().await.unwrap();
        }
        // Whoever reads no more has left, and the program learns of it.
        stream.read(&mut [0; 1]).await.unwrap_or(0)
    });
    let mut answer = world.visit(Method::GET, id, port, "/events").send().await.unwrap();
    for _ in 0..3 {
        assert_eq!(answer.chunk().await.unwrap().unwrap(), "data: x\n\n");
        seen.send(()).await.unwrap();
    }
    drop(answer);
    assert_eq!(program.await.unwrap(), 0);
}

async fn who_is_not_there_is_told_in_words(world: World) {
    let id = world.capsule().await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let paused = world.capsule().await;
    world.ask(paused, "pause").await;
    let ended = world.capsule().await;
    world.delete(&format!("/v1/capsules/{ended}")).await;
    for (id, code, message) in [
        (CapsuleId::random(), "not_found", "The sandbox was not found"),
        (ended, "invalid_state", "The sandbox was not found"),
        (paused, "invalid_state", "The sandbox was not found"),
        (id, "port_closed", "The sandbox is running but port is not open"),
    ] {
        let answer = world.visit(Method::GET, id, nobody, "/").send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
        let body: Value = answer.json().await.unwrap();
        assert_eq!((&body["error"]["code"], &body["message"]), (&json!(code), &json!(message)), "{body}");
        assert_eq!(
            (&body["sandboxId"], &body["port"], &body["code"]),
            (&json!(id.to_string()), &json!(nobody), &json!(502))
        );
        let answer = world.visit(Method::GET, id, nobody, "/").header("accept", "text/html,*/*").send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("text/html"));
        assert!(answer.text().await.unwrap().contains(&id.to_string()));
    }
    // Whoever listens but does not speak HTTP is not nobody.
    let program = Program::answering("SSH-2.0-OpenSSH\r\n").await;
    let answer = world.visit(Method::GET, id, program.port, "/").send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "no_answer");
}

async fn a_private_capsule_wants_its_token(world: World) {
    let (id, token) = world.private().await;
    let program = Program::saying_ok().await;
    let refused = world.visit(Method::GET, id, program.port, "/").send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::FORBIDDEN);
    assert_eq!(world.visited(id, program.port, &world.key).await, StatusCode::FORBIDDEN);
    assert_eq!(world.visited(id, program.port, &token).await, StatusCode::OK);
    let path = format!("/v1/capsules/{id}");
    assert!(world.get(&path).await.1.get("traffic_access_token").is_none(), "it is told once");
    // Another, and the old one is worth nothing, however lately it was.
    let (status, body) = world.send(world.request(Method::POST, &format!("{path}/traffic-token"))).await;
    assert_eq!(status, StatusCode::CREATED);
    let new = body["traffic_access_token"].as_str().unwrap();
    assert_eq!(world.visited(id, program.port, &token).await, StatusCode::FORBIDDEN);
    assert_eq!(world.visited(id, program.port, new).await, StatusCode::OK);
    assert_eq!(world.delete(&format!("{path}/traffic-token")).await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::OK);
    // What was public a moment ago is not, and another's capsule is nobody's to open.
    world.send(world.request(Method::POST, &format!("{path}/traffic-token"))).await;
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::FORBIDDEN);
    let stranger = world.stranger().await;
    let request = world.client.delete(format!("{}{path}/traffic-token", world.url)).header("x-api-key", stranger);
    assert_eq!(world.send(request).await.0, StatusCode::NOT_FOUND);
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::FORBIDDEN);
}

async fn forks_are_as_private_as_their_parent(world: World) {
    let (id, token) = world.private().await;
    let program = Program::saying_ok().await;
    let (_, forked) = world.post(&format!("/v1/capsules/{id}/fork"), json!({"count": 2})).await;
    let mut tokens = vec![token];
    for child in forked["capsules"].as_array().unwrap() {
        let child_id = child["id"].as_str().unwrap().parse().unwrap();
        for token in &tokens {
            assert_eq!(world.visited(child_id, program.port, token).await, StatusCode::FORBIDDEN);
        }
        let own = child["traffic_access_token"].as_str().unwrap().to_owned();
        assert_eq!(world.visited(child_id, program.port, &own).await, StatusCode::OK);
        tokens.push(own);
    }
    assert_eq!(tokens.len(), 3);
}

async fn a_paused_capsule_wakes_if_it_wants_to(world: World) {
    let program = Program::saying_ok().await;
    for wakes in [true, false] {
        let (_, capsule) = world.post("/v1/capsules", json!({"auto_resume": wakes})).await;
        assert_eq!(capsule["auto_resume"], wakes);
        let id: CapsuleId = capsule["id"].as_str().unwrap().parse().unwrap();
        // Also while it is remembered as running.
        assert_eq!(world.visited(id, program.port, "").await, StatusCode::OK);
        world.ask(id, "pause").await;
        let (status, now) = if wakes { (StatusCode::OK, "running") } else { (StatusCode::BAD_GATEWAY, "paused") };
        assert_eq!(world.visited(id, program.port, "").await, status);
        assert_eq!(world.status(id).await, now);
    }
    // Not for those who may not come in.
    let body = json!({"auto_resume": true, "network": {"allowPublicTraffic": false}});
    let (_, capsule) = world.post("/v1/capsules", body).await;
    let id: CapsuleId = capsule["id"].as_str().unwrap().parse().unwrap();
    world.ask(id, "pause").await;
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::FORBIDDEN);
    assert_eq!(world.status(id).await, "paused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_control_plane_makes_private_is_private_at_all() {
    let world = World::new(Store::Postgres).await;
    let other = world.beside().await;
    let id = world.capsule().await;
    let program = Program::saying_ok().await;
    let visited = async || {
        let request = world.client.get(&other).header("host", host(id, program.port));
        request.send().await.unwrap().status()
    };
    assert_eq!(visited().await, StatusCode::OK);
    world.ask(id, "traffic-token").await;
    let hidden = async {
        while visited().await != StatusCode::FORBIDDEN {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), hidden).await.expect("it is remembered for seconds");
}

async fn a_pause_that_nobody_knew_of_costs_a_moment(world: World) {
    let program = Program::saying_ok().await;
    let (_, capsule) = world.post("/v1/capsules", json!({"auto_resume": true})).await;
    let id: CapsuleId = capsule["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::OK);
    world.agent.doze(id).await;
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::OK);
    assert_eq!(world.status(id).await, "running");
}

async fn what_has_ended_is_gone_at_once(world: World) {
    let id = world.capsule().await;
    let mut program = Program::saying_ok().await;
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::OK);
    program.request().await;
    world.delete(&format!("/v1/capsules/{id}")).await;
    assert_eq!(world.visited(id, program.port, "").await, StatusCode::BAD_GATEWAY);
    assert!(program.is_quiet());
}

async fn the_steering_of_a_capsule_is_not_for_visitors(world: World) {
    let id = world.capsule().await;
    for path in ["/init", "/freeze", "/snapshot/prepare"] {
        let answer = world.visit(Method::POST, id, 49983, path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::NOT_FOUND, "{path}");
    }
}
