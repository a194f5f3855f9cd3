//! Benchmark `start`: what a capsule start costs beyond the VMM's own boot.
//!
//! Ours is a create through a real agent, from the request to the first answer of the guest's envd. The peer is the same
//! VMM with the same guest, disk and tap, started by hand, from its exec to the same answer. Both run in turn in one run,
//! after one round of each that is not counted. The peer's command line is taken from our own running VMM, so that what
//! is compared cannot drift apart; `bare.rs` says what is left out of it.
//!
//! Then what a snapshot saves: that agent's cold boot, and another's create from its boot snapshot and resume, each from the
//! request to the answer of a command in the guest.
//!
//! Needs root and `make build images`. Leaves nothing on the machine.

mod bare;
mod ours;
mod table;

use std::io::Write;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::layer::SubscriberExt;

use bare::{Bare, Netns};
use ours::{Clock, Ours};
use table::Figures;

/// Guest memory of both sides, MiB; one virtual processor each.
const MEMORY_MIB: u32 = 512;

/// Compares a capsule's start with the bare VMM's.
#[derive(Debug, Parser)]
struct Args {
    /// Counted rounds; each is one start of ours and one of the peer's.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON in place of a Markdown table.
    #[arg(long)]
    json: bool,
}

/// What is booted.
const IMAGE: &str = "minimal";

/// The last step of what ends with a command in the guest.
const COMMAND: &str = "command answered";

/// A start of ours: when each step was done, counted from the request, in order.
type Steps = Vec<(String, Duration)>;

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root: it makes network namespaces, mounts and control groups");
    }
    let stop = CancellationToken::new();
    tokio::spawn({
        let stop = stop.clone();
        async move {
            // A signal that cannot be listened for ends it like one that came.
            let _ = tokio::signal::ctrl_c().await;
            stop.cancel();
        }
    });
    let clock = Clock::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(clock.clone()))?;
    let booting = Ours::open(clock.clone(), false).await?;
    let figures = match Ours::open(clock, true).await {
        Ok(resuming) => {
            let figures = measure(&booting, &resuming, args.rounds, &stop).await;
            resuming.close().await.and(figures)
        }
        Err(error) => Err(error),
    };
    let vmm = booting.vmm().to_owned();
    // Also after a failure: the machine is as it was.
    booting.close().await?;
    let figures = figures?;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", figures.json(&vmm))?;
    } else {
        write!(out, "{}", figures.markdown(&vmm))?;
    }
    Ok(())
}

/// `ours` boots what it creates, `resuming` has it begin from a boot snapshot.
async fn measure(ours: &Ours, resuming: &Ours, rounds: u32, stop: &CancellationToken) -> Result<Figures> {
    let netns = Netns::create()?;
    resuming.until_booted(IMAGE).await?;
    let warm_up = ours.create(IMAGE).await?;
    let command = bare::Command::of(ours, &warm_up.id).await;
    ours.destroy(&warm_up.id).await?;
    let bare = Bare { command: command?, disk: ours.root().join("bare.ext4"), netns };
    bare.start(stop).await?;
    let mut figures = Figures::default();
    for _ in 0..rounds {
        if stop.is_cancelled() {
            bail!("interrupted");
        }
        let started = ours.create(IMAGE).await?;
        ours.destroy(&started.id).await?;
        figures.ours.push(started.steps);
        figures.bare.push(bare.start(stop).await?);
        figures.boot.push(ours.create_and_run(IMAGE).await?.0);
        let (created, resumed) = resuming.create_and_run(IMAGE).await?;
        figures.from_snapshot.push(created);
        figures.resume.push(resumed);
    }
    Ok(figures)
}
