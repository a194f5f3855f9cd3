//! Benchmark `snapshot-store`: what a pause writes and costs, and what it costs to read through many of them.
//!
//! A memory of which half is in use is paused again and again, each time with a small set of dirty pages, scattered, one
//! in eight of them zeroed. In turn, in every round, with the same pages:
//!
//! - *ours*: `Store::pack` and `commit` of the sparse file that a VMM would have written to a tmpfs;
//! - *floor*: the dirty pages as they are, written in order and synced: no pause that is durable can do less;
//! - *qcow2*: an overlay of the last round's with `qemu-img`, the pages written into it by `qemu-io` and flushed; less
//!   what the same two programs take to do that with one page;
//! - *zstd*: `zstd -1` of the sparse file, synced.
//!
//! Then a merge of ours, and reads of single pages with a stride: through ours before and after the merge and through a
//! single generation, and through the qcow2 chain and its first image with `qemu-img bench`.
//!
//! Everything of this process is measured by the wall clock on the file system of `--dir`; `qemu-img`, `qemu-io` (Debian
//! qemu-utils) and `zstd` must be there. Leaves nothing on the machine.

mod guest;
mod ours;
mod peers;
mod table;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

use guest::Guest;
use ours::Ours;
use peers::Qcow2;
use table::Figures;

/// Compares pauses with small dirty sets with what others offer.
#[derive(Debug, Parser)]
struct Args {
    /// Pauses that are counted, after the first, which stores half of the memory.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Guest memory, MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(16..))]
    memory_mib: u32,
    /// Dirty pages of each pause, MiB.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    dirty_mib: u32,
    /// Where snapshots are stored; the default is a directory below the current one, as `/tmp` may be memory.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Print JSON in place of a Markdown table.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let dir = tempfile::tempdir_in(&args.dir)?;
    let mut guest = Guest::boot(u64::from(args.memory_mib) << 20)?;
    let mut ours = Ours::open(dir.path())?;
    let mut qcow2 = Qcow2::create(dir.path(), &guest)?;
    ours.pause(&guest)?;
    qcow2.pause(&guest)?;
    let mut figures =
        Figures { read_one: ours.read(guest.size())?, qcow2_read_one: qcow2.read()?, ..Figures::default() };
    for _ in 0..args.rounds {
        guest.run(u64::from(args.dirty_mib) << 20)?;
        figures.floor.push(peers::floor(dir.path(), &guest)?);
        figures.ours.push(ours.pause(&guest)?);
        figures.qcow2.push(qcow2.pause(&guest)?);
        figures.zstd.push(peers::zstd(dir.path(), &guest)?);
        if ours.generations()? == snapshot::MERGE_AT {
            figures.read_many = ours.read(guest.size())?;
        }
        // Off the path of any pause, as an agent does it.
        figures.merges.extend(ours.merge()?);
    }
    figures.read_merged = ours.read(guest.size())?;
    figures.qcow2_read_many = qcow2.read()?;
    ours.check(&guest)?;
    figures.dirty_bytes = guest.dirty_bytes();
    figures.on_disk = ours.on_disk()?;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", figures.json())?;
    } else {
        write!(out, "{}", figures.markdown())?;
    }
    Ok(())
}
