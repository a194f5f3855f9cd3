//! A command in a capsule, to its end or in the background.

use std::time::{Duration, Instant};

use api::{Encoding, Exec, ExecResult, ExecSpec, ExecStarted, limits};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tokio::time::timeout;

use super::Error;
use super::guest::Guest;
use super::process::{self, Event, Events, Exit, Manner, Output, Process};

/// The guest ends a command at its deadline and says so; this is how much later we stop believing in that. Clients wait 10 s
/// beyond the deadline.
const OVERTIME: Duration = Duration::from_secs(5);

/// What came of a command.
#[derive(Debug)]
pub enum Outcome {
    Finished(ExecResult),
    Started(ExecStarted),
}

/// Runs a command in the capsule. A caller that leaves does not end it; only its own limit does.
pub async fn exec(guest: &Guest, request: Exec) -> Result<Outcome, Error> {
    let spec = request.validate()?;
    match spec.timeout_sec {
        Some(seconds) => foreground(guest, spec, seconds).await.map(Outcome::Finished),
        None => background(guest, spec).await.map(Outcome::Started),
    }
}

async fn foreground(guest: &Guest, spec: ExecSpec, seconds: u32) -> Result<ExecResult, Error> {
    let began = Instant::now();
    let limit = Duration::from_secs(seconds.into());
    let whole = async {
        let manner = Manner { limit: Some(limit), ..Manner::default() };
        let (process, events) = process::start(guest, &spec, manner).await?;
        collect(&process, events).await
    };
    let (stdout, stderr, exit) = match timeout(limit + OVERTIME, whole).await {
        Err(_) | Ok(Err(Error::Deadline)) => return Err(Error::Timeout(seconds)),
        Ok(result) => result?,
    };
    // Ended by a signal at its deadline: that signal was the deadline's.
    if exit.by_signal && began.elapsed() >= limit {
        return Err(Error::Timeout(seconds));
    }
    let (stdout, stderr, encoding) = readable(stdout, stderr);
    let duration_ms = began.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
    Ok(ExecResult { sandbox_id: guest.id, cmd: spec.cmd, stdout, stderr, exit_code: exit.code, duration_ms, encoding })
}

async fn background(guest: &Guest, mut spec: ExecSpec) -> Result<ExecStarted, Error> {
    let tag = spec.tag.get_or_insert_with(|| process::random_tag("proc")).clone();
    // Leaving the events does not end the process.
    let (process, _) = process::start(guest, &spec, Manner::default()).await?;
    Ok(ExecStarted { sandbox_id: guest.id, cmd: spec.cmd, pid: process.pid, tag })
}

/// Everything a process writes, to its end.
async fn collect(process: &Process, mut events: Events) -> Result<(Vec<u8>, Vec<u8>, Exit), Error> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match events.next().await? {
            Event::Output(Output::Stdout, bytes) => stdout.extend_from_slice(&bytes),
            Event::Output(Output::Stderr, bytes) => stderr.extend_from_slice(&bytes),
            Event::Output(Output::Terminal, _) => {
                return Err(Error::GuestAnswer("terminal output without a terminal"));
            }
            Event::Exit(exit) => {
                events.close().await;
                return Ok((stdout, stderr, exit));
            }
        }
        if stdout.len() + stderr.len() > limits::EXEC_OUTPUT_BYTES {
            if let Err(error) = process.kill().await {
                tracing::debug!(
                    pid = process.pid,
                    error = &error as &dyn std::error::Error,
                    "the process was not ended"
                );
            }
            return Err(Error::TooMuchOutput);
        }
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
