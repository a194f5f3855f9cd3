//! A control plane that listens, with a fake host and an empty database.

use std::time::Duration;

use api::{CapsuleId, ErrorCode, SafeName};
use control::{Config, Control};
use reqwest::{Method, StatusCode};
use serde_json::Value;
use testkit::{FakeAgent, Postgres};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Which database a test runs on.
#[derive(Debug, Clone, Copy)]
pub enum Store {
    Sqlite,
    Postgres,
}

/// Declares one test per database, of a function that takes a [`World`].
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(crate::world::World::new(crate::world::Store::Sqlite).await).await; })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(crate::world::World::new(crate::world::Store::Postgres).await).await; })*
        }
    };
}
pub(crate) use on_both;

pub struct World {
    pub agent: FakeAgent,
    pub control: Control,
    pub url: String,
    pub key: String,
    pub client: reqwest::Client,
    database_url: String,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
    _dir: Option<tempfile::TempDir>,
}

impl World {
    pub async fn new(store: Store) -> Self {
        match store {
            Store::Sqlite => {
                let dir = tempfile::tempdir().unwrap();
                let world = Self::over(control::sqlite_url(&dir.path().join("control.db"))).await;
                Self { _dir: Some(dir), ..world }
            }
            Store::Postgres => {
                Self::over(tokio::task::spawn_blocking(|| Postgres::shared().database()).await.unwrap()).await
            }
        }
    }

    /// Over a database that is there.
    pub async fn over(database_url: String) -> Self {
        let agent = FakeAgent::start().await;
        let config = Config { database_url: database_url.clone(), agent: agent.endpoint(), version: "test".into() };
        let control = Control::open(config).await.unwrap();
        let team = control.ensure_team(&"first".parse::<SafeName>().unwrap()).await.unwrap();
        let key = control.issue_key(team, "test").await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let served = control.clone();
        let serving = tokio::spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            served.run(listener, shutdown).await.unwrap();
        });
        let client = reqwest::Client::new();
        Self { agent, control, url, key, client, database_url, stop: Some(stop), serving, _dir: None }
    }

    /// Another control plane over the same database and the same host; its URL.
    pub async fn beside(&self) -> String {
        let config =
            Config { database_url: self.database_url.clone(), agent: self.agent.endpoint(), version: "test".into() };
        let control = Control::open(config).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { control.run(listener, std::future::pending()).await });
        url
    }

    /// A key of another team.
    pub async fn stranger(&self) -> String {
        let team = self.control.ensure_team(&"second".parse::<SafeName>().unwrap()).await.unwrap();
        self.control.issue_key(team, "test").await.unwrap()
    }

    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url)).header("x-api-key", &self.key).timeout(PATIENCE)
    }

    /// Sends, and answers the status and the JSON body, `null` when there is none.
    pub async fn send(&self, request: reqwest::RequestBuilder) -> (StatusCode, Value) {
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let body = answer.bytes().await.unwrap();
        (
            status,
            if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).expect("every answer is JSON") },
        )
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.send(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.send(self.request(Method::POST, path).json(&body)).await
    }

    pub async fn delete(&self, path: &str) -> (StatusCode, Value) {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// A capsule that runs.
    pub async fn capsule(&self) -> CapsuleId {
        let (status, body) = self.post("/v1/capsules", serde_json::json!({})).await;
        assert_eq!((status, &body["status"]), (StatusCode::CREATED, &"running".into()), "{body}");
        body["id"].as_str().unwrap().parse().unwrap()
    }

    /// Posts without a body, as the SDK does.
    pub async fn ask(&self, id: CapsuleId, verb: &str) -> (StatusCode, Value) {
        self.send(self.request(Method::POST, &format!("/v1/capsules/{id}/{verb}"))).await
    }

    pub async fn status(&self, id: CapsuleId) -> String {
        let (status, body) = self.get(&format!("/v1/capsules/{id}")).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body["status"].as_str().unwrap().to_owned()
    }

    /// Waits until the capsule has that status.
    pub async fn until(&self, id: CapsuleId, wanted: &str) {
        let reached = async {
            while self.status(id).await != wanted {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("{id} is {} and never became {wanted}", self.status(id).await);
        }
    }

    /// Waits until nothing runs in the capsule.
    pub async fn until_idle(&self, id: CapsuleId) {
        let idle = async {
            while !self.agent.processes(id).await.is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, idle).await.expect("its processes are ended");
    }

    /// Tells the control plane to end, as a signal would.
    pub fn begin_shut_down(&mut self) {
        // It may have ended by itself, which `shut_down` tells.
        let _ = self.stop.take().expect("it is told once").send(());
    }

    /// Waits for the control plane's end.
    pub async fn shut_down(self) {
        self.serving.await.unwrap();
    }
}

/// Asserts an error answer, and gives its message.
#[track_caller]
pub fn refused((status, body): (StatusCode, Value), expected: u16, code: ErrorCode) -> String {
    let body: api::ErrorBody =
        serde_json::from_value(body.clone()).unwrap_or_else(|error| panic!("{status} {body}: {error}"));
    assert_eq!((status.as_u16(), body.error.code), (expected, code), "{}", body.error.message);
    body.error.message
}
