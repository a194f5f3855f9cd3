//! A real agent in a directory of its own, listening on a socket file, and the count of what it holds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use agent::{Agent, Config};
use agent_api::{CapsuleSpec, Endpoint, Lifecycle, Transport};
use api::CapsuleId;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

pub struct Host {
    pub agent: Agent,
    dir: TempDir,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
    shutdown: CancellationToken,
}

/// The images that `make images` prepared, and the VMM that this build made.
fn config(dir: &Path) -> Config {
    let cache =
        std::env::var("WRENN_CACHE").unwrap_or_else(|_| format!("{}/.cache/wrenn", std::env::var("HOME").unwrap()));
    let images = PathBuf::from(cache).join("images");
    let manifest = fs::read(images.join("images.json")).expect("`make images` was run");
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let file = |value: &Value| images.join(value.as_str().unwrap());
    let test = std::env::current_exe().unwrap();
    Config {
        dir: dir.to_owned(),
        vmm: test.ancestors().nth(2).unwrap().join("firecracker-qemu"),
        kernel: file(&manifest["kernel"]),
        templates: [("minimal".to_owned(), file(&manifest["templates"]["minimal"]))].into(),
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

impl Host {
    /// Opens an agent whose configuration `change` has altered.
    pub async fn open(change: impl FnOnce(&mut Config)) -> Self {
        let dir = TempDir::with_prefix("wrenn-agent-").unwrap();
        let mut config = config(dir.path());
        change(&mut config);
        let agent = Agent::open(config).await.unwrap();
        let shutdown = CancellationToken::new();
        let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        let serving = axum::serve(listener, agent.router()).with_graceful_shutdown(shutdown.clone().cancelled_owned());
        Self { agent, server: tokio::spawn(serving.into_future()), dir, shutdown }
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.dir.path().join("agent.sock"))
    }

    pub fn lifecycle(&self) -> Lifecycle {
        Transport::new(self.endpoint()).lifecycle()
    }

    /// Where images and capsules are, on either kind of disk.
    pub fn root(&self) -> PathBuf {
        let volume = self.dir.path().join("volume");
        if volume.exists() { volume } else { self.dir.path().to_owned() }
    }

    fn instance(&self) -> String {
        let socket = self.agent.socket();
        socket.file_stem().unwrap().to_str().unwrap().trim_start_matches("agent-").to_owned()
    }

    /// How much of capsules this agent holds on the machine: directories, claims and their namespaces, control groups,
    /// firewall elements. 0 when there is no capsule.
    pub fn holds(&self) -> usize {
        let instance = self.instance();
        let claims: Vec<String> = names("/run/wrenn/slots")
            .into_iter()
            .filter(|slot| fs::read_link(format!("/run/wrenn/slots/{slot}")).is_ok_and(|to| to == Path::new(&instance)))
            .collect();
        let namespaces =
            claims.iter().filter(|slot| Path::new(&format!("/run/netns/wrenn-ns-{slot}")).exists()).count();
        let groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(|root| format!("{root}/wrenn-{instance}"));
        let groups: usize = groups.iter().map(|group| directories(group)).sum();
        let table = Command::new("nft").args(["list", "table", "inet", &format!("wrenn_{instance}")]).output().unwrap();
        let elements = String::from_utf8_lossy(&table.stdout).matches("wrenn-veth").count();
        directories(self.root().join("capsules").to_str().unwrap()) + claims.len() + namespaces + groups + elements
    }

    /// Stops serving and gives back what the agent itself holds, which must succeed.
    pub async fn close(self) {
        self.shutdown.cancel();
        self.server.await.unwrap().unwrap();
        self.agent.destroy_all().await;
        self.agent.close().await.unwrap();
    }
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn directories(dir: &str) -> usize {
    fs::read_dir(dir).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()).count()
}
