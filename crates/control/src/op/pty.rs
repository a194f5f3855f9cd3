//! A terminal in a capsule: its process, what is typed into it and what it shows.

use std::time::Duration;

use agent_api::{GuestProcesses, Transport};
use api::pty;
use bytes::Bytes;
use connectrpc::client::{CallOptions, ClientTransport, ServerStream};
use connectrpc::{ConnectError, ErrorCode as Code};
use guest_api::process::__buffa::oneof::process_input::Input;
use guest_api::process::__buffa::oneof::process_selector::Selector;
use guest_api::process::__buffa::view::oneof::process_event::Event as Wire;
use guest_api::process::__buffa::view::oneof::process_event::data_event::Output;
use guest_api::process::{
    ConnectRequest, ConnectResponseView, PTY, ProcessInput, ProcessSelector, SendInputRequest, SendSignalRequest,
    Signal, StartRequest, StartResponseView, UpdateRequest, pty as wire_pty,
};
use lifecycle::Command;
use tokio::time::timeout;

use super::exec::{self, BEGIN};
use super::{Context, Error, usable};
use crate::db::capsule::Capsule;

type Stream<View> = ServerStream<<Transport as ClientTransport>::ResponseBody, View>;

/// How long the guest may take to resize a terminal or to send a signal.
const QUICK: Duration = Duration::from_secs(10);

/// A process with a terminal. Dropping it leaves the process as it is.
pub struct Terminal {
    processes: GuestProcesses,
    pub pid: u32,
    pub tag: String,
}

/// What a terminal shows, from where one joined: at first everything, later the last of it.
pub struct Screen(Source);

enum Source {
    Started(Stream<StartResponseView<'static>>),
    Joined(Stream<ConnectResponseView<'static>>),
}

/// What happens on a terminal.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    Begun(u32),
    Output(Bytes),
    /// The last: the exit code, or -1 when a signal ended the process.
    Exit(i32),
}

/// Starts a process with a terminal in the capsule, which may still be starting itself.
pub async fn start(ctx: &Context, capsule: Capsule, request: pty::Start) -> Result<(Terminal, Screen), Error> {
    let (spec, size) = request.validate()?;
    let tag = spec.tag.clone().unwrap_or_else(|| exec::random_tag("pty"));
    let capsule = usable::usable(ctx, capsule, Command::Exec).await?;
    let processes = ctx.host.processes(capsule.id);
    let request = StartRequest {
        process: exec::process(&spec).into(),
        pty: wire_size(size).into(),
        tag: Some(tag.clone()),
        ..Default::default()
    };
    let begin = async {
        let stream = processes.start_with_options(request, CallOptions::default()).await.map_err(exec::unreached)?;
        let mut screen = Screen(Source::Started(stream));
        let pid = screen.begun(|error| exec::refusal(error, &spec)).await?;
        Ok((screen, pid))
    };
    let (screen, pid) = within_begin(ctx, begin).await?;
    Ok((Terminal { processes, pid, tag }, screen))
}

/// Comes back to a process that was started with this tag. One that ended a moment ago still shows what it showed.
pub async fn connect(ctx: &Context, capsule: Capsule, tag: String) -> Result<(Terminal, Screen), Error> {
    pty::check_tag(&tag)?;
    let capsule = usable::usable(ctx, capsule, Command::Exec).await?;
    let processes = ctx.host.processes(capsule.id);
    let process = ProcessSelector { selector: Some(Selector::Tag(tag.clone())), ..Default::default() };
    let request = ConnectRequest { process: process.into(), ..Default::default() };
    let begin = async {
        let stream = processes.connect_with_options(request, CallOptions::default()).await.map_err(exec::unreached)?;
        let mut screen = Screen(Source::Joined(stream));
        let unknown = |error: ConnectError| match error.code {
            Code::NotFound => Error::NoProcess(tag.clone()),
            _ => Error::Guest(error),
        };
        let pid = screen.begun(unknown).await?;
        Ok((screen, pid))
    };
    let (screen, pid) = within_begin(ctx, begin).await?;
    Ok((Terminal { processes, pid, tag }, screen))
}

async fn within_begin<T>(ctx: &Context, begin: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let begun = timeout(BEGIN, begin).await.map_err(|_| Error::GuestAnswer("the process did not begin"));
    begun.flatten().inspect_err(|error| suspect(ctx, error))
}

/// What looks as if the capsule were no more is looked into.
fn suspect(ctx: &Context, error: &Error) {
    if matches!(error, Error::Gone | Error::Guest(_)) {
        ctx.nudge.notify_one();
    }
}

fn wire_size(size: pty::Size) -> PTY {
    let size = wire_pty::Size { cols: size.cols.into(), rows: size.rows.into(), ..Default::default() };
    PTY { size: size.into(), ..Default::default() }
}

impl Screen {
    /// What comes next. Dropping the future loses nothing. Not to be called after [`Event::Exit`] or an error.
    pub async fn next(&mut self, ctx: &Context) -> Result<Event, Error> {
        self.read(Error::Guest).await.inspect_err(|error| suspect(ctx, error))
    }

