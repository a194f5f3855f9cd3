//! `wrenn capsule shell`.

mod window;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Error, Result, anyhow, bail};
use api::pty::{Answer, Encoding, Request, Size, Start};
use api::{CapsuleId, ErrorCode};
use clap::Args;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::exec::{SIGNALLED, not_run};
use super::stdio::{self, Output, Signals};
use crate::rest::{Client, Refused, Socket};
use window::Window;

/// Pauses before each attempt to come back after the connection broke: together longer than a restart of the server.
const RETRIES: [Duration; 6] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
];
/// How often the connection is used when nobody types, and how long the server may stay silent until it counts as broken.
const PING: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(65);
/// How often the end of our input is typed, see [`Session::speak`].
const END_AGAIN: Duration = Duration::from_secs(1);
/// What ends the input of a program on a terminal: ctrl-D.
const END_OF_INPUT: u8 = 4;

/// Opens a shell in a capsule, and exits with its code.
///
/// When the connection breaks the shell lives on, and this command comes back to it by itself. Without a terminal it types
/// what it reads from standard input. Exits with 125 when there was no shell, or it was lost.
#[derive(Debug, Args)]
pub(super) struct Shell {
    /// The capsule.
    id: CapsuleId,
    /// A command line to run instead of the shell.
    #[arg(long, value_name = "CMD")]
    cmd: Option<String>,
}

impl Shell {
    pub(super) async fn run(self, client: &Client) -> ExitCode {
        // A command line is for a shell to take apart.
        let (cmd, args) = match self.cmd {
            Some(line) => (Some("/bin/sh".to_owned()), Some(vec!["-c".to_owned(), line])),
            None => (None, None),
        };
        attend(client, self.id, Start { cmd, args, ..Start::default() }).await
    }
}

/// Runs `start` on a terminal of the user's size and kind, until it ends, over as many connections as that takes.
pub(super) async fn attend(client: &Client, id: CapsuleId, start: Start) -> ExitCode {
    match carry_on(client, id, start).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => not_run(&error),
    }
}

async fn carry_on(client: &Client, id: CapsuleId, start: Start) -> Result<u8> {
    let mut session = Session::new()?;
    let mut socket = client.pty(id).await?;
    let mut hello = Request::Start(on(&session.window, start));
    loop {
        let broken = match session.carry(socket, &hello).await? {
            End::Exited(code) => return Ok(u8::try_from(code).unwrap_or(SIGNALLED)),
            End::Interrupted(signal) => return Ok(128u8.saturating_add(signal)),
            End::Broken(why) => why,
        };
        let Some(tag) = session.tag.clone() else {
            return Err(broken.context("the connection broke before the shell began"));
        };
        eprint(&format!("the connection broke ({broken:#}); coming back to {tag}"));
        socket = tokio::select! {
            socket = come_back(client, id, &mut session.tries, broken) => socket?,
            signal = session.signals.next() => return Ok(128u8.saturating_add(signal)),
        };
        hello = Request::Connect { tag, encoding: Encoding::Binary };
    }
}

fn on(window: &Window, mut start: Start) -> Start {
    let Size { cols, rows } = window.size();
    if let Some(term) = std::env::var("TERM").ok().filter(|term| window.is_terminal() && !term.is_empty()) {
        start.envs.get_or_insert_default().entry("TERM".to_owned()).or_insert(term);
    }
    Start { cols: Some(cols.into()), rows: Some(rows.into()), ..start }
}

/// A new connection. A server that refuses will not do otherwise if asked again; one that is away may come back.
async fn come_back(client: &Client, id: CapsuleId, tries: &mut usize, mut broken: Error) -> Result<Socket> {
    while let Some(pause) = RETRIES.get(*tries) {
        *tries += 1;
        sleep(*pause).await;
        match client.pty(id).await {
            Ok(socket) => return Ok(socket),
            Err(error) => match error.downcast_ref::<Refused>() {
                Some(refused) if !passes(refused.code) => return Err(error),
                _ => broken = error,
            },
        }
    }
    Err(broken.context("the connection is gone"))
}

/// Whether a refusal is of the moment: a part of Wrenn is away, while the shell lives on.
fn passes(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::AgentError | ErrorCode::HostUnavailable | ErrorCode::Unavailable)
}

/// A line for the user, beside what the shell shows.
#[expect(clippy::print_stderr, reason = "this is what standard error is for")]
fn eprint(line: &str) {
    eprintln!("wrenn: {line}");
}

/// What stays while connections come and go.
struct Session {
    window: Window,
    /// Standard input, piece by piece; closed at its end.
    typed: mpsc::Receiver<Vec<u8>>,
    /// Standard output.
    shown: Output,
    /// Standard input has ended, and its end is still to be typed.
    ended: bool,
    /// Whether the last byte typed ended a line.
    at_line_start: bool,
    resized: Signal,
    signals: Signals,
    tag: Option<String>,
    /// Attempts to come back since a shell was last there.
    tries: usize,
}

/// How a connection ended.
enum End {
    Exited(i32),
    /// By a signal to this command.
    Interrupted(u8),
    Broken(Error),
}

