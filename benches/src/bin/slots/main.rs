//! Benchmark `slots`: what a capsule's network costs, with 1, 100 and 500 of them on the machine.
//!
//! In turn, in every round:
//!
//! - *ours*: `claim` and `create` of a slot that was not there, then `destroy`;
//! - *from the pool*: `claim` and `create` of a slot that was made ahead, then `give_back`;
//! - *peer*: `ip` and `iptables`, one command for each step, as a script would make the same namespace, links, addresses,
//!   routes and rules; then remove them. Without our limits, counters and shaping.
//!
//! Everything happens in a network namespace of its own with its own `/run`, and is gone with it; `unshare`, `ip` and
//! `iptables` must be there.

mod peer;
mod table;

use std::collections::HashSet;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use network::{Config, Network};

use table::{Figures, Took};

/// How many slots there are when others are made.
const THERE: [usize; 3] = [1, 100, 500];
/// Slots that are ready; one is taken in each round.
const READY: usize = 8;
/// In which the pool makes up for the one that was taken.
const PAUSE: Duration = Duration::from_millis(150);

/// Compares our slots with what `ip` and `iptables` make.
#[derive(Debug, Parser)]
struct Args {
    /// Rounds for each number of slots.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON in place of a Markdown table.
    #[arg(long)]
    json: bool,
    /// Set by the program itself, for the one of its processes that has a network of its own.
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if !args.inside {
        let program = std::env::current_exe()?;
        let error = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "--"])
            .arg(program)
            .arg("--inside")
            .args(std::env::args_os().skip(1))
            .exec();
        return Err(error).context("run `unshare`");
    }
    prepare()?;
    let unpooled = open("0123abcd", 0)?;
    let pooled = open("89abcdef", READY)?;
    pooled.sweep(&HashSet::new())?;
    let mut all = Vec::new();
    let mut standing = 0;
    for there in THERE {
        while standing < there {
            unpooled.create(unpooled.claim()?.slot())?;
            standing += 1;
        }
        let mut figures = Figures { there, ..Figures::default() };
        for round in 0..args.rounds {
            std::thread::park_timeout(PAUSE);
            let begun = Instant::now();
            let claim = unpooled.claim()?;
            unpooled.create(claim.slot())?;
            let made = begun.elapsed();
            let begun = Instant::now();
            unpooled.give_back(claim)?;
            figures.ours.push(Took { made, removed: begun.elapsed() });

            std::thread::park_timeout(PAUSE);
            let begun = Instant::now();
            let claim = pooled.claim()?;
            pooled.create(claim.slot())?;
            let made = begun.elapsed();
            let begun = Instant::now();
            pooled.give_back(claim)?;
            figures.pooled.push(Took { made, removed: begun.elapsed() });

            std::thread::park_timeout(PAUSE);
            figures.peer.push(peer::round(30_000 + round)?);
        }
        all.push(figures);
    }
    unpooled.sweep(&HashSet::new())?;
    unpooled.close()?;
    pooled.close()?;
    let left = std::fs::read_dir("/run/netns")?.count() + std::fs::read_dir("/run/wrenn/slots")?.count();
    // The internet's.
    ensure!(left == 1, "{left} namespaces and claims are left");
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", table::json(&all))?;
    } else {
        write!(out, "{}", table::markdown(&all))?;
    }
    Ok(())
}

fn open(instance: &str, ready: usize) -> Result<Network> {
    Ok(Network::open(&Config {
        instance: instance.to_owned(),
        ready,
        allow: Vec::new(),
        deny: Vec::new(),
        users: 900_000,
    })?)
}

/// A machine with an uplink.
fn prepare() -> Result<()> {
    peer::sh(
        "mount -t tmpfs tmpfs /run; ip link set lo up; ip netns add internet
        ip link add up0 type veth peer name eth0 netns internet
        ip addr add 192.0.2.1/24 dev up0; ip link set up0 up
        ip -n internet addr add 192.0.2.2/24 dev eth0; ip -n internet link set eth0 up
        ip route add default via 192.0.2.2",
    )
}
