//! Our side: an agent in this process, asked over its socket as the control plane asks it.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent::{Agent, Config, Sizes};
use agent_api::{
    CapsuleSpec, CreateCapsuleRequest, DestroyCapsuleRequest, Endpoint, Lifecycle, PauseCapsuleRequest,
    ResumeCapsuleRequest, Transport,
};
use anyhow::{Context, Result, bail, ensure};
use api::CapsuleId;
use guest_api::process::process_event::Event as Happened;
use guest_api::process::{ProcessConfig, StartRequest};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context as LayerContext, Layer};

use super::{COMMAND, MEMORY_MIB, Steps};

/// Where the agent tells the steps of a start.
const STEPS: &str = "agent::capsule::start";

/// Of all guests here.
const SIZES: Sizes = Sizes { vcpus: 1, memory_mib: MEMORY_MIB, disk_mib: 5120 };
/// The step that only a start from a snapshot has.
const FROM_SNAPSHOT: &str = "snapshot placed";
/// In which a boot snapshot is taken.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// An agent that serves.
pub struct Ours {
    agent: Agent,
    dir: TempDir,
    vmm: PathBuf,
    kernel: PathBuf,
    socket: PathBuf,
    lifecycle: Lifecycle,
    clock: Clock,
    server: JoinHandle<std::io::Result<()>>,
    shutdown: CancellationToken,
}

/// A capsule that was started.
pub struct Started {
    /// Which.
    pub id: CapsuleId,
    /// When each step was done; the last is the answer to the request.
    pub steps: Steps,
}

impl Ours {
    /// Opens an agent in a directory of its own, with the VMM that `wrenn up` would choose. With boot snapshots, what is
    /// created begins from one once it was taken.
    pub async fn open(clock: Clock, boot_snapshots: bool) -> Result<Self> {
        let dir = TempDir::with_prefix("wrenn-bench-")?;
        let vmm = choose_vmm()?;
        let mut config = config(dir.path(), &vmm)?;
        config.boot_snapshots = boot_snapshots.then_some(SIZES);
        let kernel = config.kernel.clone();
        let agent = Agent::open(config).await.context("opening the agent")?;
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket)?;
        let shutdown = CancellationToken::new();
        let serving = axum::serve(listener, agent.router()).with_graceful_shutdown(shutdown.clone().cancelled_owned());
        let server = tokio::spawn(serving.into_future());
        let lifecycle = Transport::new(Endpoint::Unix(socket.clone())).lifecycle();
        Ok(Self { agent, dir, vmm, kernel, socket, lifecycle, clock, server, shutdown })
    }

    /// Starts a capsule from an image or snapshot, and waits for the answer.
    pub async fn create(&self, image: &str) -> Result<Started> {
        let id = CapsuleId::random();
        let spec = CapsuleSpec {
            id: id.to_string(),
            image: image.into(),
            vcpus: 1,
            memory_mib: MEMORY_MIB,
            disk_mib: 5120,
            ..Default::default()
        };
        let begin = self.clock.start();
        self.lifecycle.create_capsule(CreateCapsuleRequest { spec: spec.into(), ..Default::default() }).await?;
        Ok(Started { id, steps: self.clock.stop(begin, "answered") })
    }

    /// From a request for a capsule to the answer of a command in it; and the same from the request to resume it.
    pub async fn create_and_run(&self, image: &str) -> Result<(Steps, Steps)> {
        let begin = Instant::now();
        let Started { id, steps: mut created } = self.create(image).await?;
        self.run(id).await?;
        created.push((COMMAND.into(), begin.elapsed()));
        self.lifecycle.pause_capsule(PauseCapsuleRequest { id: id.to_string(), ..Default::default() }).await?;
        let begin = self.clock.start();
        self.lifecycle.resume_capsule(ResumeCapsuleRequest { id: id.to_string(), ..Default::default() }).await?;
        let mut resumed = self.clock.stop(begin, "answered");
        self.run(id).await?;
        resumed.push((COMMAND.into(), begin.elapsed()));
        self.destroy(&id).await?;
        Ok((created, resumed))
    }

    /// Waits until what is created begins from a boot snapshot.
    pub async fn until_booted(&self, image: &str) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < BOOT_LIMIT {
            let Started { id, steps } = self.create(image).await?;
            self.destroy(&id).await?;
            if steps.iter().any(|(step, _)| step == FROM_SNAPSHOT) {
                return Ok(());
            }
        }
        bail!("there is no boot snapshot after {} s", BOOT_LIMIT.as_secs())
    }

    /// Runs a command in the guest and waits for its end.
    async fn run(&self, id: CapsuleId) -> Result<()> {
        let process = ProcessConfig { cmd: "/bin/true".into(), ..Default::default() };
        let request = StartRequest { process: process.into(), stdin: Some(false), ..Default::default() };
        let mut stream = Transport::new(Endpoint::Unix(self.socket.clone())).guest(id).start(request).await?;
        while let Some(message) = stream.message().await? {
            if let Some(Happened::End(end)) =
                message.to_owned_message().event.into_option().and_then(|event| event.event)
            {
                ensure!(end.exit_code == 0, "the command failed");
                return Ok(());
            }
        }
        bail!("the command's stream ended without an end")
    }

    /// Ends a capsule and waits until all of it is gone.
    pub async fn destroy(&self, id: &CapsuleId) -> Result<()> {
        self.lifecycle.destroy_capsule(DestroyCapsuleRequest { id: id.to_string(), ..Default::default() }).await?;
        Ok(())
    }

    /// The program that runs guests.
    pub fn vmm(&self) -> &Path {
        &self.vmm
    }

    /// The kernel that guests boot.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// Where images and capsules are, and files that share blocks with them can be.
    pub fn root(&self) -> PathBuf {
        let volume = self.dir.path().join("volume");
        if volume.exists() { volume } else { self.dir.path().to_owned() }
    }

    /// The processes of a capsule.
    pub fn pids(&self, id: &CapsuleId) -> Result<Vec<u32>> {
        let socket = self.agent.socket();
        let name = socket.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        Ok(vmm::cgroup::Cgroup::root(name.trim_start_matches("agent-"))?.child(&id.to_string()).pids()?)
    }

    /// Ends every capsule and gives back what the agent holds.
    pub async fn close(self) -> Result<()> {
        self.shutdown.cancel();
        self.server.await??;
        self.agent.destroy_all().await;
        self.agent.close().await.context("closing the agent")
    }
}

