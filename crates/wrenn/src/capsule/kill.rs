//! `wrenn capsule kill`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use api::{CapsuleId, Signal};
use clap::Args;

use crate::rest::Client;
use crate::terminal;

/// Ends processes in a capsule, with all their children.
#[derive(Debug, Args)]
pub(super) struct Kill {
    /// The capsule.
    id: CapsuleId,
    /// Process ids or tags, as `ps` shows them.
    #[arg(required = true, value_name = "PID|TAG")]
    processes: Vec<String>,
    /// How: SIGKILL, or SIGTERM, which a process may take its time for.
    #[arg(short, long, value_parser = str::parse::<Signal>, default_value = "SIGKILL")]
    signal: Signal,
}

impl Kill {
    pub(super) async fn run(self, client: &Client) -> Result<ExitCode> {
        let mut code = ExitCode::SUCCESS;
        for process in &self.processes {
            let killed = client.kill(self.id, process, self.signal).await;
            if let Err(error) = killed.with_context(|| format!("cannot end {process}")) {
                terminal::error(&error);
                code = ExitCode::FAILURE;
            }
        }
        Ok(code)
    }
}