    async fn begun(&mut self, refusal: impl Fn(ConnectError) -> Error) -> Result<u32, Error> {
        match self.read(refusal).await? {
            Event::Begun(pid) => Ok(pid),
            Event::Output(_) | Event::Exit(_) => Err(Error::GuestAnswer("output before the start")),
        }
    }

    async fn read(&mut self, refusal: impl Fn(ConnectError) -> Error) -> Result<Event, Error> {
        loop {
            let event = match &mut self.0 {
                Source::Started(stream) => match stream.message().await.map_err(&refusal)? {
                    Some(message) => understand(message.view().event.event.as_ref())?,
                    None => return Err(Error::GuestAnswer("no end")),
                },
                Source::Joined(stream) => match stream.message().await.map_err(&refusal)? {
                    Some(message) => understand(message.view().event.event.as_ref())?,
                    None => return Err(Error::GuestAnswer("no end")),
                },
            };
            if let Some(event) = event {
                return Ok(event);
            }
        }
    }
}

/// `None` for what only says that the stream lives.
fn understand(event: Option<&Wire<'_>>) -> Result<Option<Event>, Error> {
    Ok(Some(match event {
        Some(Wire::Start(start)) => Event::Begun(start.pid),
        Some(Wire::Data(data)) => match data.output {
            // Who comes back by tag may find a process without a terminal, and sees what it prints.
            Some(Output::Pty(bytes) | Output::Stdout(bytes) | Output::Stderr(bytes)) => {
                Event::Output(Bytes::copy_from_slice(bytes))
            }
            None => return Err(Error::GuestAnswer("output of an unknown kind")),
        },
        Some(Wire::End(end)) => Event::Exit(end.exit_code),
        Some(Wire::Keepalive(_)) => return Ok(None),
        None => return Err(Error::GuestAnswer("an unknown event")),
    }))
}

impl Terminal {
    /// Types. Answers when the process's terminal has taken everything, which it does at the process's pace. False when
    /// the process has ended.
    pub async fn input(&self, bytes: Vec<u8>) -> Result<bool, Error> {
        let input = ProcessInput { input: Some(Input::Pty(bytes)), ..Default::default() };
        let request = SendInputRequest { process: self.selector().into(), input: input.into(), ..Default::default() };
        done(self.processes.send_input_with_options(request, CallOptions::default()).await)
    }

    /// Gives the terminal another size. False when the process has ended.
    pub async fn resize(&self, size: pty::Size) -> Result<bool, Error> {
        let request =
            UpdateRequest { process: self.selector().into(), pty: wire_size(size).into(), ..Default::default() };
        done(self.processes.update_with_options(request, CallOptions::default().with_timeout(QUICK)).await)
    }

    /// Ends the process with SIGKILL. False when it has ended already.
    pub async fn kill(&self) -> Result<bool, Error> {
        let signal = Signal::SIGNAL_SIGKILL.into();
        let request = SendSignalRequest { process: self.selector().into(), signal, ..Default::default() };
        done(self.processes.send_signal_with_options(request, CallOptions::default().with_timeout(QUICK)).await)
    }

    /// By pid: tags need not be unique.
    fn selector(&self) -> ProcessSelector {
        ProcessSelector { selector: Some(Selector::Pid(self.pid)), ..Default::default() }
    }
}

fn done<T>(answer: Result<T, ConnectError>) -> Result<bool, Error> {
    match answer {
        Ok(_) => Ok(true),
        // Of the process or of its capsule: what the screen says last tells which.
        Err(error) if error.code == Code::NotFound => Ok(false),
        Err(error) if matches!(error.code, Code::InvalidArgument | Code::FailedPrecondition) => {
            Err(Error::Refused(error.message.unwrap_or_else(|| "the guest does not accept it".into())))
        }
        Err(error) => Err(exec::unreached(error)),
    }
}
