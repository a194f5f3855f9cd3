//! A command in a capsule, to its end or in the background.

use std::time::{Duration, Instant};

use agent_api::{GuestProcesses, Transport};
use api::{CapsuleId, Encoding, Exec, ExecResult, ExecSpec, ExecStarted, limits};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use connectrpc::client::{CallOptions, ClientTransport, ServerStream};
use connectrpc::{ConnectError, ErrorCode};
use guest_api::process::__buffa::oneof::process_selector::Selector;
use guest_api::process::__buffa::view::oneof::process_event::Event;
use guest_api::process::__buffa::view::oneof::process_event::data_event::Output;
use guest_api::process::{ProcessConfig, ProcessSelector, SendSignalRequest, Signal, StartRequest, StartResponseView};
use lifecycle::Command;
use tokio::time::timeout;

use super::{Context, Error, usable};
use crate::db::capsule::Capsule;

type Stream = ServerStream<<Transport as ClientTransport>::ResponseBody, StartResponseView<'static>>;

/// How long a process may take to begin.
const BEGIN: Duration = Duration::from_secs(25);
/// The guest ends a command at its deadline and says so; this is how much later we stop believing in that. Clients wait 10 s
/// beyond the deadline.
const OVERTIME: Duration = Duration::from_secs(5);

/// How long to wait for a stream to close after its last event, before its connection is given up instead.
const CLOSE: Duration = Duration::from_millis(250);

/// What came of a command.
#[derive(Debug)]
pub enum Outcome {
    Finished(ExecResult),
    Started(ExecStarted),
}

/// Runs a command in the capsule, which may still be starting.
pub async fn exec(ctx: &Context, capsule: Capsule, request: Exec) -> Result<Outcome, Error> {
    let spec = request.validate()?;
    let capsule = usable::usable(ctx, capsule, Command::Exec).await?;
    let processes = ctx.host.processes(capsule.id);
    let result = match spec.timeout_sec {
        Some(seconds) => foreground(&processes, capsule.id, spec, seconds).await.map(Outcome::Finished),
        None => background(&processes, capsule.id, spec).await.map(Outcome::Started),
    };
    if matches!(result, Err(Error::Gone | Error::Guest(_))) {
        ctx.nudge.notify_one();
    }
    result
}

async fn foreground(
    processes: &GuestProcesses,
    id: CapsuleId,
    spec: ExecSpec,
    seconds: u32,
) -> Result<ExecResult, Error> {
    let began = Instant::now();
    let limit = Duration::from_secs(seconds.into());
    // The guest keeps the deadline. It is only a header here: this side must not stop listening before the guest has spoken.
    let options = CallOptions::default().with_header("connect-timeout-ms", limit.as_millis().to_string());
    let whole = async {
        let mut stream = start(processes, &spec, spec.tag.clone(), options).await?;
        collect(processes, &mut stream, &spec).await
    };
    let finished = match timeout(limit + OVERTIME, whole).await {
        Err(_) => return Err(Error::Timeout(seconds)),
        Ok(Err(Error::Guest(error))) if error.code == ErrorCode::DeadlineExceeded => {
            return Err(Error::Timeout(seconds));
        }
        Ok(result) => result?,
    };
    // Ended by a signal at its deadline: that signal was the deadline's.
    if !finished.exited && began.elapsed() >= limit {
        return Err(Error::Timeout(seconds));
    }
    let (stdout, stderr, encoding) = readable(finished.stdout, finished.stderr);
    let duration_ms = began.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
    Ok(ExecResult {
        sandbox_id: id,
        cmd: spec.cmd,
        stdout,
        stderr,
        exit_code: finished.exit_code,
        duration_ms,
        encoding,
    })
}

async fn background(processes: &GuestProcesses, id: CapsuleId, spec: ExecSpec) -> Result<ExecStarted, Error> {
    let tag = match &spec.tag {
        Some(tag) => tag.clone(),
        None => {
            let mut bytes = [0; 4];
            getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
            format!("proc-{}", hex::encode(bytes))
        }
    };
    let begin = async {
        let mut stream = start(processes, &spec, Some(tag.clone()), CallOptions::default()).await?;
        began(&mut stream, &spec).await
    };
    // Leaving the stream does not end the process.
    let pid = timeout(BEGIN, begin).await.map_err(|_| Error::GuestAnswer("the process did not begin"))??;
    Ok(ExecStarted { sandbox_id: id, cmd: spec.cmd, pid, tag })
}

