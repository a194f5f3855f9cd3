//! Capsules that begin where another is.

use std::collections::HashSet;

use api::{ErrorCode, EventName, event::Outcome};
use connectrpc::ErrorCode as AgentCode;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::events::Listener;
use crate::world::{World, on_both, refused};

on_both![all_run, labels_may_be_their_own, all_or_none, a_host_that_fails, bad_requests, forks_are_told];

async fn fork(world: &World, id: impl std::fmt::Display, body: Value) -> (StatusCode, Value) {
    world.post(&format!("/v1/capsules/{id}/fork"), body).await
}

async fn all_run(world: World) {
    let request = json!({ "vcpus": 2, "memory_mb": 1024, "timeout_sec": 600, "metadata": { "owner": "zoë" } });
    let parent = world.post("/v1/capsules", request).await.1;
    let (status, forked) = fork(&world, parent["id"].as_str().unwrap(), json!({ "count": 100 })).await;
    assert_eq!(status, StatusCode::CREATED, "{forked}");
    let capsules = forked["capsules"].as_array().unwrap();
    let ids: HashSet<_> = capsules.iter().map(|capsule| capsule["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 100);
    for capsule in capsules {
        for field in ["status", "template", "vcpus", "memory_mb", "disk_size_mb", "timeout_sec", "metadata"] {
            assert_eq!(capsule[field], parent[field], "{field}");
        }
    }
    assert_eq!(world.get("/v1/capsules").await.1.as_array().unwrap().len(), 101);
    let path = format!("/v1/capsules/{}", capsules[99]["id"].as_str().unwrap());
    assert_eq!(world.post(&format!("{path}/exec"), json!({ "cmd": "true" })).await.0, StatusCode::OK);
    assert_eq!(world.delete(&path).await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.agent.alive().len(), 100);
}

async fn labels_may_be_their_own(world: World) {
    let parent = world.capsule().await;
    let (status, forked) = fork(&world, parent, json!({ "metadata": { "role": "child" } })).await;
    assert_eq!(status, StatusCode::CREATED);
    let capsules = forked["capsules"].as_array().unwrap();
    assert_eq!((capsules.len(), &capsules[0]["metadata"]["role"]), (1, &json!("child")));
    let id = capsules[0]["id"].as_str().unwrap();
    // A fork is a capsule like any other.
    assert_eq!(world.ask(id.parse().unwrap(), "pause").await.1["status"], "paused");
    assert_eq!(world.status(parent).await, "running");
}

async fn all_or_none(world: World) {
    let parent = world.capsule().await;
    world.agent.make_room(3);
    let message = refused(fork(&world, parent, json!({ "count": 5 })).await, 503, ErrorCode::HostUnavailable);
    assert!(message.starts_with("the host is full: not enough memory left"), "{message}");
    assert_eq!(world.agent.alive(), [parent.to_string()]);
    world.agent.make_room(6);
    world.agent.fail_children(3);
    let message = refused(fork(&world, parent, json!({ "count": 5 })).await, 502, ErrorCode::AgentError);
    assert_eq!(message, "3 of 5 forks did not start, so that none was kept: this host was told to fail");
    assert_eq!(world.agent.alive(), [parent.to_string()]);
    assert_eq!(world.get("/v1/capsules").await.1.as_array().unwrap().len(), 1);
    assert_eq!(world.status(parent).await, "running");
    assert_eq!(fork(&world, parent, json!({ "count": 2 })).await.0, StatusCode::CREATED);
}

async fn a_host_that_fails(mut world: World) {
    let parent = world.capsule().await;
    for (failure, status, code) in [
        (AgentCode::Internal, 502, ErrorCode::AgentError),
        (AgentCode::FailedPrecondition, 409, ErrorCode::InvalidState),
        (AgentCode::ResourceExhausted, 503, ErrorCode::HostUnavailable),
    ] {
        world.agent.fail_changes(Some(failure));
        refused(fork(&world, parent, json!({ "count": 2 })).await, status, code);
    }
    world.agent.stop().await;
    refused(fork(&world, parent, json!({ "count": 2 })).await, 503, ErrorCode::HostUnavailable);
    assert_eq!(world.get("/v1/capsules").await.1.as_array().unwrap().len(), 1);
    world.agent.resume().await;
    world.agent.fail_changes(None);
    world.agent.lose(parent);
    let message = refused(fork(&world, parent, json!({})).await, 409, ErrorCode::InvalidState);
    assert!(message.contains("no longer runs it") || message == "the capsule is missing", "{message}");
}

async fn bad_requests(world: World) {
    let parent = world.capsule().await;
    for (body, part) in [
        (json!({ "count": 0 }), "count must be between 1 and 100"),
        (json!({ "count": 101 }), "count must be between 1 and 100"),
        (json!({ "count": "2" }), "count"),
        (json!({ "metadata": { "envd_version": "1" } }), "metadata.envd_version"),
        (json!([]), "JSON object"),
    ] {
        let message = refused(fork(&world, parent, body.clone()).await, 400, ErrorCode::InvalidRequest);
        assert!(message.contains(part), "{body}: {message}");
    }
    assert_eq!(world.agent.alive(), [parent.to_string()]);
}

async fn forks_are_told(world: World) {
    let parent = world.capsule().await;
    let mut listener = Listener::new(&world).await;
    let forked = fork(&world, parent, json!({ "count": 2 })).await.1;
    let mut told = HashSet::new();
    for _ in 0..2 {
        let event = listener.until_asked().await.1;
        assert_eq!((event.event, event.outcome), (EventName::CapsuleCreate, Some(Outcome::Success)));
        assert_eq!(event.actor.unwrap().name.as_deref(), Some("test"));
        told.insert(event.resource.unwrap().id);
    }
    let made = forked["capsules"].as_array().unwrap().iter().map(|capsule| capsule["id"].as_str().unwrap().to_owned());
    assert_eq!(told, made.collect());
}
