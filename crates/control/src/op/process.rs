//! Processes in a capsule: started, found again, followed, fed and ended.

use std::time::Duration;

use agent_api::Transport;
use api::{ExecSpec, ProcessList, Selector, Signal, pty};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use connectrpc::client::{CallOptions, ClientTransport, ServerStream};
use connectrpc::{ConnectError, ErrorCode as Code};
use guest_api::process::__buffa::oneof::process_input::Input;
use guest_api::process::__buffa::oneof::process_selector::Selector as Which;
use guest_api::process::__buffa::view::oneof::process_event::Event as Wire;
use guest_api::process::__buffa::view::oneof::process_event::data_event::Output as WireOutput;
use guest_api::process::{
    CloseStdinRequest, ConnectRequest, ConnectResponseView, ListRequest, PTY, ProcessConfig, ProcessInput,
    ProcessSelector, SendInputRequest, SendSignalRequest, Signal as WireSignal, StartRequest, StartResponseView,
    UpdateRequest, pty as wire_pty,
};
use tokio::time::timeout;

use super::Error;
use super::files::large;
use super::guest::{Guest, refused_by_host};

type Stream<View> = ServerStream<<Transport as ClientTransport>::ResponseBody, View>;

/// How long a process may take to begin.
const BEGIN: Duration = Duration::from_secs(25);
/// How long the guest may take for what costs it nothing: a list, a signal, a resize.
const QUICK: Duration = Duration::from_secs(10);
/// How long to wait for a stream to close after its last event, before its connection is given up instead.
const CLOSE: Duration = Duration::from_millis(250);

/// What to start besides the command itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manner {
    /// With a terminal of that size.
    pub terminal: Option<pty::Size>,
    /// With a standard input that will be written to. A terminal always has one.
    pub stdin: bool,
    /// Ended with its whole group after that long.
    pub limit: Option<Duration>,
}

/// A process that runs. Dropping it leaves the process as it is.
pub struct Process {
    guest: Guest,
    pub pid: u32,
    terminal: bool,
}

/// What a process does, from where one joined: at first everything, later the last of it.
pub struct Events {
    source: Source,
    guest: Guest,
}

enum Source {
    Started(Stream<StartResponseView<'static>>),
    Joined(Stream<ConnectResponseView<'static>>),
}

/// Where output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Stdout,
    Stderr,
    Terminal,
}

/// What a process does.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    Output(Output, Bytes),
    /// The last.
    Exit(Exit),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// -1 when a signal ended it.
    pub code: i32,
    pub by_signal: bool,
}

/// What comes over the wire.
enum Heard {
    Begun(u32),
    Event(Event),
}

/// A name for a process whose client brought none.
pub fn random_tag(kind: &str) -> String {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    format!("{kind}-{}", hex::encode(bytes))
}

