//! The plain endpoints and the token.

use crate::harness::*;
use crate::wire::response;
use connectrpc::ErrorCode;
use connectrpc::client::CallOptions;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

/// Status, head in lower case, body.
pub fn request(envd: &Envd, method: &str, path: &str, headers: &[&str], body: &str) -> (u16, String, Vec<u8>) {
    request_to(envd.address, method, path, headers, body)
}

pub fn request_to(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[&str],
    body: &str,
) -> (u16, String, Vec<u8>) {
    let mut socket = TcpStream::connect(address).unwrap();
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(body.as_bytes()).unwrap();
    let mut wire = Vec::new();
    socket.read_to_end(&mut wire).unwrap();
    response(&wire)
}

pub fn json(body: &[u8]) -> Value {
    serde_json::from_slice(body).unwrap()
}

#[test]
fn health_says_which_version() {
    let envd = Envd::start();
    let (status, head, body) = request(&envd, "GET", "/health", &[], "");
    assert_eq!((status, body.as_slice()), (200, format!(r#"{{"version":"{}"}}"#, envd::VERSION).as_bytes()));
    assert!(head.contains("cache-control: no-store") && head.contains("content-type: application/json"));
}

#[test]
fn init_answers_with_nothing_and_the_version() {
    let envd = Envd::start();
    for body in ["", "{}", r#"{"timestamp": 1, "hyperloopIP": "1.2.3.4", "volumeMounts": []}"#] {
        let (status, head, body) = request(&envd, "POST", "/init", &["Content-Type: application/json"], body);
        assert_eq!((status, body.len()), (204, 0));
        assert!(head.contains(&format!("x-envd-version: {}", envd::VERSION)) && head.contains("no-store"), "{head}");
    }
    for bad in ["nonsense", r#"{"accessToken": 5}"#, r#"{"timestamp": "soon"}"#] {
        let (status, _, body) = request(&envd, "POST", "/init", &[], bad);
        assert_eq!((status, json(&body)["code"].as_u64()), (400, Some(400)), "{bad}");
    }
}

#[test]
fn init_replaces_the_environment_and_is_idempotent() {
    let envd = Envd::start();
    let envs = || json(&request(&envd, "GET", "/envs", &[], "").2);
    let told = |mut more: Value| {
        // Not in a capsule, and it says so.
        more["WRENN_SANDBOX"] = "false".into();
        more["E2B_SANDBOX"] = "false".into();
        more
    };
    assert_eq!(envs(), told(serde_json::json!({})));
    for _ in 0..2 {
        request(&envd, "POST", "/init", &[], r#"{"envVars":{"A":"1"}}"#);
        assert_eq!(envs(), told(serde_json::json!({"A": "1"})));
    }
    request(&envd, "POST", "/init", &[], "{}");
    assert_eq!(envs(), told(serde_json::json!({"A": "1"})));
    request(&envd, "POST", "/init", &[], r#"{"envVars":{"B":"2"}}"#);
    assert_eq!(envs(), told(serde_json::json!({"B": "2"})));
}

#[tokio::test]
async fn a_token_closes_everything_but_two_doors() {
    let envd = Envd::start();
    let init = |token: &str| request(&envd, "POST", "/init", &[], &format!(r#"{{"accessToken":"{token}"}}"#)).0;
    assert_eq!(init("secret"), 204);
    assert_eq!(init("secret"), 204);
    assert_eq!(init("other"), 401);
    assert_eq!(request(&envd, "POST", "/init", &[], "{}").0, 401);
    assert_eq!(request(&envd, "GET", "/health", &[], "").0, 200);

    let right = "X-Access-Token: secret";
    for (method, path) in [
        ("GET", "/envs"),
        ("GET", "/metrics"),
        ("GET", "/init"),
        ("POST", "/health"),
        ("GET", "/nothing"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("POST", "/process.Process/List"),
        ("POST", "/process.Process/Start"),
        ("POST", "/filesystem.Filesystem/Stat"),
        ("POST", "/filesystem.Filesystem/WatchDir"),
    ] {
        for wrong in [&[][..], &["X-Access-Token: secre"], &["X-Access-Token: secret2"], &["X-Access-Token: "]] {
            let (status, _, body) = request(&envd, method, path, wrong, "");
            assert_eq!((status, json(&body)["code"].as_u64()), (401, Some(401)), "{method} {path} {wrong:?}");
        }
        assert_ne!(request(&envd, method, path, &[right], "").0, 401, "{method} {path}");
    }

    let client = envd.client();
    let error = client.list(Default::default()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unauthenticated);
    let options = CallOptions::default().with_header("x-access-token", "secret");
    let run = run_with(&client, sh("echo in"), options).await.unwrap();
    assert_eq!(run.out(), "in\n");
}

#[test]
fn metrics_have_what_clients_read() {
    let envd = Envd::start();
    let (status, _, body) = request(&envd, "GET", "/metrics", &[], "");
    assert_eq!(status, 200);
    let metrics = json(&body);
    for field in [
        "ts",
        "cpu_count",
        "mem_total",
        "mem_used",
        "mem_cache",
        "disk_total",
        "disk_used",
        "mem_total_mib",
        "mem_used_mib",
    ] {
        assert!(metrics[field].as_u64().is_some_and(|value| value > 0), "{field} in {metrics}");
    }
    assert!(metrics["cpu_used_pct"].as_f64().is_some_and(|value| (0.0..=100.0).contains(&value)));
}

#[test]
fn what_is_not_there_says_so_in_json() {
    let envd = Envd::start();
    for (method, path, code) in
        [("GET", "/", 404), ("POST", "/nothing", 404), ("DELETE", "/health", 405), ("GET", "/init", 405)]
    {
        let (status, _, body) = request(&envd, method, path, &[], "");
        assert_eq!(status, code, "{method} {path}");
        assert_eq!(json(&body)["code"].as_u64(), Some(code.into()));
        assert!(json(&body)["message"].is_string());
    }
}

#[test]
fn a_browser_may_ask_without_the_token_whether_it_may_call() {
    let envd = Envd::start();
    assert_eq!(request(&envd, "POST", "/init", &[], r#"{"accessToken":"secret"}"#).0, 204);
    let origin = "Origin: https://example.com";
    let asks = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: x-access-token"];
    for path in ["/process.Process/Start", "/envs"] {
        let (status, head, _) = request(&envd, "OPTIONS", path, &[&[origin][..], &asks].concat(), "");
        assert_eq!(status, 200);
        for line in [
            "access-control-allow-origin: *",
            "access-control-allow-methods: *",
            "access-control-allow-headers: *",
            "access-control-max-age: 7200",
        ] {
            assert!(head.contains(line), "{line} in {head}");
        }
        // The call itself needs the token as ever, and its answer can be read.
        let (status, head, _) = request(&envd, "POST", path, &[origin], "");
        assert_eq!(status, 401);
        assert!(head.contains("access-control-allow-origin: *"), "{head}");
    }
}

#[test]
fn the_control_routes_need_the_token_and_a_machine_of_their_own() {
    let envd = Envd::start();
    assert_eq!(request(&envd, "POST", "/init", &[], r#"{"accessToken":"secret"}"#).0, 204);
    let right = "X-Access-Token: secret";
    for (path, status) in [
        ("/snapshot/prepare", 204),
        ("/snapshot/warm-up", 501),
        ("/freeze", 501),
        ("/freeze?maxWaitMs=1&mode=any", 501),
        ("/unfreeze", 501),
        ("/fsfreeze", 501),
        ("/fsthaw", 501),
        ("/collapse", 501),
    ] {
        for wrong in [&[][..], &["X-Access-Token: other"]] {
            assert_eq!(request(&envd, "POST", path, wrong, "").0, 401, "{path}");
        }
        let (answered, _, body) = request(&envd, "POST", path, &[right], "");
        assert_eq!(answered, status, "{path}: {}", String::from_utf8_lossy(&body));
        assert_eq!(request(&envd, "GET", path, &[right], "").0, 405, "{path}");
    }
    let restore = |more: &str| format!(r#"{{"restore":{{"kind":"resume","entropy":"{}"}}{more}}}"#, "A".repeat(44));
    let init = |headers: &[&str], body: &str| request(&envd, "POST", "/init", headers, body).0;
    assert_eq!(init(&[], &restore(r#","timestamp":1"#)), 401);
    assert_eq!(init(&[right], &restore("")), 400, "no timestamp");
    assert_eq!(init(&[right], r#"{"restore":{"kind":"resume","entropy":"AA"},"timestamp":1}"#), 400);
    assert_eq!(init(&[right], &restore(r#","timestamp":1,"accessToken":"new""#)), 501);
    assert_eq!(request(&envd, "GET", "/envs", &[right], "").0, 200, "what was refused changed nothing");
}

#[test]
fn whoever_has_the_token_may_change_it() {
    let envd = Envd::start();
    let init = |headers: &[&str], body: &str| request(&envd, "POST", "/init", headers, body).0;
    assert_eq!(init(&[], r#"{"accessToken":"old"}"#), 204);
    assert_eq!(init(&["X-Access-Token: wrong"], r#"{"accessToken":"new"}"#), 401);
    assert_eq!(init(&["X-Access-Token: old"], "{}"), 204);
    assert_eq!(init(&["X-Access-Token: old"], r#"{"accessToken":"new"}"#), 204);
    assert_eq!(init(&["X-Access-Token: old"], "{}"), 401);
    assert_eq!(init(&[], r#"{"accessToken":"new"}"#), 204);
}
