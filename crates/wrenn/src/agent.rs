//! `wrenn agent`: the host agent alone, for a machine of a fleet or for working on it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ::agent::Agent;
use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::host::HostArgs;
use crate::terminal::{Interrupts, Progress};
use crate::{images, up, vmm_choice};

/// How long a shutdown waits for exchanges that are under way.
const GRACE: Duration = Duration::from_secs(10);

/// Runs the host agent alone. Stopping it leaves its capsules running, for the next one to take over.
#[derive(Debug, Args)]
pub struct AgentCommand {
    /// Where everything is kept.
    #[arg(long, env = "WRENN_DIR", default_value = up::DIR)]
    dir: PathBuf,
    /// Loopback address for the control plane, which needs no certificate there.
    #[arg(long, env = "WRENN_HOST_LISTEN_ADDR", default_value = "127.0.0.1:50051")]
    listen: SocketAddr,
    #[command(flatten)]
    host: HostArgs,
}

impl AgentCommand {
    /// Runs until ctrl-C or SIGTERM.
    pub async fn run(self) -> Result<ExitCode> {
        if !self.listen.ip().is_loopback() {
            bail!("--listen {} is not a loopback address, and the agent does not ask who is calling", self.listen);
        }
        let progress = Progress::new(false);
        let dir = up::prepare_dir(&self.dir)?;
        let _lock = up::lock(&dir).await?;
        let choice = vmm_choice::choose(self.host.vmm.as_deref()).await?;
        progress.say(&choice.sentence);
        let images = images::prepare(&images::cache()?, &progress).await?;
        let config = self.host.config(dir, choice.binary, images)?;
        let agent = Agent::open(config).await.context("starting the agent")?;
        let mut interrupts = Interrupts::listen()?;
        let listener = TcpListener::bind(self.listen).await.with_context(|| format!("listening on {}", self.listen))?;
        progress.say(&format!("agent listens on {}", listener.local_addr()?));
        let shutdown = CancellationToken::new();
        let forget = tokio::spawn(agent.clone().forget_ended(shutdown.clone().cancelled_owned()));
        let watch = tokio::spawn(agent.clone().watch_capsules(shutdown.clone().cancelled_owned()));
        let mut server = tokio::spawn(proxy::serve(listener, agent.router(), shutdown.clone().cancelled_owned()));
        interrupts.next().await;
        shutdown.cancel();
        // Streams that have no end of their own are cut; what they are about goes on in its capsule.
        match tokio::time::timeout(GRACE, &mut server).await {
            Ok(ended) => ended.context("the agent's listener")?,
            Err(_) => server.abort(),
        }
        forget.await?;
        watch.await?;
        Ok(ExitCode::SUCCESS)
    }
}