impl Session {
    fn new() -> Result<Self> {
        Ok(Self {
            window: Window::of_this_process(),
            typed: stdio::input(),
            shown: Output::stdout(),
            ended: false,
            at_line_start: true,
            resized: signal(SignalKind::window_change())?,
            signals: Signals::new()?,
            tag: None,
            tries: 0,
        })
    }

    /// Attends one connection, from its first message to its end.
    async fn carry(&mut self, socket: Socket, hello: &Request) -> Result<End> {
        let (mut to, mut from) = socket.split();
        if let Err(error) = to.send(message(hello)).await {
            return Ok(End::Broken(error.into()));
        }
        let (begin, begun) = watch::channel(false);
        let Self { window, typed, shown, ended, at_line_start, resized, signals, tag, tries } = self;
        let mut speaker = Speaker { window, typed, ended, at_line_start, resized };
        // At once, each at its own pace: who waits to speak must still listen, or both sides would wait for each other.
        let end = tokio::select! {
            end = listen(&mut from, window, shown, tag, &begin) => end,
            why = speaker.speak(&mut to, begun) => Ok(End::Broken(why)),
            signal = signals.next() => Ok(End::Interrupted(signal)),
        };
        // A server that takes connections only to break them is not there.
        if *begin.borrow() {
            *tries = 0;
        }
        end
    }
}

/// Shows what the shell writes. The user's terminal is raw while a shell is there to type into, and only then.
async fn listen(
    from: &mut SplitStream<Socket>,
    window: &Window,
    shown: &Output,
    tag: &mut Option<String>,
    begin: &watch::Sender<bool>,
) -> Result<End> {
    let mut raw = None;
    loop {
        let Ok(next) = timeout(SILENCE, from.next()).await else {
            return Ok(End::Broken(anyhow!("the server has been silent for {} seconds", SILENCE.as_secs())));
        };
        let text = match next {
            Some(Ok(Message::Binary(bytes))) => {
                shown.write(bytes).await?;
                continue;
            }
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Close(_))) | None => return Ok(End::Broken(anyhow!("the server closed it"))),
            Some(Ok(_)) => continue,
            Some(Err(error)) => return Ok(End::Broken(error.into())),
        };
        match serde_json::from_str(&text) {
            Ok(Answer::Started { tag: given, .. }) => {
                *tag = Some(given);
                if raw.is_none() {
                    raw = window.raw()?;
                }
                begin.send_replace(true);
            }
            Ok(Answer::Exit { exit_code }) => return Ok(End::Exited(exit_code)),
            Ok(Answer::Error { code, data, fatal: true }) if tag.is_some() && passes(code) => {
                return Ok(End::Broken(Error::msg(data)));
            }
            Ok(Answer::Error { data, fatal: true, .. }) => bail!(data),
            Ok(Answer::Error { data, fatal: false, .. }) => eprint(&format!("{data}\r")),
            // Not asked for, or of a newer server.
            Ok(Answer::Output { .. }) | Err(_) => {}
        }
    }
}

/// The speaking half of a [`Session`].
struct Speaker<'a> {
    window: &'a Window,
    typed: &'a mut mpsc::Receiver<Vec<u8>>,
    ended: &'a mut bool,
    at_line_start: &'a mut bool,
    resized: &'a mut Signal,
}

impl Speaker<'_> {
    /// Types standard input once the shell has `begun`, and tells of new window sizes. Why it could not go on.
    ///
    /// At the end of standard input it types ctrl-D, and again until the shell ends: a program that is just changing the
    /// terminal's mode, as shells do around every command, may take one for a plain byte.
    async fn speak(&mut self, to: &mut SplitSink<Socket, Message>, mut begun: watch::Receiver<bool>) -> Error {
        let mut pings = interval(PING);
        let mut ends = interval(END_AGAIN);
        ends.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ready = false;
        loop {
            let message = tokio::select! {
                typed = self.typed.recv(), if ready && !*self.ended => match typed {
                    Some(bytes) => {
                        *self.at_line_start = bytes.last() == Some(&b'\n');
                        Message::binary(bytes)
                    }
                    None => {
                        *self.ended = true;
                        // A line without an end would swallow it.
                        if *self.at_line_start { continue } else { Message::binary(&b"\n"[..]) }
                    }
                },
                _ = ends.tick(), if ready && *self.ended => Message::binary(vec![END_OF_INPUT]),
                _ = begun.changed(), if !ready => {
                    ready = true;
                    // It may have changed since it was last told.
                    if !self.window.is_terminal() { continue }
                    self.size()
                }
                _ = self.resized.recv(), if ready && self.window.is_terminal() => self.size(),
                _ = pings.tick() => Message::Ping(Default::default()),
            };
            if let Err(error) = to.send(message).await {
                return error.into();
            }
        }
    }

    fn size(&self) -> Message {
        let Size { cols, rows } = self.window.size();
        message(&Request::Resize { cols: cols.into(), rows: rows.into() })
    }
}

fn message(request: &Request) -> Message {
    Message::text(serde_json::to_string(request).expect("a request is plain data"))
}
