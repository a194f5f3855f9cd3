//! `wrenn agent` and `wrenn control` as two processes, so that one of them can die while the other lives.

use std::io::{BufRead, BufReader, Write};
use std::ops::Deref;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::up::{Api, Options, Up, program};

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
        let mut agent = Process::new("agent", ["--dir".into(), path.display().to_string()]);
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
        let mut control = Process::new("control", [database, at].concat());
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
    child: Option<Child>,
    /// What it says before its address, and the address.
    serving: Option<(String, String)>,
}

impl Process {
    fn new(verb: &'static str, args: impl Into<Vec<String>>) -> Self {
        Self { verb, args: args.into(), child: None, serving: None }
    }

    /// Starts it on `listen`; the address that it says it has.
    fn start(&mut self, says: &str, listen: &str) -> String {
        let mut command = Command::new(program("wrenn"));
        command.arg(self.verb).args(&self.args).args(["--listen", listen]).env_remove("DATABASE_URL");
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        self.child = Some(child);
        let address = loop {
            let mut line = String::new();
            assert_ne!(said.read_line(&mut line).unwrap(), 0, "`wrenn {}` ended before it served", self.verb);
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            if let Some(address) = line.trim().strip_prefix(says) {
                break address.to_owned();
            }
        };
        // What it says later belongs to the test's output too.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::stderr()));
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
