//! Creating, finding, keeping awake and destroying capsules.

use std::collections::HashSet;
use std::time::Duration;

use api::ErrorCode;
use connectrpc::ErrorCode as AgentCode;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::world::{PATIENCE, World, on_both, refused};

on_both![
    the_quick_start,
    a_capsule_says_what_it_is,
    lists_are_newest_first_and_without_the_ended,
    destroying_is_repeatable,
    a_slow_start_is_answered_and_awaited,
    patience_ends_before_the_clients,
    a_client_that_leaves_leaves_no_orphan,
    many_at_once,
    a_destroy_overtakes_a_create,
    a_host_that_fails_leaves_an_error,
    pings_reach_the_host,
    whatever_goes_into_a_capsule_is_activity,
    both_prefixes_serve_everything,
    shutting_down_lets_a_start_end,
];

async fn the_quick_start(world: World) {
    let (status, capsule) = world.post("/v1/capsules", json!({ "template": "minimal" })).await;
    assert_eq!(status, StatusCode::CREATED);
    let path = format!("/v1/capsules/{}", capsule["id"].as_str().unwrap());
    let (status, result) = world.post(&format!("{path}/exec"), json!({ "cmd": "echo", "args": ["hello"] })).await;
    assert_eq!((status, &result["stdout"], &result["exit_code"]), (StatusCode::OK, &json!("hello\n"), &json!(0)));
    assert_eq!(world.delete(&path).await, (StatusCode::NO_CONTENT, Value::Null));
    assert!(world.agent.alive().is_empty());
    assert_eq!(world.get(&path).await.1["status"], "stopped");
}

async fn a_capsule_says_what_it_is(world: World) {
    let request = json!({
        "template": "minimal-ubuntu", "vcpus": 2, "memory_mb": 1024, "timeout_sec": 5, "disk_size_mb": 8192,
        "metadata": { "owner": "zoë" }
    });
    let (_, made) = world.post("/v1/capsules", request).await;
    let capsule: api::Capsule = serde_json::from_value(made.clone()).unwrap();
    assert_eq!((capsule.status, capsule.template.as_str()), (api::Status::Running, "minimal"));
    assert_eq!((capsule.vcpus, capsule.memory_mb, capsule.timeout_sec, capsule.disk_size_mb), (2, 1024, 60, 8192));
    assert_eq!(capsule.metadata["owner"], "zoë");
    assert_eq!(capsule.metadata["envd_version"], "fake");
    assert!(capsule.started_at.unwrap() >= capsule.created_at && capsule.last_active_at.is_some());
    assert!(made["created_at"].as_str().unwrap().ends_with('Z'), "times have an offset");
    assert_eq!(world.get(&format!("/v1/capsules/{}", capsule.id)).await, (StatusCode::OK, made));
}

