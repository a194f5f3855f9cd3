//! Commands followed as they run.

use api::CapsuleId;
use serde_json::{Value, json};

use crate::socket::Socket;
use crate::world::{World, on_both};

on_both![
    output_comes_as_it_is_written,
    characters_are_never_cut,
    input_and_its_end,
    a_stop_and_a_departure_leave_the_process,
    limits_and_refusals_are_messages,
];

async fn stream(world: &World, id: CapsuleId, hello: Value) -> Socket {
    Socket::open(world, id, "exec/stream", hello).await
}

fn sh(script: &str) -> Value {
    json!({ "type": "start", "cmd": "/bin/sh", "args": ["-c", script] })
}

fn with(mut message: Value, more: Value) -> Value {
    message.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    message
}

/// All of standard output and standard error up to the end, and the exit code.
async fn rest(socket: &mut Socket) -> (String, String, i64) {
    let (mut out, mut err) = (String::new(), String::new());
    loop {
        let message = socket.told().await.1;
        match message["type"].as_str().unwrap() {
            "stdout" => out.push_str(message["data"].as_str().unwrap()),
            "stderr" => err.push_str(message["data"].as_str().unwrap()),
            "exit" => {
                socket.closes().await;
                return (out, err, message["exit_code"].as_i64().unwrap());
            }
            _ => panic!("{message}"),
        }
    }
}

async fn output_comes_as_it_is_written(world: World) {
    let id = world.capsule().await;
    let script = "echo out; echo err >&2; read -r line; echo \"$line $A $PWD\"; exit 5";
    let more = json!({ "stdin": true, "envs": { "A": "b" }, "cwd": "/usr", "tag": "mine" });
    let mut socket = stream(&world, id, with(sh(script), more)).await;
    let start = socket.told().await.1;
    assert_eq!(start["type"], "start");
    // Both before the process goes on, in either order.
    let both = [socket.told().await.1, socket.told().await.1];
    assert!(both.contains(&json!({ "type": "stdout", "data": "out\n" })), "{both:?}");
    assert!(both.contains(&json!({ "type": "stderr", "data": "err\n" })), "{both:?}");
    let running = world.get(&format!("/v1/capsules/{id}/processes")).await.1;
    assert_eq!((&running["processes"][0]["pid"], &running["processes"][0]["tag"]), (&start["pid"], &json!("mine")));

    // Another joins, by pid and by tag, and finds what was there.
    let mut others = Vec::new();
    for selector in [start["pid"].to_string(), "mine".to_owned()] {
        let mut other =
            Socket::open(&world, id, &format!("processes/{selector}/stream"), json!({ "type": "stop" })).await;
        assert_eq!(other.told().await.1, start);
        others.push(other);
    }
    socket.write("typed\n").await;
    assert_eq!(rest(&mut socket).await, ("typed b /usr\n".into(), String::new(), 5));
    for other in &mut others {
        assert_eq!(rest(other).await, ("out\ntyped b /usr\n".into(), "err\n".into(), 5));
    }
    world.until_idle(id).await;
}

async fn characters_are_never_cut(world: World) {
    let id = world.capsule().await;
    // Every byte of a character by itself, and at the end half of one.
    let script = "for b in '\\303' '\\251' '\\360' '\\237' '\\246' '\\200'; do printf $b; sleep 0.05; done; printf '\\342\\202' >&2";
    let mut socket = stream(&world, id, sh(script)).await;
    socket.told().await;
    assert_eq!(rest(&mut socket).await, ("é🦀".into(), "\u{fffd}".into(), 0));
    let mut socket = stream(&world, id, with(sh("printf '\\377\\0'"), json!({ "encoding": "base64" }))).await;
    socket.told().await;
    assert_eq!(rest(&mut socket).await, ("/wA=".into(), String::new(), 0));
    // A megabyte of three bytes each, in pieces that fit none of them.
    let script = "yes 漢 | tr -d '\\n' | head -c 3000000";
    let mut socket = stream(&world, id, sh(script)).await;
    socket.told().await;
    let (out, _, code) = rest(&mut socket).await;
    assert!(code == 0 && out.len() == 3_000_000 && out.chars().all(|c| c == '漢'));
}

async fn input_and_its_end(world: World) {
    let id = world.capsule().await;
    let mut socket = stream(&world, id, json!({ "type": "start", "cmd": "cat", "stdin": true })).await;
    socket.told().await;
    socket.say(json!({ "type": "stdin", "data": "é" })).await;
    socket.write("x").await;
    socket.say(json!({ "type": "eof" })).await;
    assert_eq!(rest(&mut socket).await, ("éx".into(), String::new(), 0));
    // Without, there is nothing to read.
    let mut socket = stream(&world, id, json!({ "type": "start", "cmd": "cat" })).await;
    socket.told().await;
    assert_eq!(rest(&mut socket).await, (String::new(), String::new(), 0));
}

async fn a_stop_and_a_departure_leave_the_process(world: World) {
    let id = world.capsule().await;
    let sleep = |tag: &str| json!({ "type": "start", "cmd": "sleep", "args": ["1000"], "tag": tag });
    let mut stopped = stream(&world, id, sleep("a")).await;
    stopped.told().await;
    stopped.say(json!({ "type": "stop" })).await;
    stopped.closes().await;
    let mut left = stream(&world, id, sleep("b")).await;
    left.told().await;
    drop(left);
    assert_eq!(world.post(&format!("/v1/capsules/{id}/exec"), json!({ "cmd": "sleep", "args": ["1"] })).await.0, 200);
    assert_eq!(world.agent.processes(id).await.len(), 2);
}

async fn limits_and_refusals_are_messages(world: World) {
    let id = world.capsule().await;
    let mut socket =
        stream(&world, id, json!({ "type": "start", "cmd": "sleep", "args": ["1000"], "timeout_sec": 1 })).await;
    socket.told().await;
    socket.fails("timeout", true).await;
    world.until_idle(id).await;
    for (hello, word) in [
        (json!({ "type": "stop" }), "first message must be type 'start' with a 'cmd' field"),
        (json!({ "type": "start" }), "first message must be type 'start' with a 'cmd' field"),
        (json!({ "type": "start", "cmd": "" }), "cmd"),
        (json!({ "type": "start", "cmd": "x", "timeout_sec": 86_401 }), "timeout_sec"),
        (json!({ "type": "start", "cmd": "x", "cwd": "/missing" }), "/missing"),
    ] {
        let message = stream(&world, id, hello).await.fails("invalid_request", true).await;
        assert!(message.contains(word), "{message}");
    }
    let mut socket = stream(&world, id, json!({ "type": "start", "cmd": "cat" })).await;
    socket.told().await;
    assert_eq!(socket.told().await.1["type"], "exit");
    let mut nobody = Socket::open(&world, id, "processes/nobody/stream", json!({})).await;
    nobody.fails("not_found", true).await;
    world.delete(&format!("/v1/capsules/{id}")).await;
    for what in ["exec/stream", "processes/1/stream"] {
        let mut late = Socket::open(&world, id, what, json!({ "type": "start", "cmd": "x" })).await;
        assert_eq!(late.fails("invalid_state", true).await, "the capsule is stopped");
    }
}
