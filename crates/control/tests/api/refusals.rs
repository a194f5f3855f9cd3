//! Bad input of every kind: the documented code, and nothing touched.

use api::{CapsuleId, ErrorCode};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use testkit::Postgres;

use crate::world::{World, on_both, refused};

on_both![
    keys,
    values_outside_their_bounds,
    bodies_that_are_not_right,
    ids_that_are_not_ids,
    other_teams_capsules,
    paths_and_methods,
];

/// Nothing was made, nothing was asked of the host.
async fn untouched(world: &World) {
    assert_eq!(*world.agent.creates().borrow(), 0);
    assert_eq!(*world.agent.destroys().borrow(), 0);
    assert_eq!(world.get("/v1/capsules").await.1, json!([]));
}

async fn keys(world: World) {
    let id = CapsuleId::random();
    let routes = [
        (Method::POST, "/v1/capsules".to_owned()),
        (Method::GET, "/v1/capsules".to_owned()),
        (Method::GET, "/v1/snapshots".to_owned()),
        (Method::GET, format!("/v1/capsules/{id}")),
        (Method::DELETE, format!("/v1/capsules/{id}")),
        (Method::POST, format!("/v1/capsules/{id}/ping")),
        (Method::POST, format!("/v1/capsules/{id}/pause")),
        (Method::POST, format!("/v1/capsules/{id}/resume")),
        (Method::POST, format!("/v1/capsules/{id}/fork")),
        (Method::POST, "/v1/snapshots".to_owned()),
        (Method::DELETE, "/v1/snapshots/minimal".to_owned()),
        (Method::POST, format!("/v1/capsules/{id}/exec")),
        (Method::GET, format!("/v1/capsules/{id}/processes")),
        (Method::DELETE, format!("/v1/capsules/{id}/processes/1")),
        (Method::GET, format!("/v1/capsules/{id}/metrics")),
        (Method::POST, format!("/v1/capsules/{id}/files/list")),
        (Method::POST, format!("/v1/capsules/{id}/files/mkdir")),
        (Method::POST, format!("/v1/capsules/{id}/files/remove")),
        (Method::POST, format!("/v1/capsules/{id}/files/read")),
        (Method::POST, format!("/v1/capsules/{id}/files/write")),
        (Method::POST, format!("/v1/capsules/{id}/files/stream/read")),
        (Method::POST, format!("/v1/capsules/{id}/files/stream/write")),
        (Method::GET, "/v1/events/stream".to_owned()),
        (Method::GET, "/v1/capsules/not-an-id".to_owned()),
    ];
    let unknown = format!("wrn_{}", "0".repeat(32));
    for (method, path) in routes {
        for key in [
            None,
            Some(""),
            Some("wrn_"),
            Some(&unknown),
            Some(&world.key.to_uppercase()),
            Some(&world.key[..35]),
            Some("ключ"),
        ] {
            let mut request = world.client.request(method.clone(), format!("{}{path}", world.url)).body("{}");
            if let Some(key) = key {
                request = request.header("x-api-key", key.as_bytes());
            }
            refused(world.send(request).await, 401, ErrorCode::Unauthorized);
        }
    }
    untouched(&world).await;
}

async fn values_outside_their_bounds(world: World) {
    for (body, field) in [
        (json!({ "vcpus": 0 }), "vcpus"),
        (json!({ "vcpus": 1_000_000_000 }), "vcpus"),
        (json!({ "vcpus": -1 }), "vcpus"),
        (json!({ "vcpus": 1.5 }), "vcpus"),
        (json!({ "vcpus": "2" }), "vcpus"),
        (json!({ "memory_mb": 0 }), "memory_mb"),
        (json!({ "memory_mb": 1e30 }), "memory_mb"),
        (json!({ "disk_size_mb": 0 }), "disk_size_mb"),
        (json!({ "timeout_sec": -1 }), "timeout_sec"),
        (json!({ "timeout_sec": 2_592_001 }), "timeout_sec"),
        (json!({ "template": "a/../b" }), "template"),
        (json!({ "template": "" }), "template"),
        (json!({ "template": 7 }), "template"),
        (json!({ "metadata": { "envd_version": "1" } }), "metadata.envd_version"),
        (json!({ "metadata": { "a": 1 } }), "metadata.a"),
        (json!({ "metadata": { "a": "x".repeat(65) } }), "metadata.a"),
    ] {
        let message = refused(world.post("/v1/capsules", body.clone()).await, 400, ErrorCode::InvalidRequest);
        assert!(message.starts_with(field), "{body}: {message}");
    }
    let message = refused(world.post("/v1/capsules", json!({ "template": "nobodys" })).await, 404, ErrorCode::NotFound);
    assert!(message.contains("nobodys"));
    untouched(&world).await;

    let id = world.capsule().await;
    for (body, field) in [
        (json!({ "args": ["x"] }), "cmd"),
        (json!({ "cmd": "" }), "cmd"),
        (json!({ "cmd": "x", "timeout_sec": -1 }), "timeout_sec"),
        (json!({ "cmd": "x", "timeout_sec": 86_401 }), "timeout_sec"),
        (json!({ "cmd": "x", "args": "y" }), "args"),
        (json!({ "cmd": "x", "args": ["a", 1] }), "args[1]"),
        (json!({ "cmd": "x", "envs": { "A": 1 } }), "envs.A"),
        (json!({ "cmd": "x\u{0}" }), "cmd"),
        (json!({ "cmd": "x", "background": "yes" }), "background"),
    ] {
        let message =
            refused(world.post(&format!("/v1/capsules/{id}/exec"), body.clone()).await, 400, ErrorCode::InvalidRequest);
        assert!(message.contains(field), "{body}: {message}");
    }
    assert!(world.agent.processes(id).await.is_empty());
}

