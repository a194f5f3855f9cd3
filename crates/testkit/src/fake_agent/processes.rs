//! A guest's processes, imagined: a few commands with exact output, and the contract's errors.
//!
//! | command | what it does |
//! |---|---|
//! | `echo ARG...` | the arguments and a newline on standard output |
//! | `say OUT ERR CODE` | texts on standard output and standard error, then that exit code |
//! | `bytes COUNT` | so many bytes `x` on standard output |
//! | `endless` | `x` on standard output until a signal |
//! | `latin1` | the bytes `ff fe` on standard output, `ok` on standard error |
//! | `env` | the environment of the request, one `NAME=value` a line, sorted |
//! | `pwd` | the working directory of the request |
//! | `hang` | nothing, until its deadline or a signal |
//! | `vanish` | begins, then the connection breaks |
//!
//! A process that is started with a terminal is one of [`super::terminal`] instead.
//!
//! The working directory `/missing` does not exist, and no other command does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use connectrpc::{
    ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::channel::mpsc;
use futures::{SinkExt, Stream, StreamExt};
use guest_api::process::__buffa::oneof::process_event::Event;
use guest_api::process::__buffa::oneof::process_event::data_event::Output;
use guest_api::process::__buffa::oneof::process_input::Input;
use guest_api::process::__buffa::oneof::process_selector::Selector;
use guest_api::process::process_event::{DataEvent, EndEvent, StartEvent};
use guest_api::process::*;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;

use super::terminal::{Shown, Terminal};

/// Bytes of one piece of output, as envd sends it.
const CHUNK: usize = 32 * 1024;

/// A process that runs.
#[derive(Debug, Clone)]
pub struct Running {
    pub cmd: String,
    pub tag: Option<String>,
    pub has_deadline: bool,
    killed: watch::Sender<bool>,
    terminal: Option<Terminal>,
}

#[derive(Clone, Default)]
pub(super) struct Processes(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    running: HashMap<u32, Running>,
    started: u32,
}

impl Processes {
    pub(super) fn running(&self) -> HashMap<u32, Running> {
        self.table().running.clone()
    }

    /// The process that is meant, and its pid.
    fn find(&self, selector: Option<ProcessSelector>) -> Result<(u32, Running), ConnectError> {
        let found = match selector.and_then(|process| process.selector) {
            Some(Selector::Pid(pid)) => self.running().remove_entry(&pid),
            Some(Selector::Tag(tag)) => {
                self.running().into_iter().find(|(_, process)| process.tag == Some(tag.clone()))
            }
            None => None,
        };
        found.ok_or_else(|| ConnectError::not_found("no such process"))
    }

    fn terminal(&self, selector: Option<ProcessSelector>) -> Result<(u32, Terminal), ConnectError> {
        let (pid, process) = self.find(selector)?;
        let none = || ConnectError::failed_precondition("the process has no terminal");
        Ok((pid, process.terminal.ok_or_else(none)?))
    }

    /// Enters a process into the table.
    fn enter(
        &self,
        cmd: &str,
        tag: Option<String>,
        has_deadline: bool,
        terminal: Option<Terminal>,
    ) -> (u32, watch::Receiver<bool>) {
        let killed = watch::Sender::new(false);
        let receiver = killed.subscribe();
        let mut table = self.table();
        table.started += 1;
        let pid = 1000 + table.started;
        table.running.insert(pid, Running { cmd: cmd.to_owned(), tag, has_deadline, killed, terminal });
        (pid, receiver)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().expect("no panics under this lock")
    }
}

/// The stream of a process's events.
struct Events(mpsc::Sender<Result<StartResponse, ConnectError>>);

impl Events {
    /// Waits for a slow client. One that left does not end the process.
    async fn send(&mut self, event: impl Into<Event>) {
        let event = ProcessEvent { event: Some(event.into()), ..Default::default() };
        let _ = self.0.send(Ok(StartResponse { event: event.into(), ..Default::default() })).await;
    }

    async fn stdout(&mut self, bytes: impl Into<Vec<u8>>) {
        self.send(DataEvent { output: Some(Output::Stdout(bytes.into())), ..Default::default() }).await;
    }

    async fn stderr(&mut self, bytes: impl Into<Vec<u8>>) {
        self.send(DataEvent { output: Some(Output::Stderr(bytes.into())), ..Default::default() }).await;
    }

    async fn exit(&mut self, exit_code: i32) {
        let status = format!("exit status {exit_code}");
        self.send(EndEvent { exit_code, exited: true, status, ..Default::default() }).await;
    }

    async fn killed(&mut self) {
        self.send(EndEvent { exit_code: -1, status: "signal: killed".into(), ..Default::default() }).await;
    }

    async fn fail(&mut self, error: ConnectError) {
        let _ = self.0.send(Err(error)).await;
    }
}

