//! Templates that come of capsules.

use std::time::Duration;

use api::{CapsuleId, ErrorCode, EventName, event::Outcome};
use connectrpc::ErrorCode as AgentCode;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::events::Listener;
use crate::world::{PATIENCE, World, on_both, refused};

on_both![
    a_template_of_a_capsule,
    sizes_are_built_in,
    a_name_is_made_up,
    names_are_taken_once,
    overwriting_replaces,
    the_platforms_names,
    names_that_are_none,
    templates_belong_to_their_team,
    what_failed_leaves_nothing,
    a_host_that_was_away_forgets_later,
    templates_are_told,
];

async fn snapshot(world: &World, id: CapsuleId, name: &str) -> (StatusCode, Value) {
    world.post("/v1/snapshots", json!({ "sandbox_id": id, "name": name })).await
}

/// The names of the templates, of that kind if it is one.
async fn names(world: &World, query: &str) -> Vec<String> {
    let listed = world.get(&format!("/v1/snapshots{query}")).await.1;
    listed.as_array().unwrap().iter().map(|template| template["name"].as_str().unwrap().to_owned()).collect()
}

/// Waits until the host has that many templates.
async fn until_host_has(world: &World, count: usize) {
    let reached = async {
        while world.agent.templates().len() != count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.expect("the host forgets what is deleted");
}

async fn a_template_of_a_capsule(world: World) {
    let id = world.capsule().await;
    let (status, made) = snapshot(&world, id, "Mine.v1").await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let template: api::Template = serde_json::from_value(made.clone()).unwrap();
    assert_eq!((template.name.as_str(), template.kind), ("Mine.v1", api::TemplateKind::Snapshot));
    assert_eq!((template.vcpus, template.memory_mb, template.disk_size_mb), (1, 512, 5120));
    assert!(!template.platform && !template.protected && template.size_bytes > 0);
    assert_eq!(template.metadata["envd_version"], "fake");
    assert_eq!(world.status(id).await, "running", "it runs on");

    assert_eq!(world.get("/v1/snapshots").await.1[0], made);
    assert_eq!(names(&world, "").await, ["Mine.v1", "minimal"]);
    assert_eq!(names(&world, "?type=snapshot").await, ["Mine.v1"]);
    assert_eq!(names(&world, "?type=base").await, ["minimal"]);
    assert!(names(&world, "?type=custom").await.is_empty());

    let (status, made) = world.post("/v1/capsules", json!({ "template": "Mine.v1" })).await;
    assert_eq!(
        (status, &made["status"], &made["template"]),
        (StatusCode::CREATED, &json!("running"), &json!("Mine.v1"))
    );

    assert_eq!(world.delete("/v1/snapshots/Mine.v1").await, (StatusCode::NO_CONTENT, Value::Null));
    refused(world.delete("/v1/snapshots/Mine.v1").await, 404, ErrorCode::NotFound);
    assert_eq!(names(&world, "").await, ["minimal"]);
    refused(world.post("/v1/capsules", json!({ "template": "Mine.v1" })).await, 404, ErrorCode::NotFound);
    until_host_has(&world, 0).await;
    // What was made from it goes on, and sleeps, without it.
    let made: CapsuleId = made["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(world.ask(made, "pause").await.1["status"], "paused");
    assert_eq!(world.ask(made, "resume").await.1["status"], "running");
}

async fn sizes_are_built_in(world: World) {
    let request = json!({ "vcpus": 2, "memory_mb": 1024, "disk_size_mb": 8192 });
    let id = world.post("/v1/capsules", request).await.1["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(snapshot(&world, id, "big").await.0, StatusCode::CREATED);
    for body in [json!({ "template": "big" }), json!({ "template": "big", "vcpus": 2, "memory_mb": 1024 })] {
        let (status, made) = world.post("/v1/capsules", body).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        assert_eq!(
            (&made["vcpus"], &made["memory_mb"], &made["disk_size_mb"]),
            (&json!(2), &json!(1024), &json!(8192))
        );
    }
    for field in ["vcpus", "memory_mb", "disk_size_mb"] {
        let answer = world.post("/v1/capsules", json!({ "template": "big", field: 5120 })).await;
        let message = refused(answer, 400, ErrorCode::InvalidRequest);
        assert!(message.starts_with(&format!("{field} must be ")) && message.contains("`big`"), "{message}");
    }
}

async fn a_name_is_made_up(world: World) {
    let id = world.capsule().await;
    for body in [json!({ "sandbox_id": id }), json!({ "sandbox_id": id, "name": null })] {
        let made = world.post("/v1/snapshots", body).await.1;
        let name = made["name"].as_str().unwrap().strip_prefix("template-").unwrap().to_owned();
        assert!(name.len() == 8 && name.bytes().all(|byte| byte.is_ascii_hexdigit()), "{name}");
    }
    assert_eq!(names(&world, "?type=snapshot").await.len(), 2);
}

async fn names_are_taken_once(world: World) {
    let id = world.capsule().await;
    assert_eq!(snapshot(&world, id, "mine").await.0, StatusCode::CREATED);
    let message = refused(snapshot(&world, id, "mine").await, 409, ErrorCode::Conflict);
    assert!(message.contains("`mine`") && message.contains("overwrite=true"), "{message}");
    let attempts = (0..8).map(|_| snapshot(&world, id, "contested"));
    let made = futures::future::join_all(attempts).await;
    assert_eq!(made.iter().filter(|(status, _)| *status == StatusCode::CREATED).count(), 1, "{made:?}");
    assert!(made.iter().all(|(status, _)| matches!(status.as_u16(), 201 | 409)), "{made:?}");
    until_host_has(&world, 2).await;
}

async fn overwriting_replaces(world: World) {
    let request = json!({ "memory_mb": 1024 });
    let (one, two) = (world.capsule().await, world.post("/v1/capsules", request).await.1);
    assert_eq!(snapshot(&world, one, "mine").await.0, StatusCode::CREATED);
    let body = json!({ "sandbox_id": two["id"], "name": "mine" });
    let (status, made) = world.post("/v1/snapshots?overwrite=true", body.clone()).await;
    assert_eq!((status, &made["memory_mb"]), (StatusCode::CREATED, &json!(1024)));
    assert_eq!(names(&world, "?type=snapshot").await, ["mine"]);
    until_host_has(&world, 1).await;
    let made = world.post("/v1/capsules", json!({ "template": "mine" })).await.1;
    assert_eq!(made["memory_mb"], 1024);
    refused(world.post("/v1/snapshots?overwrite=false", body.clone()).await, 409, ErrorCode::Conflict);
    let message = refused(world.post("/v1/snapshots?overwrite=maybe", body).await, 400, ErrorCode::InvalidRequest);
    assert!(message.contains("overwrite"), "{message}");
}

async fn the_platforms_names(world: World) {
    let id = world.capsule().await;
    for name in ["minimal", "minimal-ubuntu", "minimal-alpine", "minimal-arch", "minimal-fedora"] {
        let body = json!({ "sandbox_id": id, "name": name });
        let answer = world.post("/v1/snapshots?overwrite=true", body).await;
        assert!(refused(answer, 409, ErrorCode::Conflict).contains(name));
    }
    for name in ["minimal", "minimal-ubuntu"] {
        refused(world.delete(&format!("/v1/snapshots/{name}")).await, 403, ErrorCode::Forbidden);
    }
    assert_eq!(names(&world, "").await, ["minimal"]);
    assert!(world.agent.templates().is_empty());
}

async fn names_that_are_none(world: World) {
    let id = world.capsule().await;
    for name in ["", ".a", "a/b", "a b", "ä", &"x".repeat(65)] {
        let message = refused(snapshot(&world, id, name).await, 400, ErrorCode::InvalidRequest);
        assert!(message.starts_with("name must be 1 to 64"), "{message}");
    }
    for name in ["a%2Fb", "a%20b", "%C3%A4", "other"] {
        refused(world.delete(&format!("/v1/snapshots/{name}")).await, 404, ErrorCode::NotFound);
    }
    for (body, part) in [(json!({}), "sandbox_id"), (json!({ "sandbox_id": "cl-1" }), "sandbox_id")] {
        let message = refused(world.post("/v1/snapshots", body).await, 400, ErrorCode::InvalidRequest);
        assert!(message.contains(part), "{message}");
    }
    refused(snapshot(&world, CapsuleId::random(), "mine").await, 404, ErrorCode::NotFound);
    assert!(world.agent.templates().is_empty());
}

async fn templates_belong_to_their_team(mut world: World) {
    let id = world.capsule().await;
    assert_eq!(snapshot(&world, id, "mine").await.0, StatusCode::CREATED);
    let stranger = world.stranger().await;
    let key = std::mem::replace(&mut world.key, stranger);
    refused(snapshot(&world, id, "theirs").await, 404, ErrorCode::NotFound);
    assert_eq!(names(&world, "").await, ["minimal"]);
    refused(world.post("/v1/capsules", json!({ "template": "mine" })).await, 404, ErrorCode::NotFound);
    refused(world.delete("/v1/snapshots/mine").await, 404, ErrorCode::NotFound);
    let theirs = world.capsule().await;
    assert_eq!(snapshot(&world, theirs, "mine").await.0, StatusCode::CREATED, "each team has its own names");
    assert_eq!(world.delete("/v1/snapshots/mine").await.0, StatusCode::NO_CONTENT);
    world.key = key;
    assert_eq!(names(&world, "?type=snapshot").await, ["mine"]);
    until_host_has(&world, 1).await;
}

async fn what_failed_leaves_nothing(world: World) {
    let id = world.capsule().await;
    for (failure, status, code) in [
        (AgentCode::Internal, 502, ErrorCode::AgentError),
        (AgentCode::FailedPrecondition, 409, ErrorCode::InvalidState),
        (AgentCode::Unavailable, 503, ErrorCode::HostUnavailable),
    ] {
        world.agent.fail_changes(Some(failure));
        refused(snapshot(&world, id, "mine").await, status, code);
    }
    world.agent.fail_changes(None);
    assert_eq!(names(&world, "").await, ["minimal"]);
    assert_eq!(snapshot(&world, id, "mine").await.0, StatusCode::CREATED, "the name is free");
}

async fn a_host_that_was_away_forgets_later(mut world: World) {
    let id = world.capsule().await;
    assert_eq!(snapshot(&world, id, "mine").await.0, StatusCode::CREATED);
    world.agent.stop().await;
    assert_eq!(world.delete("/v1/snapshots/mine").await.0, StatusCode::NO_CONTENT);
    assert_eq!((names(&world, "?type=snapshot").await.len(), world.agent.templates().len()), (0, 1));
    world.agent.resume().await;
    until_host_has(&world, 0).await;
}

async fn templates_are_told(world: World) {
    let id = world.capsule().await;
    let mut listener = Listener::new(&world).await;
    snapshot(&world, id, "mine").await;
    let made = listener.next().await.unwrap();
    assert_eq!((made.event, made.outcome), (EventName::TemplateSnapshotCreate, Some(Outcome::Success)));
    let resource = made.resource.unwrap();
    assert_eq!((resource.id.as_str(), resource.kind.as_str()), ("mine", "template"));
    assert_eq!((made.actor.unwrap().name.as_deref(), made.sandbox.unwrap().id), (Some("test"), id));
    world.agent.fail_changes(Some(AgentCode::Internal));
    snapshot(&world, id, "other").await;
    let failed = listener.next().await.unwrap();
    assert_eq!((failed.event, failed.outcome), (EventName::TemplateSnapshotCreate, Some(Outcome::Error)));
    assert!(failed.error.unwrap().contains("told to fail"));
    world.delete("/v1/snapshots/mine").await;
    let gone = listener.next().await.unwrap();
    assert_eq!((gone.event, gone.resource.unwrap().id.as_str()), (EventName::TemplateSnapshotDelete, "mine"));
}
