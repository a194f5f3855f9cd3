//! The command as people and scripts meet it: words in, bytes and exit codes out.
//!
//! The server is a stand-in with the public types; the whole, with a real one, is tested end to end in `tests/`.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use api::{Capsule, CapsuleId, Encoding, ErrorBody, ErrorCode, ErrorDetail, ExecResult, ExecStarted, Status};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, delete, get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

const ID: &str = "cl-0000000000000000000000001";
const KEY: &str = "wrn_0123456789abcdef0123456789abcdef";

fn wrenn() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
    command.env_remove("WRENN_BASE_URL").env_remove("WRENN_API_KEY").env("XDG_STATE_HOME", "/nowhere");
    command
}

fn run(arguments: &[&str]) -> Output {
    wrenn().args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn doctor_tells_what_is_stored_and_fails_for_what_should_not_be() {
    let dir = tempfile::tempdir().unwrap();
    let told = |path: &Path| run(&["doctor", "--storage", "--json", "--dir", path.to_str().unwrap()]);
    let lost = told(&dir.path().join("none"));
    assert_eq!((lost.status.code(), text(&lost.stdout)), (Some(1), ""));
    assert!(text(&lost.stderr).contains("none"));

    for name in ["generations", "capsules", "templates"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    for name in ["lock", "wrenn.db", "generations/0123456789abcdef0123456789abcdef"] {
        std::fs::write(dir.path().join(name), "x").unwrap();
    }
    let clean = told(dir.path());
    let report: Value = serde_json::from_slice(&clean.stdout).unwrap();
    assert_eq!((clean.status.code(), &report["clean"]), (Some(0), &json!(true)));
    assert_eq!(report["findings"][0]["verdict"], "garbage");
    assert_eq!(report["used"]["other"]["count"], 2);
    assert!(dir.path().join("generations/0123456789abcdef0123456789abcdef").exists());

    // Also while it is in use.
    let lock = std::fs::File::open(dir.path().join("lock")).unwrap();
    lock.try_lock().unwrap();
    let foreign = dir.path().join("templates/mine");
    std::fs::write(&foreign, "").unwrap();
    let bad = told(dir.path());
    let report: Value = serde_json::from_slice(&bad.stdout).unwrap();
    assert_eq!((bad.status.code(), &report["clean"]), (Some(1), &json!(false)));
    let findings = report["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["verdict"] == "foreign").unwrap();
    assert_eq!(found["path"], foreign.canonicalize().unwrap().to_str().unwrap());
    let plain = run(&["doctor", "--storage", "--dir", dir.path().to_str().unwrap()]);
    assert!(text(&plain.stdout).contains(foreign.to_str().unwrap()) && text(&plain.stdout).contains("garbage"));
}

#[test]
fn doctor_tells_what_the_object_store_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let (data, store) = (dir.path().join("data"), dir.path().join("store"));
    std::fs::create_dir_all(&data).unwrap();
    std::fs::create_dir_all(&store).unwrap();
    let config = objects::Config::parse(&format!("file://{}", store.display()), []).unwrap();
    let told = || {
        let url = format!("file://{}", store.display());
        let output = run(&["doctor", "--storage", "--json", "--dir", data.to_str().unwrap(), "--objects", &url]);
        (output.status.code(), serde_json::from_slice::<Value>(&output.stdout).unwrap()["objects"].clone())
    };
    let state = dir.path().join("state");
    std::fs::write(&state, b"what the VMM knew").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let file = std::fs::File::open(&state).unwrap();
        let source = objects::Source { name: "state".into(), file, base: None, is_named_by_content: false };
        let objects = objects::Objects::open(&config).unwrap();
        objects.upload("capsules/a", Vec::new(), vec![source]).await.unwrap();
    });
    let (code, report) = told();
    assert_eq!((code, &report["uploads"], &report["used"]["objects"]), (Some(0), &json!(1), &json!(1)));
    assert_eq!((&report["garbage"]["objects"], &report["wrong"]), (&json!(0), &json!({})));

    let manifest = std::fs::read(store.join("manifests/capsules/a")).unwrap();
    let lost = objects::Manifest::decode(&manifest).unwrap().stored().next().unwrap().to_string();
    std::fs::remove_file(store.join("chunks").join(&lost[..2]).join(&lost)).unwrap();
    let (code, report) = told();
    assert_eq!((code, &report["wrong"]), (Some(1), &json!({ lost: "lost; capsules/a needs it" })));
}

