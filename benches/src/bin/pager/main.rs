//! Benchmark `pager`: what it costs a guest to touch memory that comes from a snapshot.
//!
//! A process maps memory as Firecracker does, hands it to a page server in another process, and touches its pages in some
//! order. Ours is the pager on a snapshot of the store; the peers are a handler that copies one page per fault out of a
//! mapped file, as Firecracker's example does, and no handler at all: a private mapping of that file. All run in turn, with
//! the files in the page cache.
//!
//! Needs userfaultfd (root), 2 GiB of memory and 1 GiB of disk.

mod handlers;
mod memory;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use pager::PAGE;
use snapshot::Store;

use handlers::Handler;
use memory::Memory;

/// Compares the pager with a minimal handler and with a plain mapping.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    handler: Option<handlers::Role>,
    /// MiB of memory, all of which is touched.
    #[arg(long, default_value_t = 512)]
    memory_mib: u64,
    /// Counted rounds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// The order in which pages are touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trace {
    Sequential,
    Random,
    /// One page of each 64 KiB, in a random order and with pauses: what one fault costs whoever causes it.
    Single,
}

/// Where the memory comes from: a flat file, and the same in a store.
struct Files {
    directory: tempfile::TempDir,
    size: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(role) = args.handler {
        return handlers::run(role);
    }
    let files = Files::make(args.memory_mib << 20)?;
    let mut out = std::io::stdout();
    writeln!(out, "`pager`, {} MiB, {} rounds, medians:\n", args.memory_mib, args.rounds)?;
    writeln!(
        out,
        "| touching every page | ours | one page per fault | mmap | one page ÷ ours |\n|---|---|---|---|---|"
    )?;
    let mut resident = 0;
    for trace in [Trace::Sequential, Trace::Random] {
        let order = trace.order(files.size);
        let (mut ours, mut minimal, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        let (mut our_work, mut minimal_work) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            let memory = Memory::anonymous(files.size)?;
            let handler = Handler::ours(&files, &memory, None)?;
            ours.push(touch(&memory, &order)?);
            our_work.push(handler.processor_time()?);
            resident = resident.max(handler.private_bytes().unwrap_or(0));
            drop((memory, handler));
            let memory = Memory::anonymous(files.size)?;
            let handler = Handler::minimal(&files, &memory)?;
            minimal.push(touch(&memory, &order)?);
            minimal_work.push(handler.processor_time()?);
            drop((memory, handler));
            plain.push(touch(&Memory::of_file(&files.flat(), files.size)?, &order)?);
        }
        let (ours, minimal, plain) = (median(ours), median(minimal), median(plain));
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let ratio = ms(minimal) / ms(ours);
        let (our_work, minimal_work) = (ms(median(our_work)), ms(median(minimal_work)));
        write!(out, "| {trace:?} | {:.0} ms | {:.0} ms | {:.0} ms | {ratio:.1} |", ms(ours), ms(minimal), ms(plain))?;
        writeln!(out, " {our_work:.0} ms | {minimal_work:.0} ms |")?;
    }
    single(&files, &mut out, args.rounds)?;
    prefetch(&files, &mut out, args.rounds)?;
    writeln!(out, "\nOf its own the pager had {} KiB of memory at the end of a trace.", resident >> 10)?;
    Ok(())
}

/// One fault at a time.
fn single(files: &Files, out: &mut impl std::io::Write, rounds: u32) -> Result<()> {
    let order = Trace::Single.order(files.size);
    let (mut ours, mut minimal) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let memory = Memory::anonymous(files.size)?;
        let _handler = Handler::ours(files, &memory, None)?;
        ours.extend(touch_apart(&memory, &order)?);
        let memory = Memory::anonymous(files.size)?;
        let _handler = Handler::minimal(files, &memory)?;
        minimal.extend(touch_apart(&memory, &order)?);
    }
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let (ours, minimal) = (us(median(ours)), us(median(minimal)));
    writeln!(
        out,
        "\nOne fault alone: ours {ours:.1} µs, one page per fault {minimal:.1} µs, ratio {:.2}.",
        ours / minimal
    )?;
    Ok(())
}

