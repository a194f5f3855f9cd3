//! A `wrenn up` for one test: its own directory, port and key, and a client for its API.

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reqwest::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What `wrenn up --json` prints once it is ready.
#[derive(Debug, Clone, Deserialize)]
struct Ready {
    url: String,
    api_key: String,
    domain: String,
    ca: Option<PathBuf>,
    pid: i32,
}

/// How it is started.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// A PostgreSQL to use in place of SQLite.
    pub database_url: Option<String>,
    /// More arguments.
    pub args: Vec<String>,
    /// The name of the network namespace it runs in, and its address there; the tests' own and the loopback otherwise.
    pub netns: Option<(String, Ipv4Addr)>,
}

/// A running `wrenn up`. Dropping it sends what ctrl-C sends and waits for the end.
pub struct Up {
    dir: TempDir,
    options: Options,
    child: Child,
    pid: i32,
    api: Api,
}

/// A client of one control plane.
pub struct Api {
    url: String,
    key: String,
    domain: String,
    /// Its authority's certificate, in PEM, where it speaks TLS.
    ca: Option<String>,
    http: reqwest::Client,
}

/// A program that `make` built beside this test.
pub(crate) fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(path.exists(), "{} is not built; `make test` does", path.display());
    path
}

impl Up {
    /// Starts one in a new directory and waits until it is ready.
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    /// Starts one in a new directory, with `options`.
    pub fn with(options: Options) -> Self {
        Self::inside(TempDir::with_prefix("wrenn-test-").unwrap(), options)
    }

    /// Starts one in a directory that may have been another's, which it removes at its end.
    pub(crate) fn inside(dir: TempDir, options: Options) -> Self {
        let (child, ready) = spawn(dir.path(), &options);
        Self { dir, options, child, pid: ready.pid, api: Api::of(ready) }
    }

    /// Kills it without warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again in the same directory.
    pub fn restart(&mut self) {
        let (child, ready) = spawn(self.dir.path(), &self.options);
        (self.child, self.pid, self.api) = (child, ready.pid, Api::of(ready));
    }

    /// Sends what ctrl-C sends and waits; true when it ended as it should.
    pub fn stop(&mut self) -> bool {
        self.interrupt();
        self.child.wait().unwrap().success()
    }

    /// Sends what ctrl-C sends.
    pub fn interrupt(&self) {
        let pid = Pid::from_raw(self.pid).unwrap();
        // Already gone is fine: the status tells.
        let _ = kill_process(pid, Signal::INT);
    }

    /// What it has printed for people so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("up.log")).unwrap()
    }

    /// Its data directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where capsules' directories are, on either kind of disk.
    pub fn capsules(&self) -> PathBuf {
        let volume = self.dir().join("volume/capsules");
        if volume.exists() { volume } else { self.dir().join("capsules") }
    }

    /// Waits until the default template has its boot snapshot and nothing is left of what made it: until then there is a
    /// guest that nobody asked for.
    pub async fn has_booted(&self) {
        let root = self.capsules().parent().expect("it is in the data directory").to_owned();
        let entries = |name: &str| std::fs::read_dir(root.join(name)).into_iter().flatten().flatten();
        let is_whole = || entries("boots").any(|entry| entry.path().join("working-set").exists());
        while !is_whole() || entries("passing").next().is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// How many capsules have a directory.
    pub fn directories(&self) -> usize {
        std::fs::read_dir(self.capsules()).unwrap().count()
    }
}

impl Deref for Up {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Api {
    /// The command, as a user of this one.
    pub fn wrenn(&self) -> Command {
        let mut command = Command::new(program("wrenn"));
        command.env("WRENN_BASE_URL", &self.url).env("WRENN_API_KEY", &self.key);
        command
    }

    pub(crate) fn new(url: String, key: String) -> Self {
        Self { url, key, domain: String::new(), ca: None, http: reqwest::Client::new() }
    }

    fn of(ready: Ready) -> Self {
        let Ready { url, api_key: key, domain, ca, .. } = ready;
        let ca = ca.map(|path| std::fs::read_to_string(path).unwrap());
        let trusted = ca.iter().map(|pem| reqwest::Certificate::from_pem(pem.as_bytes()).unwrap());
        let http = reqwest::Client::builder().tls_certs_merge(trusted).build().unwrap();
        Self { url, key, domain, ca, http }
    }

