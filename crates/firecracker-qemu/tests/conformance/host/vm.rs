//! One process under test, from its start to its exit code.

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;

use serde_json::{Value, json};

use super::guest::{self, Guest};
use super::http::Api;
use super::pager::Pager;
use super::{DEADLINE, Host, until};

/// The guest's, which the host's permanent neighbour entry knows.
pub const MAC: &str = "02:fc:00:00:00:05";

const BOOT_ARGS: &str = "console=ttyS0 reboot=k panic=-1 quiet pci=off \
    i8042.noaux i8042.nomux i8042.dumbkbd i8042.nopnp \
    ip=169.254.0.21::169.254.0.22:255.255.255.252::eth0:off";

/// MiB; small, since every Full snapshot writes it.
pub const MEMORY_MIB: u64 = 128;

/// A snapshot's two files.
pub struct Snapshot {
    pub state: PathBuf,
    pub memory: PathBuf,
}

/// A process under test.
pub struct Vm {
    pub api: Api,
    pub namespace: String,
    child: Child,
    console: mpsc::Receiver<String>,
}

impl Vm {
    /// Starts the process in `namespace` and waits for its API.
    pub fn start(host: &Host, namespace: String) -> Self {
        Self::start_as(host, namespace.clone(), &namespace)
    }

    /// Starts another process in the namespace of this one, which has ended.
    pub fn successor(&self, host: &Host) -> Self {
        Self::start_as(host, self.namespace.clone(), &format!("{}-2", self.namespace))
    }

    fn start_as(host: &Host, namespace: String, id: &str) -> Self {
        let binary =
            std::env::var_os("FIRECRACKER_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_firecracker-qemu").into());
        let socket = host.path(&format!("{id}.sock"));
        let mut child = Command::new("ip")
            .args(["netns", "exec", &namespace])
            .arg(binary)
            .arg("--api-sock")
            .arg(&socket)
            .args(["--id", id])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = listen(child.stdout.take().unwrap());
        let vm = Self { api: Api::new(&socket), namespace, child, console };
        until("the API", || UnixStream::connect(&socket).ok());
        vm
    }

    /// A kernel, the suite's guest, memory and a network.
    pub fn configure(&self) {
        self.api.put("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB }));
        self.api.put(
            "/boot-source",
            json!({
                "kernel_image_path": guest::kernel(),
                "initrd_path": guest::initrd(),
                "boot_args": BOOT_ARGS,
            }),
        );
        self.api
            .put("/network-interfaces/eth0", json!({ "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": MAC }));
    }

    /// Adds a drive.
    pub fn drive(&self, id: &str, path: &Path, extra: Value) {
        let mut drive = json!({ "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": false });
        for (key, value) in extra.as_object().unwrap() {
            drive[key] = value.clone();
        }
        self.api.put(&format!("/drives/{id}"), drive);
    }

    /// Starts the configured microVM and waits until its guest says it is ready.
    pub fn boot(&mut self) {
        self.api.put("/actions", json!({ "action_type": "InstanceStart" }));
        self.wait_for_console("GUEST READY");
    }

    /// Waits for a line of the guest's console that contains `text`.
    pub fn wait_for_console(&mut self, text: &str) {
        let mut seen = Vec::new();
        while let Ok(line) = self.console.recv_timeout(DEADLINE) {
            if line.contains(text) {
                return;
            }
            seen.push(line);
        }
        panic!("the console never said {text:?}, but: {seen:#?}");
    }

    pub fn guest(&self) -> Guest {
        Guest::connect(&self.namespace)
    }

    pub fn pause(&self) {
        self.api.patch("/vm", json!({ "state": "Paused" }));
    }

    pub fn resume(&self) {
        self.api.patch("/vm", json!({ "state": "Resumed" }));
    }

    pub fn state(&self) -> String {
        self.api.get("/")["state"].as_str().unwrap().to_owned()
    }

    /// Snapshots the paused microVM.
    pub fn snapshot(&self, host: &Host, name: &str, kind: &str) -> Snapshot {
        let state = host.path(&format!("{name}.state"));
        let memory = host.path(&format!("{name}.mem"));
        let request = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
        self.api.put("/snapshot/create", request);
        Snapshot { state, memory }
    }

    /// Loads a snapshot whose memory is in a file.
    pub fn load(&self, snapshot: &Snapshot, extra: Value) {
        let extra = self.in_its_words(extra);
        self.api.put("/snapshot/load", load_request(snapshot, "File", &snapshot.memory, &extra));
    }

    /// Loads a snapshot whose memory comes from a page-fault handler, which is returned.
    pub fn load_lazily(&self, host: &Host, snapshot: &Snapshot, extra: Value) -> Pager {
        let pager = Pager::start(host.path(&format!("{}.uffd", self.namespace)), &snapshot.memory);
        let extra = self.in_its_words(extra);
        self.api.put("/snapshot/load", load_request(snapshot, "Uffd", pager.socket(), &extra));
        pager
    }

    /// Whether its version is 1.`minor` or newer.
    pub fn is_since(&self, minor: u32) -> bool {
        let answer = self.api.get("/version");
        let version = answer["firecracker_version"].as_str().unwrap();
        let numbers: Vec<u32> = version.split(['.', '-']).take(2).map(|part| part.parse().unwrap()).collect();
        numbers >= vec![1, minor]
    }

    /// Options of a load as its version calls them.
    pub fn in_its_words(&self, mut options: Value) -> Value {
        if !self.is_since(13)
            && let Some(tracked) = options.as_object_mut().unwrap().remove("track_dirty_pages")
        {
            options["enable_diff_snapshots"] = tracked;
        }
        options
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, as the host's watchdog would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        until("the process to end", || self.child.try_wait().unwrap())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The body of `PUT /snapshot/load`.
pub fn load_request(snapshot: &Snapshot, kind: &str, path: &Path, extra: &Value) -> Value {
    let mut request = json!({
        "snapshot_path": snapshot.state,
        "mem_backend": { "backend_type": kind, "backend_path": path },
    });
    for (key, value) in extra.as_object().unwrap() {
        request[key] = value.clone();
    }
    request
}

fn listen(stdout: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            // The test may have stopped listening, but the pipe must not fill.
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
    lines
}
