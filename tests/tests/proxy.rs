//! Programs in real capsules under their own hosts: as a plain client, a browser and the command see them.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::Stdio;

use end_to_end::{Browser, Machine, Up};
use futures::{SinkExt, StreamExt};
use reqwest::{Method, StatusCode, redirect};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

const APP: &str = include_str!("../src/app.py");
/// Where the program listens. On the guest's loopback, as programs do that are started without a thought.
const PORT: u16 = 8000;

/// A `wrenn up`, and a capsule in which the program runs.
struct Site {
    up: Up,
    id: String,
    http: reqwest::Client,
}

impl Site {
    async fn start(spec: Value) -> Self {
        let up = Up::start();
        let id = up.create_as(spec).await;
        let start = format!(
            "cat >/srv/app.py <<'END'\n{APP}\nEND\nsetsid python3 /srv/app.py 127.0.0.1 {PORT} >/tmp/log 2>&1 </dev/null & \
             while ! grep -q listening /tmp/log 2>/dev/null; do sleep 0.05; done"
        );
        up.output(&id, &start).await;
        let http = reqwest::Client::builder().redirect(redirect::Policy::none()).no_proxy();
        let http = [PORT, 49983, 9].into_iter().fold(http, |http, port| {
            let name = format!("{port}-{id}.localhost");
            http.resolve(&name, address(&up))
        });
        Self { http: http.build().unwrap(), up, id }
    }

    fn url(&self, port: u16, path: &str) -> String {
        format!("http://{port}-{}.localhost:{}{path}", self.id, address(&self.up).port())
    }

    fn get(&self, path: &str) -> reqwest::RequestBuilder {
        self.http.get(self.url(PORT, path))
    }

    async fn text(&self, path: &str) -> String {
        let answer = self.get(path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        answer.text().await.unwrap()
    }

    async fn socket(&self) -> WebSocketStream<TcpStream> {
        let stream = TcpStream::connect(address(&self.up)).await.unwrap();
        let request = self.url(PORT, "/ws").replace("http", "ws").into_client_request().unwrap();
        tokio_tungstenite::client_async(request, stream).await.unwrap().0
    }
}

fn address(up: &Up) -> SocketAddr {
    up.url().strip_prefix("http://").unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_program_in_a_capsule_is_a_site_of_its_own() {
    let before = Machine::now();
    let mut site = Site::start(json!({})).await;

    // Directories redirect to themselves with a slash, and lead nowhere else.
    let answer = site.get("/dir").send().await.unwrap();
    assert_eq!(
        (answer.status(), &answer.headers()["location"]),
        (StatusCode::MOVED_PERMANENTLY, &"/dir/".parse().unwrap())
    );
    assert_eq!(site.text("/dir/").await, "index");
    let head = site.http.head(site.url(PORT, "/dir/")).send().await.unwrap();
    assert_eq!(head.headers()["content-length"], "5");
    assert_eq!(site.get("/none").send().await.unwrap().status(), StatusCode::NOT_FOUND);

    // What the program sees.
    let key = site.up.api_key().to_owned();
    let seen =
        site.get("/head").header("X-API-Key", &key).bearer_auth(&key).send().await.unwrap().text().await.unwrap();
    assert!(!seen.contains(&key) && seen.contains("x-forwarded-proto: http"), "{seen}");
    assert!(seen.contains(&format!("host: {PORT}-{}.localhost", site.id)), "{seen}");

    // Sockets, and events that come as they are made.
    let mut socket = site.socket().await;
    for text in ["one", "two"] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(text));
    }
    drop(socket);
    let mut events = site.get("/events").send().await.unwrap();
    assert!(events.chunk().await.unwrap().unwrap().starts_with(b"data: 0\n\n"));
    drop(events);
    // The program learns that its reader has left.
    site.up.output(&site.id, "while ! [ -e /tmp/left ]; do sleep 0.05; done").await;

