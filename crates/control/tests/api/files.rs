//! Files: what goes in comes out, and what does not go in leaves nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use api::{CapsuleId, ErrorCode};
use futures::StreamExt;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::world::{PATIENCE, World, on_both, refused};

on_both![
    what_is_written_is_read,
    the_wire_of_the_sdk,
    directories_are_listed_made_and_removed,
    every_entry_is_of_a_kind_clients_know,
    what_is_too_large_is_refused_and_leaves_nothing,
    what_is_not_a_form_is_refused,
    a_client_that_breaks_off_leaves_nothing,
    a_full_disk_is_told,
    large_files_pass_without_being_held,
    what_a_capsule_uses,
];

/// A capsule whose files are those of this machine: tests stay in a directory of their own.
struct Files<'a> {
    world: &'a World,
    id: CapsuleId,
    dir: tempfile::TempDir,
}

impl<'a> Files<'a> {
    async fn new(world: &'a World) -> Self {
        Self { world, id: world.capsule().await, dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn url(&self, verb: &str) -> String {
        format!("/v1/capsules/{}/files/{verb}", self.id)
    }

    async fn call(&self, verb: &str, body: Value) -> (StatusCode, Value) {
        self.world.post(&self.url(verb), body).await
    }

    async fn write(&self, verb: &str, path: &str, file: impl Into<reqwest::Body>) -> (StatusCode, Value) {
        let form = Form::new().text("path", path.to_owned()).part("file", Part::stream(file).file_name("upload"));
        self.world.send(self.world.request(Method::POST, &self.url(verb)).multipart(form)).await
    }

    async fn read(&self, verb: &str, path: &str) -> Vec<u8> {
        let answer =
            self.world.request(Method::POST, &self.url(verb)).json(&json!({ "path": path })).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["content-type"], "application/octet-stream");
        answer.bytes().await.unwrap().to_vec()
    }

    /// What is in the test's directory.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Bytes that do not repeat where a buffer would.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

async fn what_is_written_is_read(world: World) {
    let files = Files::new(&world).await;
    for (number, size) in [0, 1, 65_536, 3_000_001].into_iter().enumerate() {
        let contents = noise(size);
        for verb in ["write", "stream/write"] {
            let path = files.path(&format!("a b/ü%2F{number}"));
            assert_eq!(files.write(verb, &path, contents.clone()).await, (StatusCode::NO_CONTENT, Value::Null));
            assert!(fs::read(&path).unwrap() == contents, "{verb} {size}");
            for verb in ["read", "stream/read"] {
                assert!(files.read(verb, &path).await == contents, "{verb} {size}");
            }
        }
    }
    // A shorter one takes the place of a longer one.
    let path = files.path("again");
    files.write("write", &path, "a long text").await;
    files.write("write", &path, "short").await;
    assert_eq!(fs::read(&path).unwrap(), b"short");
    for verb in ["read", "stream/read"] {
        refused(files.call(verb, json!({ "path": files.path("missing") })).await, 404, ErrorCode::NotFound);
        refused(files.call(verb, json!({ "path": files.path("") })).await, 400, ErrorCode::InvalidRequest);
        refused(files.call(verb, json!({ "path": "" })).await, 400, ErrorCode::InvalidRequest);
    }
    refused(files.write("write", &files.path("again/below"), "x").await, 400, ErrorCode::InvalidRequest);
    refused(files.write("write", &files.path(""), "x").await, 400, ErrorCode::InvalidRequest);
}

/// Sends bytes, and answers everything that comes back until the other side closes.
async fn raw(world: &World, pieces: &[&[u8]]) -> String {
    let mut socket = TcpStream::connect(world.url.strip_prefix("http://").unwrap()).await.unwrap();
    for piece in pieces {
        socket.write_all(piece).await.unwrap();
        socket.flush().await.unwrap();
    }
    let mut answer = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut answer)).await.unwrap().unwrap();
    String::from_utf8(answer).unwrap()
}

/// The head of a chunked upload.
fn chunked(files: &Files<'_>, boundary: &str) -> Vec<u8> {
    let (path, key) = (files.url("stream/write"), &files.world.key);
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\
         Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n"
    )
    .into_bytes()
}

fn chunk(bytes: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

fn preamble(boundary: &str, path: &str) -> Vec<u8> {
    let part = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n{path}\r\n");
    let file = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"upload.bin\"\r\n");
    format!("{part}{file}Content-Type: application/octet-stream\r\n\r\n").into_bytes()
}

