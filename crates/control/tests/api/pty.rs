//! Terminals.

use std::pin::pin;
use std::time::Duration;

use api::{CapsuleId, ErrorCode};
use futures::{SinkExt, StreamExt};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use crate::socket::{Socket, dial};
use crate::world::{PATIENCE, World, on_both, refused};

on_both![
    what_is_typed_and_shown_and_the_exit_code,
    a_client_that_leaves_and_comes_back,
    a_client_that_takes_only_text,
    a_kill_passes_what_waits,
    input_that_is_not_read_holds_its_client,
    a_message_that_is_too_long_is_told,
    a_browser_says_who_it_is,
    what_is_wrong_before_and_after_the_upgrade,
    a_capsule_that_starts_is_waited_for,
];

async fn terminal(world: &World, id: CapsuleId, hello: Value) -> Socket {
    Socket::open(world, id, "pty", hello).await
}

/// A shell without a prompt.
fn quiet(more: Value) -> Value {
    let mut start = json!({ "type": "start", "cmd": "/bin/sh", "args": ["-c", "stty -echo; echo ready; exec sh"] });
    start.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    start["envs"] = json!({ "PS1": "" });
    start
}

async fn what_is_typed_and_shown_and_the_exit_code(world: World) {
    let id = world.capsule().await;
    let mut terminal = terminal(&world, id, json!({ "type": "start", "cols": 0, "rows": 0, "user": "root" })).await;
    // Before the process is there.
    terminal.write("echo $((40 + 2)); stty size\n").await;
    terminal.say(json!({ "type": "pong" })).await;
    let (_, started) = terminal.told().await;
    assert_eq!(started["type"], "started");
    let tag = started["tag"].as_str().unwrap();
    assert!(tag.len() == 12 && tag.starts_with("pty-"), "{tag}");
    terminal.shows("24 80").await;
    let running = world.agent.processes(id).await;
    let config = running[0].config.as_option().unwrap();
    assert_eq!((config.cmd.as_str(), running[0].tag.as_deref()), ("/bin/bash", Some(tag)));
    assert_eq!(started["pid"], running[0].pid);
    terminal.say(json!({ "type": "resize", "cols": 132, "rows": 43 })).await;
    // `stty size`
    terminal.say(json!({ "type": "input", "data": "c3R0eSBzaXplCg==" })).await;
    terminal.shows("43 132").await;
    terminal.write("exit 7\n").await;
    assert_eq!(terminal.told().await.1, json!({ "type": "exit", "exit_code": 7 }));
    terminal.closes().await;
    world.until_idle(id).await;
}

async fn a_client_that_leaves_and_comes_back(world: World) {
    let id = world.capsule().await;
    let mut first = terminal(&world, id, quiet(json!({ "tag": "mine" }))).await;
    let started = first.told().await.1;
    first.shows("ready").await;
    // Its last words arrive.
    first.write("echo last words\n").await;
    first.0.close(None).await.unwrap();
    drop(first);
    let mut second = terminal(&world, id, json!({ "type": "connect", "tag": "mine" })).await;
    assert_eq!(second.told().await.1, started);
    second.shows("ready\r\nlast words").await;
    second.write("exit 0\n").await;
    assert_eq!(second.told().await.1, json!({ "type": "exit", "exit_code": 0 }));
    world.until_idle(id).await;
    // For a while it still tells how it ended.
    let mut third = terminal(&world, id, json!({ "type": "connect", "tag": "mine" })).await;
    assert_eq!(third.told().await.1, started);
    let (shown, exit) = third.told().await;
    assert!(shown.starts_with("ready\r\nlast words\r\n"), "{shown}");
    assert_eq!(exit["exit_code"], 0);
    let mut nobody = terminal(&world, id, json!({ "type": "connect", "tag": "other" })).await;
    assert!(nobody.fails("not_found", true).await.contains("`other`"));
}