async fn start(
    processes: &GuestProcesses,
    spec: &ExecSpec,
    tag: Option<String>,
    options: CallOptions,
) -> Result<Stream, Error> {
    let process = ProcessConfig {
        cmd: spec.cmd.clone(),
        args: spec.args.clone(),
        envs: spec.envs.clone().into_iter().collect(),
        cwd: spec.cwd.clone(),
        ..Default::default()
    };
    let request = StartRequest { process: process.into(), tag, stdin: Some(false), ..Default::default() };
    processes.start_with_options(request, options).await.map_err(unreached)
}

/// Why the guest was not even asked: what its host answers in its place, or the way there.
fn unreached(error: ConnectError) -> Error {
    match error.code {
        ErrorCode::NotFound | ErrorCode::Unimplemented => Error::Gone,
        // Only an error of the way to the host has a source; others came back from it.
        ErrorCode::Unavailable if error.source_arc().is_some() => Error::Host(error.into()),
        _ => Error::Guest(error),
    }
}

/// Why a process did not start. What the guest objects to is the client's to mend.
fn refusal(error: ConnectError, spec: &ExecSpec) -> Error {
    match error.code {
        ErrorCode::InvalidArgument
        | ErrorCode::NotFound
        | ErrorCode::PermissionDenied
        | ErrorCode::FailedPrecondition => {
            let why = error.message.as_deref().unwrap_or("the guest does not say why");
            match &spec.cwd {
                Some(cwd) => Error::Refused(format!("cannot start cmd `{}` with cwd `{cwd}`: {why}", spec.cmd)),
                None => Error::Refused(format!("cannot start cmd `{}`: {why}", spec.cmd)),
            }
        }
        _ => Error::Guest(error),
    }
}

/// The pid with which the stream begins.
async fn began(stream: &mut Stream, spec: &ExecSpec) -> Result<u32, Error> {
    while let Some(message) = stream.message().await.map_err(|error| refusal(error, spec))? {
        match message.view().event.event.as_ref() {
            Some(Event::Start(start)) => return Ok(start.pid),
            Some(Event::Keepalive(_)) => {}
            Some(Event::Data(_) | Event::End(_)) | None => return Err(Error::GuestAnswer("output before the start")),
        }
    }
    Err(Error::GuestAnswer("an end before the start"))
}

struct Finished {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit_code: i32,
    exited: bool,
}

/// Everything a process writes, to its end.
async fn collect(processes: &GuestProcesses, stream: &mut Stream, spec: &ExecSpec) -> Result<Finished, Error> {
    let pid = began(stream, spec).await?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(message) = stream.message().await.map_err(Error::Guest)? {
        match message.view().event.event.as_ref() {
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(bytes)) => stdout.extend_from_slice(bytes),
                Some(Output::Stderr(bytes)) => stderr.extend_from_slice(bytes),
                Some(Output::Pty(_)) | None => return Err(Error::GuestAnswer("terminal output without a terminal")),
            },
            Some(Event::End(end)) => {
                let finished = Finished { stdout, stderr, exit_code: end.exit_code, exited: end.exited };
                // Nothing that matters follows, but a connection can only be used again when its answer was read to the end.
                let _ = timeout(CLOSE, stream.message()).await;
                return Ok(finished);
            }
            Some(Event::Keepalive(_)) => {}
            Some(Event::Start(_)) | None => return Err(Error::GuestAnswer("a second start")),
        }
        if stdout.len() + stderr.len() > limits::EXEC_OUTPUT_BYTES {
            kill(processes, pid).await;
            return Err(Error::TooMuchOutput);
        }
    }
    Err(Error::GuestAnswer("no end"))
}

/// Ends a process nobody listens to any more. If it has just ended by itself, all the better.
async fn kill(processes: &GuestProcesses, pid: u32) {
    let process = ProcessSelector { selector: Some(Selector::Pid(pid)), ..Default::default() };
    let request =
        SendSignalRequest { process: process.into(), signal: Signal::SIGNAL_SIGKILL.into(), ..Default::default() };
    if let Err(error) = processes.send_signal_with_options(request, CallOptions::default().with_timeout(BEGIN)).await {
        tracing::debug!(pid, error = &error as &dyn std::error::Error, "the process was not ended");
    }
}

/// Both outputs as text: as they are if both are UTF-8, else both in base64.
fn readable(stdout: Vec<u8>, stderr: Vec<u8>) -> (String, String, Encoding) {
    let base64 = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
    match (String::from_utf8(stdout), String::from_utf8(stderr)) {
        (Ok(stdout), Ok(stderr)) => (stdout, stderr, Encoding::Utf8),
        (stdout, stderr) => {
            let bytes = |text: Result<String, std::string::FromUtf8Error>| match text {
                Ok(text) => text.into_bytes(),
                Err(error) => error.into_bytes(),
            };
            (base64(&bytes(stdout)), base64(&bytes(stderr)), Encoding::Base64)
        }
    }
}
