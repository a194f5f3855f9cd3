//! `wrenn capsule logs`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use api::CapsuleId;
use clap::Args;
use tokio::sync::watch;

use super::exec::{code, not_run};
use super::follow::{self, End};
use super::stdio::Signals;
use crate::rest::Client;

/// Nothing more came for this long: that was all there is so far.
const QUIET: Duration = Duration::from_secs(1);

/// Shows what a process in a capsule writes, beginning with what is kept of it (at least the last 256 KiB).
///
/// With `-f` it stays until the process ends and exits with its code; ctrl-C leaves the process alone.
#[derive(Debug, Args)]
pub(super) struct Logs {
    /// The capsule.
    id: CapsuleId,
    /// Its process id or tag, as `ps` shows them.
    #[arg(value_name = "PID|TAG")]
    process: String,
    /// Stay until the process ends.
    #[arg(short, long)]
    follow: bool,
}

impl Logs {
    pub(super) async fn run(self, client: &Client) -> Result<ExitCode> {
        let shown = self.show(client).await;
        Ok(shown.unwrap_or_else(|error| not_run(&error)))
    }

    async fn show(self, client: &Client) -> Result<ExitCode> {
        let socket = client.process_stream(self.id, &self.process).await?;
        let (pid, mut signals) = (watch::Sender::new(None), Signals::new()?);
        let quiet = (!self.follow).then_some(QUIET);
        let end = tokio::select! {
            end = follow::follow(socket, None, None, quiet, &pid) => end?,
            signal = signals.next() => return Ok(ExitCode::from(128 + signal)),
        };
        match end {
            End::Exited(exit_code) => Ok(code(exit_code)),
            End::Quiet => Ok(ExitCode::SUCCESS),
            End::Refused(error) => Err(error),
            End::Broken(error) => Err(error.context("the connection broke; the process goes on")),
        }
    }
}
