//! `wrenn capsule exec`.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use api::{CapsuleId, Encoding, ErrorCode, ExecResult};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::Args;

use crate::rest::{Client, Refused};
use crate::terminal;

/// Exit code when the command itself was never run, or its end was not learned: what `docker exec` uses for this, so that
/// it is not taken for the command's own.
const NOT_RUN: u8 = 125;
/// Exit code when the command ran too long, as `timeout` has it.
const TIMED_OUT: u8 = 124;
/// Exit code when a signal ended the command.
pub(super) const SIGNALLED: u8 = 255;

/// Runs a command in a capsule, and exits with the command's code.
///
/// No shell is added: for pipes and variables run `sh -c '…'`. Exits with 124 when the command ran too long, with 125 when it
/// could not be run.
#[derive(Debug, Args)]
pub(super) struct Exec {
    /// The capsule.
    id: CapsuleId,
    /// A variable of its environment; may be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = super::pair)]
    env: Vec<(String, String)>,
    /// Its working directory [default: the user's home].
    #[arg(short = 'w', long, value_name = "DIR")]
    cwd: Option<String>,
    /// Seconds it may run.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=86400), conflicts_with = "background")]
    timeout: u32,
    /// Let it run on, and print its process id.
    #[arg(short, long)]
    background: bool,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Exec {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let (id, timeout) = (self.id, Duration::from_secs(self.timeout.into()));
        let background = self.background;
        let request = self.request();
        if background {
            let started = match client.start(id, &request).await {
                Ok(started) => started,
                Err(error) => return Ok(not_run(&error)),
            };
            if json {
                terminal::print_json(&started)?
            } else {
                terminal::print(&started.pid.to_string())?
            }
            return Ok(ExitCode::SUCCESS);
        }
        let result = match client.exec(id, &request, timeout).await {
            Ok(result) => result,
            Err(error) => return Ok(not_run(&error)),
        };
        if json {
            terminal::print_json(&result)?;
        } else {
            pass_on(&result)?;
        }
        Ok(ExitCode::from(u8::try_from(result.exit_code).unwrap_or(SIGNALLED)))
    }

    fn request(self) -> api::Exec {
        let mut words = self.command.into_iter();
        api::Exec {
            cmd: words.next().unwrap_or_default(),
            args: Some(words.collect()),
            timeout_sec: (!self.background).then_some(self.timeout.into()),
            background: self.background.then_some(true),
            tag: None,
            envs: (!self.env.is_empty()).then(|| self.env.into_iter().collect()),
            cwd: self.cwd,
            user: None,
        }
    }
}

/// Tells why there is no exit code of the command's own, and gives one that says so.
pub(super) fn not_run(error: &anyhow::Error) -> ExitCode {
    terminal::error(error);
    let late = error.downcast_ref::<Refused>().is_some_and(|refused| refused.code == ErrorCode::Timeout);
    ExitCode::from(if late { TIMED_OUT } else { NOT_RUN })
}

/// Writes what the command wrote, byte for byte.
fn pass_on(result: &ExecResult) -> Result<()> {
    let bytes = |text: &str| match result.encoding {
        Encoding::Utf8 => Ok(text.as_bytes().to_vec()),
        Encoding::Base64 => BASE64_STANDARD.decode(text).context("the command's output came broken"),
    };
    io::stdout().lock().write_all(&bytes(&result.stdout)?)?;
    io::stderr().lock().write_all(&bytes(&result.stderr)?)?;
    Ok(io::stdout().lock().flush()?)
}
