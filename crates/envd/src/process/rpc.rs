//! The Connect service `process.Process`: requests to calls on [`Processes`], and what comes back to the wire.

use crate::process::log::{Item, Reader, Source};
use crate::process::plan::{self, Plan};
use crate::process::{End, InputError, Outcome, Process, Processes, Selector, StartError};
use crate::rpc::{keepalive, username};
use crate::settings::Settings;
use crate::sys::spawn::Stage;
use connectrpc::{ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures::{Stream, StreamExt};
use guest_api::process::process_event::{DataEvent, EndEvent, KeepAlive, StartEvent, data_event::Output};
use guest_api::process::{
    self as wire, ProcessEvent, process_event, process_input, process_selector, stream_input_request,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The service.
pub struct Service {
    pub processes: Arc<Processes>,
    pub settings: Arc<Settings>,
}

#[expect(refining_impl_trait, reason = "the concrete types are what the trait's `impl Encodable` stands for")]
impl wire::Process for Service {
    async fn list(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<wire::ListResponse> {
        let info = |process: Arc<Process>| wire::ProcessInfo {
            config: process.config.clone().into(),
            pid: pid(&process),
            tag: process.tag.clone(),
            ..Default::default()
        };
        let processes = self.processes.list().into_iter().map(info).collect();
        Response::ok(wire::ListResponse { processes, ..Default::default() })
    }

    async fn start(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<wire::StartResponse>> {
        let username = username(&context)?;
        let plan = Plan::new(request.to_owned_message(), username, self.settings.defaults()).map_err(refused)?;
        let cwd = plan.cwd.to_string_lossy().into_owned();
        let deadline = context.deadline().map(Instant::from_std);
        let started = self.processes.start(plan, deadline).await;
        let (process, reader) = started.map_err(|error| not_started(&error, &cwd))?;
        let events = events(&process, reader, keepalive(&context), Watch::Lifetime);
        let wrap = |event: ProcessEvent| wire::StartResponse { event: event.into(), ..Default::default() };
        Response::stream_ok(events.map(move |event| event.map(wrap)))
    }

    async fn connect(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<wire::ConnectResponse>> {
        let request = request.to_owned_message();
        let selector = selector(request.process.as_option())?;
        let process = self.processes.find(selector).ok_or_else(|| unknown(selector))?;
        let watch = Watch::Until(context.deadline().map(Instant::from_std));
        let events = events(&process, process.subscribe(), keepalive(&context), watch);
        let wrap = |event: ProcessEvent| wire::ConnectResponse { event: event.into(), ..Default::default() };
        Response::stream_ok(events.map(move |event| event.map(wrap)))
    }

    async fn update(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<wire::UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        if let Some(pty) = request.pty.into_option() {
            let size = pty.size.into_option().ok_or_else(|| ConnectError::invalid_argument("pty.size is missing"))?;
            process.resize(plan::window(size.cols, size.rows).map_err(refused)?).map_err(not_delivered)?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _: RequestContext,
        mut requests: InboundStream<wire::StreamInputRequest>,
    ) -> ServiceResult<wire::StreamInputResponse> {
        let mut process = None;
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(stream_input_request::Event::Start(start)) => {
                    process = Some(self.running(start.process.as_option())?)
                }
                Some(stream_input_request::Event::Data(data)) => {
                    let process = process.as_ref();
                    let process = process.ok_or_else(|| ConnectError::failed_precondition("data came before start"))?;
                    deliver(process, data.input.into_option()).await?;
                }
                Some(stream_input_request::Event::Keepalive(_)) | None => {}
            }
        }
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<wire::SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        deliver(&process, request.input.into_option()).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<wire::SendSignalResponse> {
        let request = request.to_owned_message();
        let signal = match request.signal.as_known() {
            Some(wire::Signal::SIGNAL_SIGTERM) => rustix::process::Signal::TERM,
            Some(wire::Signal::SIGNAL_SIGKILL) => rustix::process::Signal::KILL,
            Some(wire::Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(ConnectError::invalid_argument("signal must be SIGNAL_SIGTERM or SIGNAL_SIGKILL"));
            }
        };
        let selector = selector(request.process.as_option())?;
        let process = self.processes.running(selector).ok_or_else(|| unknown(selector))?;
        if !self.processes.signal(&process, signal) {
            return Err(unknown(selector));
        }
        Response::ok(wire::SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<wire::CloseStdinResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        process.close_stdin().await.map_err(not_delivered)?;
        Response::ok(wire::CloseStdinResponse::default())
    }
}

impl Service {
    fn running(&self, process: Option<&wire::ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        let selector = selector(process)?;
        self.processes.running(selector).ok_or_else(|| unknown(selector))
    }
}

/// What the caller's deadline means for a stream.
#[derive(Clone, Copy)]
enum Watch {
    /// It is the process's, and kept by its owner.
    Lifetime,
    /// It is the stream's own.
    Until(Option<Instant>),
}

struct Events {
    reader: Reader<Outcome>,
    keepalive: Duration,
    watch: Watch,
}

/// `start`, output and keepalives, then `end` or an error.
fn events(
    process: &Process,
    reader: Reader<Outcome>,
    keepalive: Duration,
    watch: Watch,
) -> impl Stream<Item = Result<ProcessEvent, ConnectError>> + Send + 'static {
    let start = Ok(event(StartEvent { pid: pid(process), ..Default::default() }));
    let rest = futures::stream::unfold(Some(Events { reader, keepalive, watch }), |events| async {
        let mut events = events?;
        match events.next().await {
            Ok((event, true)) => Some((Ok(event), Some(events))),
            Ok((event, false)) => Some((Ok(event), None)),
            Err(error) => Some((Err(error), None)),
        }
    });
    futures::stream::iter([start]).chain(rest)
}

impl Events {
    /// The next event, and whether more follow.
    async fn next(&mut self) -> Result<(ProcessEvent, bool), ConnectError> {
        let wait = tokio::time::timeout(self.keepalive, self.reader.next());
        let item = match self.watch {
            Watch::Until(Some(deadline)) => tokio::time::timeout_at(deadline, wait)
                .await
                .map_err(|_| ConnectError::deadline_exceeded("the call's deadline passed; the process goes on"))?,
            Watch::Until(None) | Watch::Lifetime => wait.await,
        };
        match item {
            Err(_idle) => Ok((event(KeepAlive::default()), true)),
            Ok(Err(unreadable)) => Err(ConnectError::data_loss(unreadable.to_string())),
            Ok(Ok(Item::Data(source, bytes))) => {
                let output = match source {
                    Source::Stdout => Output::Stdout(bytes),
                    Source::Stderr => Output::Stderr(bytes),
                    Source::Terminal => Output::Pty(bytes),
                };
                Ok((event(DataEvent { output: Some(output), ..Default::default() }), true))
            }
            Ok(Ok(Item::End(outcome))) if outcome.timed_out && matches!(self.watch, Watch::Lifetime) => {
                Err(ConnectError::deadline_exceeded("the process was killed: its time was up"))
            }
            Ok(Ok(Item::End(outcome))) => Ok((event(end(outcome.end)), false)),
        }
    }
}

fn event(event: impl Into<process_event::Event>) -> ProcessEvent {
    ProcessEvent { event: Some(event.into()), ..Default::default() }
}

fn end(end: End) -> EndEvent {
    let (exit_code, exited, status) = match end {
        End::Exited(code) => (code, true, format!("exit status {code}")),
        End::Signaled { signal, core } => {
            (-1, false, format!("signal: {}{}", signal_name(signal), if core { " (core dumped)" } else { "" }))
        }
    };
    let error = (exit_code != 0).then(|| status.clone());
    EndEvent { exit_code, exited, status, error, ..Default::default() }
}

/// What clients of this protocol know signals as.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

fn pid(process: &Process) -> u32 {
    process.pid.as_raw_nonzero().get().unsigned_abs()
}

fn selector(process: Option<&wire::ProcessSelector>) -> Result<Selector<'_>, ConnectError> {
    match process.and_then(|process| process.selector.as_ref()) {
        Some(process_selector::Selector::Pid(pid)) => Ok(Selector::Pid(*pid)),
        Some(process_selector::Selector::Tag(tag)) => Ok(Selector::Tag(tag)),
        None => Err(ConnectError::invalid_argument("process must be named by pid or tag")),
    }
}

async fn deliver(process: &Process, input: Option<wire::ProcessInput>) -> Result<(), ConnectError> {
    let result = match input.and_then(|input| input.input) {
        Some(process_input::Input::Stdin(data)) => process.write_stdin(&data).await,
        Some(process_input::Input::Pty(data)) => process.write_terminal(&data).await,
        None => return Err(ConnectError::invalid_argument("input must be stdin or pty")),
    };
    result.map_err(not_delivered)
}

fn unknown(selector: Selector<'_>) -> ConnectError {
    ConnectError::not_found(match selector {
        Selector::Pid(pid) => format!("process with pid {pid} not found"),
        Selector::Tag(tag) => format!("process with tag '{tag}' not found"),
    })
}

fn refused(error: plan::Error) -> ConnectError {
    let message = error.to_string();
    match error {
        plan::Error::UnknownUser(_) => ConnectError::unauthenticated(message),
        plan::Error::UserDatabase(source) => ConnectError::internal(format!("{message}: {source}")),
        plan::Error::NoDirectory(_)
        | plan::Error::NotDirectory(_)
        | plan::Error::Directory(_)
        | plan::Error::Nul(_)
        | plan::Error::NoCommand
        | plan::Error::VariableName(_)
        | plan::Error::TerminalSize { .. } => ConnectError::invalid_argument(message),
    }
}

fn not_started(error: &StartError, cwd: &str) -> ConnectError {
    match error {
        StartError::Spawn(spawn) if spawn.stage == Stage::Directory => {
            ConnectError::invalid_argument(format!("cwd '{cwd}' cannot be entered: {}", spawn.source))
        }
        StartError::Spawn(spawn) if spawn.stage == Stage::Identity => {
            ConnectError::permission_denied(format!("cannot become the user: {}", spawn.source))
        }
        StartError::Spawn(spawn) if spawn.stage == Stage::Clone => {
            ConnectError::resource_exhausted(format!("no new process: {}", spawn.source))
        }
        StartError::Spawn(spawn) => ConnectError::internal(format!("{error}: {}", spawn.source)),
        StartError::Streams(source) | StartError::Cgroup(source) => {
            ConnectError::internal(format!("{error}: {source}"))
        }
        StartError::Gone => ConnectError::unavailable(error.to_string()),
    }
}

fn not_delivered(error: InputError) -> ConnectError {
    let message = error.to_string();
    match error {
        InputError::Closed | InputError::IsTerminal | InputError::NoTerminal => {
            ConnectError::failed_precondition(message)
        }
        InputError::Ended => ConnectError::not_found(message),
        InputError::Write(source) | InputError::Resize(source) => {
            ConnectError::internal(format!("{message}: {source}"))
        }
    }
}
