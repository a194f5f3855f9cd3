//! `wrenn control`: the control plane alone, in front of an agent that runs elsewhere.

use std::process::ExitCode;

use ::control::Control;
use agent_api::Endpoint;
use anyhow::{Context, Result};
use clap::Args;
use tokio::net::TcpListener;

use crate::terminal::{self, Interrupts, Progress};

/// Runs the control plane alone, over a database and an agent.
#[derive(Debug, Args)]
pub struct ControlCommand {
    /// `postgres://user@host/database`, or `sqlite:///path/to/file?mode=rwc`.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// The agent: `http://host:port` or `unix:/path`.
    #[arg(long, env = "WRENN_AGENT")]
    agent: Endpoint,
    /// Address of the API.
    #[arg(long, env = "WRENN_CP_LISTEN_ADDR", default_value = "127.0.0.1:9725")]
    listen: String,
    /// Print a new API key of this team and leave.
    #[arg(long, value_name = "TEAM")]
    issue_key: Option<api::SafeName>,
}

impl ControlCommand {
    /// Runs until ctrl-C or SIGTERM.
    pub async fn run(self) -> Result<ExitCode> {
        let control = Control::open(::control::Config {
            database_url: self.database_url,
            agent: self.agent,
            version: env!("CARGO_PKG_VERSION").into(),
        })
        .await
        .context("starting the control plane")?;
        if let Some(team) = &self.issue_key {
            let team = control.ensure_team(team).await?;
            terminal::print(&control.issue_key(team, "wrenn control --issue-key").await?)?;
            return Ok(ExitCode::SUCCESS);
        }
        let listener =
            TcpListener::bind(&self.listen).await.with_context(|| format!("listening on {}", self.listen))?;
        let mut interrupts = Interrupts::listen()?;
        Progress::new(false).say(&format!("API listens on {}", listener.local_addr()?));
        control.run(listener, interrupts.next()).await?;
        Ok(ExitCode::SUCCESS)
    }
}
