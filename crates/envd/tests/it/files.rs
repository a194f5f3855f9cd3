//! Files up and down: what is answered, and what is then on the disk.

use crate::harness::Envd;
use crate::wire::response;
use guest_api::WrittenFile;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

pub const OCTETS: &str = "Content-Type: application/octet-stream";

pub struct Answer {
    pub status: u16,
    /// In lower case.
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// An error in the one shape they have.
    #[track_caller]
    pub fn refused(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        assert_eq!(self.json()["code"], json!(status));
        self.json()["message"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn written(&self) -> Vec<WrittenFile> {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        assert_eq!(self.header("content-type"), Some("application/json"));
        serde_json::from_slice(&self.body).unwrap()
    }
}

pub fn call(address: SocketAddr, method: &str, target: &str, headers: &[&str], body: &[u8]) -> Answer {
    let mut socket = TcpStream::connect(address).unwrap();
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let length = body.len();
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(body).unwrap();
    let mut wire = Vec::new();
    socket.read_to_end(&mut wire).unwrap();
    let (status, head, body) = response(&wire);
    Answer { status, head, body }
}

pub fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

pub fn put(envd: &Envd, path: &Path, headers: &[&str], body: &[u8]) -> Answer {
    let headers: Vec<&str> = [OCTETS].iter().chain(headers).copied().collect();
    call(envd.address, "POST", &format!("/files?path={}", encoded(path.to_str().unwrap())), &headers, body)
}

pub fn get(envd: &Envd, path: &Path, headers: &[&str]) -> Answer {
    call(envd.address, "GET", &format!("/files?path={}", encoded(path.to_str().unwrap())), headers, b"")
}

/// A form as browsers write it: the name, the file name and the contents of each part.
pub fn form(envd: &Envd, query: &str, parts: &[(&str, Option<&str>, &[u8])]) -> Answer {
    let mut body = Vec::new();
    for (name, file_name, contents) in parts {
        let file_name = file_name.map(|name| format!("; filename=\"{name}\"")).unwrap_or_default();
        let head = format!("--limit\r\nContent-Disposition: form-data; name=\"{name}\"{file_name}\r\n\r\n");
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(contents);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--limit--\r\n");
    let kind = "Content-Type: multipart/form-data; boundary=limit";
    call(envd.address, "POST", &format!("/files{query}"), &[kind], &body)
}

/// Bytes that do not repeat where a buffer would.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(length)
    .collect()
}

/// The sizes at which something else happens: nothing, one write, the most in memory, several batches.
const SIZES: [usize; 6] = [0, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5_000_003];

fn temporary() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_goes_up_comes_down() {
    let (envd, root) = (Envd::start(), temporary());
    for size in SIZES {
        let contents = noise(size);
        let path = root.path().join(format!("a/b c/ü{size}.bin"));
        let written = put(&envd, &path, &[], &contents).written();
        assert_eq!(
            (written[0].path.as_str(), written[0].name.clone()),
            (path.to_str().unwrap(), format!("ü{size}.bin"))
        );
        assert!(std::fs::read(&path).unwrap() == contents);
        let answer = get(&envd, &path, &[]);
        assert_eq!((answer.status, answer.header("content-length")), (200, Some(size.to_string().as_str())));
        assert!(answer.body == contents);
        let head = call(envd.address, "HEAD", &format!("/files?path={}", encoded(path.to_str().unwrap())), &[], b"");
        assert_eq!((head.status, head.body.len()), (200, 0));
        for name in ["content-length", "etag", "last-modified", "content-type", "content-disposition", "accept-ranges"]
        {
            assert_eq!(head.header(name), answer.header(name), "{name}");
            assert!(head.header(name).is_some(), "{name}");
        }
    }
    let answer = put(&envd, &root.path().join("x"), &[], b"x");
    let expected = json!([{"path": root.path().join("x"), "name": "x", "type": "file"}]);
    assert_eq!(answer.json(), expected);
}

#[test]
fn a_form_carries_several_files() {
    let (envd, root) = (Envd::start(), temporary());
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let large = noise(3_000_000);
    let answer = form(
        &envd,
        "",
        &[
            ("file", Some(&at("one")), b"1"),
            ("other", None, &large),
            ("file", Some(&at("d/two")), &large),
            ("file", Some(&at("three")), b""),
        ],
    );
    let paths: Vec<_> = answer.written().into_iter().map(|written| written.path).collect();
    assert_eq!(paths, [at("one"), at("d/two"), at("three")]);
    assert!(std::fs::read(at("d/two")).unwrap() == large);
    assert_eq!(std::fs::read(at("one")).unwrap(), b"1");

    // The path in the address is the one that counts, and there is only one of it.
    let query = format!("?path={}", encoded(&at("four")));
    assert_eq!(form(&envd, &query, &[("file", Some("/ignored"), b"4")]).written()[0].path, at("four"));
    assert_eq!(form(&envd, &query, &[("file", None, b"4")]).written()[0].path, at("four"));
    form(&envd, &query, &[("file", None, b"new"), ("file", None, b"newer")]).refused(400);
    assert_eq!(std::fs::read(at("four")).unwrap(), b"new");

    symlink(at("d"), at("link")).unwrap();
    for twin in [at("d/./five"), at("d/../d/five"), at("link/five")] {
        let answer = form(&envd, "", &[("file", Some(&at("d/five")), b"5"), ("file", Some(&twin), b"other")]);
        assert!(answer.refused(400).contains("more than once"));
        assert_eq!(std::fs::read(at("d/five")).unwrap(), b"5");
    }
    form(&envd, "", &[("other", Some("/x"), b"")]).refused(400);
    form(&envd, "", &[("file", None, b"")]).refused(400);
    let cut = b"--limit\r\nContent-Disposition: form-data; name=\"file\"; filename=\"/tmp/never\"\r\n\r\nabc";
    call(envd.address, "POST", "/files", &["Content-Type: multipart/form-data; boundary=limit"], cut).refused(400);
    assert!(!Path::new("/tmp/never").exists());
    // A head that never ends is not kept.
    let kind = "Content-Type: multipart/form-data; boundary=limit";
    let before = envd.resident();
    let message = call(envd.address, "POST", "/files", &[kind], &vec![b'x'; 64 << 20]).refused(400);
    assert!(message.contains("head of a part") && envd.resident() < before + (40 << 20), "{message}");
}

#[test]
fn paths_start_at_home() {
    let home = temporary();
    let envd = Envd::start();
    // root's home is whatever /etc/passwd says, so that only its answers can be looked at.
    let of = |path: &str| call(envd.address, "GET", &format!("/files?path={path}"), &[], b"").refused(404);
    let root = of("~/no-such-file");
    assert!(root.starts_with("'/") && root.ends_with("/no-such-file' does not exist"), "{root}");
    assert_eq!([of("no-such-file"), of("~//./no-such-file")], [root.clone(), root]);
    call(envd.address, "GET", "/files", &[], b"").refused(400);
    let init = json!({"defaultWorkdir": home.path().join("none")}).to_string();
    assert_eq!(call(envd.address, "POST", "/init", &[], init.as_bytes()).status, 204);
    call(envd.address, "GET", "/files", &[], b"").refused(404);
}

#[test]
fn files_belong_to_the_user_they_are_for() {
    let (envd, root) = (Envd::start(), temporary());
    let nobody = std::process::Command::new("id").args(["-u", "nobody"]).output().unwrap();
    let nobody: u32 = String::from_utf8(nobody.stdout).unwrap().trim().parse().unwrap();
    let owner = |name: &str| std::fs::metadata(root.path().join(name)).unwrap().uid();
    for size in SIZES {
        let path = format!("{}/{size}/f", root.path().display());
        let target = format!("/files?username=nobody&path={}", encoded(&path));
        call(envd.address, "POST", &target, &[OCTETS], &noise(size)).written();
        assert_eq!([owner(&format!("{size}")), owner(&format!("{size}/f"))], [nobody; 2]);
        let mode = |name: &str| std::fs::metadata(root.path().join(name)).unwrap().mode() & 0o7777;
        assert_eq!([mode(&format!("{size}")), mode(&format!("{size}/f"))], [0o755, 0o644]);
        // An existing file keeps its mode, and is the user's now.
        let old = root.path().join(format!("old{size}"));
        std::fs::write(&old, "something else").unwrap();
        std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o750)).unwrap();
        let target = format!("/files?username=nobody&path={}", encoded(old.to_str().unwrap()));
        call(envd.address, "POST", &target, &[OCTETS], &noise(size)).written();
        assert!(std::fs::read(&old).unwrap() == noise(size));
        assert_eq!((owner(&format!("old{size}")), mode(&format!("old{size}"))), (nobody, 0o750));
    }
    assert_eq!(owner(""), 0);
    for method in ["GET", "POST"] {
        let message = call(envd.address, method, "/files?username=no-such&path=/x", &[OCTETS], b"").refused(401);
        assert_eq!(message, "invalid username: 'no-such'");
    }
}

