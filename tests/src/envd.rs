//! One envd as an ordinary process, in namespaces of its own on the default template's root file system: what happens
//! inside a guest at a hundredth of the price.
//!
//! It has its own network (port 49983 is free), its own pids, a read-only tree with writable `/home`, `/root`, `/tmp`,
//! `/run` and `/opt`, and a disk of 1 MiB at `/mnt`. It ends with the test, however the test ends.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::cache;
use crate::up::program;

/// How long envd may take to serve.
const PATIENCE: Duration = Duration::from_secs(60);
/// Links of `/30` in 198.18.0.0/15, the network for benchmarks of RFC 2544: nothing else is there.
const LINKS: u32 = 1 << 15;

/// A running envd. Dropping it ends everything in its namespaces.
pub struct Envd {
    unshare: Child,
    /// Its end is the end of the namespaces.
    stdin: ChildStdin,
    pid: u32,
    address: SocketAddr,
    dir: TempDir,
}

impl Envd {
    /// Starts one whose default user is `user`, as E2B's clients expect, and that asks for no token.
    pub async fn start() -> Self {
        Self::start_with(json!({"defaultUser": "user"})).await
    }

    /// Starts one and gives it `init` as the body of `POST /init`.
    pub async fn start_with(init: Value) -> Self {
        let dir = TempDir::with_prefix("envd-test-").unwrap();
        let tree = tree();
        let (mut unshare, number) = namespaces(&tree, dir.path());
        let mut stdin = unshare.stdin.take().unwrap();
        writeln!(stdin, "{} {}", address(number, 2), address(number, 1)).unwrap();
        let address: SocketAddr = (address(number, 2), guest_api::PORT).into();
        let http = reqwest::Client::new();
        let limit = Instant::now() + PATIENCE;
        loop {
            match http.post(format!("http://{address}/init")).json(&init).send().await {
                Ok(answer) => break assert_eq!(answer.status(), 204),
                Err(error) => assert!(Instant::now() < limit, "envd does not serve: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let pid = descendants(unshare.id()).into_iter().find(|pid| comm(*pid) == "envd").unwrap();
        Self { unshare, stdin, pid, address, dir }
    }

    /// `http://` and its address, reachable from this machine.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A client for commands and terminals.
    pub fn processes(&self) -> guest_api::process::ProcessClient<connectrpc::client::HttpClient> {
        guest_api::process::ProcessClient::new(connectrpc::client::HttpClient::plaintext(), self.config())
    }

    /// What a client of any of its services needs.
    pub fn config(&self) -> connectrpc::client::ClientConfig {
        connectrpc::client::ClientConfig::new(self.url().parse().unwrap())
    }

    /// Where its `path` (below `/home`, `/root`, `/tmp`, `/run` or `/opt`) is for this process.
    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }

    /// A program of this machine in envd's network.
    pub fn beside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.pid)).arg(program);
        command
    }

    /// Memory that only envd has, in bytes.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap().count()
    }

    /// How many processes it has started that are still there, zombies included.
    pub fn children(&self) -> usize {
        descendants(self.pid).len()
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        // Its pid 1 goes by a signal, not by its input: a test that failed must not wait for what it left running.
        let _ = self.stdin.flush();
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// Starts the namespaces, with a link to this machine; the number of the link.
fn namespaces(tree: &Path, dir: &Path) -> (Child, u32) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/envd.sh");
    let mut unshare = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--"])
        .arg(script)
        .args([tree, dir, &program("envd")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(unshare.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n", "the namespaces' script failed");
    // The name is the claim: of two that want a number, one fails. The link goes with the namespace that has its other end.
    let mut number = std::process::id() % LINKS;
    while !ip(&format!("link add envd{number} type veth peer name eth0 netns {}", unshare.id())) {
        number = (number + 1) % LINKS;
    }
    assert!(ip(&format!("address add {}/30 dev envd{number}", address(number, 1))));
    assert!(ip(&format!("link set envd{number} up")));
    (unshare, number)
}

/// One of the two addresses of a link.
fn address(number: u32, host: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + number * 4 + host)
}

fn ip(words: &str) -> bool {
    Command::new("ip").args(words.split(' ')).stderr(Stdio::null()).status().unwrap().success()
}

/// The default template's root file system, unpacked once per machine.
fn tree() -> PathBuf {
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images");
    let mut hash = Sha256::new();
    for file in ["rootfs.packages", "rootfs.sh"] {
        hash.update(std::fs::read(images.join(file)).unwrap());
    }
    let name = format!("bookworm-{}", &hex::encode(hash.finalize())[..12]);
    let tree = cache().join("trees").join(&name);
    let tar = cache().join("images").join(format!("{name}.tar"));
    assert!(tar.exists(), "{} is not built; `make images` does", tar.display());
    let script = r#"mkdir -p "${2%/*}"; exec 9>"${2%/*}/.lock"; flock 9
        [ -e "$2" ] && exit; new=$2.new; rm -rf "$new"; mkdir "$new"
        tar -C "$new" --numeric-owner --xattrs --xattrs-include='*' -xpf "$1"; mv "$new" "$2""#;
    assert!(Command::new("bash").args(["-euc", script, "bash"]).args([&tar, &tree]).status().unwrap().success());
    tree
}

/// Everything below a process, deeper ones later.
fn descendants(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect();
    let below: Vec<u32> = children.iter().flat_map(|child| descendants(*child)).collect();
    [children, below].concat()
}

fn comm(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}
