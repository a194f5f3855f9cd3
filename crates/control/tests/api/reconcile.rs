//! What happens without being asked.

use agent_api::CapsuleState;
use api::{CapsuleId, ErrorCode};
use reqwest::StatusCode;
use serde_json::json;

use crate::world::{PATIENCE, World, on_both, refused};

on_both![
    what_ends_by_itself_says_why,
    what_is_lost_is_missing_until_it_is_seen_again,
    a_host_that_is_away_is_caught_up_with,
    a_strangers_capsule_is_left_alone,
    late_reports_change_nothing,
];

async fn what_ends_by_itself_says_why(world: World) {
    let (one, two) = (world.capsule().await, world.capsule().await);
    world.agent.end(one, CapsuleState::CAPSULE_STATE_STOPPED, "the guest powered off");
    world.agent.end(two, CapsuleState::CAPSULE_STATE_FAILED, "the machine died");
    world.until(one, "stopped").await;
    world.until(two, "error").await;
    assert_eq!(world.get(&format!("/v1/capsules/{one}")).await.1["reason"], "the guest powered off");
    assert_eq!(world.get(&format!("/v1/capsules/{two}")).await.1["reason"], "the machine died");
    assert_eq!(world.get("/v1/capsules").await.1, json!([]));
    assert_eq!(world.delete(&format!("/v1/capsules/{two}")).await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.status(two).await, "stopped");
}

async fn what_is_lost_is_missing_until_it_is_seen_again(world: World) {
    let id = world.capsule().await;
    world.agent.lose(id);
    world.until(id, "missing").await;
    assert_eq!(world.get("/v1/capsules").await.1[0]["status"], "missing");
    refused(
        world.post(&format!("/v1/capsules/{id}/exec"), json!({ "cmd": "pwd" })).await,
        409,
        ErrorCode::InvalidState,
    );
    world.agent.put(id, CapsuleState::CAPSULE_STATE_RUNNING, 2);
    world.until(id, "running").await;
    assert!(world.get(&format!("/v1/capsules/{id}")).await.1.get("reason").is_none());
    world.agent.lose(id);
    world.until(id, "missing").await;
    assert_eq!(world.delete(&format!("/v1/capsules/{id}")).await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.status(id).await, "stopped");
}

async fn a_host_that_is_away_is_caught_up_with(mut world: World) {
    let id = world.capsule().await;
    world.agent.stop().await;
    refused(world.post("/v1/capsules", json!({})).await, 503, ErrorCode::HostUnavailable);
    for (path, body) in [("exec", json!({ "cmd": "pwd" })), ("ping", json!({}))] {
        refused(world.post(&format!("/v1/capsules/{id}/{path}"), body).await, 503, ErrorCode::HostUnavailable);
    }
    // The wish is written down all the same.
    assert_eq!(world.delete(&format!("/v1/capsules/{id}")).await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.status(id).await, "stopping");
    world.agent.resume().await;
    world.until(id, "stopped").await;
    assert!(world.agent.alive().is_empty());
    world.capsule().await;
}

async fn a_strangers_capsule_is_left_alone(world: World) {
    let stranger = CapsuleId::random();
    world.agent.put(stranger, CapsuleState::CAPSULE_STATE_RUNNING, 1);
    let id = world.capsule().await;
    world.agent.end(id, CapsuleState::CAPSULE_STATE_STOPPED, "off");
    // A round has been around once this shows.
    world.until(id, "stopped").await;
    assert_eq!(world.agent.alive(), [stranger.to_string()]);
}

async fn late_reports_change_nothing(world: World) {
    let id = world.capsule().await;
    let other = world.capsule().await;
    assert_eq!(world.delete(&format!("/v1/capsules/{id}")).await.0, StatusCode::NO_CONTENT);
    // The host that confirmed its end has it again, as an old journal might tell: it is ended, and the record stays.
    let mut destroys = world.agent.destroys();
    let before = *destroys.borrow_and_update();
    world.agent.put(id, CapsuleState::CAPSULE_STATE_RUNNING, 99);
    let ended = destroys.wait_for(|&count| count > before);
    tokio::time::timeout(PATIENCE, ended).await.expect("what ended is not left running").unwrap();
    assert_eq!(world.status(id).await, "stopped");
    // An older report about one that runs.
    world.agent.put(other, CapsuleState::CAPSULE_STATE_STARTING, 1);
    let third = world.capsule().await;
    world.agent.end(third, CapsuleState::CAPSULE_STATE_STOPPED, "off");
    world.until(third, "stopped").await;
    assert_eq!(world.status(other).await, "running");
}
