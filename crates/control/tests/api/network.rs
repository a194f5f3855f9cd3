//! What a capsule may reach outside: said when it is made, changed while it lives.

use agent_api::Egress;
use api::{CapsuleId, ErrorCode};
use connectrpc::ErrorCode as AgentCode;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::world::{World, on_both, refused};

on_both![
    it_is_said_when_a_capsule_is_made,
    it_is_changed_at_once_and_all_of_it,
    what_is_no_entry_is_named,
    forks_and_those_that_come_back_have_it,
    a_host_that_was_away_is_told,
];

async fn set(world: &World, id: CapsuleId, body: Value) -> (StatusCode, Value) {
    world.send(world.request(Method::PUT, &format!("/v1/capsules/{id}/network")).json(&body)).await
}

async fn made(world: &World, body: Value) -> CapsuleId {
    let (status, capsule) = world.post("/v1/capsules", body).await;
    assert_eq!(status, StatusCode::CREATED, "{capsule}");
    capsule["id"].as_str().unwrap().parse().unwrap()
}

fn limits(allow: &[&str], deny: &[&str], domains: &[&str]) -> Egress {
    let list = |entries: &[&str]| entries.iter().map(ToString::to_string).collect();
    Egress { allow: list(allow), deny: list(deny), domains: list(domains), ..Default::default() }
}

async fn it_is_said_when_a_capsule_is_made(world: World) {
    let open = made(&world, json!({})).await;
    assert_eq!(world.agent.egress(open), limits(&[], &[], &[]));
    assert_eq!(world.get(&format!("/v1/capsules/{open}")).await.1["network"], json!({"allow_out": [], "deny_out": []}));

    let off = made(&world, json!({"allow_internet_access": false})).await;
    assert_eq!(world.agent.egress(off), limits(&[], &["0.0.0.0/0"], &[]));

    // As E2B's clients write it.
    let named = made(
        &world,
        json!({"network": {"allowOut": ["*.Example.com", "192.0.2.7"], "denyOut": ["0.0.0.0/0"], "allowPublicTraffic": false}}),
    )
    .await;
    assert_eq!(world.agent.egress(named), limits(&["192.0.2.7/32"], &["0.0.0.0/0"], &["*.example.com"]));
    let shown = &world.get(&format!("/v1/capsules/{named}")).await.1;
    assert_eq!(shown["network"], json!({"allow_out": ["192.0.2.7/32", "*.example.com"], "deny_out": ["0.0.0.0/0"]}));
    assert_eq!(shown["allow_public_traffic"], false);
}

async fn it_is_changed_at_once_and_all_of_it(world: World) {
    let id = made(&world, json!({"allow_internet_access": false})).await;
    let body = json!({"allow_out": ["192.0.2.0/24"], "deny_out": ["0.0.0.0/0"]});
    for _ in 0..2 {
        let (status, shown) = set(&world, id, body.clone()).await;
        assert_eq!(
            (status, shown),
            (StatusCode::OK, json!({"allow_out": ["192.0.2.0/24"], "deny_out": ["0.0.0.0/0"]}))
        );
        assert_eq!(world.agent.egress(id), limits(&["192.0.2.0/24"], &["0.0.0.0/0"], &[]));
    }
    // What is not said is not limited.
    assert_eq!(set(&world, id, json!({})).await.0, StatusCode::OK);
    assert_eq!(world.agent.egress(id), limits(&[], &[], &[]));
    // A paused one wakes up with it.
    world.ask(id, "pause").await;
    assert_eq!(set(&world, id, json!({"allow_internet_access": false})).await.0, StatusCode::OK);
    world.ask(id, "resume").await;
    assert_eq!(world.agent.egress(id), limits(&[], &["0.0.0.0/0"], &[]));
    world.delete(&format!("/v1/capsules/{id}")).await;
    refused(set(&world, id, json!({})).await, 409, ErrorCode::InvalidState);
    // It is a team's own.
    let id = made(&world, json!({})).await;
    let stranger = world.stranger().await;
    let request = world.client.put(format!("{}/v1/capsules/{id}/network", world.url)).header("x-api-key", stranger);
    refused(world.send(request.json(&json!({"allow_internet_access": false}))).await, 404, ErrorCode::NotFound);
    assert_eq!(world.agent.egress(id), limits(&[], &[], &[]));
}

async fn what_is_no_entry_is_named(world: World) {
    let id = made(&world, json!({})).await;
    for (body, message) in [
        (json!({"deny_out": ["1.2.3.4", "::/0"]}), "deny_out[1] must be IPv4"),
        (json!({"allow_out": ["example.com"]}), "allow_out has names, which need 0.0.0.0/0 in deny_out"),
        (json!({"deny_out": ["example.com"]}), "deny_out[0] must be an IPv4 address or network"),
        (json!({"deny_out": vec!["1.2.3.4"; 257]}), "deny_out must have at most 256 entries"),
    ] {
        let said = refused(set(&world, id, body.clone()).await, 400, ErrorCode::InvalidRequest);
        assert!(said.starts_with(message), "{said}");
        let said = refused(world.post("/v1/capsules", json!({"network": body})).await, 400, ErrorCode::InvalidRequest);
        assert!(said.starts_with(&format!("network.{message}")), "{said}");
    }
    assert_eq!(world.agent.egress(id), limits(&[], &[], &[]));
}

async fn forks_and_those_that_come_back_have_it(world: World) {
    let off = limits(&[], &["0.0.0.0/0"], &[]);
    let id = made(&world, json!({"allow_internet_access": false})).await;
    let (status, forked) = world.post(&format!("/v1/capsules/{id}/fork"), json!({})).await;
    assert_eq!(status, StatusCode::CREATED, "{forked}");
    let child: CapsuleId = forked["capsules"][0]["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(world.agent.egress(child), off);
    assert_eq!(forked["capsules"][0]["network"]["deny_out"], json!(["0.0.0.0/0"]));
    // While no host has it, it is only written down.
    world.ask(id, "pause").await;
    assert_eq!(world.ask(id, "hibernate").await.1["status"], "hibernated");
    assert_eq!(set(&world, id, json!({"deny_out": ["192.0.2.0/24"]})).await.0, StatusCode::OK);
    assert_eq!(world.ask(id, "resume").await.1["status"], "running");
    assert_eq!(world.agent.egress(id), limits(&[], &["192.0.2.0/24"], &[]));
}

async fn a_host_that_was_away_is_told(mut world: World) {
    let id = made(&world, json!({})).await;
    world.agent.stop().await;
    refused(set(&world, id, json!({"allow_internet_access": false})).await, 503, ErrorCode::HostUnavailable);
    let shown = world.get(&format!("/v1/capsules/{id}")).await.1;
    assert_eq!(shown["network"]["deny_out"], json!(["0.0.0.0/0"]), "the wish is written down all the same");
    world.agent.resume().await;
    world.agent.until_egress(id, &limits(&[], &["0.0.0.0/0"], &[])).await;
    // And one that could not do it.
    world.agent.fail_changes(Some(AgentCode::Internal));
    assert_eq!(set(&world, id, json!({})).await.0, StatusCode::BAD_GATEWAY);
    assert_eq!(world.agent.egress(id), limits(&[], &["0.0.0.0/0"], &[]));
    world.agent.fail_changes(None);
    world.agent.until_egress(id, &limits(&[], &[], &[])).await;
}
