//! A command in a capsule, to its end or in the background.

use std::sync::Arc;
use std::time::Duration;

use api::{Encoding, Exec, ExecResult, ExecSpec, ExecStarted, limits};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::guest::{self, Guest};
use super::process::{self, Event, Events, Exit, Manner, Output, Process};
use super::usable::patience;
use super::{Context, Error};
use crate::db::capsule::Capsule;

/// How much longer than its command a request may take, with the start of its capsule. Clients wait 10 s longer.
const BESIDE: Duration = Duration::from_secs(8);
/// The guest ends a command at its deadline and says so; this is how much later we stop believing in that.
const OVERTIME: Duration = Duration::from_secs(3);
/// Bytes of a command's output that are not counted, and by how many the count goes up.
const UNIT: usize = 64 * 1024;
/// From how many bytes on a text is written in the shorter way.
const LONG: usize = 1024 * 1024;

/// What came of a command.
#[derive(Debug)]
pub enum Outcome {
    Finished(ExecResult, Held),
    Started(ExecStarted),
}

/// What all commands in the foreground have written and no client has taken yet.
#[derive(Debug)]
pub struct Outputs(Arc<Semaphore>);

impl Default for Outputs {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(limits::EXEC_OUTPUTS_BYTES / UNIT)))
    }
}

/// One command's part of them, until this is dropped.
#[derive(Debug)]
pub struct Held(OwnedSemaphorePermit);

impl Outputs {
    fn hold(&self) -> Held {
        Held(self.0.clone().try_acquire_many_owned(0).expect("nothing can be had, and nobody closes it"))
    }
}

impl Held {
    /// Counts an output that has become `bytes` long. False when there is no room for it.
    fn grow(&mut self, bytes: usize) -> bool {
        let Some(more) = (bytes / UNIT).checked_sub(self.0.num_permits()).filter(|more| *more > 0) else { return true };
        let more = self.0.semaphore().clone().try_acquire_many_owned(more.try_into().unwrap_or(u32::MAX));
        more.map(|more| self.0.merge(more)).is_ok()
    }
}

/// Runs a command in the capsule, which may still be starting. A caller that leaves does not end it; only its own limit does.
pub async fn exec(ctx: &Arc<Context>, capsule: Capsule, request: Exec) -> Result<Outcome, Error> {
    let spec = request.validate()?;
    match spec.timeout_sec {
        Some(seconds) => foreground(ctx, capsule, spec, seconds).await,
        None => background(&guest::enter(ctx, capsule, patience()).await?, spec).await.map(Outcome::Started),
    }
}

async fn foreground(ctx: &Arc<Context>, capsule: Capsule, spec: ExecSpec, seconds: u32) -> Result<Outcome, Error> {
    let allowed = Duration::from_secs(seconds.into());
    let until = Instant::now() + allowed + BESIDE;
    let guest = &guest::enter(ctx, capsule, patience().min(until - OVERTIME - Duration::from_secs(1))).await?;
    let began = Instant::now();
    // Less, where the capsule has taken long to start: the client has waited for that, too.
    let limit = allowed.min(until - OVERTIME - began);
    let mut held = ctx.outputs.hold();
    let whole = async {
        let manner = Manner { limit: Some(limit), ..Manner::default() };
        let (process, events) = process::start(guest, &spec, manner).await?;
        collect(&process, events, &mut held).await
    };
    let (stdout, stderr, exit) = match timeout_at(until, whole).await {
        Err(_) | Ok(Err(Error::Deadline)) => return Err(Error::Timeout(seconds)),
        Ok(result) => result?,
    };
    // Ended by a signal at its deadline: that signal was the deadline's.
    if exit.by_signal && began.elapsed() >= limit {
        return Err(Error::Timeout(seconds));
    }
    let (stdout, stderr, encoding) = readable(stdout, stderr);
    let duration_ms = began.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
    let result =
        ExecResult { sandbox_id: guest.id, cmd: spec.cmd, stdout, stderr, exit_code: exit.code, duration_ms, encoding };
    Ok(Outcome::Finished(result, held))
}

async fn background(guest: &Guest, mut spec: ExecSpec) -> Result<ExecStarted, Error> {
    let tag = spec.tag.get_or_insert_with(|| process::random_tag("proc")).clone();
    // Leaving the events does not end the process.
    let (process, _) = process::start(guest, &spec, Manner::default()).await?;
    Ok(ExecStarted { sandbox_id: guest.id, cmd: spec.cmd, pid: process.pid, tag })
}

/// Everything a process writes, to its end.
async fn collect(process: &Process, mut events: Events, held: &mut Held) -> Result<(Vec<u8>, Vec<u8>, Exit), Error> {
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
        let written = stdout.len() + stderr.len();
        let is_too_much = written > limits::EXEC_OUTPUT_BYTES;
        if is_too_much || !held.grow(written) {
            if let Err(error) = process.kill().await {
                tracing::debug!(
                    pid = process.pid,
                    error = &error as &dyn std::error::Error,
                    "the process was not ended"
                );
            }
            return Err(if is_too_much { Error::TooMuchOutput } else { Error::TooManyOutputs });
        }
    }
}

/// Both outputs as text: as they are if both are UTF-8, else both in base64, which is also shorter for much of what nobody reads.
fn readable(stdout: Vec<u8>, stderr: Vec<u8>) -> (String, String, Encoding) {
    let base64 = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
    match (String::from_utf8(stdout), String::from_utf8(stderr)) {
        (Ok(stdout), Ok(stderr)) if !is_escaped(&stdout) && !is_escaped(&stderr) => (stdout, stderr, Encoding::Utf8),
        (stdout, stderr) => {
            let bytes = |text: Result<String, std::string::FromUtf8Error>| match text {
                Ok(text) => text.into_bytes(),
                Err(error) => error.into_bytes(),
            };
            (base64(&bytes(stdout)), base64(&bytes(stderr)), Encoding::Base64)
        }
    }
}

/// Whether a text is long, and longer in JSON than in base64.
fn is_escaped(text: &str) -> bool {
    let extra = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 1,
        0..32 => 5,
        _ => 0,
    };
    text.len() > LONG && text.bytes().map(extra).sum::<usize>() > text.len() / 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_have_room_for_so_much_and_get_it_back() {
        let outputs = Outputs::default();
        let (mut one, mut other) = (outputs.hold(), outputs.hold());
        assert!(one.grow(limits::EXEC_OUTPUTS_BYTES - UNIT) && one.grow(1));
        // What is short needs no room.
        assert!(other.grow(UNIT - 1) && other.grow(UNIT) && !other.grow(2 * UNIT));
        assert!(outputs.hold().grow(UNIT - 1));
        drop(one);
        assert!(other.grow(limits::EXEC_OUTPUTS_BYTES));
    }

    #[test]
    fn a_text_is_escaped_when_base64_is_shorter() {
        assert!(!is_escaped(&"\0".repeat(LONG)) && is_escaped(&"\0".repeat(LONG + 1)));
        assert!(!is_escaped(&"a line of text\n".repeat(LONG)) && is_escaped(&"a\n".repeat(LONG)));
    }
}