#[test]
fn doctor_reports_on_this_machine() {
    let output = run(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let named = |name: &str| checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}"));
    for name in [
        "kvm",
        "firecracker",
        "firecracker-qemu",
        "qemu",
        "vmm",
        "privileges",
        "kernel",
        "cgroup",
        "nf_tables",
        "tun",
        "loop",
        "userfaultfd",
        "memory",
        "users",
        "jail",
        "reflink",
        "xfs",
        "disk",
    ] {
        let check = named(name);
        assert!(!check["found"].as_str().unwrap().is_empty());
        assert_eq!(check["verdict"] == "ok", check["remedy"].is_null(), "{check}");
    }
    let failed = checks.iter().any(|check| check["verdict"] == "fail");
    assert_eq!(report["ready"], !failed);
    assert_eq!(output.status.code(), Some(failed.into()));
    assert_eq!(report["vmm"].is_null(), named("vmm")["verdict"] == "fail");
    assert_eq!(named("kvm")["verdict"] == "ok", vmm::kvm::probe(Path::new("/dev/kvm")) == vmm::kvm::Kvm::Usable);
    // Tests run as root, on a machine that the project's other tests make networks on.
    for name in ["privileges", "kernel", "nf_tables", "tun", "users", "jail"] {
        assert_eq!(named(name)["verdict"], "ok", "{}", named(name));
    }

    let plain = run(&["doctor"]);
    assert!(!plain.stdout.contains(&0x1b), "colours without a terminal");
    assert!(plain.stderr.is_empty(), "{}", text(&plain.stderr));
    for check in checks {
        assert!(text(&plain.stdout).contains(check["name"].as_str().unwrap()));
    }
}

