//! An imagined terminal, and the one program on it: it shows what is typed, and does what a line says.
//!
//! | line | what it does |
//! |---|---|
//! | `size` | shows rows and columns |
//! | `exit CODE` | ends |
//! | `vanish` | the connection breaks |
//!
//! The program `stuck` takes no input, and shows so.

use std::sync::{Arc, Mutex};

use connectrpc::ConnectError;
use guest_api::process::__buffa::oneof::process_event::Event;
use guest_api::process::__buffa::oneof::process_event::data_event::Output;
use guest_api::process::ProcessEvent;
use guest_api::process::process_event::{DataEvent, EndEvent, StartEvent};
use tokio::sync::{mpsc, watch};

pub(super) type Shown = Result<ProcessEvent, ConnectError>;

/// What a terminal is reached by.
#[derive(Debug, Clone)]
pub(super) struct Terminal {
    /// One waits to be read at a time, as in a terminal that is full.
    typed: mpsc::Sender<Vec<u8>>,
    /// Columns and rows.
    pub size: watch::Sender<(u32, u32)>,
    screen: Arc<Mutex<Screen>>,
}

#[derive(Debug, Default)]
struct Screen {
    watchers: Vec<mpsc::UnboundedSender<Shown>>,
    /// All that was shown, for who comes later.
    kept: Vec<u8>,
}

/// The program's side.
pub(super) struct Program {
    terminal: Terminal,
    typed: mpsc::Receiver<Vec<u8>>,
}

impl Terminal {
    pub(super) fn open(cols: u32, rows: u32) -> (Self, Program) {
        let (to, typed) = mpsc::channel(1);
        let terminal = Self { typed: to, size: watch::Sender::new((cols, rows)), screen: Arc::default() };
        (terminal.clone(), Program { terminal, typed })
    }

    /// Everything from the start event on, what is kept first.
    pub(super) fn watch(&self, pid: u32) -> mpsc::UnboundedReceiver<Shown> {
        let (to, watcher) = mpsc::unbounded_channel();
        let mut screen = self.screen.lock().expect("no panics under this lock");
        let _ = to.send(Ok(event(StartEvent { pid, ..Default::default() })));
        if !screen.kept.is_empty() {
            let _ = to.send(Ok(output(&screen.kept)));
        }
        screen.watchers.push(to);
        watcher
    }

    /// Waits until the terminal takes it; false when its program has ended.
    pub(super) async fn write(&self, bytes: Vec<u8>) -> bool {
        self.typed.send(bytes).await.is_ok()
    }

    fn tell(&self, shown: &Shown) {
        let mut screen = self.screen.lock().expect("no panics under this lock");
        screen.watchers.retain(|watcher| watcher.send(shown.clone()).is_ok());
    }

    fn show(&self, bytes: &[u8]) {
        let mut screen = self.screen.lock().expect("no panics under this lock");
        screen.kept.extend_from_slice(bytes);
        screen.watchers.retain(|watcher| watcher.send(Ok(output(bytes))).is_ok());
    }
}

impl Program {
    /// Runs to its end.
    pub(super) async fn run(mut self, cmd: &str, mut killed: watch::Receiver<bool>) {
        let shown = tokio::select! {
            shown = self.obey(cmd) => shown,
            _ = killed.wait_for(|killed| *killed) => Ok(end(-1)),
        };
        self.terminal.tell(&shown);
    }

    async fn obey(&mut self, cmd: &str) -> Shown {
        if cmd == "stuck" {
            self.terminal.show(b"stuck\n");
            std::future::pending::<()>().await;
        }
        let mut line = Vec::new();
        while let Some(bytes) = self.typed.recv().await {
            self.terminal.show(&bytes);
            for byte in bytes {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                let words = String::from_utf8_lossy(&line).into_owned();
                line.clear();
                match words.split_whitespace().collect::<Vec<_>>().as_slice() {
                    ["size"] => {
                        let (cols, rows) = *self.terminal.size.borrow();
                        self.terminal.show(format!("{rows} {cols}\n").as_bytes());
                    }
                    ["exit", code] => return Ok(end(code.parse().expect("a number"))),
                    ["vanish"] => return Err(ConnectError::unavailable("the guest is gone")),
                    _ => {}
                }
            }
        }
        Ok(end(0))
    }
}

fn event(event: impl Into<Event>) -> ProcessEvent {
    ProcessEvent { event: Some(event.into()), ..Default::default() }
}

fn output(bytes: &[u8]) -> ProcessEvent {
    event(DataEvent { output: Some(Output::Pty(bytes.to_vec())), ..Default::default() })
}

fn end(exit_code: i32) -> ProcessEvent {
    event(EndEvent { exit_code, exited: exit_code >= 0, ..Default::default() })
}
