//! A terminal in a capsule, through every hop.

use end_to_end::Up;
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// A client of one terminal.
struct Terminal {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    shown: String,
}

impl Terminal {
    async fn open(up: &Up, id: &str, hello: Value) -> Self {
        let url = format!("{}/v1/capsules/{id}/pty", up.url().replacen("http", "ws", 1));
        let mut request = url.into_client_request().unwrap();
        request.headers_mut().insert("x-api-key", up.api_key().parse().unwrap());
        let (socket, _) = connect_async(request).await.unwrap();
        let mut terminal = Self { socket, shown: String::new() };
        terminal.say(hello).await;
        terminal
    }

    async fn say(&mut self, message: Value) {
        self.socket.send(Message::text(message.to_string())).await.unwrap();
    }

    async fn write(&mut self, text: &str) {
        self.socket.send(Message::binary(text.as_bytes().to_vec())).await.unwrap();
    }

    /// The next message that is not output.
    async fn told(&mut self) -> Value {
        loop {
            match self.socket.next().await.unwrap_or_else(|| panic!("no more after {:?}", self.shown)).unwrap() {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Binary(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Message::Close(_) => panic!("closed after {:?}", self.shown),
                _ => {}
            }
        }
    }

    /// Waits until that is shown, and forgets what was shown before it.
    async fn until(&mut self, text: &str) {
        while !self.shown.contains(text) {
            match self.socket.next().await.unwrap_or_else(|| panic!("no more after {:?}", self.shown)).unwrap() {
                Message::Binary(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Message::Text(text) => panic!("{text} after {:?}", self.shown),
                _ => {}
            }
        }
        let end = self.shown.find(text).unwrap() + text.len();
        self.shown.drain(..end);
    }
}

#[tokio::test]
async fn a_shell_on_a_terminal() {
    let up = Up::start();
    let id = up.create().await;

    // What is typed before the shell runs waits for it.
    let mut terminal = Terminal::open(&up, &id, json!({"type": "start", "cols": 0, "rows": 0})).await;
    terminal.write("stty size; exit 7\n").await;
    let started = terminal.told().await;
    assert_eq!(started["type"], "started");
    assert!(started["pid"].as_u64().unwrap() > 1 && started["tag"].as_str().unwrap().starts_with("pty-"), "{started}");
    assert_eq!(terminal.told().await, json!({"type": "exit", "exit_code": 7}));
    assert!(terminal.shown.contains("24 80\r\n"), "{:?}", terminal.shown);

    // What is typed after a resize finds the new size.
    let hello = json!({"type": "start", "cmd": "/bin/sh", "envs": {"PS1": "ready> "}, "cols": 100, "rows": 30});
    let mut terminal = Terminal::open(&up, &id, hello).await;
    let started = terminal.told().await;
    terminal.until("ready> ").await;
    terminal.write("stty size\n").await;
    terminal.until("30 100\r\n").await;
    terminal.say(json!({"type": "resize", "cols": 132, "rows": 43})).await;
    terminal.write("stty size\n").await;
    terminal.until("43 132\r\n").await;

    // A client that leaves takes nothing with it, and finds the same process again, with what it showed.
    terminal.write("MARK=still-here\n").await;
    terminal.until("ready> ").await;
    drop(terminal);
    let tag = &started["tag"];
    let mut terminal = Terminal::open(&up, &id, json!({"type": "connect", "tag": tag})).await;
    assert_eq!(terminal.told().await, json!({"type": "started", "pid": started["pid"], "tag": tag}));
    terminal.until("43 132\r\n").await;
    terminal.write("echo $MARK $$\n").await;
    terminal.until(&format!("still-here {}\r\n", started["pid"])).await;

    // SIGKILL passes whatever waits to be typed.
    terminal.write("sleep 1234\n").await;
    terminal.until("sleep 1234\r\n").await;
    terminal.say(json!({"type": "kill"})).await;
    assert_eq!(terminal.told().await, json!({"type": "exit", "exit_code": -1}));
    let mut late = Terminal::open(&up, &id, json!({"type": "connect", "tag": "no-such-tag"})).await;
    let error = late.told().await;
    assert_eq!((&error["type"], &error["code"], &error["fatal"]), (&json!("error"), &json!("not_found"), &json!(true)));
}

#[tokio::test]
async fn much_of_both_arrives_whole_and_in_order() {
    let up = Up::start();
    let id = up.create().await;
    let script = "stty raw -echo; echo ready; head -c 4000000 | sha256sum; seq 1000000 | sha256sum; seq 1000000";
    let hello = json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", script]});
    let mut terminal = Terminal::open(&up, &id, hello).await;
    terminal.told().await;
    terminal.until("ready\n").await;
    let typed: String = (0..).map(|index: u32| format!("{index:07}\n")).take(500_000).collect();
    for piece in typed.as_bytes().chunks(100_001) {
        terminal.socket.send(Message::binary(piece.to_vec())).await.unwrap();
    }
    let exit = terminal.told().await;
    assert_eq!(exit, json!({"type": "exit", "exit_code": 0}));
    let sha = |text: &str| hex::encode(<sha2::Sha256 as sha2::Digest>::digest(text));
    let mut lines = terminal.shown.splitn(3, '\n');
    assert_eq!(lines.next().unwrap(), format!("{}  -", sha(&typed)));
    let shown = lines.next().unwrap().strip_suffix("  -").unwrap();
    assert_eq!(sha(lines.next().unwrap()), shown);
}

#[tokio::test]
async fn the_shell_command_without_a_terminal() {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    let up = Up::start();
    let id = up.create().await;
    let shell = |cmd: &str| {
        let program = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("wrenn");
        let mut command = Command::new(program);
        command.args(["capsule", "shell", &id, "--url", up.url(), "--api-key", up.api_key(), "--cmd", cmd]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut child = shell("bash");
    child.stdin.take().unwrap().write_all(b"stty size; echo ca$((1))va; exit 5").unwrap();
    let mut shown = String::new();
    child.stdout.take().unwrap().read_to_string(&mut shown).unwrap();
    assert!(shown.contains("24 80\r\n") && shown.contains("ca1va\r\n"), "{shown:?}");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    // The end of input ends the shell.
    let mut child = shell("bash");
    child.stdin.take().unwrap().write_all(b"sleep 1\ntrue\n").unwrap();
    child.stdout.take().unwrap().read_to_string(&mut shown).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
