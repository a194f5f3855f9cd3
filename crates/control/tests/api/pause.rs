//! Pausing and resuming, on request and without.

use std::time::Duration;

use api::{ActorKind, CapsuleId, ErrorCode, EventName, event::Outcome};
use connectrpc::ErrorCode as AgentCode;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::events::Listener;
use crate::world::{PATIENCE, World, on_both, refused};

on_both![
    it_goes_on_where_it_was,
    what_is_so_already_is_a_success,
    a_paused_capsule_is_not_used,
    what_comes_during_a_pause_hears_of_it,
    what_comes_during_a_resume_waits,
    a_resume_waits_for_a_pause,
    an_idle_capsule_is_paused_by_its_host,
    what_is_asked_of_a_capsule_that_has_just_paused_is_refused_as_ever,
    a_pause_that_fails_is_over,
    a_resume_that_fails_may_be_asked_again,
    a_pause_that_was_lost_is_told_as_it_is,
    a_paused_capsule_is_destroyed,
    a_host_that_is_away_pauses_nothing,
    pauses_are_told,
    what_has_ended_stays,
];

async fn exec(world: &World, id: CapsuleId, script: &str) -> (StatusCode, Value) {
    let body = json!({ "cmd": "sh", "args": ["-c", script] });
    world.post(&format!("/v1/capsules/{id}/exec"), body).await
}

async fn it_goes_on_where_it_was(world: World) {
    let id = world.capsule().await;
    exec(&world, id, "sleep 1000 >/dev/null 2>&1 &").await;
    for _ in 0..3 {
        let (status, paused) = world.ask(id, "pause").await;
        assert_eq!((status, &paused["status"]), (StatusCode::OK, &json!("paused")), "{paused}");
        assert!(paused.get("reason").is_none());
        assert_eq!(world.get(&format!("/v1/capsules/{id}")).await, (StatusCode::OK, paused.clone()));
        assert_eq!(world.get("/v1/capsules").await.1, json!([paused]), "what is paused is listed");
        let (status, running) = world.ask(id, "resume").await;
        assert_eq!((status, &running["status"]), (StatusCode::OK, &json!("running")), "{running}");
        assert_eq!(running["started_at"], paused["started_at"], "it started once");
        assert_eq!(exec(&world, id, "pgrep -c sleep").await.1["stdout"], "1\n");
    }
}

async fn what_is_so_already_is_a_success(world: World) {
    let id = world.capsule().await;
    for (verb, word) in [("resume", "running"), ("pause", "paused"), ("pause", "paused"), ("resume", "running")] {
        let (status, capsule) = world.ask(id, verb).await;
        assert_eq!((status, &capsule["status"]), (StatusCode::OK, &json!(word)), "{verb}: {capsule}");
    }
    // Many at once agree.
    for (verb, word) in [("pause", "paused"), ("resume", "running")] {
        let answers = futures::future::join_all((0..8).map(|_| world.ask(id, verb))).await;
        for (status, capsule) in answers {
            assert_eq!((status, &capsule["status"]), (StatusCode::OK, &json!(word)), "{verb}: {capsule}");
        }
    }
}

async fn a_paused_capsule_is_not_used(world: World) {
    let id = world.capsule().await;
    world.ask(id, "pause").await;
    for (path, body) in [
        ("exec", json!({ "cmd": "true" })),
        ("ping", json!({})),
        ("files/list", json!({ "path": "/" })),
        ("fork", json!({ "count": 1 })),
    ] {
        let answer = world.post(&format!("/v1/capsules/{id}/{path}"), body).await;
        assert_eq!(refused(answer, 409, ErrorCode::InvalidState), "the capsule is paused", "{path}");
    }
    let answer = world.post("/v1/snapshots", json!({ "sandbox_id": id })).await;
    assert_eq!(refused(answer, 409, ErrorCode::InvalidState), "the capsule is paused");
    assert_eq!(world.status(id).await, "paused", "none of these resumes it");
}

async fn what_comes_during_a_pause_hears_of_it(world: World) {
    let id = world.capsule().await;
    world.agent.hold();
    let pause = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/pause")).send());
    world.until(id, "pausing").await;
    let body = json!({ "cmd": "true" });
    let exec = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/exec")).json(&body).send());
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!exec.is_finished() && !pause.is_finished());
    world.agent.release();
    let answer = exec.await.unwrap().unwrap();
    let answer = (answer.status(), answer.json().await.unwrap());
    assert_eq!(refused(answer, 409, ErrorCode::InvalidState), "the capsule is paused");
    assert_eq!(pause.await.unwrap().unwrap().json::<Value>().await.unwrap()["status"], "paused");
}