#[test]
fn completions_and_version() {
    assert_eq!(text(&run(&["--version"]).stdout), format!("wrenn {}\n", env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert!(output.status.success());
        for word in ["capsule", "doctor", "exec", "completions"] {
            assert!(text(&output.stdout).contains(word), "{shell}: {word}");
        }
    }
    let script = run(&["completions", "bash"]).stdout;
    let complete = format!(
        "{}\nCOMP_WORDS=(wrenn cap); COMP_CWORD=1; _wrenn wrenn cap wrenn; echo ${{COMPREPLY[0]}}",
        text(&script)
    );
    let reply = Command::new("bash").args(["-c", &complete]).output().unwrap();
    assert_eq!(text(&reply.stdout), "capsule\n", "{}", text(&reply.stderr));
    assert_eq!(run(&["completions", "cmd"]).status.code(), Some(2));
}

#[test]
fn without_a_server_it_says_what_to_do() {
    let output = run(&["capsule", "list"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("sudo wrenn up"), "{}", text(&output.stderr));
    let output = run(&["capsule", "exec", ID, "true"]);
    assert_eq!(output.status.code(), Some(125));
    // Nobody listens on port 1.
    let output = run(&["capsule", "list", "--url", "http://127.0.0.1:1", "--api-key", KEY]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot reach http://127.0.0.1:1"), "{}", text(&output.stderr));
}

/// The requests it got: method and path, and the body where there was one.
type Seen = Arc<Mutex<Vec<(String, Value)>>>;

/// A server with one capsule, whose second look finds it running.
struct Server {
    runtime: tokio::runtime::Runtime,
    url: String,
    seen: Seen,
    home: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let seen = Seen::default();
        let routes = Router::new()
            .route("/v1/capsules", post(create).get(list))
            .route("/v1/capsules/{id}", get(look).delete(remove))
            .route("/v1/capsules/{id}/exec", post(exec))
            .route("/v1/capsules/{id}/exec/stream", any(exec_stream))
            .route("/v1/capsules/{id}/processes", get(processes))
            .route("/v1/capsules/{id}/processes/{process}", delete(kill))
            .route("/v1/capsules/{id}/processes/{process}/stream", any(process_stream))
            .route("/v1/capsules/{id}/{verb}", post(move_on))
            .route("/v1/snapshots", post(snapshot).get(templates))
            .route("/v1/snapshots/{name}", delete(forget))
            .with_state(seen.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, routes).await });
        let home = tempfile::tempdir().unwrap();
        // Found as `wrenn up` leaves it.
        std::fs::create_dir(home.path().join("wrenn")).unwrap();
        let note = json!({"url": url, "api_key": KEY, "dir": "/data"}).to_string();
        std::fs::write(home.path().join("wrenn/current.json"), note).unwrap();
        Self { runtime, url, seen, home }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        wrenn().env("XDG_STATE_HOME", self.home.path()).arg("capsule").args(arguments).output().unwrap()
    }

    fn seen(&self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    fn end(self) {
        self.runtime.shutdown_background();
    }
}

fn capsule(status: Status) -> Json<Capsule> {
    Json(Capsule {
        id: ID.parse().unwrap(),
        status,
        template: "minimal".to_owned(),
        vcpus: 1,
        memory_mb: 512,
        disk_size_mb: 5120,
        timeout_sec: 0,
        created_at: Default::default(),
        started_at: None,
        last_active_at: None,
        last_updated: Default::default(),
        auto_resume: false,
        allow_public_traffic: true,
        network: Default::default(),
        traffic_access_token: None,
        metadata: Default::default(),
        reason: None,
    })
}

fn refuse(status: StatusCode, code: ErrorCode, message: &str) -> Response {
    (status, Json(ErrorBody { error: ErrorDetail { code, message: message.to_owned() } })).into_response()
}

async fn create(State(seen): State<Seen>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    if headers.get("x-api-key").is_none_or(|key| key != KEY) {
        return refuse(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, "the API key is unknown");
    }
    seen.lock().unwrap().push(("create".to_owned(), body));
    (StatusCode::CREATED, capsule(Status::Starting)).into_response()
}

async fn list() -> Json<[Capsule; 1]> {
    Json([capsule(Status::Running).0])
}

async fn look(State(seen): State<Seen>, UrlPath(_): UrlPath<CapsuleId>) -> Json<Capsule> {
    let mut seen = seen.lock().unwrap();
    let status = if seen.iter().any(|(request, _)| request == "look") { Status::Running } else { Status::Starting };
    seen.push(("look".to_owned(), Value::Null));
    capsule(status)
}

async fn remove(State(seen): State<Seen>, UrlPath(id): UrlPath<CapsuleId>) -> Response {
    seen.lock().unwrap().push(("remove".to_owned(), Value::Null));
    if id.to_string() == ID {
        return StatusCode::NO_CONTENT.into_response();
    }
    refuse(StatusCode::NOT_FOUND, ErrorCode::NotFound, "there is no such capsule")
}

/// On the way at first, there at the second look.
async fn move_on(
    State(seen): State<Seen>,
    UrlPath((_, verb)): UrlPath<(CapsuleId, String)>,
    body: axum::body::Bytes,
) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    seen.lock().unwrap().push((verb.clone(), body.clone()));
    match verb.as_str() {
        "pause" => capsule(Status::Paused).into_response(),
        "resume" => capsule(Status::Resuming).into_response(),
        _ => {
            let forks = vec![capsule(Status::Running).0; body["count"].as_u64().unwrap() as usize];
            (StatusCode::CREATED, Json(json!({"capsules": forks}))).into_response()
        }
    }
}

fn template(name: &str) -> Value {
    json!({"name": name, "type": "snapshot", "vcpus": 1, "memory_mb": 512, "disk_size_mb": 5120, "size_bytes": 1,
        "created_at": "2026-11-22T00:00:00Z", "platform": false, "protected": false, "metadata": {}})
}

async fn snapshot(State(seen): State<Seen>, uri: Uri, Json(body): Json<Value>) -> Response {
    seen.lock().unwrap().push((format!("snapshot {}", uri.query().unwrap_or_default()), body.clone()));
    (StatusCode::CREATED, Json(template(body["name"].as_str().unwrap_or("template-1")))).into_response()
}

async fn templates() -> Json<Value> {
    Json(json!([template("mine"), template("yours")]))
}

async fn forget(State(seen): State<Seen>, UrlPath(name): UrlPath<String>) -> Response {
    seen.lock().unwrap().push((format!("forget {name}"), Value::Null));
    match name.as_str() {
        "minimal" => refuse(StatusCode::FORBIDDEN, ErrorCode::Forbidden, "it is the platform's"),
        _ => StatusCode::NO_CONTENT.into_response(),
    }
}