#[test]
fn links_are_followed_and_other_names_keep_what_the_parent_module_says() {
    let (envd, root) = (Envd::start(), temporary());
    let at = |name: &str| root.path().join(name);
    for size in SIZES {
        let contents = noise(size);
        std::fs::write(at("real"), "old, and longer than five").unwrap();
        std::fs::hard_link(at("real"), at("twin")).unwrap();
        symlink("real", at("link")).unwrap();
        symlink("link", at("link2")).unwrap();
        symlink("new/file", at("nowhere")).unwrap();
        put(&envd, &at("link2"), &[], &contents).written();
        put(&envd, &at("nowhere"), &[], &contents).written();
        assert!(std::fs::symlink_metadata(at("link2")).unwrap().is_symlink());
        assert!(std::fs::read(at("real")).unwrap() == contents && std::fs::read(at("new/file")).unwrap() == contents);
        assert!(get(&envd, &at("nowhere"), &[]).body == contents);
        let twin = std::fs::read(at("twin")).unwrap();
        assert!(if size < 1 << 20 { twin == contents } else { twin == b"old, and longer than five" });
        assert_eq!(names(root.path()), ["link", "link2", "new", "nowhere", "real", "twin"]);
        for name in ["link", "link2", "nowhere", "real", "twin", "new/file"] {
            std::fs::remove_file(at(name)).unwrap();
        }
    }
}

