//! A real agent in a directory of its own, listening on a socket file, and the count of what it holds.

use std::fs;
use std::ops::Deref;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent::audit::{Finding, Kind, Verdict};
use agent::{Agent, Config};
use agent_api::*;
use api::CapsuleId;
use connectrpc::ConnectError;
use guest_api::process::__buffa::view::oneof::process_event::Event;
use guest_api::process::__buffa::view::oneof::process_event::data_event::Output;
use guest_api::process::{ProcessConfig, StartRequest};
use rustix::process::Pid;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::killed;

/// What an agent is asked, wherever it listens.
pub struct Caller(pub Endpoint);

impl Caller {
    pub fn endpoint(&self) -> Endpoint {
        self.0.clone()
    }

    pub fn lifecycle(&self) -> Lifecycle {
        Transport::new(self.endpoint()).lifecycle()
    }

    /// Makes a capsule, which runs then.
    pub async fn create(&self, spec: CapsuleSpec) -> Result<Capsule, ConnectError> {
        let request = CreateCapsuleRequest { spec: spec.into(), ..Default::default() };
        Ok(self.lifecycle().create_capsule(request).await?.into_owned().capsule.into_option().unwrap())
    }

    pub async fn destroy(&self, id: CapsuleId) {
        let request = DestroyCapsuleRequest { id: id.to_string(), ..Default::default() };
        self.lifecycle().destroy_capsule(request).await.unwrap();
    }

    pub async fn pause(&self, id: CapsuleId) -> Result<Capsule, ConnectError> {
        let request = PauseCapsuleRequest { id: id.to_string(), ..Default::default() };
        Ok(self.lifecycle().pause_capsule(request).await?.into_owned().capsule.into_option().unwrap())
    }

    pub async fn resume(&self, id: CapsuleId) -> Result<Capsule, ConnectError> {
        let request = ResumeCapsuleRequest { id: id.to_string(), ..Default::default() };
        Ok(self.lifecycle().resume_capsule(request).await?.into_owned().capsule.into_option().unwrap())
    }

    /// Resumes a capsule that another host has uploaded.
    pub async fn adopt(&self, id: CapsuleId) -> Result<Capsule, ConnectError> {
        let request = ResumeCapsuleRequest { id: id.to_string(), adopt: true, ..Default::default() };
        Ok(self.lifecycle().resume_capsule(request).await?.into_owned().capsule.into_option().unwrap())
    }

    pub async fn hibernate(&self, id: CapsuleId) -> Result<Capsule, ConnectError> {
        let request = HibernateCapsuleRequest { id: id.to_string(), ..Default::default() };
        Ok(self.lifecycle().hibernate_capsule(request).await?.into_owned().capsule.into_option().unwrap())
    }

    /// Destroys a capsule, and what the object store has of it.
    pub async fn forget(&self, id: CapsuleId) {
        let request = DestroyCapsuleRequest { id: id.to_string(), forget: true, ..Default::default() };
        self.lifecycle().destroy_capsule(request).await.unwrap();
    }

    pub async fn fork(&self, id: CapsuleId, children: &[CapsuleId]) -> Result<Vec<Child>, ConnectError> {
        let children = children.iter().map(ToString::to_string).collect();
        let request = ForkCapsuleRequest { id: id.to_string(), children, ..Default::default() };
        Ok(self.lifecycle().fork_capsule(request).await?.into_owned().children)
    }

    /// The capsule as it is listed.
    pub async fn listed(&self, id: CapsuleId) -> Capsule {
        let list = self.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned();
        list.capsules.into_iter().find(|capsule| capsule.id == id.to_string()).unwrap()
    }

