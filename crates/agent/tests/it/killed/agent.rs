//! An agent in a process of its own, to be killed, and what it and its capsules hold on the machine.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent::Agent;
use agent_api::{Capsule, CapsuleState, Endpoint, ListCapsulesRequest};
use api::CapsuleId;
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use snapshot::Snapshot;
use tempfile::TempDir;
use tokio::net::UnixListener;

use crate::common::{self, Caller};

/// Tells the process where to be an agent.
const DIR: &str = "WRENN_KILLED_DIR";
/// Tells it of an object store.
const OBJECTS: &str = "WRENN_KILLED_OBJECTS";
/// Tells it to end all capsules and itself, in place of serving.
const END: &str = "WRENN_KILLED_END";

/// What runs of a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What serves its memory.
    Pager,
    /// Its VMM, or the emulator below that.
    Vmm,
}

/// An agent process and its directory. Whatever becomes of the test, nothing of it is left.
pub struct Killable {
    dir: TempDir,
    /// The object store, if it has one.
    objects: Option<TempDir>,
    process: Child,
    is_ended: bool,
}

/// The process: an agent until it is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let filter = tracing_subscriber::EnvFilter::try_from_env("WRENN_LOG").unwrap_or_else(|_| "off".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let mut config = common::config(Path::new(&dir));
    config.objects = std::env::var(OBJECTS).ok().map(|address| objects::Config::parse(&address, []).unwrap());
    let agent = Agent::open(config).await.unwrap();
    if std::env::var_os(END).is_some() {
        agent.destroy_all().await;
        return agent.close().await.unwrap();
    }
    let socket = Path::new(&dir).join("agent.sock");
    let _ = fs::remove_file(&socket);
    axum::serve(UnixListener::bind(socket).unwrap(), agent.router()).await.unwrap();
}

impl Killable {
    pub async fn start(has_objects: bool) -> Self {
        let dir = TempDir::with_prefix("wrenn-killed-").unwrap();
        let objects = has_objects.then(|| TempDir::with_prefix("wrenn-objects-").unwrap());
        let process = command(dir.path(), objects.as_ref()).spawn().unwrap();
        let mut killable = Self { dir, objects, process, is_ended: false };
        killable.answers().await;
        killable
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn caller(&self) -> Caller {
        Caller(Endpoint::Unix(self.dir.path().join("agent.sock")))
    }

    async fn answers(&mut self) {
        while self.caller().lifecycle().list_capsules(ListCapsulesRequest::default()).await.is_err() {
            assert!(self.process.try_wait().unwrap().is_none(), "the agent ended by itself");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn kill(&mut self) {
        // Who traced it has killed it, or waited for it, already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    pub async fn restart(&mut self) {
        self.process = command(self.dir.path(), self.objects.as_ref()).spawn().unwrap();
        self.answers().await;
    }

    pub fn root(&self) -> PathBuf {
        common::root(self.dir.path())
    }

    /// Every capsule that is not forgotten.
    pub async fn capsules(&self) -> Vec<Capsule> {
        let listed = self.caller().lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap();
        listed.into_owned().capsules
    }

    /// What that capsule is, once it is not about to be anything else.
    pub async fn settled(&self, id: CapsuleId) -> Option<Capsule> {
        loop {
            let listed = self.capsules().await;
            let capsule = listed.into_iter().find(|capsule| capsule.id == id.to_string())?;
            let settled = [
                CapsuleState::Running,
                CapsuleState::Paused,
                CapsuleState::Hibernated,
                CapsuleState::Failed,
                CapsuleState::Stopped,
            ];
            if settled.into_iter().any(|state| capsule.state == state) {
                return Some(capsule);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How many generations the capsule's newest snapshot has.
    pub fn generations_of(&self, id: CapsuleId) -> usize {
        let dir = self.root().join("capsules").join(id.to_string());
        let record: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("record.json")).unwrap()).unwrap();
        let Some(number) = record["base"]["snapshot"]["number"].as_u64() else { return 0 };
        let snapshot = Snapshot::open(&self.root().join("generations"), &dir.join(format!("memory-{number}")));
        snapshot.map_or(0, |snapshot| snapshot.files().len())
    }

    /// How much of capsules is there: as [`common::holds`], processes, and generations.
    pub fn holds(&self) -> (usize, usize, usize) {
        let generations = fs::read_dir(self.root().join("generations")).unwrap().count();
        let instance = self.instance();
        (common::holds(&self.root(), &instance), common::processes(&instance).len(), generations)
    }

    /// What lies in the object store, if there is one.
    pub async fn objects(&self) -> Option<objects::Audit> {
        let config = objects::Config::parse(&address(self.objects.as_ref()?), []).unwrap();
        Some(objects::Objects::open(&config).unwrap().audit().await.unwrap())
    }

    /// Looks at the whole data directory: all of it is used, or will be removed.
    pub async fn storage_is_clean(&self) {
        let audit = agent::audit::audit(self.dir.path(), &["agent.sock"]).await.unwrap();
        assert!(audit.is_clean(), "{:#?}", audit.wrong().collect::<Vec<_>>());
    }

    /// Bytes that files take on the disk. What files share counts for each.
    pub fn usage(&self) -> u64 {
        usage(&self.root().join("capsules"))
            + ["templates", "passing", "boots", "images", "generations"]
                .map(|name| usage(&self.root().join(name)))
                .iter()
                .sum::<u64>()
    }

    /// Ends all that there is, in an orderly way, and says whether that went well.
    pub fn end(mut self) -> bool {
        self.clean()
    }

    fn clean(&mut self) -> bool {
        self.is_ended = true;
        self.kill();
        command(self.dir.path(), self.objects.as_ref()).envs(to_end(self.dir.path())).status().unwrap().success()
    }

    /// What its network names and control groups have in their names.
    pub fn instance(&self) -> String {
        let dir = self.dir.path().canonicalize().unwrap();
        hex::encode(&Sha256::digest(dir.as_os_str().as_encoded_bytes())[..4])
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        if !self.is_ended {
            self.clean();
        }
    }
}

/// What the process has in its environment that is to end all of the agent in `dir`.
pub fn to_end(dir: &Path) -> [(&'static str, &OsStr); 2] {
    [(DIR, dir.as_os_str()), (END, OsStr::new(""))]
}

fn command(dir: &Path, objects: Option<&TempDir>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "killed::agent::process", "--nocapture"]).env(DIR, dir).stdout(Stdio::null());
    command.envs(objects.map(|folder| (OBJECTS, address(folder))));
    command
}

fn address(folder: &TempDir) -> String {
    format!("file://{}", folder.path().display())
}

fn usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => usage(&entry.path()),
        _ => entry.metadata().map_or(0, |metadata| metadata.blocks() * 512),
    });
    sizes.sum()
}

/// Whether the capsule of that record runs here with memory that has not all come yet.
pub fn is_remote(record: &Path) -> bool {
    let record = fs::read(record).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    record.is_some_and(|record| record["is_remote"] == true)
}

/// The processes of that kind that the capsules of an agent have.
pub fn processes(instance: &str, kind: Kind) -> Vec<Pid> {
    let is_kind = |pid: &Pid| {
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let is_pager = words.get(1).is_some_and(|word| word == "pager");
        let is_vmm = words[0].ends_with("firecracker-qemu") || words[0].contains("qemu-system");
        match kind {
            Kind::Pager => is_pager,
            Kind::Vmm => is_vmm,
        }
    };
    common::processes(instance).into_iter().filter(is_kind).collect()
}

/// Kills a process that may be gone by now.
pub fn kill(pid: Pid) {
    let _ = kill_process(pid, Signal::KILL);
}
