//! Hibernating, and coming back from it.

use std::time::Duration;

use api::ErrorCode;
use connectrpc::ErrorCode as AgentCode;
use reqwest::StatusCode;
use serde_json::json;

use crate::world::{World, on_both, refused};

on_both![
    it_takes_nothing_of_its_host_and_goes_on,
    only_what_is_paused_hibernates,
    what_fails_leaves_it_paused,
    what_was_uploaded_outlives_its_host,
    what_hibernates_is_destroyed,
];

async fn it_takes_nothing_of_its_host_and_goes_on(world: World) {
    let id = world.capsule().await;
    let body = json!({ "cmd": "sh", "args": ["-c", "sleep 1000 >/dev/null 2>&1 & echo $!"] });
    let (_, answer) = world.post(&format!("/v1/capsules/{id}/exec"), body).await;
    let alive = format!("kill -0 {} && echo alive", answer["stdout"].as_str().unwrap().trim_end());
    for _ in 0..2 {
        world.ask(id, "pause").await;
        for _ in 0..2 {
            let (status, capsule) = world.ask(id, "hibernate").await;
            assert_eq!((status, &capsule["status"]), (StatusCode::OK, &json!("hibernated")), "{capsule}");
        }
        assert!(world.agent.alive().is_empty());
        let (status, capsule) = world.get(&format!("/v1/capsules/{id}")).await;
        assert_eq!((status, &capsule["status"]), (StatusCode::OK, &json!("hibernated")), "{capsule}");
        assert_eq!(world.get("/v1/capsules").await.1[0]["status"], "hibernated", "it is listed");
        // It is paused, and more than that.
        let (status, capsule) = world.ask(id, "pause").await;
        assert_eq!((status, &capsule["status"]), (StatusCode::OK, &json!("hibernated")), "{capsule}");
        let body = json!({ "cmd": "true" });
        refused(world.post(&format!("/v1/capsules/{id}/exec"), body).await, 409, ErrorCode::InvalidState);
        let (status, capsule) = world.ask(id, "resume").await;
        assert_eq!((status, &capsule["status"]), (StatusCode::OK, &json!("running")), "{capsule}");
        let body = json!({ "cmd": "sh", "args": ["-c", alive] });
        assert_eq!(world.post(&format!("/v1/capsules/{id}/exec"), body).await.1["stdout"], "alive\n");
    }
}

async fn only_what_is_paused_hibernates(world: World) {
    let id = world.capsule().await;
    refused(world.ask(id, "hibernate").await, 409, ErrorCode::InvalidState);
    world.delete(&format!("/v1/capsules/{id}")).await;
    refused(world.ask(id, "hibernate").await, 409, ErrorCode::InvalidState);
}

async fn what_fails_leaves_it_paused(world: World) {
    let id = world.capsule().await;
    world.ask(id, "pause").await;
    world.agent.fail_changes(Some(AgentCode::Internal));
    let (status, _) = world.ask(id, "hibernate").await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert_eq!(world.status(id).await, "paused");
    world.agent.fail_changes(None);
    assert_eq!(world.ask(id, "hibernate").await.1["status"], "hibernated");
}

async fn what_was_uploaded_outlives_its_host(world: World) {
    let id = world.capsule().await;
    world.ask(id, "pause").await;
    let path = format!("/v1/capsules/{id}");
    let before = world.get(&path).await.1["last_updated"].clone();
    world.agent.upload(id);
    while world.get(&path).await.1["last_updated"] == before {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(world.status(id).await, "paused", "as the SDKs know it");
    world.agent.lose(id);
    world.until(id, "hibernated").await;
    let (status, capsule) = world.ask(id, "resume").await;
    assert_eq!((status, &capsule["status"]), (StatusCode::OK, &json!("running")), "{capsule}");
}

async fn what_hibernates_is_destroyed(world: World) {
    let id = world.capsule().await;
    world.ask(id, "pause").await;
    world.ask(id, "hibernate").await;
    assert_eq!(world.agent.stored().len(), 1);
    let (status, _) = world.delete(&format!("/v1/capsules/{id}")).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert!(world.agent.stored().is_empty());
    assert_eq!(world.status(id).await, "stopped");
}
