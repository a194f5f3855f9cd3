//! What happens, as it is told.

use agent_api::CapsuleState;
use api::{ActorKind, Event, EventName, event::Outcome};
use axum::http::header::CONTENT_TYPE;
use connectrpc::ErrorCode as AgentCode;

use reqwest::StatusCode;
use serde_json::json;
use tokio::time::timeout;

use crate::world::{PATIENCE, World, on_both};

on_both![a_life_is_told, failures_are_told, others_are_not_told, a_stream_ends_with_the_control_plane];

pub struct Listener {
    answer: reqwest::Response,
    text: String,
}

impl Listener {
    pub async fn new(world: &World) -> Self {
        let request = world.client.get(format!("{}/v1/events/stream", world.url)).header("x-api-key", &world.key);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()[CONTENT_TYPE.as_str()], "text/event-stream");
        let mut listener = Self { answer, text: String::new() };
        assert_eq!(listener.next().await.unwrap().event, EventName::Connected);
        listener
    }

    /// The next event; `None` at the stream's end.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((frame, rest)) = self.text.split_once("\n\n") {
                let lines: Vec<_> = frame.lines().map(|line| line.split_once(':').unwrap()).collect();
                let event = match lines.as_slice() {
                    [("event", name), ("data", data)] => {
                        assert!(data.is_ascii(), "{data}");
                        let event: Event = serde_json::from_str(data).unwrap();
                        assert_eq!(name.trim(), event.event.as_str());
                        Some(event)
                    }
                    [("", _)] => None,
                    other => panic!("{other:?}"),
                };
                self.text = rest.to_owned();
                if event.is_some() {
                    return event;
                }
                continue;
            }
            let chunk = timeout(PATIENCE, self.answer.chunk()).await.expect("something happens").unwrap()?;
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// The events up to and with the next that was asked for.
    pub async fn until_asked(&mut self) -> (Vec<(String, String)>, Event) {
        let mut changes = Vec::new();
        loop {
            let event = self.next().await.unwrap();
            if event.event != EventName::CapsuleStateChanged {
                return (changes, event);
            }
            assert!(event.outcome.is_none() && event.actor.unwrap().kind == ActorKind::System);
            changes.push((event.metadata["from"].clone(), event.metadata["to"].clone()));
        }
    }
}

async fn a_life_is_told(world: World) {
    let mut listener = Listener::new(&world).await;
    let body = json!({ "metadata": { "owner": "zoë\u{2028}" } });
    let capsule = world.post("/v1/capsules", body).await.1;
    let (changes, created) = listener.until_asked().await;
    assert_eq!(changes.last().unwrap().1, "running");
    assert_eq!(changes[0].0, "pending");
    assert_eq!((created.event, created.outcome), (EventName::CapsuleCreate, Some(Outcome::Success)));
    let actor = created.actor.unwrap();
    assert_eq!((actor.kind, actor.name.as_deref()), (ActorKind::ApiKey, Some("test")));
    assert!(actor.id.unwrap().starts_with("key-"));
    let resource = created.resource.unwrap();
    assert_eq!((resource.id.as_str(), resource.kind.as_str()), (capsule["id"].as_str().unwrap(), "capsule"));
    assert_eq!(serde_json::to_value(created.sandbox.unwrap()).unwrap()["metadata"], capsule["metadata"]);

    world.delete(&format!("/v1/capsules/{}", capsule["id"].as_str().unwrap())).await;
    let (changes, destroyed) = listener.until_asked().await;
    let change = |from: &str, to: &str| (from.to_owned(), to.to_owned());
    assert_eq!(changes, [change("running", "stopping"), change("stopping", "stopped")]);
    assert_eq!((destroyed.event, destroyed.outcome), (EventName::CapsuleDestroy, Some(Outcome::Success)));
    assert_eq!(destroyed.actor.unwrap().kind, ActorKind::ApiKey);
    assert_eq!(destroyed.sandbox.unwrap().status, api::Status::Stopped);
}

async fn failures_are_told(world: World) {
    let mut listener = Listener::new(&world).await;
    world.agent.fail_creates(Some(AgentCode::Internal));
    world.post("/v1/capsules", json!({})).await;
    let (changes, failed) = listener.until_asked().await;
    assert_eq!(changes, [("pending".to_owned(), "error".to_owned())]);
    assert_eq!((failed.event, failed.outcome), (EventName::CapsuleCreate, Some(Outcome::Error)));
    assert!(failed.error.unwrap().contains("told to fail") && failed.metadata["reason"].contains("told to fail"));
    world.agent.fail_creates(None);
    // What ends by itself was not asked for.
    let id = world.capsule().await;
    assert_eq!(listener.until_asked().await.1.outcome, Some(Outcome::Success));
    world.agent.end(id, CapsuleState::CAPSULE_STATE_STOPPED, "the guest powered off");
    let event = listener.next().await.unwrap();
    assert_eq!(event.event, EventName::CapsuleStateChanged);
    assert_eq!(
        (event.metadata["to"].as_str(), event.metadata["reason"].as_str()),
        ("stopped", "the guest powered off")
    );
}

async fn others_are_not_told(mut world: World) {
    let mut ours = Listener::new(&world).await;
    let stranger = world.stranger().await;
    let key = std::mem::replace(&mut world.key, stranger);
    let mut theirs = Listener::new(&world).await;
    let id = world.capsule().await;
    assert_eq!(theirs.until_asked().await.1.resource.unwrap().id, id.to_string());
    world.key = key;
    let id = world.capsule().await;
    assert_eq!(ours.until_asked().await.1.resource.unwrap().id, id.to_string());
}

async fn a_stream_ends_with_the_control_plane(mut world: World) {
    let mut listener = Listener::new(&world).await;
    world.begin_shut_down();
    assert!(listener.next().await.is_none());
    world.shut_down().await;
}
