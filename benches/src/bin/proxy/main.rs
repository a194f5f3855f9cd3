//! Benchmark `proxy`: `crates/proxy` beside nginx, haproxy and Caddy, each in front of the same server on this machine.
//!
//! In turn, in every round, with the same clients:
//!
//! - *1 KiB*: requests over connections that stay, as many as there are turns for; requests a second of time, and a second of
//!   the proxy's own processor time, which is what there is to compare where clients, server and proxy share the processors;
//! - *64 MiB*: one large answer after the other;
//! - *socket*: a few bytes there and back on a connection that was upgraded.
//!
//! Ours is as the control plane uses it: a lookup by host, [`proxy::serve()`], the lane aside, [`Upstream::exchange`]. The others have
//! as many threads, keep connections to the server, pass bytes on as they come, and say who asked.
//!
//! Needs Debian's nginx-light, haproxy and caddy. Leaves nothing on the machine.

mod client;
mod peers;
mod servers;
mod table;

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

use peers::Proxy;
use servers::Role;
use table::Figures;

/// Compares our proxy with others.
#[derive(Debug, Parser)]
struct Args {
    /// Rounds that are counted, after one that is not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Connections of the small requests.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// Seconds of small requests, a round and proxy.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Large answers of a round.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    large: u32,
    /// Bytes there and back of a round.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    echoes: u32,
    /// Print JSON in place of a Markdown table.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    match args.role.take() {
        Some(role) => servers::play(role),
        None => measure(&args),
    }
}

fn measure(args: &Args) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (_upstream, upstream) = servers::spawn(&["upstream"])?;
    let proxies = [
        Proxy::ours(upstream)?,
        Proxy::nginx(dir.path(), upstream)?,
        Proxy::haproxy(dir.path(), upstream)?,
        Proxy::caddy(dir.path(), upstream)?,
        Proxy::none(upstream),
    ];
    let mut figures = Figures::default();
    for round in 0..=args.rounds {
        for proxy in &proxies {
            let measured = one(args, proxy)?;
            if round > 0 {
                figures.add(proxy.name, measured);
            }
        }
    }
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", figures.json())?;
    } else {
        write!(out, "{}", figures.markdown(args))?;
    }
    Ok(())
}

/// What one round of one proxy gave.
pub struct Measured {
    /// Small requests a second, and a second of processor time.
    pub requests: f64,
    pub requests_cpu: f64,
    pub latencies: Vec<Duration>,
    /// Of large answers, MiB a second, and a second of processor time.
    pub large: f64,
    pub large_cpu: f64,
    pub echoes: Vec<Duration>,
}

fn one(args: &Args, proxy: &Proxy) -> Result<Measured> {
    let address: SocketAddr = proxy.address;
    let before = proxy.cpu()?;
    let small = client::small(address, args.connections, Duration::from_secs_f64(args.seconds))?;
    let between = proxy.cpu()?;
    let large = client::large(address, args.large)?;
    let after = proxy.cpu()?;
    let echoes = client::echoes(address, args.echoes)?;
    let requests = small.latencies.len() as f64;
    let mib = f64::from(args.large * client::LARGE_MIB);
    Ok(Measured {
        requests: requests / small.time.as_secs_f64(),
        requests_cpu: requests / (between - before).as_secs_f64(),
        latencies: small.latencies,
        large: mib / large.as_secs_f64(),
        large_cpu: mib / (after - between).as_secs_f64(),
        echoes,
    })
}
