//! Commands.

use std::time::Duration;

use api::ErrorCode;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::world::{PATIENCE, World, on_both, refused};

on_both![
    outputs_and_exit_codes_are_exact,
    connections_are_used_again,
    large_output_arrives_whole,
    long_output_that_nobody_reads_is_shorter_in_base64,
    a_capsule_that_starts_takes_of_its_commands_time,
    too_much_output_is_refused_and_ended,
    a_timeout_is_an_error_and_ends_the_process,
    background_processes_live_on,
    a_client_that_leaves_does_not_end_its_command,
    processes_are_ended_by_pid_and_by_tag,
    what_the_guest_refuses_is_the_callers_to_mend,
    a_guest_that_goes_away_is_an_error,
];

/// A request for a line of shell.
fn sh(script: &str) -> Value {
    json!({ "cmd": "/bin/sh", "args": ["-c", script] })
}

fn with(mut request: Value, more: Value) -> Value {
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

async fn outputs_and_exit_codes_are_exact(world: World) {
    let path = format!("/v1/capsules/{}/exec", world.capsule().await);
    let exec = |body| world.post(&path, body);
    let say = sh("printf 'out\\r\\n'; printf érr >&2; exit 3");
    let (status, result) = exec(with(say, json!({ "timeout_sec": 30, "background": false }))).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        (&result["stdout"], &result["stderr"], &result["exit_code"]),
        (&json!("out\r\n"), &json!("érr"), &json!(3))
    );
    assert_eq!((&result["cmd"], &result["encoding"]), (&json!("/bin/sh"), &json!("utf-8")));
    assert!(result["duration_ms"].is_u64() && path.contains(result["sandbox_id"].as_str().unwrap()));

    let (_, result) = exec(sh("printf '\\377\\376'; printf ok >&2")).await;
    assert_eq!(
        (&result["stdout"], &result["stderr"], &result["encoding"]),
        (&json!("//4="), &json!("b2s="), &json!("base64"))
    );

    let (_, result) = exec(with(sh("echo \"$A$B\""), json!({ "envs": { "A": "1", "B": "x y" } }))).await;
    assert_eq!(result["stdout"], "1x y\n");
    assert_eq!(exec(json!({ "cmd": "pwd", "cwd": "/usr/lib" })).await.1["stdout"], "/usr/lib\n");
    assert_eq!(exec(json!({ "cmd": "nonsense" })).await.1["exit_code"], 127);
    assert_eq!(exec(sh("kill -9 $$")).await.1["exit_code"], -1);
    assert_eq!(exec(json!({ "cmd": "id", "args": ["-un"] })).await.1["stdout"], "root\n");
    assert_eq!(
        exec(json!({ "cmd": "id", "args": ["-un"], "user": "nobody", "cwd": "/" })).await.1["stdout"],
        "nobody\n"
    );
    let message = refused(exec(json!({ "cmd": "id", "user": "stranger" })).await, 400, ErrorCode::InvalidRequest);
    assert!(message.contains("user `stranger`"), "{message}");
}

async fn connections_are_used_again(world: World) {
    let path = format!("/v1/capsules/{}/exec", world.capsule().await);
    let before = world.agent.connections();
    for number in 0..50 {
        let result = world.post(&path, json!({ "cmd": "printf", "args": [number.to_string()] })).await.1;
        assert_eq!(result["stdout"], number.to_string());
    }
    let made = world.agent.connections() - before;
    assert!(made < 10, "50 commands took {made} connections");
}

async fn large_output_arrives_whole(world: World) {
    let path = format!("/v1/capsules/{}/exec", world.capsule().await);
    let size = 64 * 1024 * 1024;
    let (status, result) = world.post(&path, sh(&format!("head -c {size} /dev/zero | tr '\\0' x"))).await;
    assert_eq!(status, StatusCode::OK);
    let stdout = result["stdout"].as_str().unwrap();
    assert!(stdout.len() == size && stdout.bytes().all(|byte| byte == b'x'));
}

async fn long_output_that_nobody_reads_is_shorter_in_base64(world: World) {
    let path = format!("/v1/capsules/{}/exec", world.capsule().await);
    for (bytes, encoding) in [(1024 * 1024, "utf-8"), (2 * 1024 * 1024, "base64")] {
        let (status, result) = world.post(&path, sh(&format!("head -c {bytes} /dev/zero"))).await;
        assert_eq!((status, &result["encoding"]), (StatusCode::OK, &json!(encoding)));
        let stdout = result["stdout"].as_str().unwrap();
        let stdout = if encoding == "base64" { BASE64_STANDARD.decode(stdout).unwrap() } else { stdout.into() };
        assert!(stdout.len() == bytes && stdout.iter().all(|byte| *byte == 0));
    }
}

async fn a_capsule_that_starts_takes_of_its_commands_time(world: World) {
    let id = world.capsule().await;
    world.ask(id, "pause").await;
    world.agent.hold();
    let resume = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/resume")).send());
    world.until(id, "resuming").await;
    let request = world.request(Method::POST, &format!("/v1/capsules/{id}/exec"));
    let request = request.json(&json!({ "cmd": "true", "timeout_sec": 1 }));
    // As the SDK does.
    let request = request.timeout(Duration::from_secs(11));
    refused(world.send(request).await, 409, ErrorCode::InvalidState);
    world.agent.release();
    resume.await.unwrap().unwrap();
}