    // Bodies of any size, both ways.
    let body: Vec<u8> = (0..32u32 << 20).map(|index| (index / 7) as u8).collect();
    let sum = hex::encode(Sha256::digest(&body));
    let answer = site.http.post(site.url(PORT, "/sum")).body(body).send().await.unwrap();
    assert_eq!(answer.text().await.unwrap(), sum);
    let mut answer = site.get("/big?32").send().await.unwrap();
    let mut length = 0;
    while let Some(chunk) = answer.chunk().await.unwrap() {
        length += chunk.len();
    }
    assert_eq!(length, 32 << 20);

    // A port on which nobody listens.
    let answer = site.http.get(site.url(9, "/")).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "port_closed");

    // Envd answers to those who have its token, and steers for nobody out here.
    for (method, path, status) in [
        (Method::GET, "/health", 200),
        (Method::GET, "/envs", 401),
        (Method::POST, "/process.Process/List", 401),
        (Method::POST, "/init", 404),
        (Method::POST, "//init", 404),
        (Method::POST, "/%69nit", 404),
        (Method::POST, "/freeze", 404),
    ] {
        let answer = site.http.request(method, site.url(49983, path)).send().await.unwrap();
        assert_eq!(answer.status(), status, "{path}");
    }

    site.up.destroy(&site.id).await;
    let gone = site.get("/").send().await.unwrap();
    assert_eq!(gone.status(), StatusCode::BAD_GATEWAY);
    assert!(site.up.stop());
    before.is_back().await;
}

#[tokio::test]
async fn a_pause_cuts_what_is_open_and_a_visit_wakes() {
    let site = Site::start(json!({"auto_resume": true})).await;
    assert_eq!(site.text("/dir/").await, "index");
    let mut socket = site.socket().await;
    let mut events = site.get("/events").send().await.unwrap();
    events.chunk().await.unwrap().unwrap();
    let pause = format!("/v1/capsules/{}/pause", site.id);
    let (status, capsule) = site.up.call(Method::POST, &pause, None).await;
    assert_eq!(status, StatusCode::OK, "{capsule}");
    site.up.until(&site.id, "paused").await;
    assert!(!matches!(socket.next().await, Some(Ok(_))));
    while let Ok(Some(_)) = events.chunk().await {}
    // The same process, where it was. A visitor whom it takes too long is asked to come again.
    while site.get("/dir/").send().await.unwrap().status() == StatusCode::SERVICE_UNAVAILABLE {}
    assert_eq!(site.text("/dir/").await, "index");
    let (_, capsule) = site.up.call(Method::GET, &format!("/v1/capsules/{}", site.id), None).await;
    assert_eq!(capsule["status"], "running");
    let mut socket = site.socket().await;
    socket.send(Message::text("again")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("again"));
}

#[tokio::test]
async fn the_command_leads_to_any_port() {
    let site = Site::start(json!({})).await;
    let url = site.up.wrenn().args(["capsule", "url", &site.id, "8000"]).output().unwrap();
    assert_eq!(String::from_utf8(url.stdout).unwrap().trim(), site.url(PORT, ""));
    let mut forward = site.up.wrenn();
    forward.args(["capsule", "port-forward", &site.id, "0:8000", "0:9"]).stdout(Stdio::piped());
    let mut forward = forward.spawn().unwrap();
    let mut lines = BufReader::new(forward.stdout.take().unwrap()).lines();
    let mut here = || lines.next().unwrap().unwrap().split(' ').next().unwrap().to_owned();
    let (open, closed) = (here(), here());
    assert_eq!(reqwest::get(format!("http://{open}/dir/")).await.unwrap().text().await.unwrap(), "index");
    assert!(reqwest::get(format!("http://{closed}/")).await.is_err());
    forward.kill().unwrap();
    forward.wait().unwrap();
}

#[tokio::test]
async fn a_browser_has_nothing_to_complain_about() {
    let site = Site::start(json!({})).await;
    let mut browser = Browser::start().await;
    browser.open(&site.url(PORT, "/")).await;
    assert_eq!(browser.until("window.report").await, "/ index socket 012");
    assert_eq!(browser.redirects, [(site.url(PORT, "/dir"), site.url(PORT, "/dir/"))]);
    assert_eq!(browser.complaints, [""; 0]);
}
