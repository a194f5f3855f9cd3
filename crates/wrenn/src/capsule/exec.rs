//! `wrenn capsule exec`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Error, Result};
use api::pty;
use api::stream::{Encoding, Request, Start};
use api::{CapsuleId, Signal};
use clap::Args;
use tokio::sync::watch;

use super::follow::{self, End};
use super::stdio::{self, Signals};
use super::{pair, shell};
use crate::rest::Client;
use crate::terminal;

/// Exit code when the command itself was never run, or its end was not learned: what `docker exec` uses for this, so that
/// it is not taken for the command's own.
const NOT_RUN: u8 = 125;
/// Exit code when the command ran too long, as `timeout` has it.
const TIMED_OUT: u8 = 124;
/// Exit code when a signal ended the command.
pub(super) const SIGNALLED: u8 = 255;
/// The longest a command whose output is waited for as a whole may run.
const LONGEST: u32 = 86_400;

/// Runs a command in a capsule, shows its output as it comes, and exits with its code.
///
/// No shell is added: for pipes and variables run `sh -c '…'`. Ctrl-C ends the command too. Exits with 124 when the command ran
/// too long, with 125 when it could not be run.
#[derive(Debug, Args)]
pub(super) struct Exec {
    /// The capsule.
    id: CapsuleId,
    /// A variable of its environment; may be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Its working directory [default: the user's home].
    #[arg(short = 'w', long, value_name = "DIR")]
    cwd: Option<String>,
    /// The capsule's user that runs it [default: root].
    #[arg(short, long)]
    user: Option<String>,
    /// Pass standard input on.
    #[arg(short, long, conflicts_with_all = ["background", "json"])]
    interactive: bool,
    /// Run it on a terminal, as `shell` does; standard input is passed on.
    #[arg(short, long, conflicts_with_all = ["background", "json", "timeout"])]
    tty: bool,
    /// Seconds it may run [default: without an end].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=i64::from(LONGEST)), conflicts_with = "background")]
    timeout: Option<u32>,
    /// Let it run on, and print its process id.
    #[arg(short, long)]
    background: bool,
    /// A name by which to find it again with `ps`, `logs` and `kill`.
    #[arg(long)]
    tag: Option<String>,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Exec {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        if self.tty {
            let id = self.id;
            return Ok(shell::attend(client, id, self.on_a_terminal()).await);
        }
        let outcome = match (self.background, json) {
            (true, json) => self.start(client, json).await,
            (false, true) => self.collect(client).await,
            (false, false) => self.stream(client).await,
        };
        Ok(outcome.unwrap_or_else(|error| not_run(&error)))
    }

    async fn start(self, client: &Client, json: bool) -> Result<ExitCode> {
        let started = client.start(self.id, &self.request()).await?;
        if json {
            terminal::print_json(&started)?;
        } else {
            terminal::print(&started.pid.to_string())?;
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn collect(self, client: &Client) -> Result<ExitCode> {
        let limit = Duration::from_secs(self.timeout.unwrap_or(LONGEST).into());
        let result = client.exec(self.id, &self.request(), limit).await?;
        terminal::print_json(&result)?;
        Ok(code(result.exit_code))
    }

    async fn stream(self, client: &Client) -> Result<ExitCode> {
        let id = self.id;
        let typed = self.interactive.then(stdio::input);
        let socket = client.exec_stream(id).await?;
        let start = Request::Start(self.streamed());
        let (pid, mut signals) = (watch::Sender::new(None), Signals::new()?);
        let end = tokio::select! {
            end = follow::follow(socket, Some(&start), typed, None, &pid) => end?,
            signal = signals.next() => {
                let pid = *pid.borrow();
                if let Some(pid) = pid {
                    client.kill(id, &pid.to_string(), Signal::Term).await?;
                }
                return Ok(ExitCode::from(128 + signal));
            }
        };
        match end {
            End::Exited(exit_code) => Ok(code(exit_code)),
            End::Refused(error) => Err(error),
            End::Quiet => unreachable!("nobody asked for it"),
            End::Broken(error) => Err(match *pid.borrow() {
                Some(pid) => error.context(format!(
                    "the connection broke, and the command goes on: `wrenn capsule logs -f {id} {pid}` shows the rest"
                )),
                None => error.context("the connection broke before the command began"),
            }),
        }
    }

    fn request(self) -> api::Exec {
        let (cmd, args) = split(self.command);
        api::Exec {
            cmd,
            args: Some(args),
            timeout_sec: (!self.background).then(|| self.timeout.unwrap_or(LONGEST).into()),
            background: self.background.then_some(true),
            tag: self.tag,
            envs: (!self.env.is_empty()).then(|| self.env.into_iter().collect()),
            cwd: self.cwd,
            user: self.user,
        }
    }

    fn streamed(self) -> Start {
        let (cmd, args) = split(self.command);
        Start {
            cmd,
            args: Some(args),
            envs: (!self.env.is_empty()).then(|| self.env.into_iter().collect()),
            cwd: self.cwd,
            user: self.user,
            tag: self.tag,
            timeout_sec: self.timeout.map(i64::from),
            stdin: self.interactive,
            encoding: Encoding::Base64,
        }
    }

    fn on_a_terminal(self) -> pty::Start {
        let (cmd, args) = split(self.command);
        pty::Start {
            cmd: Some(cmd),
            args: Some(args),
            envs: (!self.env.is_empty()).then(|| self.env.into_iter().collect()),
            cwd: self.cwd,
            user: self.user,
            tag: self.tag,
            ..pty::Start::default()
        }
    }
}

fn split(command: Vec<String>) -> (String, Vec<String>) {
    let mut words = command.into_iter();
    (words.next().unwrap_or_default(), words.collect())
}

/// A command's exit code as this process's own.
pub(super) fn code(exit_code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(exit_code).unwrap_or(SIGNALLED))
}

/// Tells why there is no exit code of the command's own, and gives one that says so.
pub(super) fn not_run(error: &Error) -> ExitCode {
    terminal::error(error);
    ExitCode::from(if follow::is_late(error) { TIMED_OUT } else { NOT_RUN })
}