async fn exec(State(seen): State<Seen>, UrlPath(id): UrlPath<CapsuleId>, Json(body): Json<Value>) -> Response {
    seen.lock().unwrap().push(("exec".to_owned(), body.clone()));
    let cmd = body["cmd"].as_str().unwrap().to_owned();
    if body["background"] == true {
        return Json(ExecStarted { sandbox_id: id, cmd, pid: 71, tag: "proc-1".to_owned() }).into_response();
    }
    let result = |stdout: &str, stderr: &str, exit_code, encoding| ExecResult {
        sandbox_id: id,
        cmd: cmd.clone(),
        stdout: stdout.to_owned(),
        stderr: stderr.to_owned(),
        exit_code,
        duration_ms: 1,
        encoding,
    };
    match cmd.as_str() {
        "text" => Json(result("hällo\n", "oops", 3, Encoding::Utf8)).into_response(),
        _ => (StatusCode::BAD_GATEWAY, "<html>not ours</html>").into_response(),
    }
}

async fn exec_stream(State(seen): State<Seen>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async move |mut socket: WebSocket| {
        let Some(Ok(Message::Text(first))) = socket.recv().await else { return };
        let first: Value = serde_json::from_str(&first).unwrap();
        seen.lock().unwrap().push(("start".to_owned(), first.clone()));
        say(&mut socket, json!({"type": "start", "pid": 71})).await;
        match first["cmd"].as_str().unwrap() {
            "text" => {
                say(&mut socket, json!({"type": "stdout", "data": BASE64_STANDARD.encode("hällo\n")})).await;
                say(&mut socket, json!({"type": "stderr", "data": BASE64_STANDARD.encode("oops")})).await;
                say(&mut socket, json!({"type": "exit", "exit_code": 3})).await;
            }
            "bytes" => {
                say(&mut socket, json!({"type": "stdout", "data": BASE64_STANDARD.encode([0xff, 0, b'\n'])})).await;
                say(&mut socket, json!({"type": "exit", "exit_code": 0})).await;
            }
            "cat" => {
                while let Some(Ok(message)) = socket.recv().await {
                    match message {
                        Message::Binary(bytes) => {
                            say(&mut socket, json!({"type": "stdout", "data": BASE64_STANDARD.encode(bytes)})).await
                        }
                        Message::Text(text) if text.contains("eof") => break,
                        _ => {}
                    }
                }
                say(&mut socket, json!({"type": "exit", "exit_code": 0})).await;
            }
            "killed" => say(&mut socket, json!({"type": "exit", "exit_code": -1})).await,
            "slow" => {
                let data = "the command ran longer than 30 seconds";
                say(&mut socket, json!({"type": "error", "code": "timeout", "data": data, "fatal": true})).await;
            }
            "endless" => while socket.recv().await.is_some() {},
            // The connection breaks.
            _ => {}
        }
    })
}

async fn process_stream(UrlPath((_, process)): UrlPath<(CapsuleId, String)>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async move |mut socket: WebSocket| {
        say(&mut socket, json!({"type": "start", "pid": 71})).await;
        say(&mut socket, json!({"type": "stdout", "data": BASE64_STANDARD.encode(process.as_str())})).await;
        if process == "done" {
            say(&mut socket, json!({"type": "exit", "exit_code": 4})).await;
        }
        while socket.recv().await.is_some() {}
    })
}

async fn say(socket: &mut WebSocket, message: Value) {
    socket.send(Message::Text(message.to_string().into())).await.unwrap();
}

async fn processes() -> Json<Value> {
    let words = json!(["-c", "sleep 9; echo it's"]);
    Json(
        json!({"processes": [{"pid": 71, "tag": "build", "cmd": "sh", "args": words}, {"pid": 8, "cmd": "top", "args": []}]}),
    )
}

async fn kill(State(seen): State<Seen>, UrlPath((_, process)): UrlPath<(CapsuleId, String)>, uri: Uri) -> Response {
    seen.lock().unwrap().push((format!("kill {process} {}", uri.query().unwrap_or_default()), Value::Null));
    match process.as_str() {
        "nobody" => refuse(StatusCode::NOT_FOUND, ErrorCode::NotFound, "there is no such process"),
        _ => StatusCode::NO_CONTENT.into_response(),
    }
}

