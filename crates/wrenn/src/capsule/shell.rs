//! `wrenn capsule shell`.

mod window;

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Error, Result, anyhow, bail};
use api::pty::{Answer, Encoding, Request, Size, Start};
use api::{CapsuleId, ErrorCode};
use bytes::Bytes;
use clap::Args;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use reqwest::Upgraded;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::exec::{SIGNALLED, not_run};
use crate::rest::{Client, Refused};
use window::Window;

type Socket = WebSocketStream<Upgraded>;

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
/// Bytes read from standard input at once, and how many such pieces may wait.
const PIECE: usize = 16 * 1024;
const PIECES: usize = 16;

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
        match self.attend(client).await {
            Ok(code) => ExitCode::from(code),
            Err(error) => not_run(&error),
        }
    }

    async fn attend(self, client: &Client) -> Result<u8> {
        let mut session = Session::new()?;
        let mut socket = client.pty(self.id).await?;
        let id = self.id;
        let mut hello = Request::Start(self.start(&session.window));
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

    fn start(self, window: &Window) -> Start {
        let Size { cols, rows } = window.size();
        // A command line is for a shell to take apart.
        let (cmd, args) = match self.cmd {
            Some(line) => (Some("/bin/sh".to_owned()), Some(vec!["-c".to_owned(), line])),
            None => (None, None),
        };
        let term = std::env::var("TERM").ok().filter(|term| window.is_terminal() && !term.is_empty());
        let envs = term.map(|term| [("TERM".to_owned(), term)].into());
        Start { cmd, args, cols: Some(cols.into()), rows: Some(rows.into()), envs, ..Start::default() }
    }
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

/// Bytes for standard output, and where to say that they are written.
type Output = mpsc::Sender<(Bytes, oneshot::Sender<io::Result<()>>)>;

/// Standard input. A thread, not a task: nothing could cancel its read, and the runtime would wait for it at the end.
fn input() -> mpsc::Receiver<Vec<u8>> {
    let (to, typed) = mpsc::channel(PIECES);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            match io::stdin().read(&mut buffer) {
                Ok(read) if read > 0 => {
                    if to.blocking_send(buffer[..read].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return,
            }
        }
    });
    typed
}

/// Standard output, in a thread for the same reason.
fn output() -> Output {
    let (shown, mut from) = mpsc::channel::<(Bytes, oneshot::Sender<_>)>(1);
    std::thread::spawn(move || {
        while let Some((bytes, written)) = from.blocking_recv() {
            let mut stdout = io::stdout().lock();
            // Nobody waits for it any more if the command was interrupted.
            let _ = written.send(stdout.write_all(&bytes).and_then(|()| stdout.flush()));
        }
    });
    shown
}

/// Writes to standard output, at its pace.
async fn show(shown: &Output, bytes: Bytes) -> io::Result<()> {
    let (written, done) = oneshot::channel();
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    shown.send((bytes, written)).await.map_err(|_| gone())?;
    done.await.map_err(|_| gone())?
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
            typed: input(),
            shown: output(),
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
                show(shown, bytes).await?;
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
            // Text that was not asked for, and what only a newer server says.
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

/// The signals that end this command, which must leave the user's terminal as it was.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The number of the next one.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hang_up.recv() => 1,
        }
    }
}