#[test]
fn a_running_program_is_replaced() {
    let (envd, root) = (Envd::start(), temporary());
    let path = root.path().join("sleep");
    std::fs::copy("/bin/sleep", &path).unwrap();
    let mut child = std::process::Command::new(&path).arg("1000").spawn().unwrap();
    let answer = put(&envd, &path, &[], b"#!/bin/sh\n");
    child.kill().unwrap();
    child.wait().unwrap();
    answer.written();
    assert_eq!(std::fs::read(&path).unwrap(), b"#!/bin/sh\n");
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o755);
}

#[test]
fn what_is_not_a_file_is_refused_without_waiting() {
    let (envd, root) = (Envd::start(), temporary());
    let pipe = root.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.path().join("socket")).unwrap();
    symlink("loop", root.path().join("loop")).unwrap();
    std::fs::write(root.path().join("file"), "").unwrap();
    let long = root.path().join("n".repeat(256));
    for name in ["", "pipe", "socket", "loop", "file/below", "/dev/null", "/dev/zero", "/", long.to_str().unwrap()] {
        let path = root.path().join(name);
        get(&envd, &path, &[]).refused(400);
        put(&envd, &path, &[], b"x").refused(400);
    }
    get(&envd, &root.path().join("absent"), &[]).refused(404);
    get(&envd, &root.path().join("absent/below"), &[]).refused(404);
    for target in ["/files?path=~root/x", "/files?path=/a%00b"] {
        call(envd.address, "GET", target, &[], b"").refused(400);
        call(envd.address, "POST", target, &[OCTETS], b"").refused(400);
    }
    call(envd.address, "POST", "/files", &[OCTETS], b"x").refused(400);
    call(envd.address, "POST", "/files?path=/x", &["Content-Type: text/plain"], b"x").refused(400);
    call(envd.address, "POST", "/files?path=/x", &[], b"x").refused(400);
    call(envd.address, "POST", "/files?path=/x", &[OCTETS, "Content-Encoding: br"], b"x").refused(400);
    call(envd.address, "GET", "/files?path=/x&signature_expiration=soon", &[], b"").refused(400);
    call(envd.address, "PUT", "/files?path=/x", &[], b"").refused(405);
}

