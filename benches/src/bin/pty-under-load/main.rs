//! Benchmark `pty-under-load`: a key's echo on a terminal, while another port of the same capsule has more to say than its
//! readers take.
//!
//! Everything is real and a process of its own: `wrenn agent`, `wrenn control`, a capsule, readers, and this program, which only
//! types. Where a guest is emulated, a flood that it makes itself costs its terminal the guest's own processor; so every way of
//! flooding is measured twice, once with the readers at the capsule's address on this machine, past everything of ours
//! (*direct*), and once through the capsule's host name (*edge*). What ours adds is the ratio of the two. In one run:
//!
//! - *idle*: the terminal alone;
//! - *guest*: a program in the guest floods, at a rate that the readers set;
//! - *beside*: a process in the capsule's network namespace floods in the guest's place, which costs the guest nothing;
//! - *beside, all they can*: the same with readers that know no measure, for which there are not processors enough;
//! - *shared*: as *beside*, but all connections between control plane and agent go over one ([`shared`]). This is what we do not
//!   do, and why. With a twentieth of the keys.
//!
//! Needs root and `make build`. Leaves nothing on the machine.

mod load;
mod shared;
mod world;

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::{Value, json};

use load::{Load, Role, Source};
use world::{BESIDE, IN_GUEST, World};

/// How long readers run before a measurement, so that all buffers on the way are full.
const WARM_UP: Duration = Duration::from_secs(2);
/// Between two keys, as of somebody who types fast.
const PAUSE: Duration = Duration::from_millis(5);

/// Measures a terminal beside a busy port.
#[derive(Debug, Parser)]
struct Args {
    /// Keys of each measurement.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    keys: u32,
    /// Readers of the busy port.
    #[arg(long, default_value_t = 4)]
    readers: u32,
    /// What each of them takes when it does not take all it can, MiB a second.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Rounds that are counted.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON in place of a Markdown table.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

/// Who floods, and how the readers come to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Direct,
    Edge,
    Shared,
}

/// One row of the table.
struct Row {
    name: &'static str,
    /// The port, the way to it, and whether the readers hold back.
    flood: Option<(u16, Way, bool)>,
    /// The row it is compared with, besides the first.
    floor: Option<usize>,
    times: Vec<Duration>,
    carried: Vec<f64>,
}

impl Row {
    fn new(name: &'static str, flood: Option<(u16, Way, bool)>, floor: Option<usize>) -> Self {
        Self { name, flood, floor, times: Vec::new(), carried: Vec::new() }
    }
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    match args.role.take() {
        Some(role) => role.play(),
        None => tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(measure(&args)),
    }
}

async fn measure(args: &Args) -> Result<()> {
    let dir = tempfile::TempDir::with_prefix("wrenn-bench-")?;
    let agent_dir = dir.path().join("agent");
    let (agent, address) = world::agent(&agent_dir)?;
    let apart = World::start(dir.path(), &agent_dir, address).await?;
    let shared = World::start(dir.path(), &agent_dir, shared::start(address).await?).await?;
    let mut sources = Vec::new();
    for world in [&apart, &shared] {
        world.open_ports().await?;
        sources.push(Source::start(&world.slot()?.netns_path(), BESIDE)?);
    }
    let mut rows = [
        Row::new("idle", None, None),
        Row::new("guest, direct", Some((IN_GUEST, Way::Direct, true)), None),
        Row::new("guest, edge", Some((IN_GUEST, Way::Edge, true)), Some(1)),
        Row::new("beside, direct", Some((BESIDE, Way::Direct, true)), None),
        Row::new("beside, edge", Some((BESIDE, Way::Edge, true)), Some(3)),
        Row::new("beside, direct, all they can", Some((BESIDE, Way::Direct, false)), None),
        Row::new("beside, edge, all they can", Some((BESIDE, Way::Edge, false)), Some(5)),
        Row::new("beside, shared", Some((BESIDE, Way::Shared, true)), Some(3)),
    ];
    for _ in 0..args.rounds {
        for row in &mut rows {
            let (_, way, _) = row.flood.unwrap_or((0, Way::Direct, false));
            let world = if way == Way::Shared { &shared } else { &apart };
            let load = row.flood.map(|(port, way, holds_back)| {
                let rate = if holds_back { args.rate } else { 0 };
                let host = format!("{port}-{}.localhost", world.capsule);
                let address =
                    if way == Way::Direct { SocketAddr::from((world.host_ip()?, port)) } else { world.address };
                Load::start(address, &host, args.readers, rate)
            });
            let load = load.transpose()?;
            if load.is_some() {
                tokio::time::sleep(WARM_UP).await;
            }
            // Where a key takes a second, a few tell enough.
            let keys = if way == Way::Shared { (args.keys / 20).max(20) } else { args.keys };
            let echoes = tokio::time::timeout(Duration::from_secs(300), world.echoes(keys, PAUSE));
            row.times.extend(echoes.await.context("keys do not come back")??);
            if let Some(load) = load {
                row.carried.push(load.stop()?);
            }
        }
    }
    drop(sources);
    apart.end().await?;
    shared.end().await?;
    drop(agent);
    // An agent leaves what capsules share to the next; there is none.
    rest(&agent_dir)?;
    print(args, rows)
}

/// Gives back what an agent leaves behind for the next one.
fn rest(dir: &std::path::Path) -> Result<()> {
    let wrenn = std::env::current_exe()?.with_file_name("wrenn");
    let mut up = std::process::Command::new(wrenn)
        .args(["up", "--json", "--listen", "127.0.0.1:0", "--dir"])
        .arg(dir)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(up.stdout.take().context("it is piped")?), &mut line)?;
    if let Some(pid) = rustix::process::Pid::from_raw(up.id() as i32) {
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    }
    up.wait()?;
    Ok(())
}

fn print(args: &Args, mut rows: [Row; 8]) -> Result<()> {
    let micros = |times: &[Duration], share: f64| {
        let index = ((times.len() - 1) as f64 * share).round() as usize;
        times[index].as_secs_f64() * 1e6
    };
    rows.iter_mut().for_each(|row| row.times.sort_unstable());
    let p99 = |row: &Row| micros(&row.times, 0.99);
    let idle = p99(&rows[0]);
    let floor = |row: &Row| row.floor.map(|floor| p99(row) / p99(&rows[floor]));
    let carried = |row: &Row| row.carried.iter().sum::<f64>() / row.carried.len().max(1) as f64;
    let mut out = std::io::stdout().lock();
    if args.json {
        let rows = rows.iter().map(|row| {
            json!({"name": row.name, "mib_s": carried(row), "p50_us": micros(&row.times, 0.5), "p99_us": p99(row),
                "over_idle_p99": p99(row) / idle, "over_direct_p99": floor(row)})
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
    writeln!(out, "| | carried | p50 | p99 | p99 / idle | p99 / direct |\n|---|---|---|---|---|---|")?;
    for row in &rows {
        let (p50, p99) = (micros(&row.times, 0.5), p99(row));
        let over = floor(row).map_or(String::new(), |ratio| format!("{ratio:.2}"));
        writeln!(
            out,
            "| {} | {:.0} MiB/s | {p50:.0} µs | {p99:.0} µs | {:.2} | {over} |",
            row.name,
            carried(row),
            p99 / idle
        )?;
    }
    Ok(())
}