#[test]
fn create_waits_until_it_runs_and_prints_the_id() {
    let server = Server::start();
    let output = server.run(&["create", "--template", "minimal", "--memory", "1024", "--label", "a=b"]);
    assert_eq!((text(&output.stdout), text(&output.stderr)), (format!("{ID}\n").as_str(), ""));
    let seen = server.seen();
    assert_eq!(
        seen[0].1,
        json!({"template": "minimal", "vcpus": null, "memory_mb": 1024, "disk_size_mb": null,
        "timeout_sec": null, "metadata": {"a": "b"}, "auto_resume": null, "allow_internet_access": null, "network": null})
    );
    assert_eq!(seen[1..].iter().map(|(request, _)| request.as_str()).collect::<Vec<_>>(), ["look", "look"]);

    let output = server.run(&["create", "--no-wait", "--json"]);
    let created: Capsule = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(created.status, Status::Starting);
    assert_eq!(server.seen().len(), 1);

    let output = server.run(&["create", "--api-key", "wrn_wrong"]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), "error: the API key is unknown\n"));
    // A key for here is not sent elsewhere, even if elsewhere is only another name for here.
    let elsewhere = server.url.replace("127.0.0.1", "localhost");
    let output = server.run(&["create", "--url", &elsewhere]);
    assert!(text(&output.stderr).contains("no API key"), "{}", text(&output.stderr));
    server.end();
}