#[test]
fn packed_bodies_and_answers() {
    use flate2::{Compression, read::GzDecoder, write::GzEncoder};
    let (envd, root) = (Envd::start(), temporary());
    let pack = |bytes: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    for size in SIZES {
        let path = root.path().join(format!("{size}.txt"));
        let contents = noise(size);
        put(&envd, &path, &["Content-Encoding: gzip"], &pack(&contents)).written();
        assert!(std::fs::read(&path).unwrap() == contents);
        let answer = get(&envd, &path, &["Accept-Encoding: gzip, deflate"]);
        assert_eq!((answer.status, answer.header("content-encoding")), (200, Some("gzip")));
        assert_eq!(answer.header("vary"), Some("accept-encoding"));
        let mut unpacked = Vec::new();
        GzDecoder::new(answer.body.as_slice()).read_to_end(&mut unpacked).unwrap();
        assert!(unpacked == contents);
        let target = format!("/files?path={}", encoded(path.to_str().unwrap()));
        let head = call(envd.address, "HEAD", &target, &["Accept-Encoding: gzip"], b"");
        assert_eq!((head.status, head.header("content-encoding")), (200, Some("gzip")));
        // It is the same file to who has it packed.
        let tag = format!("If-None-Match: {}", answer.header("etag").unwrap().replace("w/", "W/"));
        assert_eq!(get(&envd, &path, &[&tag, "Accept-Encoding: gzip"]).status, 304);
    }
    let path = root.path().join("bad");
    for bad in [&b"plain"[..], &pack(&noise(3_000_000))[..2_000_000], b""] {
        put(&envd, &path, &["Content-Encoding: gzip"], bad).refused(400);
    }
    assert!(!path.exists());
    let path = root.path().join("5.txt");
    get(&envd, &path, &["Accept-Encoding: *;q=0"]).refused(406);
    get(&envd, &path, &["Accept-Encoding: identity;q=0, br"]).refused(406);
    std::fs::write(root.path().join("a.zip"), "x").unwrap();
    assert_eq!(get(&envd, &root.path().join("a.zip"), &["Accept-Encoding: gzip"]).header("content-encoding"), None);
}