async fn bodies_that_are_not_right(world: World) {
    let post = |body: Vec<u8>| world.send(world.request(Method::POST, "/v1/capsules").body(body));
    for body in ["", "{", "[]", "null", "1", "{}{}", "{\"vcpus\":1,\"vcpus\":2}", "\u{feff}{}", &"[".repeat(100_000)] {
        refused(post(body.into()).await, 400, ErrorCode::InvalidRequest);
    }
    refused(post(b"{\"template\":\"\xff\"}".to_vec()).await, 400, ErrorCode::InvalidRequest);
    let large = json!({ "template": "x".repeat(10 * 1024 * 1024) }).to_string();
    let message = refused(post(large.clone().into()).await, 413, ErrorCode::TooLarge);
    assert!(message.contains("1048576"), "{message}");
    // The same without a length.
    let chunks = futures::stream::iter(vec![Ok::<_, std::io::Error>(large)]);
    let request = world.request(Method::POST, "/v1/capsules").body(reqwest::Body::wrap_stream(chunks));
    refused(world.send(request).await, 413, ErrorCode::TooLarge);
    // The largest that is not too large is judged by what it says.
    let mut exact = json!({ "template": "" }).to_string();
    exact.insert_str(13, &"x".repeat(1024 * 1024 - exact.len()));
    refused(post(exact.into()).await, 400, ErrorCode::InvalidRequest);
    untouched(&world).await;
}

async fn ids_that_are_not_ids(world: World) {
    for id in [
        "0",
        "cl-",
        "cl-0",
        "usr-0000000000000000000000000",
        "cl-00000000000000000000000000",
        "cl-000000000000000000000000A",
        // 2^128, and the largest number of 25 digits.
        "cl-f5lxx1zz5pnorynqglhzmsp34",
        "cl-zzzzzzzzzzzzzzzzzzzzzzzzz",
        "cl-%00",
        "cl-%ff",
        "stats",
    ] {
        let path = format!("/v1/capsules/{id}");
        for request in [
            world.request(Method::GET, &path),
            world.request(Method::DELETE, &path),
            world.request(Method::POST, &format!("{path}/ping")),
            world.request(Method::POST, &format!("{path}/exec")).json(&json!({ "cmd": "x" })),
            world.request(Method::GET, &format!("{path}/processes")),
            world.request(Method::DELETE, &format!("{path}/processes/1")),
            world.request(Method::GET, &format!("{path}/metrics")),
            world.request(Method::POST, &format!("{path}/files/list")).json(&json!({ "path": "/" })),
            world.request(Method::POST, &format!("{path}/files/write")).body("x"),
        ] {
            refused(world.send(request).await, 400, ErrorCode::InvalidRequest);
        }
    }
    untouched(&world).await;
}

async fn other_teams_capsules(mut world: World) {
    let id = world.capsule().await;
    world.key = world.stranger().await;
    let unknown = CapsuleId::random();
    for id in [id, unknown] {
        let path = format!("/v1/capsules/{id}");
        for request in [
            world.request(Method::GET, &path),
            world.request(Method::DELETE, &path),
            world.request(Method::POST, &format!("{path}/ping")),
            world.request(Method::POST, &format!("{path}/exec")).json(&json!({ "cmd": "x" })),
            world.request(Method::GET, &format!("{path}/processes")),
            world.request(Method::DELETE, &format!("{path}/processes/1")),
            world.request(Method::GET, &format!("{path}/metrics")),
            world.request(Method::POST, &format!("{path}/files/list")).json(&json!({ "path": "/" })),
            world.request(Method::POST, &format!("{path}/files/write")).body("x"),
        ] {
            // Word for word what an id says that is nobody's.
            let message = refused(world.send(request).await, 404, ErrorCode::NotFound);
            assert_eq!(message, format!("there is no capsule {id}"));
        }
    }
    assert_eq!(world.get("/v1/capsules").await.1, json!([]));
    assert_eq!(*world.agent.destroys().borrow(), 0);
    assert_eq!(world.agent.alive(), [id.to_string()]);
    assert!(world.agent.processes(id).await.is_empty());
}

async fn paths_and_methods(world: World) {
    for path in
        ["/", "/v1", "/v2/capsules", "/v1/capsules/", "/api", "/api/api/v1/capsules", "/v1/capsules/a/b/c", "/%2e%2e/x"]
    {
        refused(world.get(path).await, 404, ErrorCode::NotFound);
    }
    for path in ["/v1/capsules", "/api/v1/capsules", "/health"] {
        let answer = world.request(Method::PATCH, path).send().await.unwrap();
        assert!(answer.headers()["allow"].to_str().unwrap().contains("GET"));
        let answer: (StatusCode, Value) = (answer.status(), answer.json().await.unwrap());
        refused(answer, 405, ErrorCode::MethodNotAllowed);
    }
    untouched(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away() {
    let postgres = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
    let world = World::over(postgres.database()).await;
    let id = world.capsule().await;
    tokio::task::spawn_blocking(|| drop(postgres)).await.unwrap();
    let path = format!("/v1/capsules/{id}");
    let (list, get, create) =
        tokio::join!(world.get("/v1/capsules"), world.get(&path), world.post("/v1/capsules", json!({})),);
    for answer in [list, get, create] {
        refused(answer, 503, ErrorCode::Unavailable);
    }
    assert_eq!(*world.agent.creates().borrow(), 1, "what cannot be written down is not begun");
}