async fn a_client_that_takes_only_text(world: World) {
    let id = world.capsule().await;
    let mut terminal = terminal(&world, id, quiet(json!({ "tag": "text", "encoding": "base64" }))).await;
    assert_eq!(terminal.told().await.1["type"], "started");
    // "ready\r\n"
    assert_eq!(terminal.told().await.1, json!({ "type": "output", "data": "cmVhZHkNCg==" }));
    drop(terminal);
    let hello = json!({ "type": "connect", "tag": "text", "encoding": "base64" });
    let mut terminal = Socket::open(&world, id, "pty", hello).await;
    assert_eq!(terminal.told().await.1["type"], "started");
    assert_eq!(terminal.told().await.1, json!({ "type": "output", "data": "cmVhZHkNCg==" }));
    terminal.say(json!({ "type": "kill" })).await;
    assert_eq!(terminal.told().await, (String::new(), json!({ "type": "exit", "exit_code": -1 })));
}

/// Shows `stuck` and reads nothing.
fn stuck(tag: &str) -> Value {
    json!({ "type": "start", "cmd": "/bin/sh", "args": ["-c", "stty raw -echo; echo stuck; exec sleep 1000"], "tag": tag })
}

async fn a_kill_passes_what_waits(world: World) {
    let id = world.capsule().await;
    let mut terminal = terminal(&world, id, stuck("a")).await;
    terminal.told().await;
    terminal.shows("stuck").await;
    for _ in 0..10 {
        terminal.write(&"never read".repeat(1000)).await;
    }
    terminal.say(json!({ "type": "kill" })).await;
    assert_eq!(terminal.told().await.1, json!({ "type": "exit", "exit_code": -1 }));
}

async fn input_that_is_not_read_holds_its_client(world: World) {
    let id = world.capsule().await;
    let mut first = terminal(&world, id, stuck("full")).await;
    first.told().await;
    first.shows("stuck").await;
    // More than all buffers between here and there hold.
    let piece = "x".repeat(1024 * 1024);
    let flood = async {
        for _ in 0..256 {
            first.write(&piece).await;
        }
    };
    assert!(timeout(Duration::from_secs(5), flood).await.is_err(), "everything was taken");
    drop(first);
    // The program still does not read: what was on its way to it is given up.
    let given_up = async {
        while world.agent.unanswered() > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, given_up).await.expect("nothing waits for a client that is gone");
    let mut other = terminal(&world, id, json!({ "type": "connect", "tag": "full" })).await;
    other.told().await;
    other.say(json!({ "type": "kill" })).await;
    assert_eq!(other.told().await.1["exit_code"], -1);
}

async fn a_message_that_is_too_long_is_told(world: World) {
    let id = world.capsule().await;
    let mut terminal = terminal(&world, id, stuck("long")).await;
    terminal.told().await;
    terminal.shows("stuck").await;
    let Socket(socket) = terminal;
    let (mut to, from) = socket.split();
    // It need not be taken to its end.
    let said = tokio::spawn(async move { to.send(Message::binary(vec![b'x'; 17 << 20])).await });
    let mut from = pin!(from.filter_map(async |message| message.ok().filter(|message| !message.is_ping())));
    let told = timeout(PATIENCE, from.next()).await.unwrap().expect("it is told").into_text().unwrap();
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["code"], &told["fatal"]), (&json!("too_large"), &json!(true)), "{told}");
    assert!(told["data"].as_str().unwrap().contains("16777216"), "{told}");
    drop(said.await);
}

async fn a_browser_says_who_it_is(world: World) {
    let id = world.capsule().await;
    let path = format!("{id}/pty");
    let mut socket = dial(&world.url, None, &path).await.unwrap();
    // It does not wait for an answer.
    socket.say(json!({ "type": "auth", "token": world.key })).await;
    socket.say(quiet(json!({}))).await;
    assert_eq!(socket.told().await.1["type"], "started");
    socket.write("exit 3\n").await;
    assert_eq!(socket.told().await.1["exit_code"], 3);

    for hello in [
        json!({ "type": "auth", "token": "wrn_" }),
        json!({ "type": "auth", "token": format!("wrn_{}", "0".repeat(32)) }),
        json!({ "type": "auth" }),
        json!({ "type": "start" }),
        json!([]),
    ] {
        let mut socket = dial(&world.url, None, &path).await.unwrap();
        socket.say(hello).await;
        assert_eq!(socket.fails("unauthorized", true).await, "authentication failed");
    }
    let mut silent = dial(&world.url, None, &path).await.unwrap();
    assert_eq!(silent.fails("unauthorized", true).await, "authentication failed");
    let mut socket = dial(&world.url, None, &path).await.unwrap();
    socket.say(json!({ "type": "auth", "token": world.stranger().await })).await;
    assert_eq!(socket.fails("not_found", true).await, format!("there is no capsule {id}"));
    assert!(world.agent.processes(id).await.is_empty());
}

