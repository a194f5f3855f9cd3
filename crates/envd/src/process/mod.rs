//! Processes: the table of those that run, and of those that ended a moment ago.
//!
//! Each process is owned by one task ([`run`]), which starts it, carries its output into its [`log::Log`], keeps its deadline
//! and records its end. Requests only look it up here, write to its input, and signal it through the reaper.
//!
//! ```text
//! start ─► running ─► (exited: output is drained) ─► ended, kept for latecomers ─► forgotten
//! ```

pub mod log;
pub mod plan;
pub mod rpc;
mod run;
mod stdio;

use crate::cgroup::Cgroups;
use crate::reaper::Reaper;
use crate::sys::poll::Polled;
use guest_api::process::ProcessConfig;
use log::{Log, Reader};
use plan::Plan;
use rustix::process::{Pid, Signal};
use rustix::termios::Winsize;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long a process that ended can be joined, and how many of them, and how much output and command
/// line of them all.
const KEEP_FOR: Duration = Duration::from_secs(60);
const KEEP_PROCESSES: usize = 128;
const KEEP_BYTES: u64 = 8 * 1024 * 1024;

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("opening the process's streams")]
    Streams(#[source] io::Error),
    #[error("making the process's control group")]
    Cgroup(#[source] io::Error),
    #[error(transparent)]
    Spawn(crate::sys::spawn::Error),
    /// envd is shutting down.
    #[error("the process's owner is gone")]
    Gone,
}

/// Why input or a resize did not reach a process.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("the process has no open standard input")]
    Closed,
    #[error("the process has a terminal: write to 'pty' instead of 'stdin'")]
    IsTerminal,
    #[error("the process has no terminal")]
    NoTerminal,
    #[error("the process has ended")]
    Ended,
    #[error("writing to the process")]
    Write(#[source] io::Error),
    #[error("resizing the terminal")]
    Resize(#[source] io::Error),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub end: End,
    /// Its deadline passed, and we killed it.
    pub timed_out: bool,
}

/// As the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    Signaled { signal: i32, core: bool },
}

/// One process of ours.
pub struct Process {
    pub pid: Pid,
    pub config: ProcessConfig,
    pub tag: Option<String>,
    started: Instant,
    log: Arc<Log<Outcome>>,
    /// Held while writing, so that writes do not interleave. `None` once closed.
    input: tokio::sync::Mutex<Option<stdio::Input>>,
    /// Its terminal, if it has one; closed with its output.
    terminal: Option<Weak<Polled>>,
    /// Set when it has exited, though its output may not be drained yet.
    exited: AtomicBool,
    /// Wakes writers whose process has exited.
    exit: tokio::sync::Notify,
}

/// The table, and what starting a process takes.
pub struct Processes {
    reaper: Arc<Reaper>,
    cgroups: Arc<Cgroups>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    running: HashMap<Pid, Arc<Process>>,
    /// Oldest first.
    ended: VecDeque<Ended>,
}

struct Ended {
    process: Arc<Process>,
    at: Instant,
}

/// Names a process.
#[derive(Clone, Copy, Debug)]
pub enum Selector<'a> {
    Pid(u32),
    Tag(&'a str),
}

impl Processes {
    pub fn new(reaper: Arc<Reaper>, cgroups: Arc<Cgroups>) -> Processes {
        Processes { reaper, cgroups, table: Mutex::default() }
    }

    /// Starts a process; the reader has everything from its first byte on. It lives until it ends by itself or `deadline`
    /// passes: dropping this future or the reader changes nothing.
    pub async fn start(
        self: &Arc<Self>,
        plan: Plan,
        deadline: Option<Instant>,
    ) -> Result<(Arc<Process>, Reader<Outcome>), StartError> {
        let (report, started) = oneshot::channel();
        tokio::spawn(run::own(Arc::clone(self), plan, deadline, report));
        started.await.unwrap_or(Err(StartError::Gone))
    }

    /// Those that have not exited, oldest first.
    pub fn list(&self) -> Vec<Arc<Process>> {
        let table = self.lock();
        let mut running: Vec<_> = table.running.values().filter(|process| process.is_running()).cloned().collect();
        running.sort_by_key(|process| process.started);
        running
    }

    /// One that runs. Of several with one tag, the youngest.
    pub fn running(&self, selector: Selector<'_>) -> Option<Arc<Process>> {
        let candidates = self.list().into_iter().filter(|process| process.is(selector));
        candidates.last()
    }

    /// One that runs, or else the last one of that name that ended and is still kept.
    pub fn find(&self, selector: Selector<'_>) -> Option<Arc<Process>> {
        let table = self.lock();
        let draining = table.running.values().filter(|process| process.is(selector));
        let draining = draining.max_by_key(|process| (process.is_running(), process.started));
        let mut kept = table.ended.iter().rev().filter(|ended| !ended.is_stale());
        draining.or_else(|| kept.find(|ended| ended.process.is(selector)).map(|ended| &ended.process)).cloned()
    }

    /// Sends a signal to a process and its group. False when it has ended.
    pub fn signal(&self, process: &Process, signal: Signal) -> bool {
        self.reaper.signal_group(process.pid, signal)
    }

    fn enter(&self, process: Arc<Process>) {
        self.lock().running.insert(process.pid, process);
    }

    /// Moves a process to those that ended, and forgets the ones that are too old or too much.
    fn retire(&self, process: &Arc<Process>) {
        let mut table = self.lock();
        // A pid may be used again as soon as its process is reaped, which is before its output is drained.
        if table.running.get(&process.pid).is_some_and(|entered| Arc::ptr_eq(entered, process)) {
            table.running.remove(&process.pid);
        }
        table.ended.push_back(Ended { process: Arc::clone(process), at: Instant::now() });
        let mut bytes: u64 = table.ended.iter().map(|ended| ended.process.kept()).sum();
        while let Some(oldest) = table.ended.front() {
            if !oldest.is_stale() && table.ended.len() <= KEEP_PROCESSES && bytes <= KEEP_BYTES {
                break;
            }
            bytes -= oldest.process.kept();
            table.ended.pop_front();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ended {
    fn is_stale(&self) -> bool {
        self.at.elapsed() > KEEP_FOR
    }
}

impl Process {
    /// Joins the output at the oldest byte kept.
    pub fn subscribe(&self) -> Reader<Outcome> {
        self.log.subscribe()
    }

    /// Writes to standard input, after every write that was called earlier and at the pace the process reads.
    pub async fn write_stdin(&self, data: &[u8]) -> Result<(), InputError> {
        if self.terminal.is_some() {
            return Err(InputError::IsTerminal);
        }
        self.write(data).await
    }

    /// Types into the terminal.
    pub async fn write_terminal(&self, data: &[u8]) -> Result<(), InputError> {
        if self.terminal.is_none() {
            return Err(InputError::NoTerminal);
        }
        self.write(data).await
    }

    async fn write(&self, data: &[u8]) -> Result<(), InputError> {
        let write = async {
            let input = self.input.lock().await;
            let input = input.as_ref().ok_or(InputError::Closed)?;
            input.write_all(data).await.map_err(|error| match error.kind() {
                // Nobody has the terminal any more: its process is ending.
                io::ErrorKind::BrokenPipe if self.terminal.is_some() => InputError::Ended,
                io::ErrorKind::BrokenPipe => InputError::Closed,
                _ => InputError::Write(error),
            })
        };
        tokio::select! {
            result = write => result,
            () = self.exited() => Err(InputError::Ended),
        }
    }

    /// Ends standard input after what was written. Closing it twice is fine.
    pub async fn close_stdin(&self) -> Result<(), InputError> {
        if self.terminal.is_some() {
            return Err(InputError::IsTerminal);
        }
        *self.input.lock().await = None;
        Ok(())
    }

    /// Changes the terminal's size; its foreground group gets SIGWINCH.
    pub fn resize(&self, size: Winsize) -> Result<(), InputError> {
        let terminal = self.terminal.as_ref().ok_or(InputError::NoTerminal)?;
        let terminal = terminal.upgrade().ok_or(InputError::Ended)?;
        rustix::termios::tcsetwinsize(terminal.get(), size).map_err(|error| InputError::Resize(error.into()))
    }

    /// What keeping it costs in memory, near enough.
    fn kept(&self) -> u64 {
        let config = &self.config;
        let environment = config.envs.iter().map(|(name, value)| name.len() + value.len());
        let words = config.args.iter().map(String::len).chain(environment).sum::<usize>() + config.cmd.len();
        self.log.kept() + words as u64
    }

    fn is_running(&self) -> bool {
        !self.exited.load(Ordering::Acquire)
    }

    fn is(&self, selector: Selector<'_>) -> bool {
        match selector {
            Selector::Pid(pid) => self.pid.as_raw_nonzero().get() as u32 == pid,
            Selector::Tag(tag) => self.tag.as_deref() == Some(tag),
        }
    }

    async fn exited(&self) {
        let exit = self.exit.notified();
        tokio::pin!(exit);
        exit.as_mut().enable();
        if self.is_running() {
            exit.await;
        }
    }
}
