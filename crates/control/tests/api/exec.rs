//! Commands.

use api::ErrorCode;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::world::{World, on_both, refused};

on_both![
    outputs_and_exit_codes_are_exact,
    connections_are_used_again,
    large_output_arrives_whole,
    too_much_output_is_refused_and_ended,
    a_timeout_is_an_error_and_ends_the_process,
    background_processes_live_on,
    what_the_guest_refuses_is_the_callers_to_mend,
    a_guest_that_goes_away_is_an_error,
];

async fn outputs_and_exit_codes_are_exact(world: World) {
    let path = format!("/v1/capsules/{}/exec", world.capsule().await);
    let exec = |body| world.post(&path, body);
    let (status, result) =
        exec(json!({ "cmd": "say", "args": ["out\r\n", "érr", "3"], "timeout_sec": 30, "background": false })).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        (&result["stdout"], &result["stderr"], &result["exit_code"]),
        (&json!("out\r\n"), &json!("érr"), &json!(3))
    );
    assert_eq!((&result["cmd"], &result["encoding"]), (&json!("say"), &json!("utf-8")));
    assert!(result["duration_ms"].is_u64() && path.contains(result["sandbox_id"].as_str().unwrap()));

    let (_, result) = exec(json!({ "cmd": "latin1" })).await;
    assert_eq!(
        (&result["stdout"], &result["stderr"], &result["encoding"]),
        (&json!("//4="), &json!("b2s="), &json!("base64"))
    );

    let (_, result) = exec(json!({ "cmd": "env", "envs": { "A": "1", "B": "x y" } })).await;
    assert_eq!(result["stdout"], "A=1\nB=x y\n");
    assert_eq!(exec(json!({ "cmd": "pwd", "cwd": "repo" })).await.1["stdout"], "repo\n");
    assert_eq!(exec(json!({ "cmd": "nonsense" })).await.1["exit_code"], 127);
}

async fn connections_are_used_again(world: World) {
    let path = format!("/v1/capsules/{}/exec", world.capsule().await);
    let before = world.agent.connections();
    for number in 0..50 {
        let result = world.post(&path, json!({ "cmd": "say", "args": [number.to_string(), "", "0"] })).await.1;
        assert_eq!(result["stdout"], number.to_string());
    }
    let made = world.agent.connections() - before;
    assert!(made < 10, "50 commands took {made} connections");
}

async fn large_output_arrives_whole(world: World) {
    let path = format!("/v1/capsules/{}/exec", world.capsule().await);
    let size = 64 * 1024 * 1024;
    let (status, result) = world.post(&path, json!({ "cmd": "bytes", "args": [size.to_string()] })).await;
    assert_eq!(status, StatusCode::OK);
    let stdout = result["stdout"].as_str().unwrap();
    assert!(stdout.len() == size && stdout.bytes().all(|byte| byte == b'x'));
}

async fn too_much_output_is_refused_and_ended(world: World) {
    let id = world.capsule().await;
    let body = json!({ "cmd": "endless" });
    let message = refused(world.post(&format!("/v1/capsules/{id}/exec"), body).await, 413, ErrorCode::TooLarge);
    assert!(message.contains("268435456"), "{message}");
    world.until_idle(id).await;
}

async fn a_timeout_is_an_error_and_ends_the_process(world: World) {
    let id = world.capsule().await;
    let body = json!({ "cmd": "hang", "timeout_sec": 1 });
    let message = refused(world.post(&format!("/v1/capsules/{id}/exec"), body).await, 504, ErrorCode::Timeout);
    assert!(message.contains("timeout_sec"), "{message}");
    world.until_idle(id).await;
}

async fn background_processes_live_on(world: World) {
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/exec");
    let (status, started) = world.post(&path, json!({ "cmd": "hang", "background": true, "timeout_sec": 1 })).await;
    assert_eq!((status, &started["cmd"]), (StatusCode::ACCEPTED, &json!("hang")));
    let tag = started["tag"].as_str().unwrap();
    assert!(tag.len() == 13 && tag.starts_with("proc-"), "{tag}");
    let (_, named) = world.post(&path, json!({ "cmd": "hang", "background": true, "tag": "mine" })).await;
    assert_eq!(named["tag"], "mine");
    let running = world.agent.processes(id);
    assert_eq!(running.len(), 2);
    for answer in [&started, &named] {
        let process = &running[&(answer["pid"].as_u64().unwrap() as u32)];
        assert_eq!((process.cmd.as_str(), process.tag.as_deref()), ("hang", answer["tag"].as_str()));
        assert!(!process.has_deadline, "a background process has none");
    }
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
    refused(world.post(&path, json!({ "cmd": "vanish" })).await, 502, ErrorCode::AgentError);
    world.agent.lose(id);
    refused(world.post(&path, json!({ "cmd": "echo" })).await, 409, ErrorCode::InvalidState);
    world.until(id, "missing").await;
    let (_, body): (_, Value) = world.get(&format!("/v1/capsules/{id}")).await;
    assert_eq!(body["reason"], "its host no longer lists it");
}