async fn what_comes_during_a_resume_waits(world: World) {
    let id = world.capsule().await;
    world.ask(id, "pause").await;
    world.agent.hold();
    let resume = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/resume")).send());
    // Once the reconciler has been around.
    world.until(id, "resuming").await;
    let body = json!({ "cmd": "echo", "args": ["early"] });
    let exec = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/exec")).json(&body).send());
    let again = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/resume")).send());
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!exec.is_finished() && !again.is_finished());
    world.agent.release();
    assert_eq!(exec.await.unwrap().unwrap().json::<Value>().await.unwrap()["stdout"], "early\n");
    for answer in [resume, again] {
        assert_eq!(answer.await.unwrap().unwrap().json::<Value>().await.unwrap()["status"], "running");
    }
}

async fn a_resume_waits_for_a_pause(world: World) {
    let id = world.capsule().await;
    world.agent.hold();
    let pause = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/pause")).send());
    world.until(id, "pausing").await;
    let resume = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/resume")).send());
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!resume.is_finished());
    world.agent.release();
    assert_eq!(resume.await.unwrap().unwrap().json::<Value>().await.unwrap()["status"], "running");
    assert_eq!(pause.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(world.status(id).await, "running");
}

async fn an_idle_capsule_is_paused_by_its_host(world: World) {
    let id = world.capsule().await;
    let mut listener = Listener::new(&world).await;
    world.agent.doze(id).await;
    world.until(id, "paused").await;
    let capsule = world.get(&format!("/v1/capsules/{id}")).await.1;
    assert_eq!(capsule["reason"], "nothing happened for 60 s");
    let (changes, told) = listener.until_asked().await;
    assert_eq!(changes.last().unwrap().1, "paused");
    assert_eq!((told.event, told.outcome), (EventName::CapsulePause, Some(Outcome::Success)));
    assert_eq!((told.metadata["reason"].as_str(), told.actor.unwrap().kind), ("ttl_expired", ActorKind::System));
    // A reconciler that has been around leaves it.
    let other = world.capsule().await;
    world.agent.end(other, agent_api::CapsuleState::CAPSULE_STATE_STOPPED, "off");
    world.until(other, "stopped").await;
    assert_eq!(world.status(id).await, "paused");
    let (status, resumed) = world.ask(id, "resume").await;
    assert_eq!((status, &resumed["status"]), (StatusCode::OK, &json!("running")));
    assert!(resumed.get("reason").is_none());
}

async fn what_is_asked_of_a_capsule_that_has_just_paused_is_refused_as_ever(world: World) {
    let files = ["list", "mkdir", "remove", "read"].map(|verb| (format!("files/{verb}"), json!({ "path": "/tmp/x" })));
    let command = json!({ "cmd": "true", "background": true });
    let asked = [("exec".into(), json!({ "cmd": "true" })), ("exec".into(), command)].into_iter().chain(files);
    for (verb, body) in asked {
        let id = world.capsule().await;
        // What is known of it changes when its host is asked next.
        world.agent.doze(id).await;
        let message =
            refused(world.post(&format!("/v1/capsules/{id}/{verb}"), body).await, 409, ErrorCode::InvalidState);
        assert_eq!(message, "the capsule is paused", "{verb}");
    }
    let id = world.capsule().await;
    world.agent.doze(id).await;
    let listed = world.get(&format!("/v1/capsules/{id}/processes")).await;
    refused(listed, 409, ErrorCode::InvalidState);
}

async fn a_pause_that_fails_is_over(world: World) {
    let id = world.capsule().await;
    let mut listener = Listener::new(&world).await;
    world.agent.fail_changes(Some(AgentCode::Internal));
    let message = refused(world.ask(id, "pause").await, 502, ErrorCode::AgentError);
    assert!(message.contains("told to fail"), "{message}");
    assert_eq!(world.status(id).await, "running");
    assert_eq!(exec(&world, id, "true").await.0, StatusCode::OK);
    let (changes, told) = listener.until_asked().await;
    let change = |from: &str, to: &str| (from.to_owned(), to.to_owned());
    assert_eq!(changes, [change("running", "pausing"), change("pausing", "running")]);
    assert_eq!((told.event, told.outcome), (EventName::CapsulePause, Some(Outcome::Error)));
    assert!(told.error.unwrap().contains("told to fail") && told.actor.unwrap().kind == ActorKind::ApiKey);
    world.agent.fail_changes(None);
    assert_eq!(world.ask(id, "pause").await.1["status"], "paused");
}