#[test]
fn parts_and_conditions() {
    let (envd, root) = (Envd::start(), temporary());
    let path = root.path().join("d\u{f6}.html");
    let contents = noise(3_000_000);
    std::fs::write(&path, &contents).unwrap();
    let whole = get(&envd, &path, &[]);
    assert_eq!(whole.header("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(
        whole.header("content-disposition"),
        Some("inline; filename=\"d_.html\"; filename*=utf-8''d%c3%b6.html")
    );
    let etag = whole.header("etag").unwrap().to_owned();
    for (range, start, end) in [
        ("0-9", 0, 10),
        ("2999990-", 2_999_990, 3_000_000),
        ("-1", 2_999_999, 3_000_000),
        ("100-2000099", 100, 2_000_100),
    ] {
        let range = format!("Range: bytes={range}");
        let part = get(&envd, &path, &[&range, "Accept-Encoding: gzip"]);
        let (length, place) = ((end - start).to_string(), format!("bytes {start}-{}/3000000", end - 1));
        assert_eq!(
            (part.status, part.header("content-length"), part.header("content-range")),
            (206, Some(&*length), Some(&*place))
        );
        assert!(part.body == contents[start..end] && part.header("content-encoding").is_none());
        assert_eq!(get(&envd, &path, &[&range, &format!("If-Range: {etag}")]).status, 206);
        assert_eq!(get(&envd, &path, &[&range, "If-Range: \"other\""]).body.len(), 3_000_000);
    }
    let answer = get(&envd, &path, &["Range: bytes=3000000-"]);
    answer.refused(416);
    assert_eq!(answer.header("content-range"), Some("bytes */3000000"));
    assert_eq!(get(&envd, &path, &["Range: bytes=0-1,4-5"]).status, 200);

    let same = get(&envd, &path, &[&format!("If-None-Match: {etag}")]);
    assert_eq!((same.status, same.body.len(), same.header("etag")), (304, 0, Some(etag.as_str())));
    get(&envd, &path, &["If-Match: \"other\""]).refused(412);
    let capitals = whole.header("last-modified").unwrap().to_owned();
    // Headers come in lower case from our own reader; the date's words begin with capitals.
    let date: String = capitals
        .split(' ')
        .map(|word| if word == "gmt" { "GMT".to_owned() } else { word[..1].to_uppercase() + &word[1..] })
        .collect::<Vec<_>>()
        .join(" ");
    assert_eq!(get(&envd, &path, &[&format!("If-Modified-Since: {date}")]).status, 304);
    std::fs::write(&path, &contents).unwrap();
    assert_eq!(get(&envd, &path, &[&format!("If-None-Match: {etag}")]).status, 200);
}

#[test]
fn files_without_a_length_are_read_to_their_end() {
    let envd = Envd::start();
    let version = get(&envd, Path::new("/proc/version"), &[]);
    assert_eq!((version.status, version.body), (200, std::fs::read("/proc/version").unwrap()));
    let symbols = get(&envd, Path::new("/proc/kallsyms"), &[]);
    assert!(symbols.body == std::fs::read("/proc/kallsyms").unwrap() && symbols.body.len() > 1 << 20);
}

#[test]
fn metadata_is_kept_and_replaced() {
    let (envd, root) = (Envd::start(), temporary());
    for size in SIZES {
        let path = root.path().join(format!("{size}"));
        let answer = put(&envd, &path, &["X-Metadata-Author: me", "x-metadata-b: "], &noise(size));
        assert_eq!(answer.json()[0]["metadata"], json!({"author": "me", "b": ""}));
        let kept = || envd::metadata::read(&path).unwrap();
        assert_eq!(kept(), [("author".to_owned(), "me".to_owned()), ("b".to_owned(), String::new())].into());
        assert_eq!(put(&envd, &path, &["X-Metadata-C: d"], b"").json()[0]["metadata"], json!({"c": "d"}));
        assert_eq!(kept().len(), 1);
        assert!(put(&envd, &path, &[], &noise(size)).json()[0].get("metadata").is_none());
        assert!(kept().is_empty());
    }
    let path = root.path().join("no");
    let long = format!("X-Metadata-{}: v", "k".repeat(247));
    for bad in [long.as_str(), "X-Metadata-a: \u{fc}"] {
        assert!(put(&envd, &path, &[bad], b"x").refused(400).contains("x-metadata-"));
    }
    assert!(!path.exists());
}

#[test]
fn several_become_one() {
    let (envd, root) = (Envd::start(), temporary());
    let at = |name: &str| root.path().join(name);
    let join = |sources: &[&str], destination: &str, user: Option<&str>| {
        let sources: Vec<_> = sources.iter().map(|name| at(name)).collect();
        let body = json!({"source_paths": sources, "destination": at(destination), "username": user}).to_string();
        call(envd.address, "POST", "/files/compose", &[], body.as_bytes())
    };
    let (one, two) = (noise(2_000_000), noise(700_001));
    let make = || {
        std::fs::write(at("one"), &one).unwrap();
        std::fs::write(at("two"), &two).unwrap();
        std::fs::write(at("empty"), "").unwrap();
    };
    for _ in 0..2 {
        make();
        let answer = join(&["one", "two", "empty", "one"], "d/all", Some("nobody"));
        assert_eq!(answer.json(), json!({"path": at("d/all"), "name": "all", "type": "file"}));
        assert!(std::fs::read(at("d/all")).unwrap() == [&one[..], &two, &one].concat());
        assert_ne!(std::fs::metadata(at("d/all")).unwrap().uid(), 0);
        assert_eq!((names(root.path()), names(&at("d"))), (vec!["d".to_owned()], vec!["all".to_owned()]));
    }
    make();
    symlink("one", at("link")).unwrap();
    join(&[], "x", None).refused(400);
    join(&["one", "two"], "one", None).refused(400);
    join(&["two", "one"], "link", None).refused(400);
    join(&["one", "d"], "x", None).refused(400);
    join(&["one", "/dev/null"], "x", None).refused(400);
    join(&["one"], "d", None).refused(400);
    join(&["one", "absent"], "x", None).refused(404);
    join(&["one"], "x", Some("no-such")).refused(401);
    for bad in ["", "[]", "{}", r#"{"source_paths":["/x"]}"#] {
        call(envd.address, "POST", "/files/compose", &[], bad.as_bytes()).refused(400);
    }
    assert_eq!(names(root.path()), ["d", "empty", "link", "one", "two"]);
    assert!(std::fs::read(at("one")).unwrap() == one);
}

#[test]
fn a_refused_upload_is_answered_once_it_was_sent_and_its_connection_is_good_for_more() {
    let envd = Envd::start();
    assert_eq!(call(envd.address, "POST", "/init", &[], br#"{"accessToken":"secret"}"#).status, 204);
    let mut socket = TcpStream::connect(envd.address).unwrap();
    let head = "POST /files?path=/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n";
    for _ in 0..2 {
        write!(socket, "{head}\r\n").unwrap();
        // Who is still sending would meet a closed connection in place of an answer.
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(socket.read(&mut [0]).is_err(), "answered before the body was there");
        socket.set_read_timeout(None).unwrap();
        socket.write_all(b"x").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            answer.extend(byte);
        }
        assert!(answer.starts_with(b"HTTP/1.1 401 "));
    }
    // Who asks before sending is told so at once.
    write!(socket, "{head}Expect: 100-continue\r\n\r\n").unwrap();
    let mut status = [0; 13];
    socket.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 401 ");
}

#[test]
fn a_signature_does_instead_of_the_token() {
    use base64::Engine;
    use sha2::{Digest, Sha256};
    let (envd, root) = (Envd::start(), temporary());
    let path = root.path().join("a b").to_str().unwrap().to_owned();
    assert_eq!(call(envd.address, "POST", "/init", &[], br#"{"accessToken":"secret"}"#).status, 204);
    let sign = |operation: &str, path: &str, tail: &str| {
        let text = format!("{path}:{operation}::secret{tail}");
        let encoded_hash = base64::engine::general_purpose::STANDARD_NO_PAD.encode(Sha256::digest(text));
        format!("&signature={}", encoded(&format!("v1_{encoded_hash}")))
    };
    let target = format!("/files?path={}", encoded(&path));
    let of = |method: &str, tail: &str, headers: &[&str]| {
        let headers: Vec<&str> = [OCTETS].iter().chain(headers).copied().collect();
        call(envd.address, method, &format!("{target}{tail}"), &headers, b"x")
    };
    let (read, write) = (sign("read", &path, ""), sign("write", &path, ""));
    of("POST", &write, &[]).written();
    assert_eq!(of("GET", &read, &[]).body, b"x");
    assert_eq!(of("HEAD", &read, &[]).status, 200);
    of("POST", "", &["X-Access-Token: secret"]).written();
    assert_eq!(of("GET", "", &["X-Access-Token: secret"]).body, b"x");

    for method in ["GET", "POST"] {
        assert_eq!(of(method, "", &[]).refused(401), "missing signature query parameter");
        assert_eq!(of(method, "&signature=v1_x", &[]).refused(401), "invalid signature");
    }
    assert_eq!(of("GET", &write, &[]).refused(401), "invalid signature");
    assert_eq!(of("POST", &read, &[]).refused(401), "invalid signature");
    assert_eq!(of("GET", &format!("{read}&username=root"), &[]).refused(401), "invalid signature");
    // The header decides when it is there.
    of("GET", &read, &["X-Access-Token: wrong"]).refused(401);
    let past = format!("{}&signature_expiration=1000", sign("read", &path, ":1000"));
    let answer = of("GET", &past, &[]);
    assert_eq!(answer.body, br#"{"code":401,"message":"signature is already expired"}"#);
    assert_eq!(
        of("GET", &format!("{}&signature_expiration=9999999999", sign("read", &path, ":9999999999")), &[]).body,
        b"x"
    );
    assert_eq!(
        of("GET", &format!("{}&signature_expiration=9999999998", sign("read", &path, ":9999999999")), &[]).status,
        401
    );
    let body = json!({"source_paths": [path], "destination": "/x"}).to_string();
    call(envd.address, "POST", "/files/compose", &[], body.as_bytes()).refused(401);
    for (method, target) in [("DELETE", "/files"), ("GET", "/files/"), ("GET", "//files"), ("GET", "/files/compose")] {
        call(envd.address, method, target, &[], b"").refused(401);
    }
    // Without a path, what is signed is the right to upload by the names in a form.
    let signed = sign("write", "", "").replacen('&', "?", 1);
    form(&envd, &signed, &[("file", Some(&path), b"y")]).written();
}