async fn the_wire_of_the_sdk(world: World) {
    let files = Files::new(&world).await;
    let boundary = "0123456789abcdef0123456789abcdef";
    let path = files.path("sent");
    let end = format!("\r\n--{boundary}--\r\n");
    let pieces = [chunk(&preamble(boundary, &path)), chunk(b"one\r\n--0123"), chunk(b"two"), chunk(end.as_bytes())];
    let head = chunked(&files, boundary);
    let [a, b, c, d] = &pieces;
    let answer = raw(&world, &[&head, a, b, c, d, b"0\r\n\r\n"]).await;
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    assert_eq!(fs::read(&path).unwrap(), b"one\r\n--0123two");
}

async fn directories_are_listed_made_and_removed(world: World) {
    let files = Files::new(&world).await;
    let (status, made) = files.call("mkdir", json!({ "path": files.path("a/b") })).await;
    assert_eq!(
        (status, &made["entry"]["name"], &made["entry"]["type"]),
        (StatusCode::OK, &json!("b"), &json!("directory"))
    );
    assert_eq!(made["entry"]["path"], files.path("a/b"));
    refused(files.call("mkdir", json!({ "path": files.path("a/b") })).await, 409, ErrorCode::Conflict);
    fs::write(files.path("a/file"), "12345").unwrap();
    refused(files.call("mkdir", json!({ "path": files.path("a/file") })).await, 400, ErrorCode::InvalidRequest);

    let names = |(status, list): (StatusCode, Value)| {
        assert_eq!(status, StatusCode::OK, "{list}");
        let names = list["entries"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    for depth in [json!(0), json!(1), Value::Null] {
        assert_eq!(names(files.call("list", json!({ "path": files.path(""), "depth": depth })).await), ["a"]);
    }
    assert_eq!(names(files.call("list", json!({ "path": files.path(""), "depth": 2 })).await), ["a", "b", "file"]);
    assert_eq!(names(files.call("list", json!({ "path": files.path("a/b/") })).await), [""; 0]);
    let home = names(files.call("list", json!({ "path": "", "depth": 1 })).await);
    assert_eq!(home, names(files.call("list", json!({ "path": "/root" })).await));
    // A parent that is missing or a file has nobody in it.
    for path in ["missing", "missing/too", "a/file"] {
        let gone = files.call("list", json!({ "path": files.path(path) })).await;
        assert!(refused(gone, 404, ErrorCode::NotFound).contains(path));
    }
    for (body, field) in [
        (json!({ "path": "/", "depth": -1 }), "depth"),
        (json!({ "path": "/", "depth": 65 }), "depth"),
        (json!({ "path": "\u{0}" }), "path"),
        (json!({ "path": "x".repeat(4096) }), "path"),
        (json!({ "path": "~stranger" }), "path"),
        (json!({}), "path"),
    ] {
        let message = refused(files.call("list", body).await, 400, ErrorCode::InvalidRequest);
        assert!(message.contains(field), "{message}");
    }

    for path in ["a/file", "a"] {
        assert_eq!(
            files.call("remove", json!({ "path": files.path(path) })).await,
            (StatusCode::NO_CONTENT, Value::Null)
        );
    }
    assert_eq!(files.names(), [""; 0]);
    refused(files.call("remove", json!({ "path": files.path("a") })).await, 404, ErrorCode::NotFound);
    refused(files.call("remove", json!({ "path": "" })).await, 400, ErrorCode::InvalidRequest);
    refused(files.call("remove", json!({ "path": "/" })).await, 400, ErrorCode::InvalidRequest);
}

async fn every_entry_is_of_a_kind_clients_know(world: World) {
    let files = Files::new(&world).await;
    fs::write(files.path("file"), "12345").unwrap();
    fs::create_dir(files.path("dir")).unwrap();
    symlink("file", files.path("to-file")).unwrap();
    symlink("dir", files.path("to-dir")).unwrap();
    symlink("nowhere", files.path("to-nowhere")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(files.path("socket")).unwrap();
    let list = files.call("list", json!({ "path": files.path(""), "depth": 1 })).await.1;
    let found: Vec<_> = list["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            let text = |name: &str| entry[name].as_str().map(ToOwned::to_owned);
            (text("name").unwrap(), text("type").unwrap(), text("symlink_target"))
        })
        .collect();
    let entry = |name: &str, kind: &str, target: Option<&str>| {
        (name.to_owned(), kind.to_owned(), target.map(|name| files.path(name)))
    };
    let expected = [
        entry("dir", "directory", None),
        entry("file", "file", None),
        entry("socket", "file", None),
        entry("to-dir", "directory", Some("dir")),
        entry("to-file", "file", Some("file")),
        entry("to-nowhere", "symlink", Some("nowhere")),
    ];
    assert_eq!(found, expected);
    let file = &list["entries"][1];
    assert_eq!((&file["size"], &file["mode"], &file["permissions"]), (&json!(5), &json!(0o644), &json!("-rw-r--r--")));
    assert_eq!((&file["owner"], &file["group"]), (&json!("root"), &json!("root")));
    assert!(file["modified_at"].as_i64().unwrap() > 1_700_000_000);
    // Removing a link leaves what it leads to.
    files.call("remove", json!({ "path": files.path("to-dir") })).await;
    files.call("remove", json!({ "path": files.path("to-nowhere") })).await;
    assert_eq!(files.names(), ["dir", "file", "socket", "to-file"]);
}

async fn what_is_too_large_is_refused_and_leaves_nothing(world: World) {
    let files = Files::new(&world).await;
    let limit = 100 * 1024 * 1024;
    let exact = vec![7; limit];
    assert_eq!(files.write("write", &files.path("exact"), exact).await.0, StatusCode::NO_CONTENT);
    assert_eq!(fs::metadata(files.path("exact")).unwrap().len(), limit as u64);
    // With a length, which is refused at once, and without, which is noticed on the way.
    let large = vec![7; limit + 1024 * 1024];
    let message = refused(files.write("write", &files.path("large"), large.clone()).await, 413, ErrorCode::TooLarge);
    assert!(message.contains("104857600"), "{message}");
    let pieces = futures::stream::iter(
        large.chunks(65_536).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect::<Vec<_>>(),
    );
    let body = reqwest::Body::wrap_stream(pieces);
    refused(files.write("write", &files.path("large"), body).await, 413, ErrorCode::TooLarge);
    assert_eq!(files.names(), ["exact"]);
    assert_eq!(files.write("stream/write", &files.path("large"), large).await.0, StatusCode::NO_CONTENT);
}

async fn what_is_not_a_form_is_refused(world: World) {
    let files = Files::new(&world).await;
    let path = || files.path("x");
    let file = || Part::bytes(b"contents".to_vec()).file_name("upload");
    for verb in ["write", "stream/write"] {
        let post = |request: reqwest::RequestBuilder| world.send(request);
        let request = || world.request(Method::POST, &files.url(verb));
        for (form, word) in [
            (Form::new().part("file", file()).text("path", path()), "before the part file"),
            (Form::new().text("path", path()), "file is missing"),
            (Form::new().text("other", "x"), "path is missing"),
            (Form::new().text("path", "").part("file", file()), "path must not be empty"),
            (Form::new().text("path", "a\0").part("file", file()), "NUL"),
            (Form::new().text("path", "x".repeat(5000)).part("file", file()), "4095"),
            (Form::new().part("path", Part::bytes(vec![0xff])).part("file", file()), "UTF-8"),
        ] {
            let message = refused(post(request().multipart(form)).await, 400, ErrorCode::InvalidRequest);
            assert!(message.contains(word), "{message}");
        }
        for kind in ["application/json", "multipart/form-data", "multipart/form-data; boundary="] {
            refused(post(request().header("content-type", kind).body("x")).await, 400, ErrorCode::InvalidRequest);
        }
        let kind = "multipart/form-data; boundary=b";
        refused(post(request().header("content-type", kind).body("x")).await, 400, ErrorCode::InvalidRequest);
        // A form without its end.
        let mut cut = preamble("b", &path());
        cut.extend_from_slice(b"half of");
        refused(post(request().header("content-type", kind).body(cut)).await, 400, ErrorCode::InvalidRequest);
        // A client that writes everything before it reads still reads why.
        let large = vec![b'x'; 64 * 1024 * 1024];
        let form = Form::new().part("file", Part::bytes(large).file_name("upload")).text("path", path());
        refused(post(request().multipart(form)).await, 400, ErrorCode::InvalidRequest);
    }
    assert_eq!(files.names(), [""; 0]);
}

async fn a_client_that_breaks_off_leaves_nothing(world: World) {
    let files = Files::new(&world).await;
    let path = files.path("half");
    let mut socket = TcpStream::connect(world.url.strip_prefix("http://").unwrap()).await.unwrap();
    socket.write_all(&chunked(&files, "b")).await.unwrap();
    socket.write_all(&chunk(&preamble("b", &path))).await.unwrap();
    for _ in 0..64 {
        socket.write_all(&chunk(&noise(65_536))).await.unwrap();
    }
    // Files without a name that envd, the parent of the shell, has open.
    let look = "ls -l /proc/$PPID/fd | grep -c deleted || true";
    let open = || async {
        let look = json!({ "cmd": "/bin/sh", "args": ["-c", look] });
        world.post(&format!("/v1/capsules/{}/exec", files.id), look).await.1["stdout"].clone()
    };
    let is_open = async |count: &str| {
        while open().await != count {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, is_open("1\n")).await.expect("it is on its way");
    assert!(fs::metadata(&path).is_err(), "it is not there before it is whole");
    drop(socket);
    timeout(PATIENCE, is_open("0\n")).await.expect("the half is given up");
    assert_eq!(files.names(), [""; 0]);
}

async fn a_full_disk_is_told(world: World) {
    let files = Files::new(&world).await;
    // The guest has its own mounts.
    let disk = files.path("disk");
    fs::create_dir(&disk).unwrap();
    let mount = json!({ "cmd": "mount", "args": ["-t", "tmpfs", "-o", "size=8m", "tmpfs", disk] });
    let mounted = world.post(&format!("/v1/capsules/{}/exec", files.id), mount).await.1;
    assert_eq!(mounted["exit_code"], 0, "{mounted}");
    let path = format!("{disk}/large");
    for verb in ["write", "stream/write"] {
        refused(files.write(verb, &path, noise(64 * 1024 * 1024)).await, 507, ErrorCode::DiskFull);
    }
    assert_eq!(files.call("list", json!({ "path": disk })).await.1, json!({ "entries": [] }));
    assert_eq!(files.write("write", &path, noise(1024)).await.0, StatusCode::NO_CONTENT);
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

async fn large_files_pass_without_being_held(world: World) {
    let files = Files::new(&world).await;
    let (piece, count) = (noise(1 << 20), 256);
    let path = files.path("large");
    let before = resident();
    let sent = piece.clone();
    let pieces = futures::stream::iter(0..count).map(move |_| Ok::<_, std::io::Error>(sent.clone()));
    let body = reqwest::Body::wrap_stream(pieces);
    assert_eq!(files.write("stream/write", &path, body).await.0, StatusCode::NO_CONTENT);
    assert_eq!(Path::new(&path).metadata().unwrap().len(), count << 20);
    let request = world.request(Method::POST, &files.url("stream/read")).json(&json!({ "path": path }));
    let mut answer = request.timeout(10 * PATIENCE).send().await.unwrap();
    assert_eq!(answer.content_length(), Some(count << 20));
    let mut at = 0;
    while let Some(mut bytes) = answer.chunk().await.unwrap() {
        while !bytes.is_empty() {
            let expected = &piece[at % piece.len()..];
            let same = bytes.split_to(expected.len().min(bytes.len()));
            assert!(same == expected[..same.len()], "at {at}");
            at += same.len();
        }
    }
    assert_eq!(at as u64, count << 20);
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more than before");
}

async fn what_a_capsule_uses(world: World) {
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/metrics");
    let (status, metrics) = world.get(&path).await;
    assert_eq!(
        (status, &metrics["sandbox_id"], &metrics["range"]),
        (StatusCode::OK, &json!(id.to_string()), &json!("10m"))
    );
    let metrics: api::CapsuleMetrics = serde_json::from_value(metrics).unwrap();
    assert_eq!(metrics.points.len(), 1);
    let point = &metrics.points[0];
    assert!(point.timestamp_unix > 1_700_000_000 && point.mem_bytes > 0 && point.disk_bytes > 0);
    assert!((0.0..=100.0).contains(&point.cpu_pct));
    assert!(point.net_sent_bytes > 0 && point.net_received_bytes > 0);
    assert_eq!(world.get(&format!("{path}?range=24h")).await.1["range"], "24h");
    let message = refused(world.get(&format!("{path}?range=1w")).await, 400, ErrorCode::InvalidRequest);
    assert!(message.starts_with("range must be one of"), "{message}");
    // Who asks does not wake it, nor keep it awake.
    let active = world.get(&format!("/v1/capsules/{id}")).await.1["last_active_at"].clone();
    assert_eq!(world.ask(id, "pause").await.1["status"], "paused");
    let (status, metrics) = world.get(&path).await;
    assert_eq!((status, &metrics["points"]), (StatusCode::OK, &json!([])));
    assert_eq!(world.status(id).await, "paused");
    assert_eq!(world.get(&format!("/v1/capsules/{id}")).await.1["last_active_at"], active);
    world.delete(&format!("/v1/capsules/{id}")).await;
    refused(world.get(&path).await, 404, ErrorCode::NotFound);
}
