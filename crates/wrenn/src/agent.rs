//! `wrenn agent`: the host agent alone, for a machine of a fleet or for working on it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ::agent::Agent;
use ::agent::admission::Limits;
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
    /// The user that the VMM in slot N (1 to 32767) runs as has this number plus N. No account may be in that range.
    #[arg(long, env = "WRENN_VMM_USERS", default_value_t = ::agent::VMM_USERS, value_parser = vmm_users())]
    vmm_users: u32,
    #[command(flatten)]
    room: Room,
}

/// How far the host may be promised to capsules. A start that does not fit is refused.
#[derive(Debug, Args)]
pub struct Room {
    /// How many times the memory that is not reserved may be promised to capsules.
    #[arg(long, env = "WRENN_MEMORY_FACTOR", default_value_t = Limits::default().memory_factor, value_parser = factor)]
    memory_factor: f64,
    /// Memory that is kept for the host itself, in MiB; an eighth of it if not given.
    #[arg(long, env = "WRENN_MEMORY_RESERVE", value_name = "MIB")]
    memory_reserve: Option<u64>,
    /// How many virtual processors each processor may be promised as.
    #[arg(long, env = "WRENN_VCPU_FACTOR", default_value_t = Limits::default().vcpu_factor, value_parser = factor)]
    vcpu_factor: f64,
    /// Disk space that is kept free, in MiB.
    #[arg(long, env = "WRENN_DISK_RESERVE", value_name = "MIB", default_value_t = Limits::default().disk_reserve_mib)]
    disk_reserve: u64,
}

impl From<Room> for Limits {
    fn from(room: Room) -> Self {
        let Room { memory_factor, memory_reserve, vcpu_factor, disk_reserve } = room;
        Self { memory_factor, memory_reserve_mib: memory_reserve, vcpu_factor, disk_reserve_mib: disk_reserve }
    }
}

/// A factor of which something is left.
fn factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if factor > 0.0 && factor <= 1000.0 => Ok(factor),
        _ => Err("it must be a number above 0 and up to 1000".into()),
    }
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

/// Numbers of users, of which none is root, nor beyond what the kernel has.
pub fn vmm_users() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1000..=2_000_000_000)
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
        let config =
            config(dir, choice.binary, images, self.objects, self.disks, self.egress, self.vmm_users, self.room)?;
        let agent = Agent::open(config).await.context("starting the agent")?;
        let listener = TcpListener::bind(self.listen).await.with_context(|| format!("listening on {}", self.listen))?;
        progress.say(&format!("agent listens on {}", listener.local_addr()?));
        let shutdown = CancellationToken::new();
        let forget = tokio::spawn(agent.clone().forget_ended(shutdown.clone().cancelled_owned()));
        let watch = tokio::spawn(agent.clone().watch_capsules(shutdown.clone().cancelled_owned()));
        let mut server = tokio::spawn(proxy::serve(listener, agent.router(), shutdown.clone().cancelled_owned()));
        interrupted().await?;
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

/// How an agent is set up whose VMM and images were found. This same program serves the memory of resumed capsules.
pub fn config(
    dir: PathBuf,
    vmm: PathBuf,
    images: Images,
    objects: Option<::objects::Config>,
    disks: Disks,
    egress: Egress,
    vmm_users: u32,
    room: Room,
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
        vmm_users,
        limits: room.into(),
        disks: disks.backend,
    })
}