    /// Waits until the capsule is listed in that state.
    pub async fn until(&self, id: CapsuleId, state: CapsuleState) -> Capsule {
        loop {
            let capsule = self.listed(id).await;
            if capsule.state == state {
                return capsule;
            }
            assert!(
                !(capsule.state == CapsuleState::Failed || capsule.state == CapsuleState::Stopped),
                "{:?}: {}",
                capsule.state,
                capsule.reason
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Looks at the guest's clock, which must lie between two looks at ours, give or take a second.
    pub async fn is_in_time(&self, id: CapsuleId) {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64;
        let before = now();
        let guest: i64 = self.sh(id, "date +%s%3N").await.parse().unwrap();
        assert!((before - 1000..=now() + 1000).contains(&guest), "{id}: {guest} at {before}");
    }

    /// What a shell in the guest prints, without the last newline.
    pub async fn sh(&self, id: CapsuleId, script: &str) -> String {
        self.try_sh(id, script).await.unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    pub async fn try_sh(&self, id: CapsuleId, script: &str) -> Result<String, ConnectError> {
        let processes = Transport::new(self.endpoint()).guest(id);
        let args = vec!["-c".into(), script.into()];
        let process = ProcessConfig { cmd: "/bin/sh".into(), args, ..Default::default() };
        let request = StartRequest { process: process.into(), stdin: Some(false), ..Default::default() };
        let mut stream = processes.start(request).await?;
        let mut out = Vec::new();
        while let Some(message) = stream.message().await? {
            match message.view().event.event.as_ref() {
                Some(Event::Data(data)) => {
                    if let Some(Output::Stdout(bytes) | Output::Stderr(bytes)) = data.output {
                        out.extend_from_slice(bytes);
                    }
                }
                Some(Event::End(end)) => {
                    assert_eq!(end.exit_code, 0, "{script}: {}", String::from_utf8_lossy(&out));
                    return Ok(String::from_utf8(out).unwrap().trim_end().to_owned());
                }
                _ => {}
            }
        }
        Err(ConnectError::new(connectrpc::ErrorCode::Aborted, "the stream ended without an end"))
    }
}

/// An agent. Whatever becomes of the test, nothing of it is left.
pub struct Host {
    pub agent: Agent,
    caller: Caller,
    dir: TempDir,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
    shutdown: CancellationToken,
}

/// The images that `make images` prepared, and the VMM that `FIRECRACKER_BIN` names, by default the one this build made.
pub fn config(dir: &Path) -> Config {
    let cache =
        std::env::var("WRENN_CACHE").unwrap_or_else(|_| format!("{}/.cache/wrenn", std::env::var("HOME").unwrap()));
    let images = PathBuf::from(cache).join("images");
    let manifest = fs::read(images.join("images.json")).expect("`make images` was run");
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let file = |value: &Value| images.join(value.as_str().unwrap());
    let test = std::env::current_exe().unwrap();
    let program = |name: &str| test.ancestors().nth(2).unwrap().join(name);
    Config {
        dir: dir.to_owned(),
        vmm: std::env::var_os("FIRECRACKER_BIN").map_or_else(|| program("firecracker-qemu"), PathBuf::from),
        kernel: file(&manifest["kernel"]),
        templates: [("minimal".to_owned(), file(&manifest["templates"]["minimal"]))].into(),
        pager: (program("wrenn"), vec!["pager".into()]),
        objects: None,
        boot_snapshots: None,
        egress_allow: Vec::new(),
        egress_deny: Vec::new(),
        // What is ready would be counted with what capsules hold.
        slots_ready: 0,
        vmm_users: agent::VMM_USERS,
        limits: agent::admission::Limits::default(),
        disks: std::env::var("WRENN_DISKS").ok().map(|how| how.parse().unwrap()),
    }
}

pub fn spec(id: CapsuleId) -> CapsuleSpec {
    CapsuleSpec {
        id: id.to_string(),
        image: "minimal".into(),
        vcpus: 1,
        memory_mib: 256,
        disk_mib: 5120,
        ..Default::default()
    }
}

impl Deref for Host {
    type Target = Caller;

    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl Host {
    /// Opens an agent whose configuration `change` has altered.
    pub async fn open(change: impl FnOnce(&mut Config)) -> Self {
        let dir = TempDir::with_prefix("wrenn-agent-").unwrap();
        end_with_this_process(dir.path());
        Self::open_in(dir, change).await
    }

    /// Opens an agent on what another left in `dir`.
    pub async fn open_in(mut dir: TempDir, change: impl FnOnce(&mut Config)) -> Self {
        dir.disable_cleanup(true);
        let filter = tracing_subscriber::EnvFilter::try_from_env("WRENN_LOG").unwrap_or_else(|_| "warn".into());
        // Tests of one process share it.
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let mut config = config(dir.path());
        change(&mut config);
        let _ = fs::remove_file(dir.path().join("agent.sock"));
        let agent = Agent::open(config).await.unwrap();
        let shutdown = CancellationToken::new();
        let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        let serving = axum::serve(listener, agent.router()).with_graceful_shutdown(shutdown.clone().cancelled_owned());
        let caller = Caller(Endpoint::Unix(dir.path().join("agent.sock")));
        Self { agent, caller, server: tokio::spawn(serving.into_future()), dir, shutdown }
    }

    /// Where images and capsules are, on either kind of disk.
    pub fn root(&self) -> PathBuf {
        root(self.dir.path())
    }

    /// What names this agent's things on the machine.
    pub fn instance(&self) -> String {
        let socket = self.agent.socket();
        socket.file_stem().unwrap().to_str().unwrap().trim_start_matches("agent-").to_owned()
    }

    /// What [`holds`] says of this agent.
    pub fn holds(&self) -> usize {
        holds(&self.root(), &self.instance())
    }

    /// The directory of a capsule.
    pub fn capsule(&self, id: CapsuleId) -> PathBuf {
        self.root().join("capsules").join(id.to_string())
    }

    /// What the capsule's record says.
    pub fn record(&self, id: CapsuleId) -> Value {
        serde_json::from_slice(&fs::read(self.capsule(id).join("record.json")).unwrap()).unwrap()
    }

    /// Kills a process that the capsule's record names.
    pub fn kill(&self, id: CapsuleId, process: &str) {
        self.signal(id, process, rustix::process::Signal::KILL);
    }

    /// Sends a signal to a process that the capsule's record names.
    pub fn signal(&self, id: CapsuleId, process: &str, signal: rustix::process::Signal) {
        let pid = self.record(id)[process]["pid"].as_i64().unwrap_or_else(|| panic!("it has no {process}"));
        let pid = Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Stops the capsule's pager where it is; false if it had nothing left to do.
    pub fn stop_pager(&self, id: CapsuleId) -> bool {
        let pid = self.record(id)["pager"]["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32));
        // It may have ended meanwhile.
        let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::STOP));
        !fs::read_to_string(self.capsule(id).join("pager.log")).unwrap().contains("whole")
    }

    /// How many processes run in the control groups of this agent's capsules.
    pub fn processes(&self) -> usize {
        processes(&self.instance()).len()
    }

    /// How many generations of memory are kept.
    pub fn generations(&self) -> usize {
        names(self.root().join("generations").to_str().unwrap()).len()
    }

    /// Waits until what nobody needs any more is collected, which happens beside everything else.
    pub async fn until_generations(&self, count: usize) {
        while self.generations() != count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the audit finds no garbage among the generations.
    pub async fn until_generations_are_settled(&self) {
        let is_generation = |finding: &Finding| finding.kind == Kind::Generation && finding.verdict == Verdict::Garbage;
        while agent::audit::audit(self.dir(), &["agent.sock"]).await.unwrap().findings.iter().any(is_generation) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The data directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Stops the agent after its capsules were paused; nothing is left but the directory.
    pub async fn put_away(mut self) -> TempDir {
        self.shutdown.cancel();
        self.server.await.unwrap().unwrap();
        self.agent.close().await.unwrap();
        self.dir.disable_cleanup(false);
        self.dir
    }

    /// Stops the agent as it is, without asking its capsules; what is left is in the directory.
    pub async fn leave(self) -> TempDir {
        self.shutdown.cancel();
        self.server.await.unwrap().unwrap();
        drop(self.agent);
        self.dir
    }

    /// Stops serving and gives back what the agent itself holds, which must succeed.
    pub async fn close(self) {
        self.agent.destroy_all().await;
        self.put_away().await;
    }
}

/// Has what the agent of `dir` left ended when this process has, if the directory is still there: the capsules of a test that
/// failed, or was killed, would be in the way of those that follow.
#[expect(clippy::zombie_processes, reason = "it outlives this process")]
fn end_with_this_process(dir: &Path) {
    const SCRIPT: &str =
        r#"read -r _; [ -d "$1" ] || exit; "$0" --exact killed::agent::process; rm -rf --one-file-system "$1""#;
    let mut keeper = Command::new("sh");
    keeper.args(["-c", SCRIPT]).arg(std::env::current_exe().unwrap()).arg(dir);
    // In a group of its own, as the whole of ours is killed when time is up.
    keeper.envs(killed::agent::to_end(dir)).process_group(0);
    let mut keeper = keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Until the end, however that comes about.
    std::mem::forget(keeper.stdin.take());
}

/// Where images and capsules of the data directory `dir` are, on either kind of disk.
pub fn root(dir: &Path) -> PathBuf {
    let volume = dir.join("volume");
    if volume.exists() { volume } else { dir.to_owned() }
}

/// How much of capsules the agent `instance` holds on the machine, with its disks below `root`: directories, claims and
/// their namespaces, control groups, firewall elements. 0 when there is no capsule.
pub fn holds(root: &Path, instance: &str) -> usize {
    let claims = claims(instance);
    let namespaces = claims.iter().filter(|slot| Path::new(&format!("/run/netns/wrenn-ns-{slot}")).exists()).count();
    let groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(|root| format!("{root}/wrenn-{instance}"));
    let groups: usize = groups.iter().map(|group| directories(group)).sum();
    let table = Command::new("nft").args(["list", "table", "inet", &format!("wrenn_{instance}")]).output().unwrap();
    let elements = String::from_utf8_lossy(&table.stdout).matches("wrenn-veth").count();
    directories(root.join("capsules").to_str().unwrap()) + claims.len() + namespaces + groups + elements
}

/// The slots that the agent `instance` has claimed.
pub fn claims(instance: &str) -> Vec<String> {
    names("/run/wrenn/slots")
        .into_iter()
        .filter(|slot| fs::read_link(format!("/run/wrenn/slots/{slot}")).is_ok_and(|to| to == Path::new(instance)))
        .collect()
}

/// The processes in the control groups of the capsules of the agent `instance`.
pub fn processes(instance: &str) -> Vec<Pid> {
    let groups = format!("/wrenn-{instance}/");
    names("/proc")
        .into_iter()
        .filter(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(&groups)))
        // One that has ended holds nothing any more; the machine's init collects it when it gets to it.
        .filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()))
        .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        .collect()
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn directories(dir: &str) -> usize {
    fs::read_dir(dir).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()).count()
}
