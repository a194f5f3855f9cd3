//! The bytes of the protocol, as clients that are not ours send and expect them.

use crate::harness::Envd;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;

/// One Connect envelope without flags.
pub fn envelope(body: &str) -> Vec<u8> {
    let mut envelope = vec![0];
    envelope.extend((body.len() as u32).to_be_bytes());
    envelope.extend(body.as_bytes());
    envelope
}

/// Sends a POST as a client that wants the connection closed afterwards.
pub fn send(socket: &mut TcpStream, path: &str, kind: &str, body: &[u8]) {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: capsule\r\nContent-Type: {kind}\r\nConnect-Protocol-Version: 1\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(body).unwrap();
}

/// The status line, the headers and the body of a whole response.
pub fn response(wire: &[u8]) -> (u16, String, Vec<u8>) {
    let end = wire.windows(4).position(|window| window == b"\r\n\r\n").expect("a whole head");
    let head = String::from_utf8(wire[..end].to_vec()).unwrap().to_ascii_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut rest = &wire[end + 4..];
    if !head.contains("transfer-encoding: chunked") {
        return (status, head, rest.to_vec());
    }
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|window| window == b"\r\n").expect("a whole chunk size");
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        if size == 0 {
            return (status, head, body);
        }
        body.extend(&rest[line + 2..line + 2 + size]);
        rest = &rest[line + 2 + size + 2..];
    }
}

/// The envelopes of a streaming response, the last one flagged as the end of the stream.
pub fn events(wire: &[u8]) -> Vec<Value> {
    let (status, head, body) = response(wire);
    assert_eq!(status, 200, "{head}");
    let mut events = Vec::new();
    let mut rest = body.as_slice();
    while let [flags, a, b, c, d, tail @ ..] = rest {
        let size = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        assert_eq!(*flags == 2, tail.len() == size, "the last envelope, and only that, ends the stream");
        events.push(serde_json::from_slice(&tail[..size]).unwrap());
        rest = &tail[size..];
    }
    assert!(rest.is_empty());
    events
}

fn call(envd: &Envd, path: &str, kind: &str, body: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(envd.address).unwrap();
    send(&mut socket, path, kind, body);
    let mut wire = Vec::new();
    socket.read_to_end(&mut wire).unwrap();
    wire
}

fn start(envd: &Envd, body: &Value) -> Vec<u8> {
    call(envd, "/process.Process/Start", "application/connect+json", &envelope(&body.to_string()))
}

#[test]
fn a_stream_in_json_byte_for_byte() {
    let envd = Envd::start();
    let wire = start(&envd, &json!({"process": {"cmd": "/bin/sh", "args": ["-c", "echo hello; exit 3"]}}));
    let (status, head, body) = response(&wire);
    assert_eq!(status, 200);
    assert!(head.contains("\r\ncontent-type: application/connect+json"), "{head}");
    assert!(!head.contains("content-encoding"), "{head}");
    let pid = events(&wire)[0]["event"]["start"]["pid"].as_u64().unwrap();
    let mut expected = envelope(&format!(r#"{{"event":{{"start":{{"pid":{pid}}}}}}}"#));
    expected.extend(envelope(r#"{"event":{"data":{"stdout":"aGVsbG8K"}}}"#));
    let end = r#"{"event":{"end":{"exitCode":3,"exited":true,"status":"exit status 3","error":"exit status 3"}}}"#;
    expected.extend(envelope(end));
    expected.extend(b"\x02\0\0\0\x02{}");
    assert_eq!(String::from_utf8_lossy(&body), String::from_utf8_lossy(&expected));
}

#[test]
fn a_stream_in_protobuf_byte_for_byte() {
    let envd = Envd::start();
    // StartRequest{process: ProcessConfig{cmd: "/bin/echo", args: ["hi"]}}
    let message = b"\x0a\x0f\x0a\x09/bin/echo\x12\x02hi";
    let request = [b"\0\0\0\0\x11".as_slice(), message].concat();
    let wire = call(&envd, "/process.Process/Start", "application/connect+proto", &request);
    let (status, head, body) = response(&wire);
    assert_eq!(status, 200);
    assert!(head.contains("\r\ncontent-type: application/connect+proto"), "{head}");
    // ... start{pid}, whose varint's length depends on the pid, then data and end.
    let tail = [
        b"\0\0\0\0\x09\x0a\x07\x12\x05\x0a\x03hi\n".as_slice(),
        b"\0\0\0\0\x15\x0a\x13\x1a\x11\x10\x01\x1a\x0dexit status 0",
        b"\x02\0\0\0\x02{}",
    ];
    assert!(body.ends_with(&tail.concat()), "{:?}", String::from_utf8_lossy(&body));
}

#[test]
fn a_list_in_json() {
    let envd = Envd::start();
    let wire = call(&envd, "/process.Process/List", "application/json", b"{}");
    let (status, head, body) = response(&wire);
    assert_eq!((status, String::from_utf8_lossy(&body).as_ref()), (200, "{}"));
    assert!(head.contains("\r\ncontent-type: application/json"), "{head}");
}

#[test]
fn errors_before_a_stream_begins_are_its_end() {
    let envd = Envd::start();
    let cases = [
        (json!({"process": {"cmd": ""}}), "invalid_argument"),
        (json!({}), "invalid_argument"),
        (json!({"process": {"cmd": "id", "cwd": "/no/such/place"}}), "invalid_argument"),
        (json!({"process": {"cmd": "id", "envs": {"A=B": "x"}}}), "invalid_argument"),
        (json!({"process": {"cmd": "a\u{0}b"}}), "invalid_argument"),
        (json!({"process": {"cmd": "id"}, "pty": {"size": {"cols": 70000, "rows": 1}}}), "invalid_argument"),
    ];
    for (request, code) in cases {
        let events = events(&start(&envd, &request));
        assert_eq!(events.len(), 1, "{request}");
        assert_eq!(events[0]["error"]["code"], code, "{request}: {}", events[0]);
    }
}

#[test]
fn newer_clients_are_understood() {
    let envd = Envd::start();
    let request = json!({"process": {"cmd": "/bin/true", "novelty": {"deep": [1]}}, "another": "one", "stdin": null});
    let events = events(&start(&envd, &request));
    assert_eq!(events[1]["event"]["end"]["status"], "exit status 0", "{events:?}");
}

#[test]
fn what_is_no_message_is_refused() {
    let envd = Envd::start();
    let wire = call(&envd, "/process.Process/List", "application/json", b"{\"surprise\": [");
    assert_eq!(response(&wire).0, 400);
    let wire = call(&envd, "/process.Process/List", "text/plain", b"{}");
    assert_eq!(response(&wire).0, 415);
    let wire = call(&envd, "/process.Process/Nothing", "application/json", b"{}");
    assert!(matches!(response(&wire).0, 404 | 501), "{}", String::from_utf8_lossy(&wire));
}
