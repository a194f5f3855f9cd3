//! `wrenn agent` and `wrenn control` as two processes, so that one of them can die while the other lives.

use std::fs::{File, OpenOptions};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::up::{Api, Options, Up, program};

/// How long one of them may take to say that it listens.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running agent and a running control plane, each of which can be killed and started again.
pub struct Split {
    agent: Process,
    control: Process,
    api: Api,
    /// `None` only while it is dropped.
    dir: Option<TempDir>,
}

impl Split {
    /// Starts both in a new directory.
    pub fn start() -> Self {
        let dir = TempDir::with_prefix("wrenn-test-").unwrap();
        let path = dir.path();
        let mut agent = Process::new("agent", path, ["--dir".into(), path.display().to_string()]);
        let address = agent.start("agent listens on ", "127.0.0.1:0");
        let database = ["--database-url".to_owned(), format!("sqlite://{}?mode=rwc", path.join("wrenn.db").display())];
        let at = ["--agent".to_owned(), format!("http://{address}")];
        let issued = Command::new(program("wrenn"))
            .arg("control")
            .args(database.iter().chain(&at))
            .args(["--issue-key", "default"])
            .output()
            .unwrap();
        assert!(issued.status.success(), "{}", String::from_utf8_lossy(&issued.stderr));
        let key = String::from_utf8(issued.stdout).unwrap().trim().to_owned();
        let mut control = Process::new("control", path, [database, at].concat());
        let address = control.start("API listens on ", "127.0.0.1:0");
        Self { agent, control, api: Api::new(format!("http://{address}"), key), dir: Some(dir) }
    }

    /// Kills the agent without warning and starts it again; capsules go on.
    pub fn restart_agent(&mut self) {
        self.agent.restart();
    }

    /// Kills the control plane without warning and starts it again.
    pub fn restart_control(&mut self) {
        self.control.restart();
    }
}

impl Deref for Split {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Drop for Split {
    fn drop(&mut self) {
        self.control.kill();
        self.agent.kill();
        // An agent that stops leaves its capsules to the next one; `wrenn up` in the same place takes them over and ends them.
        if let Some(dir) = self.dir.take() {
            drop(Up::inside(dir, Options::default()));
        }
    }
}

/// One `wrenn` process that serves one address.
struct Process {
    verb: &'static str,
    args: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
    /// What it says before its address, and the address.
    serving: Option<(String, String)>,
}

impl Process {
    fn new(verb: &'static str, dir: &Path, args: impl Into<Vec<String>>) -> Self {
        Self { verb, args: args.into(), log: dir.join(format!("{verb}.log")), child: None, serving: None }
    }

    /// Starts it on `listen`; the address that it says it has.
    fn start(&mut self, says: &str, listen: &str) -> String {
        let log = File::create(&self.log).unwrap();
        let append = OpenOptions::new().append(true).open(&self.log).unwrap();
        let mut command = Command::new(program("wrenn"));
        command.arg(self.verb).args(&self.args).args(["--listen", listen]).env_remove("DATABASE_URL");
        self.child = Some(command.stdin(Stdio::null()).stdout(log).stderr(append).spawn().unwrap());
        let limit = Instant::now() + PATIENCE;
        let address = loop {
            let said = std::fs::read_to_string(&self.log).unwrap();
            let address = said.split_once(says).and_then(|(_, rest)| rest.split_once('\n'));
            if let Some((address, _)) = address {
                break address.trim().to_owned();
            }
            assert!(Instant::now() < limit, "`wrenn {}` does not serve: {said}", self.verb);
            std::thread::park_timeout(Duration::from_millis(20));
        };
        self.serving = Some((says.to_owned(), address.clone()));
        address
    }

    fn restart(&mut self) {
        self.kill();
        let (says, address) = self.serving.take().unwrap();
        self.start(&says, &address);
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