async fn what_is_wrong_before_and_after_the_upgrade(world: World) {
    let id = world.capsule().await;
    let refuse = |(status, body): (u16, Value), expected, code| {
        refused((StatusCode::from_u16(status).unwrap(), body), expected, code)
    };
    let key = Some(world.key.as_str());
    for what in ["pty", "exec/stream", "processes/1/stream"] {
        let path = format!("{id}/{what}");
        for key in ["", "wrn_", "wrn_00000000000000000000000000000000"] {
            refuse(dial(&world.url, Some(key), &path).await.err().unwrap(), 401, ErrorCode::Unauthorized);
        }
        for key in [key, None] {
            let bad = dial(&world.url, key, &format!("cl-1/{what}")).await.err().unwrap();
            refuse(bad, 400, ErrorCode::InvalidRequest);
        }
        let nobodys = format!("{}/{what}", CapsuleId::random());
        refuse(dial(&world.url, key, &nobodys).await.err().unwrap(), 404, ErrorCode::NotFound);
        let stranger = world.stranger().await;
        refuse(dial(&world.url, Some(&stranger), &path).await.err().unwrap(), 404, ErrorCode::NotFound);
        let plain = world.get(&format!("/v1/capsules/{path}")).await;
        assert!(refused(plain, 400, ErrorCode::InvalidRequest).contains("WebSocket"));
    }

    for (hello, field) in [
        (json!({ "type": "resize", "cols": 1, "rows": 1 }), "start"),
        (json!({ "type": "dance" }), "start"),
        (json!({ "type": "start", "cols": 70_000 }), "cols"),
        (json!({ "type": "start", "cwd": "/missing" }), "/missing"),
        (json!({ "type": "start", "user": "stranger" }), "stranger"),
        (json!({ "type": "start", "encoding": "hex" }), "encoding"),
        (json!({ "type": "connect", "tag": "" }), "tag"),
    ] {
        let message = terminal(&world, id, hello.clone()).await.fails("invalid_request", true).await;
        assert!(message.contains(field) || field == "encoding", "{hello}: {message}");
    }
    assert!(world.agent.processes(id).await.is_empty());

    let mut one = terminal(&world, id, quiet(json!({}))).await;
    one.told().await;
    one.shows("ready").await;
    for (message, word) in [
        (json!({ "type": "resize", "cols": 0, "rows": 1 }), "cols"),
        (json!({ "type": "input", "data": "!" }), "base64"),
        (json!({ "type": "start" }), "its terminal"),
        (json!("hello"), "understood"),
    ] {
        one.say(message).await;
        let message = one.fails("invalid_request", false).await;
        assert!(message.contains(word), "{message}");
    }
    // The guest is gone.
    one.write("kill -9 $PPID\n").await;
    one.fails("agent_error", true).await;
    world.agent.lose(id);
    world.until(id, "missing").await;
    terminal(&world, id, json!({ "type": "start" })).await.fails("invalid_state", true).await;
}

async fn a_capsule_that_starts_is_waited_for(world: World) {
    world.agent.hold();
    let mut creates = world.agent.creates();
    let body = world.post("/v1/capsules", json!({}));
    let begun = async {
        creates.wait_for(|count| *count == 1).await.unwrap();
        let (_, capsules) = world.get("/v1/capsules").await;
        let id: CapsuleId = capsules[0]["id"].as_str().unwrap().parse().unwrap();
        let mut terminal = terminal(&world, id, quiet(json!({}))).await;
        terminal.write("exit 3\n").await;
        world.agent.release();
        assert_eq!(terminal.told().await.1["type"], "started");
        assert_eq!(terminal.told().await.1["exit_code"], 3);
    };
    tokio::join!(body, begun);
}