    /// The domain of capsules' hosts, with the port.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Whom clients have to trust, in PEM.
    pub fn ca(&self) -> Option<&str> {
        self.ca.as_deref()
    }

    /// Where its API is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A key for it.
    pub fn api_key(&self) -> &str {
        &self.key
    }

    /// A request with the key; the status and the JSON body (null when empty).
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut request = self.http.request(method, format!("{}{path}", self.url)).header("X-API-Key", &self.key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Creates a capsule and hands out its id.
    pub async fn create(&self) -> String {
        self.create_as(json!({})).await
    }

    /// Creates a capsule as that body says, and hands out its id when it runs, which takes longer than the answer on a slow
    /// machine.
    pub async fn create_as(&self, body: Value) -> String {
        let (status, capsule) = self.call(Method::POST, "/v1/capsules", Some(body)).await;
        assert_eq!(status, 201, "{capsule}");
        let id = capsule["id"].as_str().unwrap().to_owned();
        self.until(&id, "running").await;
        id
    }

    /// Waits until the capsule has that status; it must not fail on the way.
    pub async fn until(&self, id: &str, status: &str) {
        loop {
            let (_, capsule) = self.call(Method::GET, &format!("/v1/capsules/{id}"), None).await;
            match capsule["status"].as_str().unwrap_or("gone") {
                now if now == status => return,
                "error" | "stopped" | "gone" => panic!("it was to be {status}: {capsule}"),
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Destroys a capsule.
    pub async fn destroy(&self, id: &str) {
        let (status, body) = self.call(Method::DELETE, &format!("/v1/capsules/{id}"), None).await;
        assert_eq!(status, 204, "{body}");
    }

    /// Runs a command by `/bin/sh -c` in a capsule, which may be in an emulated host and slow; the whole answer.
    pub async fn sh(&self, id: &str, command: &str) -> Value {
        let body = json!({"cmd": "/bin/sh", "args": ["-c", command], "timeout_sec": 300});
        let (status, answer) = self.call(Method::POST, &format!("/v1/capsules/{id}/exec"), Some(body)).await;
        assert_eq!(status, 200, "{command}: {answer}");
        answer
    }

    /// Begins to read a file in a capsule.
    pub async fn download(&self, id: &str, path: &str) -> reqwest::Response {
        let request = self.http.post(format!("{}/v1/capsules/{id}/files/stream/read", self.url));
        let response = request.header("X-API-Key", &self.key).json(&json!({"path": path})).send().await.unwrap();
        assert_eq!(response.status(), 200);
        response
    }

    /// The bytes of a file in a capsule.
    pub async fn read(&self, id: &str, path: &str) -> Vec<u8> {
        self.download(id, path).await.bytes().await.unwrap().to_vec()
    }

    /// How many processes a capsule has, without the kernel's and the shell's that counts.
    pub async fn processes(&self, id: &str) -> usize {
        // The list is made before anybody is begun to look at it.
        let count = "set -- /proc/[0-9]*/exe; for one; do readlink $one >/dev/null && echo; done | wc -l";
        self.output(id, count).await.parse().unwrap()
    }

    /// Runs a command that must succeed; its standard output without the last newline.
    pub async fn output(&self, id: &str, command: &str) -> String {
        let answer = self.sh(id, command).await;
        assert_eq!(answer["exit_code"], 0, "{command}: {answer}");
        answer["stdout"].as_str().unwrap().trim_end().to_owned()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.stop();
        }
    }
}

fn spawn(dir: &Path, options: &Options) -> (Child, Ready) {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("up.log")).unwrap();
    let (mut command, address) = match &options.netns {
        None => (Command::new(program("wrenn")), Ipv4Addr::LOCALHOST),
        Some((name, address)) => {
            // Not by `ip netns exec`, which hides the control groups.
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{name}")).arg(program("wrenn"));
            (command, *address)
        }
    };
    command.args(["up", "--json", "--listen", &format!("{address}:0"), "--dir"]).arg(dir).args(&options.args);
    match &options.database_url {
        Some(url) => command.env("DATABASE_URL", url),
        None => command.env_remove("DATABASE_URL"),
    };
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let log = || std::fs::read_to_string(dir.join("up.log")).unwrap_or_default();
    let ready =
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("`wrenn up` said {line:?} ({error}): {}", log()));
    (child, ready)
}