async fn lists_are_newest_first_and_without_the_ended(world: World) {
    assert_eq!(world.get("/v1/capsules").await, (StatusCode::OK, json!([])));
    let ids = [world.capsule().await, world.capsule().await, world.capsule().await];
    world.delete(&format!("/v1/capsules/{}", ids[1])).await;
    let (_, list) = world.get("/v1/capsules").await;
    let listed: Vec<_> =
        list.as_array().unwrap().iter().map(|capsule| capsule["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(listed, [ids[2].to_string(), ids[0].to_string()]);
    let templates = world.get("/v1/snapshots").await.1;
    assert_eq!(
        (&templates[0]["name"], &templates[0]["type"], &templates[0]["platform"]),
        (&json!("minimal"), &json!("base"), &json!(true))
    );
}

async fn destroying_is_repeatable(world: World) {
    let id = world.capsule().await;
    for _ in 0..3 {
        assert_eq!(world.delete(&format!("/v1/capsules/{id}")).await.0, StatusCode::NO_CONTENT);
        assert_eq!(world.status(id).await, "stopped");
    }
    for (path, body) in [("exec", json!({ "cmd": "echo" })), ("ping", json!({}))] {
        let message =
            refused(world.post(&format!("/v1/capsules/{id}/{path}"), body).await, 409, ErrorCode::InvalidState);
        assert_eq!(message, "the capsule is stopped");
    }
}

async fn a_slow_start_is_answered_and_awaited(world: World) {
    world.agent.hold();
    let mut creates = world.agent.creates();
    let create = tokio::spawn(world.request(Method::POST, "/v1/capsules").json(&json!({})).send());
    creates.wait_for(|&count| count == 1).await.unwrap();
    let id = world.get("/v1/capsules").await.1[0]["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/capsules/{id}");
    // Once the reconciler has been around, the host's word shows.
    world.until(id.parse().unwrap(), "starting").await;
    let exec = tokio::spawn(
        world.request(Method::POST, &format!("{path}/exec")).json(&json!({ "cmd": "echo", "args": ["early"] })).send(),
    );
    let ping = tokio::spawn(world.request(Method::POST, &format!("{path}/ping")).send());
    // Neither is refused while it starts, and the create is not answered twice.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!exec.is_finished() && !ping.is_finished());
    world.agent.release();
    assert_eq!(create.await.unwrap().unwrap().status(), StatusCode::CREATED);
    assert_eq!(exec.await.unwrap().unwrap().json::<Value>().await.unwrap()["stdout"], "early\n");
    assert_eq!(ping.await.unwrap().unwrap().status(), StatusCode::NO_CONTENT);
}

async fn patience_ends_before_the_clients(world: World) {
    world.agent.hold();
    let mut creates = world.agent.creates();
    let create = tokio::spawn(world.request(Method::POST, "/v1/capsules").json(&json!({})).send());
    creates.wait_for(|&count| count == 1).await.unwrap();
    let id = world.get("/v1/capsules").await.1[0]["id"].as_str().unwrap().to_owned();
    let exec = world.request(Method::POST, &format!("/v1/capsules/{id}/exec")).json(&json!({ "cmd": "pwd" }));
    let message = refused(world.send(exec).await, 409, ErrorCode::InvalidState);
    assert_eq!(message, "the capsule is starting");
    let created = create.await.unwrap().unwrap();
    assert_eq!(created.status(), StatusCode::CREATED);
    assert_eq!(created.json::<Value>().await.unwrap()["status"], "starting");
    // It goes on nonetheless.
    world.agent.release();
    world.until(id.parse().unwrap(), "running").await;
}

async fn a_client_that_leaves_leaves_no_orphan(world: World) {
    world.agent.hold();
    let mut creates = world.agent.creates();
    let create = tokio::spawn(world.request(Method::POST, "/v1/capsules").json(&json!({})).send());
    creates.wait_for(|&count| count == 1).await.unwrap();
    create.abort();
    assert!(create.await.unwrap_err().is_cancelled());
    world.agent.release();
    let id = world.get("/v1/capsules").await.1[0]["id"].as_str().unwrap().parse().unwrap();
    world.until(id, "running").await;
    assert_eq!(world.agent.alive(), [id.to_string()]);
    world.delete(&format!("/v1/capsules/{id}")).await;
    assert!(world.agent.alive().is_empty());
}

async fn many_at_once(world: World) {
    let one = || async {
        let id = world.capsule().await;
        let path = format!("/v1/capsules/{id}");
        let exec = json!({ "cmd": "echo", "args": [id.to_string()] });
        assert_eq!(world.post(&format!("{path}/exec"), exec).await.1["stdout"], format!("{id}\n"));
        assert_eq!(world.delete(&path).await.0, StatusCode::NO_CONTENT);
        id
    };
    let ids: HashSet<_> = futures::future::join_all((0..32).map(|_| one())).await.into_iter().collect();
    assert_eq!(ids.len(), 32);
    assert!(world.agent.alive().is_empty());
    assert_eq!(world.get("/v1/capsules").await.1, json!([]));
}

async fn a_destroy_overtakes_a_create(world: World) {
    world.agent.hold();
    let mut creates = world.agent.creates();
    let create = tokio::spawn(world.request(Method::POST, "/v1/capsules").json(&json!({})).send());
    creates.wait_for(|&count| count == 1).await.unwrap();
    let id = world.get("/v1/capsules").await.1[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(world.delete(&format!("/v1/capsules/{id}")).await.0, StatusCode::NO_CONTENT);
    world.agent.release();
    let _ = create.await.unwrap().unwrap();
    assert_eq!(world.status(id.parse().unwrap()).await, "stopped");
    assert!(world.agent.alive().is_empty());
}

async fn a_host_that_fails_leaves_an_error(world: World) {
    for (failure, status, code) in [
        (AgentCode::Internal, 502, ErrorCode::AgentError),
        (AgentCode::NotFound, 502, ErrorCode::AgentError),
        (AgentCode::ResourceExhausted, 503, ErrorCode::HostUnavailable),
        (AgentCode::Unavailable, 503, ErrorCode::HostUnavailable),
    ] {
        world.agent.fail_creates(Some(failure));
        refused(world.post("/v1/capsules", json!({})).await, status, code);
    }
    assert_eq!(world.get("/v1/capsules").await.1, json!([]), "what never ran is not listed");
    assert!(world.agent.alive().is_empty());
    world.agent.fail_creates(None);
    world.capsule().await;
}

async fn pings_reach_the_host(world: World) {
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}");
    let before = world.get(&path).await.1["last_active_at"].clone();
    assert_eq!(
        world.send(world.request(Method::POST, &format!("{path}/ping"))).await,
        (StatusCode::NO_CONTENT, Value::Null)
    );
    let moved = async {
        while world.get(&path).await.1["last_active_at"] == before {
            world.send(world.request(Method::POST, &format!("{path}/ping"))).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, moved).await.expect("the host's report moves last_active_at");
}

async fn whatever_goes_into_a_capsule_is_activity(world: World) {
    let path = format!("/v1/capsules/{}", world.capsule().await);
    for (verb, body) in [("exec", json!({ "cmd": "true" })), ("files/list", json!({ "path": "/usr" }))] {
        let before = world.get(&path).await.1["last_active_at"].clone();
        // By more than the clock's own unit.
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert_eq!(world.post(&format!("{path}/{verb}"), body).await.0, StatusCode::OK);
        let moved = async {
            while world.get(&path).await.1["last_active_at"] == before {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(PATIENCE, moved).await.expect("the host's report moves last_active_at");
    }
}

async fn both_prefixes_serve_everything(world: World) {
    let id = world.capsule().await;
    assert_eq!(world.get(&format!("/api/v1/capsules/{id}")).await.1["id"], id.to_string());
    assert_eq!(
        world.post(&format!("/api/v1/capsules/{id}/exec"), json!({ "cmd": "pwd" })).await.1["stdout"],
        "/root\n"
    );
    for path in ["/health", "/api/health"] {
        let (status, body) = world.send(world.client.get(format!("{}{path}", world.url))).await;
        assert_eq!((status, body), (StatusCode::OK, json!({ "status": "ok", "version": "test" })));
    }
    for path in ["/openapi.yaml", "/api/openapi.yaml"] {
        let answer = world.client.get(format!("{}{path}", world.url)).send().await.unwrap();
        assert_eq!(answer.headers()["content-type"], "application/yaml");
        assert!(answer.text().await.unwrap().contains("/v1/capsules/{id}/exec"));
    }
}

async fn shutting_down_lets_a_start_end(mut world: World) {
    world.agent.hold();
    let mut creates = world.agent.creates();
    let create = tokio::spawn(world.request(Method::POST, "/v1/capsules").json(&json!({})).send());
    creates.wait_for(|&count| count == 1).await.unwrap();
    world.begin_shut_down();
    world.agent.release();
    assert_eq!(create.await.unwrap().unwrap().status(), StatusCode::CREATED);
    world.shut_down().await;
}
