//! An agent that is killed at any instant of a pause, a resume or a fork: afterwards each capsule runs or is paused, with
//! all its memory, and the host holds nothing else. The agent is `wrenn agent`, a process of its own.

use std::fs;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::{Caller, spec};
use agent_api::{CapsuleState, ListCapsulesRequest};
use api::CapsuleId;
use tempfile::TempDir;

const KEEP: &str =
    "head -c 4M /dev/urandom > /dev/shm/m; md5sum < /dev/shm/m > /dev/shm/sum; cp /dev/shm/m /root/m; sync";
const CHECK: &str = "sum=$(cat /dev/shm/sum); test \"$(md5sum < /dev/shm/m)\" = \"$sum\"; test \"$(md5sum < /root/m)\" = \"$sum\"; \
    echo $((n=$(cat /root/n 2>/dev/null || echo 0)+1)) > /root/n; cat /dev/shm/sum";

/// An agent process and its directory.
struct Killable {
    dir: TempDir,
    port: u16,
    process: Child,
}

impl Killable {
    async fn start() -> Self {
        let dir = TempDir::with_prefix("wrenn-killed-").unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Self::spawn(&dir, port);
        let killable = Self { dir, port, process };
        killable.answers().await;
        killable
    }

    fn spawn(dir: &TempDir, port: u16) -> Child {
        let test = std::env::current_exe().unwrap();
        Command::new(test.ancestors().nth(2).unwrap().join("wrenn"))
            .args(["agent", "--dir", dir.path().to_str().unwrap(), "--listen", &format!("127.0.0.1:{port}")])
            .stdout(Stdio::null())
            .stderr(fs::File::options().create(true).append(true).open("/tmp/wrenn-killed.log").unwrap())
            .spawn()
            .unwrap()
    }

    fn caller(&self) -> Caller {
        Caller(format!("http://127.0.0.1:{}", self.port).parse().unwrap())
    }

    async fn answers(&self) {
        while self.caller().lifecycle().list_capsules(ListCapsulesRequest::default()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn kill_and_restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = Self::spawn(&self.dir, self.port);
        self.answers().await;
    }

    fn root(&self) -> std::path::PathBuf {
        let volume = self.dir.path().join("volume");
        if volume.exists() { volume } else { self.dir.path().to_owned() }
    }

    /// Waits until the host has these many capsules and of each only what it needs.
    async fn holds_only(&self, capsules: usize) {
        loop {
            let count = |dir: &str| fs::read_dir(self.root().join(dir)).unwrap().count();
            let listed = self.caller().lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap();
            let alive = listed
                .into_owned()
                .capsules
                .into_iter()
                .filter(|capsule| capsule.state == CapsuleState::Running || capsule.state == CapsuleState::Paused);
            if (alive.count(), count("capsules"), count("passing")) == (capsules, capsules, 0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn end(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        let volume = self.dir.path().join("volume");
        if volume.exists() {
            Command::new("umount").arg(&volume).status().unwrap();
        }
    }
}

#[tokio::test]
async fn a_capsule_is_running_or_paused_and_whole_whenever_its_agent_is_killed() {
    let mut agent = Killable::start().await;
    let id = CapsuleId::random();
    agent.caller().create(spec(id)).await.unwrap();
    let sum = agent.caller().sh(id, &format!("{KEEP}; cat /dev/shm/sum")).await;
    // A pause and a resume take some hundred milliseconds here: the kills fall before, between and after their steps.
    for millis in [0, 5, 10, 20, 30, 45, 60, 80, 100, 130, 170, 220, 280, 350, 450, 600, 800] {
        for verb in ["pause", "resume"] {
            let caller = agent.caller();
            let asked = tokio::spawn(async move {
                let _ = match verb {
                    "pause" => caller.pause(id).await.map(drop),
                    _ => caller.resume(id).await.map(drop),
                };
            });
            tokio::time::sleep(Duration::from_millis(millis)).await;
            agent.kill_and_restart().await;
            asked.await.unwrap();
            agent.holds_only(1).await;
            let caller = agent.caller();
            caller.resume(id).await.unwrap();
            assert_eq!(caller.sh(id, CHECK).await, sum, "{verb} killed after {millis} ms");
            if verb == "pause" {
                caller.pause(id).await.unwrap();
            }
        }
    }
    agent.caller().destroy(id).await;
    agent.holds_only(0).await;
    agent.end().await;
}

#[tokio::test]
async fn a_fork_whose_agent_is_killed_leaves_whole_children_or_none() {
    let mut agent = Killable::start().await;
    let parent = CapsuleId::random();
    agent.caller().create(spec(parent)).await.unwrap();
    let sum = agent.caller().sh(parent, &format!("{KEEP}; cat /dev/shm/sum")).await;
    for millis in [0, 20, 50, 100, 150, 250, 400, 600, 900] {
        let ids = [CapsuleId::random(), CapsuleId::random()];
        let caller = agent.caller();
        let asked = tokio::spawn(async move {
            let _ = caller.fork(parent, &ids).await;
        });
        tokio::time::sleep(Duration::from_millis(millis)).await;
        agent.kill_and_restart().await;
        asked.await.unwrap();
        let caller = agent.caller();
        let listed = caller.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned();
        assert_eq!(caller.sh(parent, CHECK).await, sum, "the parent, killed after {millis} ms");
        for capsule in &listed.capsules {
            let id = capsule.id.parse().unwrap();
            assert_eq!(caller.sh(id, CHECK).await, sum, "{id}, killed after {millis} ms");
            if id != parent {
                caller.destroy(id).await;
            }
        }
        agent.holds_only(1).await;
        // The next snapshot of the parent is whole, whatever the last one came to.
        caller.pause(parent).await.unwrap();
        caller.resume(parent).await.unwrap();
        assert_eq!(caller.sh(parent, CHECK).await, sum);
    }
    agent.caller().destroy(parent).await;
    agent.holds_only(0).await;
    agent.end().await;
}
