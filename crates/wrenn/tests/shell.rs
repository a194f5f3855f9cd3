//! `wrenn capsule shell` on a real terminal, against a stand-in with the public messages.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use api::pty::{Answer, Request};
use api::{ErrorBody, ErrorCode, ErrorDetail};
use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Json, Router};
use rustix::fd::OwnedFd;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

const ID: &str = "cl-0000000000000000000000001";

/// The text messages it got.
type Seen = Arc<Mutex<Vec<Request>>>;

struct Server {
    runtime: tokio::runtime::Runtime,
    url: String,
    seen: Seen,
}

impl Server {
    fn start() -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let seen = Seen::default();
        let routes = Router::new().route("/v1/capsules/{id}/pty", any(pty)).with_state(seen.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { runtime, url, seen }
    }

    fn shell(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(words).args(["capsule", "shell", ID, "--url", &self.url]);
        command.env("WRENN_API_KEY", "wrn_1").env("TERM", "vt100").env("NO_COLOR", "1").env_remove("WRENN_BASE_URL");
        command
    }

    fn end(self) {
        self.runtime.shutdown_background();
    }
}

async fn pty(State(seen): State<Seen>, headers: HeaderMap, upgrade: WebSocketUpgrade) -> Response {
    if headers["x-api-key"] != "wrn_1" {
        let error = ErrorDetail { code: ErrorCode::Unauthorized, message: "the API key is not known".into() };
        return (StatusCode::UNAUTHORIZED, Json(ErrorBody { error })).into_response();
    }
    upgrade.on_upgrade(|socket| attend(seen, socket))
}

/// Shows what is typed; `exit`, `drop` and `fail` on a line, and the end of input, do what they say.
async fn attend(seen: Seen, mut socket: WebSocket) {
    let text = |answer| Message::Text(serde_json::to_string(&answer).unwrap().into());
    while let Some(Ok(message)) = socket.recv().await {
        match message {
            Message::Text(said) => {
                let request: Request = serde_json::from_str(&said).unwrap();
                seen.lock().unwrap().push(request.clone());
                if matches!(request, Request::Start(_) | Request::Connect { .. }) {
                    socket.send(text(Answer::Started { pid: 7, tag: "pty-7".into() })).await.unwrap();
                    socket.send(Message::Binary("ready\r\n".into())).await.unwrap();
                }
            }
            Message::Binary(bytes) => {
                socket.send(Message::Binary(bytes.clone())).await.unwrap();
                let typed = String::from_utf8(bytes.to_vec()).unwrap();
                let fatal = |code| Answer::Error { code, data: "no more".into(), fatal: true };
                let last = match typed.trim_end_matches(['\r', '\n']) {
                    "exit" => Answer::Exit { exit_code: 7 },
                    "\u{4}" => Answer::Exit { exit_code: 0 },
                    "fail" => fatal(ErrorCode::InvalidState),
                    "away" => fatal(ErrorCode::AgentError),
                    "drop" => return,
                    _ => continue,
                };
                socket.send(text(last)).await.unwrap();
            }
            _ => {}
        }
    }
}

/// A terminal with the command on it.
struct Terminal {
    ours: File,
    theirs: OwnedFd,
    child: Child,
    shown: String,
}

impl Terminal {
    fn open(server: &Server) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).unwrap();
        unlockpt(&ours).unwrap();
        let theirs = ioctl_tiocgptpeer(&ours, flags).unwrap();
        tcsetwinsize(&ours, size(120, 40)).unwrap();
        // It makes the terminal the controlling one, which is who hears of its resizes.
        let mut command = server.shell("setsid", &["--ctty", env!("CARGO_BIN_EXE_wrenn")]);
        let end = || Stdio::from(theirs.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        Self { ours: ours.into(), theirs, child, shown: String::new() }
    }

    fn write(&mut self, text: &str) {
        self.ours.write_all(text.as_bytes()).unwrap();
    }

    /// Waits until that is shown, and forgets it and what was before.
    fn until(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        while !self.shown.contains(text) {
            let read = self.ours.read(&mut buffer).unwrap();
            self.shown.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
        let end = self.shown.find(text).unwrap() + text.len();
        self.shown.drain(..end);
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.theirs)
            .unwrap()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

fn size(cols: u16, rows: u16) -> Winsize {
    Winsize { ws_col: cols, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

#[test]
fn a_terminal_is_raw_while_the_shell_lives() {
    let server = Server::start();
    let mut terminal = Terminal::open(&server);
    terminal.until("ready\r\n");
    assert!(terminal.is_raw());
    // Every key is the shell's, ctrl-C too.
    terminal.write("\u{3}a");
    terminal.until("\u{3}a");
    tcsetwinsize(&terminal.ours, size(132, 43)).unwrap();
    let resized = Request::Resize { cols: 132, rows: 43 };
    while !server.seen.lock().unwrap().contains(&resized) {
        std::thread::yield_now();
    }
    terminal.write("exit\r");
    assert_eq!(terminal.code(), Some(7));
    assert!(!terminal.is_raw());
    let Request::Start(start) = server.seen.lock().unwrap()[0].clone() else { panic!("no start") };
    assert_eq!((start.cols, start.rows, start.cmd), (Some(120), Some(40), None));
    assert_eq!(start.envs.unwrap()["TERM"], "vt100");

    // Also when it is told to go.
    let mut terminal = Terminal::open(&server);
    terminal.until("ready\r\n");
    let pid = rustix::process::Pid::from_child(&terminal.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(terminal.code(), Some(128 + 15));
    assert!(!terminal.is_raw());
    server.end();
}

#[test]
fn it_comes_back_when_the_connection_breaks() {
    let server = Server::start();
    let mut terminal = Terminal::open(&server);
    for how in ["drop", "away"] {
        terminal.until("ready\r\n");
        terminal.write(how);
        terminal.until("coming back to pty-7");
    }
    terminal.until("ready\r\n");
    assert!(terminal.is_raw());
    assert_eq!(
        server
            .seen
            .lock()
            .unwrap()
            .iter()
            .filter(|said| matches!(said, Request::Connect { tag, .. } if tag == "pty-7"))
            .count(),
        2
    );
    terminal.write("fail");
    terminal.until("error: no more");
    assert_eq!(terminal.code(), Some(125));
    assert!(!terminal.is_raw());
    server.end();
}

#[test]
fn without_a_terminal_it_is_a_pipe() {
    let server = Server::start();
    let run = |input: &str, words: &[&str]| {
        let mut command = server.shell(env!("CARGO_BIN_EXE_wrenn"), &[]);
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // One that was refused reads nothing.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(run("exit\n", &["--cmd", "top -b"]), (Some(7), "ready\r\nexit\n".into(), String::new()));
    let Request::Start(start) = server.seen.lock().unwrap()[0].clone() else { panic!("no start") };
    assert_eq!((start.cols, start.rows, start.envs), (Some(80), Some(24), None));
    assert_eq!((start.cmd.as_deref(), start.args), (Some("/bin/sh"), Some(vec!["-c".into(), "top -b".into()])));
    // The end of input ends the shell, after a line that was not finished.
    let (code, shown, _) = run("last", &[]);
    assert_eq!(code, Some(0));
    assert!(shown.starts_with("ready\r\nlast\n\u{4}"), "{shown:?}");
    let refused = run("", &["--api-key", "wrn_2"]);
    assert_eq!(refused, (Some(125), String::new(), "error: the API key is not known\n".into()));
    server.end();
}