/// Everything, from a working set, until the pager leaves because all is there.
fn prefetch(files: &Files, out: &mut impl std::io::Write, rounds: u32) -> Result<()> {
    let set = files.directory.path().join("working-set");
    let memory = Memory::anonymous(files.size)?;
    let handler = Handler::ours(files, &memory, Some((&set, true)))?;
    touch(&memory, &Trace::Random.order(files.size))?;
    handler.wait()?;
    drop(memory);
    let (mut times, mut work) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let memory = Memory::anonymous(files.size)?;
        let started = Instant::now();
        work.push(Handler::ours(files, &memory, Some((&set, false)))?.wait()?);
        times.push(started.elapsed());
        // It is all there: no fault needs a handler now.
        touch(&memory, &Trace::Sequential.order(files.size))?;
    }
    let rate = |time: Duration| files.size as f64 / time.as_secs_f64() / f64::from(1 << 30);
    let (time, work) = (median(times), median(work));
    let (per_second, per_processor) = (rate(time), rate(work));
    writeln!(
        out,
        "Prefetch of everything, with the pager's start and end: {:.0} ms, {per_second:.2} GiB/s; {per_processor:.2} GiB \
         per second of processor time.",
        time.as_secs_f64() * 1000.0,
    )?;
    Ok(())
}

/// Touches pages in order and checks that each is what it should be.
fn touch(memory: &Memory, order: &[u64]) -> Result<Duration> {
    let started = Instant::now();
    let wrong = order.iter().filter(|page| memory.first_word(**page) != word_of(**page)).count();
    let time = started.elapsed();
    ensure!(wrong == 0, "{wrong} pages are wrong");
    Ok(time)
}

fn touch_apart(memory: &Memory, order: &[u64]) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(order.len());
    for page in order {
        // Long enough that the neighbours of the page before are there.
        std::thread::park_timeout(Duration::from_micros(200));
        let started = Instant::now();
        let word = memory.first_word(*page);
        times.push(started.elapsed());
        ensure!(word == word_of(*page), "page {page} is wrong");
    }
    Ok(times)
}

fn word_of(page: u64) -> u64 {
    page.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

impl Trace {
    fn order(self, size: u64) -> Vec<u64> {
        let pages = size / PAGE;
        let mut order: Vec<u64> = match self {
            Self::Sequential | Self::Random => (0..pages).collect(),
            Self::Single => (0..pages.min(1 << 16)).step_by(16).collect(),
        };
        if self != Self::Sequential {
            order.sort_by_key(|page| page.wrapping_mul(0xD6E8_FEB8_6659_FD93).rotate_left(32));
        }
        order
    }
}

impl Files {
    fn make(size: u64) -> Result<Self> {
        let directory = tempfile::TempDir::with_prefix("bench-pager-").context("making a directory")?;
        let files = Self { directory, size };
        let flat = File::options().read(true).write(true).create_new(true).open(files.flat())?;
        let mut page = [0; PAGE as usize];
        for at in 0..size / PAGE {
            for (index, bytes) in page.chunks_exact_mut(8).enumerate() {
                bytes.copy_from_slice(&word_of(at).rotate_left(index as u32).to_le_bytes());
            }
            flat.write_all_at(&page, at * PAGE)?;
        }
        let (store, _) = Store::open(files.directory.path(), []).context("making a store")?;
        let packed = store.pack(&flat, None).context("packing")?;
        store.commit(&packed, &files.header()).context("committing")?;
        Ok(files)
    }

    fn flat(&self) -> PathBuf {
        self.path("flat")
    }

    fn header(&self) -> PathBuf {
        self.path("header")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    fn remove_socket(path: &Path) {
        // The pager removes its own.
        let _ = std::fs::remove_file(path);
    }
}