async fn too_much_output_is_refused_and_ended(world: World) {
    let id = world.capsule().await;
    let body = json!({ "cmd": "cat", "args": ["/dev/zero"], "timeout_sec": 300 });
    let message = refused(world.post(&format!("/v1/capsules/{id}/exec"), body).await, 413, ErrorCode::TooLarge);
    assert!(message.contains("268435456"), "{message}");
    world.until_idle(id).await;
}

async fn a_timeout_is_an_error_and_ends_the_process(world: World) {
    let id = world.capsule().await;
    let body = json!({ "cmd": "sleep", "args": ["1000"], "timeout_sec": 1 });
    let message = refused(world.post(&format!("/v1/capsules/{id}/exec"), body).await, 504, ErrorCode::Timeout);
    assert!(message.contains("timeout_sec"), "{message}");
    world.until_idle(id).await;
}

async fn background_processes_live_on(world: World) {
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/exec");
    let sleep = json!({ "cmd": "sleep", "args": ["1000"], "background": true, "timeout_sec": 1 });
    let (status, started) = world.post(&path, sleep.clone()).await;
    assert_eq!((status, &started["cmd"]), (StatusCode::ACCEPTED, &json!("sleep")));
    let tag = started["tag"].as_str().unwrap();
    assert!(tag.len() == 13 && tag.starts_with("proc-"), "{tag}");
    let (_, named) = world.post(&path, with(sleep, json!({ "tag": "mine" }))).await;
    assert_eq!(named["tag"], "mine");
    // The limit of a foreground command is not theirs.
    world.post(&path, json!({ "cmd": "sleep", "args": ["2"] })).await;
    let listed =
        |answer: &Value| json!({ "pid": answer["pid"], "tag": answer["tag"], "cmd": "sleep", "args": ["1000"] });
    let (status, list) = world.get(&format!("/v1/capsules/{id}/processes")).await;
    assert_eq!((status, list), (StatusCode::OK, json!({ "processes": [listed(&started), listed(&named)] })));
}

async fn a_client_that_leaves_does_not_end_its_command(world: World) {
    let id = world.capsule().await;
    let body = json!({ "cmd": "sleep", "args": ["1000"], "timeout_sec": 1000, "tag": "left" });
    let request = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/exec")).json(&body).send());
    while world.agent.processes(id).await.is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    request.abort();
    assert!(request.await.unwrap_err().is_cancelled());
    // Another command comes and goes, and it is still there.
    world.post(&format!("/v1/capsules/{id}/exec"), json!({ "cmd": "sleep", "args": ["1"] })).await;
    assert_eq!(world.delete(&format!("/v1/capsules/{id}/processes/left")).await.0, StatusCode::NO_CONTENT);
    world.until_idle(id).await;
}

async fn processes_are_ended_by_pid_and_by_tag(world: World) {
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}");
    let start = |script: &str, tag: &str| {
        let body = with(sh(script), json!({ "background": true, "tag": tag }));
        let path = format!("{path}/exec");
        let world = &world;
        async move { world.post(&path, body).await.1["pid"].as_u64().unwrap() }
    };
    let pid = start("sleep 1000 & wait", "a").await;
    start("trap 'exit 0' TERM; while :; do sleep 0.05; done", "b").await;
    assert_eq!(world.delete(&format!("{path}/processes/{pid}")).await, (StatusCode::NO_CONTENT, Value::Null));
    // It may not have come to its trap yet.
    let ended = async {
        while world.delete(&format!("{path}/processes/b?signal=SIGTERM")).await.0 == StatusCode::NO_CONTENT {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("it ends");
    world.until_idle(id).await;
    for selector in [&pid.to_string(), "b", "nobody"] {
        let gone = world.delete(&format!("{path}/processes/{selector}")).await;
        let message = refused(gone, 404, ErrorCode::NotFound);
        assert!(message.contains(selector), "{message}");
    }
    for (selector, field) in [("b?signal=SIGHUP", "signal"), ("b?signal=", "signal"), ("99999999999", "selector")] {
        let bad = world.delete(&format!("{path}/processes/{selector}")).await;
        assert!(refused(bad, 400, ErrorCode::InvalidRequest).starts_with(field));
    }
    assert_eq!(world.get(&format!("{path}/processes")).await.1, json!({ "processes": [] }));
}

async fn what_the_guest_refuses_is_the_callers_to_mend(world: World) {
    let path = format!("/v1/capsules/{}/exec", world.capsule().await);
    for background in [false, true] {
        let body = json!({ "cmd": "pwd", "cwd": "/missing", "background": background });
        let message = refused(world.post(&path, body).await, 400, ErrorCode::InvalidRequest);
        assert!(message.contains("cwd") && message.contains("/missing"), "{message}");
    }
}

async fn a_guest_that_goes_away_is_an_error(world: World) {
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/exec");
    refused(world.post(&path, sh("kill -9 $PPID")).await, 502, ErrorCode::AgentError);
    world.agent.lose(id);
    refused(world.post(&path, json!({ "cmd": "echo" })).await, 409, ErrorCode::InvalidState);
    world.until(id, "missing").await;
    let (_, body): (_, Value) = world.get(&format!("/v1/capsules/{id}")).await;
    assert_eq!(body["reason"], "its host no longer lists it");
}