async fn a_resume_that_fails_may_be_asked_again(world: World) {
    let id = world.capsule().await;
    world.ask(id, "pause").await;
    let mut listener = Listener::new(&world).await;
    for (failure, status, code) in [
        (AgentCode::Internal, 502, ErrorCode::AgentError),
        (AgentCode::DataLoss, 502, ErrorCode::AgentError),
        (AgentCode::ResourceExhausted, 503, ErrorCode::HostUnavailable),
    ] {
        world.agent.fail_changes(Some(failure));
        refused(world.ask(id, "resume").await, status, code);
        assert_eq!(world.status(id).await, "paused");
        let (_, told) = listener.until_asked().await;
        assert_eq!((told.event, told.outcome), (EventName::CapsuleResume, Some(Outcome::Error)));
    }
    world.agent.fail_changes(None);
    world.agent.make_room(0);
    refused(world.ask(id, "resume").await, 503, ErrorCode::HostUnavailable);
    world.agent.make_room(1);
    assert_eq!(world.ask(id, "resume").await.1["status"], "running");
}

async fn a_pause_that_was_lost_is_told_as_it_is(world: World) {
    let id = world.capsule().await;
    world.agent.hold();
    let (status, capsule) = world.ask(id, "pause").await;
    assert_eq!((status, &capsule["status"]), (StatusCode::OK, &json!("pausing")));
    world.agent.release();
    world.until(id, "paused").await;
}

async fn a_paused_capsule_is_destroyed(world: World) {
    let id = world.capsule().await;
    world.ask(id, "pause").await;
    assert_eq!(world.delete(&format!("/v1/capsules/{id}")).await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.status(id).await, "stopped");
    // In the middle of a pause too.
    let id = world.capsule().await;
    world.agent.hold();
    let pause = tokio::spawn(world.request(Method::POST, &format!("/v1/capsules/{id}/pause")).send());
    world.until(id, "pausing").await;
    assert_eq!(world.delete(&format!("/v1/capsules/{id}")).await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.status(id).await, "stopped");
    world.agent.release();
    let _ = pause.await.unwrap().unwrap();
    assert_eq!(world.status(id).await, "stopped");
    assert!(world.agent.alive().is_empty());
}

async fn a_host_that_is_away_pauses_nothing(mut world: World) {
    let (running, paused) = (world.capsule().await, world.capsule().await);
    world.ask(paused, "pause").await;
    world.agent.stop().await;
    refused(world.ask(running, "pause").await, 503, ErrorCode::HostUnavailable);
    assert_eq!(world.status(running).await, "running", "the client was told that it is not paused");
    refused(world.ask(paused, "resume").await, 503, ErrorCode::HostUnavailable);
    assert_eq!(world.status(paused).await, "paused");
    world.agent.resume().await;
    assert_eq!(world.ask(running, "pause").await.1["status"], "paused");
    assert_eq!(world.ask(paused, "resume").await.1["status"], "running");
}

async fn pauses_are_told(world: World) {
    let id = world.capsule().await;
    let mut listener = Listener::new(&world).await;
    world.ask(id, "pause").await;
    let (changes, paused) = listener.until_asked().await;
    let change = |from: &str, to: &str| (from.to_owned(), to.to_owned());
    assert_eq!(changes, [change("running", "pausing"), change("pausing", "paused")]);
    assert_eq!((paused.event, paused.outcome), (EventName::CapsulePause, Some(Outcome::Success)));
    assert!(paused.metadata.is_empty() && paused.actor.unwrap().kind == ActorKind::ApiKey);
    assert_eq!(paused.sandbox.unwrap().status, api::Status::Paused);
    world.ask(id, "resume").await;
    let (changes, resumed) = listener.until_asked().await;
    assert_eq!((changes[0].0.as_str(), changes.last().unwrap().1.as_str()), ("paused", "running"));
    assert_eq!((resumed.event, resumed.outcome), (EventName::CapsuleResume, Some(Outcome::Success)));
    assert_eq!(resumed.actor.unwrap().kind, ActorKind::ApiKey);
}

async fn what_has_ended_stays(world: World) {
    let id = world.capsule().await;
    let before = *world.agent.pauses().borrow();
    world.delete(&format!("/v1/capsules/{id}")).await;
    for verb in ["pause", "resume"] {
        let message = refused(world.ask(id, verb).await, 409, ErrorCode::InvalidState);
        assert_eq!(message, "the capsule is stopped");
    }
    for path in ["pause", "resume", "fork"] {
        let answer = world.post(&format!("/v1/capsules/{}/{path}", CapsuleId::random()), json!({})).await;
        refused(answer, 404, ErrorCode::NotFound);
    }
    assert_eq!(*world.agent.pauses().borrow(), before, "the host is not asked");
    let lost = world.capsule().await;
    world.agent.lose(lost);
    tokio::time::timeout(PATIENCE, world.until(lost, "missing")).await.unwrap();
    refused(world.ask(lost, "resume").await, 409, ErrorCode::InvalidState);
}
