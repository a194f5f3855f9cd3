//! The least HTTP client that can talk to the API: one connection per request.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::DEADLINE;

/// The API of one process.
#[derive(Clone)]
pub struct Api {
    socket: PathBuf,
}

/// A status and the body: JSON, or null where there is none.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Api {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Sends a request whose body is `body`, unless that is null.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.raw(method, path, &body)
    }

    /// Sends a request with any bytes for a body.
    pub fn raw(&self, method: &str, path: &str, body: &str) -> Answer {
        self.raw_and_stay(method, path, body).0
    }

    /// The same, and the connection, on which there may be more answers.
    pub fn raw_and_stay(&self, method: &str, path: &str, body: &str) -> (Answer, UnixStream) {
        let sent = self.send(method, path, body);
        let mut stream = sent.unwrap_or_else(|error| panic!("sending {method} {path}: {error}"));
        let answer =
            read_answer(&mut stream).unwrap_or_else(|error| panic!("{method} {path} was not answered: {error}"));
        (answer, stream)
    }

    /// Sends a request whose answer nobody waits for.
    pub fn send_and_hang_up(&self, method: &str, path: &str, body: &Value) {
        drop(self.send(method, path, &body.to_string()).unwrap());
    }

    fn send(&self, method: &str, path: &str, body: &str) -> std::io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        Ok(stream)
    }

    /// A request that must succeed; its answer's body.
    #[track_caller]
    pub fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let answer = self.request(method, path, &body);
        assert!(answer.status == 204 || answer.status == 200, "{method} {path}: {answer:?}");
        assert_eq!(answer.status == 204, answer.body.is_null(), "{method} {path}: {answer:?}");
        answer.body
    }

    #[track_caller]
    pub fn put(&self, path: &str, body: Value) {
        self.ok("PUT", path, body);
    }

    #[track_caller]
    pub fn patch(&self, path: &str, body: Value) {
        self.ok("PATCH", path, body);
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.ok("GET", path, Value::Null)
    }

    /// A request that must be refused with 400; its fault message.
    #[track_caller]
    pub fn refused(&self, method: &str, path: &str, body: Value) -> String {
        let answer = self.request(method, path, &body);
        assert_eq!(answer.status, 400, "{method} {path}: {answer:?}");
        let message = answer.body["fault_message"].as_str().unwrap_or_else(|| panic!("no fault message: {answer:?}"));
        message.to_owned()
    }
}

fn read_answer(stream: &mut UnixStream) -> std::io::Result<Answer> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        read_more(stream, &mut bytes)?;
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    let status = head.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or_default();
    let length = head
        .lines()
        .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok())
        .unwrap_or(0);
    while bytes.len() < head_end + length {
        read_more(stream, &mut bytes)?;
    }
    let body = &bytes[head_end..];
    let body = match body {
        b"" => Value::Null,
        // Firecracker's own words are not always escaped as JSON wants it, so those of a refusal are taken as they come.
        body if status >= 400 => {
            serde_json::from_slice(body).unwrap_or_else(|_| json!({ "fault_message": String::from_utf8_lossy(body) }))
        }
        body => serde_json::from_slice(body)?,
    };
    Ok(Answer { status, body })
}

fn read_more(stream: &mut UnixStream, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    let mut chunk = [0; 4096];
    match stream.read(&mut chunk)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        count => {
            bytes.extend_from_slice(&chunk[..count]);
            Ok(())
        }
    }
}