#[test]
fn exec_passes_bytes_and_codes_through() {
    let server = Server::start();
    let output =
        server.run(&["exec", ID, "--env", "A=1", "--cwd", "/tmp", "--timeout", "7", "--", "text", "-x", "y z"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("hällo\n", "oops"));
    let body = &server.seen()[0].1;
    assert_eq!((&body["cmd"], &body["args"]), (&json!("text"), &json!(["-x", "y z"])));
    assert_eq!((&body["envs"], &body["cwd"], &body["timeout_sec"]), (&json!({"A": "1"}), &json!("/tmp"), &json!(7)));
    assert_eq!((&body["encoding"], &body["stdin"]), (&json!("base64"), &json!(false)));

    assert_eq!(server.run(&["exec", ID, "bytes"]).stdout, [0xff, 0, b'\n']);
    assert_eq!(server.run(&["exec", ID, "killed"]).status.code(), Some(255));
    let late = server.run(&["exec", ID, "slow"]);
    assert_eq!(
        (late.status.code(), text(&late.stderr)),
        (Some(124), "error: the command ran longer than 30 seconds\n")
    );
    let broken = server.run(&["exec", ID, "else"]);
    assert_eq!(broken.status.code(), Some(125));
    assert!(text(&broken.stderr).contains(&format!("logs -f {ID} 71")), "{}", text(&broken.stderr));

    let output = server.run(&["exec", "--background", ID, "sleep", "9"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "71\n"));
    let output = server.run(&["exec", "--json", ID, "text"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(serde_json::from_slice::<ExecResult>(&output.stdout).unwrap().stdout, "hällo\n");
    let foreign = server.run(&["exec", "--json", ID, "else"]);
    assert_eq!(foreign.status.code(), Some(125));
    assert!(text(&foreign.stderr).contains("502 Bad Gateway"), "{}", text(&foreign.stderr));
    server.end();
}

#[test]
fn capsules_sleep_wake_and_multiply() {
    let server = Server::start();
    let output = server.run(&["pause", ID]);
    assert_eq!((text(&output.stdout), text(&output.stderr)), (format!("{ID}\n").as_str(), ""));
    server.seen();
    // The first look at it finds it starting: it is not on its way any more.
    let output = server.run(&["resume", ID]);
    assert_eq!(text(&output.stderr), format!("error: cannot resume {ID}: it is starting\n"));
    let output = server.run(&["resume", ID, "--json"]);
    assert_eq!(serde_json::from_slice::<Vec<Capsule>>(&output.stdout).unwrap()[0].status, Status::Running);
    server.seen();

    let output = server.run(&["fork", ID, "--count", "3", "--label", "a=b"]);
    assert_eq!(text(&output.stdout), format!("{ID}\n").repeat(3));
    assert_eq!(server.seen(), [("fork".to_owned(), json!({"count": 3, "metadata": {"a": "b"}}))]);
    let output = server.run(&["fork", ID, "--json"]);
    assert_eq!(serde_json::from_slice::<Vec<Capsule>>(&output.stdout).unwrap().len(), 1);
    server.end();
}

#[test]
fn templates_are_made_listed_and_removed() {
    let server = Server::start();
    let top = |arguments: &[&str]| wrenn().env("XDG_STATE_HOME", server.home.path()).args(arguments).output().unwrap();
    assert_eq!(text(&server.run(&["snapshot", ID]).stdout), "template-1\n");
    assert_eq!(text(&server.run(&["snapshot", ID, "--name", "mine", "--overwrite"]).stdout), "mine\n");
    assert_eq!(server.run(&["snapshot", ID, "--overwrite"]).status.code(), Some(2), "of what?");
    assert_eq!(
        server.seen(),
        [
            ("snapshot ".to_owned(), json!({"sandbox_id": ID, "name": null})),
            ("snapshot overwrite=true".to_owned(), json!({"sandbox_id": ID, "name": "mine"})),
        ]
    );
    assert_eq!(text(&top(&["template", "list", "-q"]).stdout), "mine\nyours\n");
    let table = top(&["template", "ls"]);
    assert!(
        text(&table.stdout).lines().nth(1).unwrap().starts_with("mine   snapshot      1    512 MiB   5120 MiB  2026")
    );
    let listed: Vec<api::Template> = serde_json::from_slice(&top(&["template", "list", "--json"]).stdout).unwrap();
    assert_eq!(listed.len(), 2);
    let output = top(&["template", "rm", "a/b", "minimal", "mine"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), "a/b\nmine\n"));
    assert_eq!(text(&output.stderr), "error: cannot remove minimal: it is the platform's\n");
    assert_eq!(server.seen()[0].0, "forget a/b");
    server.end();
}

#[test]
fn exec_passes_input_on_to_its_end() {
    let server = Server::start();
    let mut command = wrenn();
    command.env("XDG_STATE_HOME", server.home.path()).args(["capsule", "exec", "-i", ID, "cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a\0\xff").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"a\0\xff");
    assert_eq!(server.seen()[0].1["stdin"], true);
    server.end();
}

#[test]
fn an_interrupted_exec_ends_its_command() {
    let server = Server::start();
    let mut command = wrenn();
    command.env("XDG_STATE_HOME", server.home.path()).args(["capsule", "exec", ID, "endless"]);
    let mut child = command.spawn().unwrap();
    while server.seen.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    // It may be on its way to learning the process's number; another signal comes until it has.
    let status = loop {
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::yield_now();
    };
    assert_eq!(status.code(), Some(130));
    let seen = server.seen();
    assert!(seen.len() == 1 || seen[1].0 == "kill 71 signal=SIGTERM", "{seen:?}");
    server.end();
}

#[test]
fn processes_are_listed_ended_and_followed() {
    let server = Server::start();
    let table = server.run(&["ps", ID]);
    let lines: Vec<_> = text(&table.stdout).lines().collect();
    assert_eq!(lines[1..], ["     71  build  sh -c 'sleep 9; echo it'\\''s'", "      8  -      top"]);
    assert_eq!(text(&server.run(&["ps", "-q", ID]).stdout), "71\n8\n");

    assert!(server.run(&["kill", ID, "71", "a/b c", "--signal", "SIGTERM"]).status.success());
    let seen = server.seen();
    assert_eq!(seen[0].0, "kill 71 signal=SIGTERM");
    assert_eq!(seen[1].0, "kill a/b c signal=SIGTERM");
    let output = server.run(&["kill", ID, "nobody"]);
    assert_eq!(
        (output.status.code(), text(&output.stderr)),
        (Some(1), "error: cannot end nobody: there is no such process\n")
    );

    let output = server.run(&["logs", "-f", ID, "done"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(4), "done"));
    let output = server.run(&["logs", ID, "on"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "on"));
    server.end();
}

#[test]
fn list_and_rm() {
    let server = Server::start();
    assert_eq!(text(&server.run(&["ls", "--quiet"]).stdout), format!("{ID}\n"));
    let table = server.run(&["list"]);
    let lines: Vec<_> = text(&table.stdout).lines().collect();
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>()[..4], [ID, "running", "minimal", "1"]);
    let json: Vec<Capsule> = serde_json::from_slice(&server.run(&["list", "--json"]).stdout).unwrap();
    assert_eq!(json.len(), 1);

    assert_eq!(text(&server.run(&["rm", ID]).stdout), format!("{ID}\n"));
    let other = "cl-0000000000000000000000002";
    let output = server.run(&["rm", other, ID]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), format!("{ID}\n").as_str()));
    assert_eq!(text(&output.stderr), format!("error: cannot remove {other}: there is no such capsule\n"));
    server.end();
}
