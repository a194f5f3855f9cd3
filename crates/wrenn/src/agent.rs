//! `wrenn agent`: the host agent alone, for a machine of a fleet or for working on it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ::agent::Agent;
use anyhow::{Context, Result, bail};
use api::egress::Cidr;
use api::limits;
use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::images::Images;
use crate::terminal::{Progress, interrupted};
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
    /// The VMM to use in place of the one that fits this machine.
    #[arg(long, env = "WRENN_VMM")]
    vmm: Option<PathBuf>,
    /// Where what is paused goes too, so that any host can resume it: s3://bucket/prefix (with the usual AWS_* variables)
    /// or file:///path. Without it nothing is uploaded.
    #[arg(long, env = "WRENN_OBJECTS", value_name = "URL", value_parser = objects)]
    objects: Option<::objects::Config>,
    #[command(flatten)]
    disks: Disks,
    #[command(flatten)]
    egress: Egress,
}

/// How root disks are made.
#[derive(Debug, Default, Args)]
pub struct Disks {
    /// How root disks are made: reflink, device-mapper (which reserves all of a disk before it is used) or copy, in place of the
    /// best way that needs nothing but the directory.
    #[arg(long = "disks", env = "WRENN_DISKS", value_name = "HOW")]
    backend: Option<::agent::DiskBackend>,
}

/// What the operator says that capsules may reach, whatever is asked for them.
#[derive(Debug, Default, Args)]
pub struct Egress {
    /// Lets capsules reach this network although it is private (RFC 1918, 100.64.0.0/10) or link-local; may be repeated.
    /// Capsules never reach each other, nor this machine's own addresses.
    #[arg(long = "egress-allow", env = "WRENN_EGRESS_ALLOW", value_name = "CIDR", value_delimiter = ',')]
    allow: Vec<Cidr>,
    /// Keeps all capsules from reaching this network; may be repeated.
    #[arg(long = "egress-deny", env = "WRENN_EGRESS_DENY", value_name = "CIDR", value_delimiter = ',')]
    deny: Vec<Cidr>,
}

/// An object store's address, with what the environment says to it.
pub fn objects(address: &str) -> Result<::objects::Config, ::objects::Error> {
    ::objects::Config::parse(address, std::env::vars())
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
        let choice = vmm_choice::choose(self.vmm.as_deref()).await?;
        progress.say(&choice.sentence);
        let images = images::prepare(&images::cache()?, &progress).await?;
        let config = config(dir, choice.binary, images, self.objects, self.disks, self.egress)?;
        let agent = Agent::open(config).await.context("starting the agent")?;
        let listener = TcpListener::bind(self.listen).await.with_context(|| format!("listening on {}", self.listen))?;
        progress.say(&format!("agent listens on {}", listener.local_addr()?));
        let shutdown = CancellationToken::new();
        let forget = tokio::spawn(agent.clone().forget_ended(shutdown.clone().cancelled_owned()));
        let mut server = tokio::spawn(proxy::serve(listener, agent.router(), shutdown.clone().cancelled_owned()));
        interrupted().await?;
        shutdown.cancel();
        // Streams that have no end of their own are cut; what they are about goes on in its capsule.
        match tokio::time::timeout(GRACE, &mut server).await {
            Ok(ended) => ended.context("the agent's listener")?,
            Err(_) => server.abort(),
        }
        forget.await?;
        Ok(ExitCode::SUCCESS)
    }
}

/// How an agent is set up whose VMM and images were found. This same program serves the memory of resumed capsules.
pub fn config(
    dir: PathBuf,
    vmm: PathBuf,
    images: Images,
    objects: Option<::objects::Config>,
    disks: Disks,
    egress: Egress,
) -> Result<::agent::Config> {
    let program = std::env::current_exe().context("finding this program")?;
    Ok(::agent::Config {
        dir,
        vmm,
        kernel: images.kernel,
        templates: images.templates,
        pager: (program, vec!["pager".into()]),
        objects,
        boot_snapshots: Some(::agent::Sizes {
            vcpus: limits::DEFAULT_VCPUS,
            memory_mib: limits::DEFAULT_MEMORY_MB,
            disk_mib: limits::DEFAULT_DISK_SIZE_MB,
        }),
        egress_allow: egress.allow,
        egress_deny: egress.deny,
        slots_ready: ::agent::SLOTS_READY,
        disks: disks.backend,
    })
}