async fn perform(process: ProcessConfig, ctx: RequestContext, mut killed: watch::Receiver<bool>, mut to: Events) {
    let args: Vec<&str> = process.args.iter().map(String::as_str).collect();
    match (process.cmd.as_str(), args.as_slice()) {
        ("echo", words) => {
            to.stdout(words.join(" ") + "\n").await;
            to.exit(0).await;
        }
        ("say", [out, err, code]) => {
            to.stdout(*out).await;
            to.stderr(*err).await;
            to.exit(code.parse().expect("a number")).await;
        }
        ("bytes", [count]) => {
            let mut left: usize = count.parse().expect("a number");
            while left > 0 {
                let size = left.min(CHUNK);
                to.stdout(vec![b'x'; size]).await;
                left -= size;
            }
            to.exit(0).await;
        }
        ("endless", []) => {
            while !*killed.borrow() {
                to.stdout([b'x'; CHUNK]).await;
            }
            to.killed().await;
        }
        ("latin1", []) => {
            to.stdout([0xff, 0xfe]).await;
            to.stderr("ok").await;
            to.exit(0).await;
        }
        ("env", []) => {
            let mut lines: Vec<_> = process.envs.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
            lines.sort();
            to.stdout(lines.concat()).await;
            to.exit(0).await;
        }
        ("pwd", []) => {
            to.stdout(process.cwd.unwrap_or_else(|| "/root".into()) + "\n").await;
            to.exit(0).await;
        }
        ("hang", []) => {
            let deadline = async {
                match ctx.time_remaining() {
                    Some(left) => tokio::time::sleep(left).await,
                    None => std::future::pending().await,
                }
            };
            let too_long = tokio::select! {
                () = deadline => true,
                _ = killed.wait_for(|killed| *killed) => false,
            };
            if too_long {
                to.fail(ConnectError::deadline_exceeded("the process was ended at its deadline")).await;
            } else {
                to.killed().await;
            }
        }
        ("vanish", []) => {
            to.fail(ConnectError::unavailable("the guest is gone")).await;
        }
        _ => to.exit(127).await,
    }
}

impl Process for Processes {
    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<StartResponse> + Send + use<>>> {
        let request = request.to_owned_message();
        let process = request.process.into_option().unwrap_or_default();
        if process.cwd.as_deref() == Some("/missing") {
            return Err(ConnectError::invalid_argument("cwd '/missing' does not exist"));
        }
        let has_deadline = ctx.deadline().is_some();
        if let Some(pty) = request.pty.into_option() {
            let size = pty.size.into_option().unwrap_or_default();
            let (terminal, program) = Terminal::open(size.cols, size.rows);
            let (pid, killed) = self.enter(&process.cmd, request.tag, has_deadline, Some(terminal.clone()));
            let events = terminal.watch(pid);
            let processes = self.clone();
            tokio::spawn(async move {
                program.run(&process.cmd, killed).await;
                processes.table().running.remove(&pid);
            });
            let wrap = |event: ProcessEvent| StartResponse { event: event.into(), ..Default::default() };
            return Ok(Response::new(stream(events).map(move |event| event.map(wrap)).boxed()));
        }
        let (to, events) = mpsc::channel(16);
        let mut to = Events(to);
        let (pid, receiver) = self.enter(&process.cmd, request.tag, has_deadline, None);
        to.send(StartEvent { pid, ..Default::default() }).await;
        let processes = self.clone();
        tokio::spawn(async move {
            perform(process, ctx, receiver, to).await;
            processes.table().running.remove(&pid);
        });
        Ok(Response::new(events.boxed()))
    }

    async fn list<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListRequest>,
    ) -> ServiceResult<impl Encodable<ListResponse> + Send + use<'a>> {
        let info = |(pid, running): (u32, Running)| ProcessInfo {
            config: ProcessConfig { cmd: running.cmd, ..Default::default() }.into(),
            pid,
            tag: running.tag,
            ..Default::default()
        };
        Response::ok(ListResponse { processes: self.running().into_iter().map(info).collect(), ..Default::default() })
    }

    async fn send_signal<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<impl Encodable<SendSignalResponse> + Send + use<'a>> {
        let (_, process) = self.find(request.to_owned_message().process.into_option())?;
        process.killed.send_replace(true);
        Response::ok(SendSignalResponse::default())
    }

    async fn connect(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ConnectResponse> + Send + use<>>> {
        let (pid, terminal) = self.terminal(request.to_owned_message().process.into_option())?;
        let wrap = |event: ProcessEvent| ConnectResponse { event: event.into(), ..Default::default() };
        Ok(Response::new(stream(terminal.watch(pid)).map(move |event| event.map(wrap)).boxed()))
    }

    async fn update<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<impl Encodable<UpdateResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let (_, terminal) = self.terminal(request.process.into_option())?;
        let size = request.pty.into_option().and_then(|pty| pty.size.into_option()).unwrap_or_default();
        terminal.size.send_replace((size.cols, size.rows));
        Response::ok(UpdateResponse::default())
    }

    async fn stream_input<'a>(
        &'a self,
        _: RequestContext,
        _: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<impl Encodable<StreamInputResponse> + Send + use<'a>> {
        Err::<Response<StreamInputResponse>, _>(not_imagined("StreamInput"))
    }

    async fn send_input<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<impl Encodable<SendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let (_, terminal) = self.terminal(request.process.into_option())?;
        let Some(Input::Pty(bytes)) = request.input.into_option().and_then(|input| input.input) else {
            return Err(ConnectError::invalid_argument("input must be pty"));
        };
        if !terminal.write(bytes).await {
            return Err(ConnectError::not_found("the process has ended"));
        }
        Response::ok(SendInputResponse::default())
    }

    async fn close_stdin<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<CloseStdinResponse> + Send + use<'a>> {
        Err::<Response<CloseStdinResponse>, _>(not_imagined("CloseStdin"))
    }
}

fn stream(mut events: UnboundedReceiver<Shown>) -> impl Stream<Item = Shown> + Send {
    futures::stream::poll_fn(move |context| events.poll_recv(context))
}

fn not_imagined(rpc: &str) -> ConnectError {
    ConnectError::unimplemented(format!("imagined processes have no {rpc}"))
}
