//! A `wrenn agent`, control planes over it, and in each a capsule with a terminal: the programs as `make build` made them.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::{SinkExt, StreamExt};
use network::slot::Slot;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// The port of the flood in the guest, and of the one beside it.
pub const IN_GUEST: u16 = 8001;
pub const BESIDE: u16 = 8002;
/// What floods in a guest.
const FLOOD: &str = "import socket,threading
def serve(c):
    c.recv(4096)
    c.sendall(b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n')
    body = b'x' * (1 << 18)
    try:
        while True: c.sendall(body)
    except OSError: pass
s = socket.create_server(('0.0.0.0', 8001))
print('listening', flush=True)
while True:
    c, _ = s.accept()
    threading.Thread(target=serve, args=(c,), daemon=True).start()";

/// A program that ends with this value.
pub struct Program(Child);

impl Program {
    fn start(args: &[&str]) -> Result<(Self, SocketAddr)> {
        let wrenn = std::env::current_exe()?.with_file_name("wrenn");
        let mut child = Command::new(wrenn).args(args).stdin(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stderr.take().context("it is piped")?).lines();
        let program = Self(child);
        let line = lines.find_map(|line| line.ok().filter(|line| line.contains(" listens on ")));
        let line = line.with_context(|| format!("wrenn {} does not listen", args[0]))?;
        let address = line.rsplit(' ').next().unwrap_or_default().parse()?;
        // What else it says, somebody has to read.
        std::thread::spawn(move || lines.for_each(drop));
        Ok((program, address))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.0.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        let _ = self.0.wait();
    }
}

/// An agent in a directory of its own.
pub fn agent(dir: &Path) -> Result<(Program, SocketAddr)> {
    let address = free_port()?;
    Program::start(&["agent", "--dir", &dir.display().to_string(), "--listen", &address])
}

fn free_port() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// A control plane over an agent, and a capsule.
pub struct World {
    pub address: SocketAddr,
    pub capsule: String,
    key: String,
    agent_dir: PathBuf,
    http: reqwest::Client,
    _control: Program,
}

impl World {
    /// `dir` is for the database; the agent whose directory is `agent_dir` is reached at `agent`.
    pub async fn start(dir: &Path, agent_dir: &Path, agent: SocketAddr) -> Result<Self> {
        let database = format!("sqlite://{}?mode=rwc", dir.join(format!("{}.db", agent.port())).display());
        let agent = format!("http://{agent}");
        let common = ["control", "--database-url", &database, "--agent", &agent];
        let wrenn = std::env::current_exe()?.with_file_name("wrenn");
        let issued = Command::new(wrenn).args(common).args(["--issue-key", "bench"]).output()?;
        let key = String::from_utf8(issued.stdout)?.trim().to_owned();
        let listen = free_port()?;
        let (control, address) = Program::start(&[&common[..], &["--listen", &listen]].concat())?;
        let http = reqwest::Client::new();
        let (agent_dir, capsule) = (agent_dir.to_owned(), String::new());
        let mut world = Self { address, capsule, key, agent_dir, http, _control: control };
        let made = world.post("/v1/capsules", json!({})).await?;
        world.capsule = made["id"].as_str().context("a capsule has an id")?.to_owned();
        Ok(world)
    }

    async fn post(&self, path: &str, body: Value) -> Result<Value> {
        let request = self.http.post(format!("http://{}{path}", self.address)).header("x-api-key", &self.key);
        Ok(request.json(&body).send().await?.error_for_status()?.json().await?)
    }

    /// Has the guest flood whoever asks its port [`IN_GUEST`], and the slot whoever asks [`BESIDE`] for what listens there in the
    /// slot's namespace: for agent and control that is a port of the capsule like any other, but no emulated processor serves it.
    pub async fn open_ports(&self) -> Result<()> {
        let path = format!("/v1/capsules/{}/exec", self.capsule);
        let start = "setsid python3 -c \"$FLOOD\" >/tmp/flood 2>&1 </dev/null & while ! grep -q listening /tmp/flood; do sleep 0.1; done";
        let exec = json!({"cmd": "/bin/sh", "args": ["-c", start], "envs": {"FLOOD": FLOOD}});
        let done = self.post(&path, exec).await?;
        if done["exit_code"] != 0 {
            bail!("the guest does not flood: {done}");
        }
        let rule = format!("iifname eth0 tcp dport {BESIDE} redirect to :{BESIDE}");
        let mut nft = Command::new("nsenter");
        nft.arg(format!("--net={}", self.slot()?.netns_path().display()))
            .args(["nft", "insert", "rule", "ip", "wrenn"]);
        let status = nft.arg("prerouting").args(rule.split(' ')).status()?;
        if status.success() { Ok(()) } else { bail!("nft {status}") }
    }

    /// The capsule's slot.
    pub fn slot(&self) -> Result<Slot> {
        let places = ["volume/capsules", "capsules"].map(|place| self.agent_dir.join(place).join(&self.capsule));
        let record = places.iter().find_map(|dir| std::fs::read(dir.join("record.json")).ok());
        let record: Value = serde_json::from_slice(&record.context("the capsule has no record")?)?;
        Ok(serde_json::from_value(record["slot"].clone())?)
    }

    /// Where the agent reaches the capsule's ports.
    pub fn host_ip(&self) -> Result<Ipv4Addr> {
        Ok(self.slot()?.host_ip())
    }

    async fn terminal(&self) -> Result<WebSocketStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let url = format!("ws://{}/v1/capsules/{}/pty", self.address, self.capsule);
        let mut request = url.into_client_request()?;
        request.headers_mut().insert("x-api-key", self.key.parse()?);
        let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await?;
        let script = "stty raw -echo; echo ready; exec cat";
        let start = json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", script]});
        socket.send(Message::text(start.to_string())).await?;
        let mut seen = Vec::new();
        while !seen.windows(5).any(|window| window == b"ready") {
            seen.extend(shown(&mut socket).await?);
        }
        Ok(socket)
    }

    /// How long keys take to a terminal and back, one after the other, `pause` apart.
    pub async fn echoes(&self, keys: u32, pause: Duration) -> Result<Vec<Duration>> {
        let mut socket = self.terminal().await?;
        let mut times = Vec::new();
        // The first few, and what is left of the greeting, do not count.
        for number in 0..keys + 5 {
            tokio::time::sleep(pause).await;
            let key = b'a' + (number % 26) as u8;
            let before = Instant::now();
            socket.send(Message::binary(vec![key])).await?;
            while !shown(&mut socket).await?.contains(&key) {}
            times.push(before.elapsed());
        }
        socket.send(Message::text(json!({"type": "kill"}).to_string())).await?;
        while let Some(Ok(_)) = socket.next().await {}
        Ok(times.split_off(5))
    }

    /// Ends the capsule.
    pub async fn end(self) -> Result<()> {
        let url = format!("http://{}/v1/capsules/{}", self.address, self.capsule);
        self.http.delete(url).header("x-api-key", &self.key).send().await?.error_for_status()?;
        Ok(())
    }
}

/// What the terminal shows next.
async fn shown(socket: &mut WebSocketStream<TcpStream>) -> Result<Vec<u8>> {
    loop {
        match socket.next().await.context("the terminal ended")?? {
            Message::Binary(bytes) => return Ok(bytes.into()),
            Message::Close(_) => bail!("the terminal ended"),
            _ => {}
        }
    }
}