/// Starts a process; the events are everything it does.
pub async fn start(guest: &Guest, spec: &ExecSpec, manner: Manner) -> Result<(Process, Events), Error> {
    let mut options = CallOptions::default();
    if let Some(limit) = manner.limit {
        // The guest keeps it. It is only a header here: this side must not stop listening before the guest has spoken.
        options = options.with_header("connect-timeout-ms", limit.as_millis().to_string());
    }
    if let Some(user) = &spec.user {
        options = options.with_header("authorization", format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:"))));
    }
    let config = ProcessConfig {
        cmd: spec.cmd.clone(),
        args: spec.args.clone(),
        envs: spec.envs.clone().into_iter().collect(),
        cwd: spec.cwd.clone(),
        ..Default::default()
    };
    let request = StartRequest {
        process: config.into(),
        pty: manner.terminal.map(wire_size).into(),
        tag: spec.tag.clone(),
        stdin: Some(manner.stdin),
        ..Default::default()
    };
    let begin = async {
        let started = guest.processes().start_with_options(request, options).await;
        let source = Source::Started(started.map_err(|error| guest.failed(error))?);
        begun(guest, source, |error| refusal(guest, error, spec)).await
    };
    let (pid, events) = within_begin(begin).await?;
    Ok((Process { guest: guest.clone(), pid, terminal: manner.terminal.is_some() }, events))
}

/// Joins a process that runs, or ended a moment ago.
pub async fn connect(guest: &Guest, selector: Selector) -> Result<(Process, Events), Error> {
    let request = ConnectRequest { process: which(&selector).into(), ..Default::default() };
    let begin = async {
        let joined = guest.processes().connect_with_options(request, CallOptions::default()).await;
        let source = Source::Joined(joined.map_err(|error| guest.failed(error))?);
        begun(guest, source, |error| unknown(guest, error, &selector)).await
    };
    let (pid, events) = within_begin(begin).await?;
    // Whether it has a terminal shows when input is refused.
    Ok((Process { guest: guest.clone(), pid, terminal: true }, events))
}

/// Everything that was started and runs, oldest first.
pub async fn list(guest: &Guest) -> Result<ProcessList, Error> {
    let options = large(quick());
    let listed = guest.processes().list_with_options(ListRequest::default(), options).await;
    let listed = listed.map_err(|error| guest.failed(error))?.into_owned();
    let processes = listed.processes.into_iter().map(|info| {
        let config = info.config.into_option().unwrap_or_default();
        api::Process { pid: info.pid, tag: info.tag, cmd: config.cmd, args: config.args }
    });
    Ok(ProcessList { processes: processes.collect() })
}

/// Sends a signal to a process and its whole group.
pub async fn signal(guest: &Guest, selector: &Selector, signal: Signal) -> Result<(), Error> {
    let signal = match signal {
        Signal::Term => WireSignal::SIGNAL_SIGTERM,
        Signal::Kill => WireSignal::SIGNAL_SIGKILL,
    };
    let request = SendSignalRequest { process: which(selector).into(), signal: signal.into(), ..Default::default() };
    let sent = guest.processes().send_signal_with_options(request, quick()).await;
    sent.map(drop).map_err(|error| unknown(guest, error, selector))
}

fn quick() -> CallOptions {
    CallOptions::default().with_timeout(QUICK)
}

async fn within_begin<T>(begin: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(BEGIN, begin).await.map_err(|_| Error::GuestAnswer("the process did not begin")).flatten()
}

/// Waits for the pid with which every stream begins.
async fn begun(
    guest: &Guest,
    mut source: Source,
    refusal: impl Fn(ConnectError) -> Error,
) -> Result<(u32, Events), Error> {
    match source.read().await.map_err(refusal)?? {
        Heard::Begun(pid) => Ok((pid, Events { source, guest: guest.clone() })),
        Heard::Event(_) => Err(Error::GuestAnswer("output before the start")),
    }
}

/// Why a process did not start. What the guest objects to is the client's to mend.
fn refusal(guest: &Guest, error: ConnectError, spec: &ExecSpec) -> Error {
    match error.code {
        _ if refused_by_host(&error) => guest.failed(error),
        Code::InvalidArgument | Code::NotFound | Code::PermissionDenied | Code::FailedPrecondition => {
            let why = error.message.as_deref().unwrap_or("the guest does not say why");
            match &spec.cwd {
                Some(cwd) => Error::Refused(format!("cannot start cmd `{}` with cwd `{cwd}`: {why}", spec.cmd)),
                None => Error::Refused(format!("cannot start cmd `{}`: {why}", spec.cmd)),
            }
        }
        // Of the capsule's users: our own right to be here is the host's matter.
        Code::Unauthenticated if spec.user.is_some() => {
            Error::Refused(format!("user `{}` is not one of the capsule's", spec.user.as_deref().unwrap_or_default()))
        }
        _ => guest.failed(error),
    }
}

fn unknown(guest: &Guest, error: ConnectError, selector: &Selector) -> Error {
    match guest.failed(error) {
        Error::Guest(error) if error.code == Code::NotFound => Error::NoProcess(selector.clone()),
        error => error,
    }
}

fn which(selector: &Selector) -> ProcessSelector {
    let which = match selector {
        Selector::Pid(pid) => Which::Pid(*pid),
        Selector::Tag(tag) => Which::Tag(tag.clone()),
    };
    ProcessSelector { selector: Some(which), ..Default::default() }
}

fn wire_size(size: pty::Size) -> PTY {
    let size = wire_pty::Size { cols: size.cols.into(), rows: size.rows.into(), ..Default::default() };
    PTY { size: size.into(), ..Default::default() }
}

impl Source {
    async fn read(&mut self) -> Result<Result<Heard, Error>, ConnectError> {
        loop {
            let heard = match self {
                Self::Started(stream) => match stream.message().await? {
                    Some(message) => understand(message.view().event.event.as_ref()),
                    None => Err(Error::GuestAnswer("no end")),
                },
                Self::Joined(stream) => match stream.message().await? {
                    Some(message) => understand(message.view().event.event.as_ref()),
                    None => Err(Error::GuestAnswer("no end")),
                },
            };
            if let Some(heard) = heard.transpose() {
                return Ok(heard);
            }
        }
    }
}

/// `None` for what only says that the stream lives.
fn understand(event: Option<&Wire<'_>>) -> Result<Option<Heard>, Error> {
    let event = match event {
        Some(Wire::Start(start)) => return Ok(Some(Heard::Begun(start.pid))),
        Some(Wire::Keepalive(_)) => return Ok(None),
        Some(Wire::End(end)) => Event::Exit(Exit { code: end.exit_code, by_signal: !end.exited }),
        Some(Wire::Data(data)) => {
            let (from, bytes) = match data.output {
                Some(WireOutput::Stdout(bytes)) => (Output::Stdout, bytes),
                Some(WireOutput::Stderr(bytes)) => (Output::Stderr, bytes),
                Some(WireOutput::Pty(bytes)) => (Output::Terminal, bytes),
                None => return Err(Error::GuestAnswer("output of an unknown kind")),
            };
            Event::Output(from, Bytes::copy_from_slice(bytes))
        }
        None => return Err(Error::GuestAnswer("an unknown event")),
    };
    Ok(Some(Heard::Event(event)))
}

impl Events {
    /// What comes next. Dropping the future loses nothing. Not to be called after [`Event::Exit`] or an error.
    pub async fn next(&mut self) -> Result<Event, Error> {
        match self.source.read().await {
            Ok(Ok(Heard::Event(event))) => Ok(event),
            Ok(Ok(Heard::Begun(_))) => Err(Error::GuestAnswer("a second start")),
            Ok(Err(error)) => Err(error),
            Err(error) if error.code == Code::DeadlineExceeded => Err(Error::Deadline),
            Err(error) => Err(self.guest.failed(error)),
        }
    }

    /// To be called after [`Event::Exit`]: a connection can only be used again when its answer was read to the end.
    pub async fn close(mut self) {
        // Nothing that matters follows.
        let _ = timeout(CLOSE, self.source.read()).await;
    }
}

impl Process {
    /// Writes to its input. Answers when all is taken, which happens at the process's pace. False when the process has
    /// ended.
    pub async fn input(&self, bytes: Vec<u8>) -> Result<bool, Error> {
        let input = if self.terminal { Input::Pty(bytes) } else { Input::Stdin(bytes) };
        let input = ProcessInput { input: Some(input), ..Default::default() };
        let request = SendInputRequest { process: self.selector().into(), input: input.into(), ..Default::default() };
        self.done(self.guest.processes().send_input_with_options(request, CallOptions::default()).await)
    }

    /// Ends its standard input, after what was written. False when the process has ended.
    pub async fn end_input(&self) -> Result<bool, Error> {
        let request = CloseStdinRequest { process: self.selector().into(), ..Default::default() };
        self.done(self.guest.processes().close_stdin_with_options(request, CallOptions::default()).await)
    }

    /// Gives its terminal another size. False when the process has ended.
    pub async fn resize(&self, size: pty::Size) -> Result<bool, Error> {
        let request =
            UpdateRequest { process: self.selector().into(), pty: wire_size(size).into(), ..Default::default() };
        self.done(self.guest.processes().update_with_options(request, quick()).await)
    }

    /// Ends it and its group with SIGKILL. If it has just ended by itself, all the better.
    pub async fn kill(&self) -> Result<(), Error> {
        match signal(&self.guest, &Selector::Pid(self.pid), Signal::Kill).await {
            Err(Error::NoProcess(_)) => Ok(()),
            other => other,
        }
    }

    /// By pid: tags need not be unique.
    fn selector(&self) -> ProcessSelector {
        which(&Selector::Pid(self.pid))
    }

    fn done<T>(&self, answer: Result<T, ConnectError>) -> Result<bool, Error> {
        match answer {
            Ok(_) => Ok(true),
            // Of the process or of its capsule: what its events say last tells which.
            Err(error) if error.code == Code::NotFound => Ok(false),
            Err(error)
                if matches!(error.code, Code::InvalidArgument | Code::FailedPrecondition)
                    && !refused_by_host(&error) =>
            {
                Err(Error::Refused(error.message.unwrap_or_else(|| "the guest does not accept it".into())))
            }
            Err(error) => Err(self.guest.failed(error)),
        }
    }
}
