//! Benchmark `pty-under-load`: a key's echo on a terminal, while another port of the same capsule has more to say than its
//! readers take.
//!
//! The way is the whole one: a WebSocket to the control plane, its connections to the agent, envd, and a shell on a terminal;
//! the readers come in by the capsule's host name. Agent and envd are the fake agent's, so that no emulated processor is
//! measured; everything is on this machine. In one run:
//!
//! - *idle*: the terminal alone;
//! - *loaded*: with readers, each of which takes a little at a time and always has more waiting;
//! - *flooded*: with readers that take all they can, which also costs processor time;
//! - *shared*: as loaded, but all connections between control plane and agent go over one ([`shared`]). This is what we do
//!   not do, and why. With a twentieth of the keys.
//!
//! Needs `make build`. Leaves nothing on the machine.

mod load;
mod shared;

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use control::{Config, Control};
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use testkit::FakeAgent;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use load::Load;

/// How long readers run before a measurement, so that all buffers on the way are full.
const WARM_UP: Duration = Duration::from_secs(2);

/// Measures a terminal beside a busy port.
#[derive(Debug, Parser)]
struct Args {
    /// Keys of each measurement.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    keys: u32,
    /// Readers of the busy port.
    #[arg(long, default_value_t = 4)]
    readers: u32,
    /// What each of them takes when it does not take all it can, MiB a second.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Rounds that are counted.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON in place of a Markdown table.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let mut agent = FakeAgent::start().await;
    let direct = agent.listen_tcp().await;
    let address: SocketAddr = direct.to_string().trim_start_matches("http://").parse()?;
    let apart = World::start(direct).await?;
    let shared = World::start(format!("http://{}", shared::start(address).await?).parse()?).await?;
    let port = load::serve().await?;
    let mut figures: Vec<(&str, Vec<Duration>)> =
        ["idle", "loaded", "flooded", "shared"].map(|name| (name, Vec::new())).into();
    for _ in 0..args.rounds {
        for (name, times) in &mut figures {
            let world = if *name == "shared" { &shared } else { &apart };
            let rate = match *name {
                "idle" => None,
                "flooded" => Some(u32::MAX),
                _ => Some(args.rate),
            };
            let readers = if rate.is_some() { args.readers } else { 0 };
            let load = Load::start(world.address, &world.capsule, port, readers, rate.unwrap_or(0));
            if readers > 0 {
                tokio::time::sleep(WARM_UP).await;
            }
            // Where a key takes a second, a few tell enough.
            let keys = if *name == "shared" { (args.keys / 20).max(20) } else { args.keys };
            let echoes = world.echoes(keys);
            times.extend(
                tokio::time::timeout(Duration::from_secs(300), echoes).await.context("keys do not come back")??,
            );
            load.stop().await;
        }
    }
    print(&args, figures)
}

/// A control plane over the agent, and a capsule.
struct World {
    address: SocketAddr,
    key: String,
    capsule: String,
    _dir: tempfile::TempDir,
}

impl World {
    async fn start(agent: agent_api::Endpoint) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let database_url = control::sqlite_url(&dir.path().join("control.db"));
        let control = Control::open(Config { database_url, agent, version: "bench".into() }).await?;
        let team = control.ensure_team(&"bench".parse()?).await?;
        let key = control.issue_key(team, "bench").await?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move { control.run(listener, std::future::pending()).await });
        let create = reqwest::Client::new().post(format!("http://{address}/v1/capsules")).header("x-api-key", &key);
        let capsule: Value = create.json(&json!({})).send().await?.error_for_status()?.json().await?;
        let capsule = capsule["id"].as_str().context("a capsule has an id")?.to_owned();
        Ok(Self { address, key, capsule, _dir: dir })
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

    /// How long keys take to a terminal and back, one after the other.
    async fn echoes(&self, keys: u32) -> Result<Vec<Duration>> {
        let mut socket = self.terminal().await?;
        let mut times = Vec::new();
        // The first few, and what is left of the greeting, do not count.
        for number in 0..keys + 5 {
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

fn print(args: &Args, mut figures: Vec<(&str, Vec<Duration>)>) -> Result<()> {
    let micros = |times: &[Duration], share: f64| {
        let index = ((times.len() - 1) as f64 * share).round() as usize;
        times[index].as_secs_f64() * 1e6
    };
    for (_, times) in &mut figures {
        times.sort_unstable();
    }
    let idle = micros(&figures[0].1, 0.99);
    let mut out = std::io::stdout().lock();
    if args.json {
        let rows = figures.iter().map(|(name, times)| {
            json!({"name": name, "p50_us": micros(times, 0.5), "p99_us": micros(times, 0.99), "ratio_p99": micros(times, 0.99) / idle})
        });
        return Ok(writeln!(out, "{}", Value::from_iter(rows))?);
    }
    writeln!(
        out,
        "A key's echo; {} readers of {} MiB/s, {} rounds of {} keys, {} build\n",
        args.readers,
        args.rate,
        args.rounds,
        args.keys,
        if cfg!(debug_assertions) { "debug" } else { "release" }
    )?;
    writeln!(out, "| | p50 | p99 | p99 / idle |\n|---|---|---|---|")?;
    for (name, times) in &figures {
        let (p50, p99) = (micros(times, 0.5), micros(times, 0.99));
        writeln!(out, "| {name} | {p50:.0} µs | {p99:.0} µs | {:.1} |", p99 / idle)?;
    }
    Ok(())
}