/// `firecracker` where it is installed and KVM runs guests, else `firecracker-qemu` beside this program.
fn choose_vmm() -> Result<PathBuf> {
    let firecracker = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .map(|directory| directory.join("firecracker"))
        .find(|path| path.is_file());
    if let Some(firecracker) = firecracker
        && vmm::kvm::probe(Path::new("/dev/kvm")) == vmm::kvm::Kvm::Usable
    {
        return Ok(firecracker);
    }
    let beside = std::env::current_exe()?.with_file_name("firecracker-qemu");
    if !beside.is_file() {
        bail!("{} is not there; `make build` makes it", beside.display());
    }
    Ok(beside)
}

/// The kernel and template that `make images` prepared.
fn config(dir: &Path, vmm: &Path) -> Result<Config> {
    let cache = match std::env::var_os("WRENN_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache/wrenn"),
    };
    let images = cache.join("images");
    let manifest = std::fs::read(images.join("images.json")).context("reading images.json; `make images` makes it")?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let file = |value: &Value| value.as_str().map(|name| images.join(name)).context("images.json is not understood");
    Ok(Config {
        dir: dir.to_owned(),
        vmm: vmm.to_owned(),
        kernel: file(&manifest["kernel"])?,
        templates: [("minimal".to_owned(), file(&manifest["templates"]["minimal"])?)].into(),
        pager: (std::env::current_exe()?.with_file_name("wrenn"), vec!["pager".into()]),
        objects: None,
        boot_snapshots: None,
        egress_allow: Vec::new(),
        egress_deny: Vec::new(),
        slots_ready: agent::SLOTS_READY,
        vmm_users: agent::VMM_USERS,
        limits: agent::admission::Limits::default(),
        disks: None,
    })
}

/// Notes when the agent says that a step of a start is done.
#[derive(Clone, Default)]
pub struct Clock(Arc<Mutex<Vec<(String, Instant)>>>);

impl Clock {
    fn start(&self) -> Instant {
        self.take();
        Instant::now()
    }

    /// The steps since then, of which this is the last.
    fn stop(&self, begin: Instant, last: &str) -> Steps {
        let end = (last.to_owned(), Instant::now());
        self.take().into_iter().chain([end]).map(|(step, at)| (step, at - begin)).collect()
    }

    fn take(&self) -> Vec<(String, Instant)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: Subscriber> Layer<S> for Clock {
    fn enabled(&self, metadata: &Metadata<'_>, _: LayerContext<'_, S>) -> bool {
        metadata.target() == STEPS && *metadata.level() <= Level::DEBUG
    }

    fn on_event(&self, event: &Event<'_>, _: LayerContext<'_, S>) {
        let now = Instant::now();
        let mut message = Message(String::new());
        event.record(&mut message);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((message.0, now));
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}
