//! The VMM as a process: started so that it survives the agent, watched while it runs, killed whole.
//!
//! ```text
//!   Launch::spawn ─► running ──(ends, or kill)──► exited()
//!                      ▲  the agent dies and returns
//!   Process::adopt ────┘
//! ```
//!
//! A VMM is born in the capsule's cgroup, so an agent killed at any instant leaves no process that its successor cannot
//! find, and runs in a [jail](crate::jail). It refuses to restart a VMM: what to do about an end is for its owner to decide.

mod child;
mod launch;
mod scratch;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::cgroup::{self, Cgroup};

pub use child::Step;
pub use launch::{Companion, Launch};
pub use scratch::Scratch;

/// What a VMM's log may grow to, in bytes. A guest writes to it as fast as it likes, through its serial console.
const LOG_LIMIT: u64 = 4 << 20;
/// How often its size is looked at.
const LOG_LOOK: Duration = Duration::from_secs(1);

/// What could not be done to a process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that the launch needs is missing or cannot be made.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was being done, as a verb.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It could not be signalled.
    #[error("cannot signal process {pid}")]
    Signal {
        /// The process.
        pid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A path or id has a NUL byte.
    #[error("`{0}` has a NUL byte and cannot be given to a process")]
    Nul(String),
    /// The child could not be made, or ended before it became the VMM.
    #[error("cannot start {}: {step}", binary.display())]
    Start {
        /// The program.
        binary: PathBuf,
        /// How far it came.
        step: Step,
        /// Why not further.
        #[source]
        source: io::Error,
    },
    /// The process was made, but could not be watched.
    #[error("cannot watch process {pid}")]
    Watch {
        /// Which process.
        pid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its cgroup refused.
    #[error("the process's control group failed")]
    Cgroup(#[from] cgroup::Error),
}

/// Names one process for ever, in a form that can be written down: pids are recycled, but not at the same start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Clock ticks from the host's boot to the process's start.
    pub start_ticks: u64,
}

impl Identity {
    /// The process that has this pid now; `None` when there is none.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self { pid, start_ticks: start_ticks(&stat)? })
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was started by an earlier agent: only the system knows.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with code {code}"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
            Self::Unknown => f.write_str("ended"),
        }
    }
}

/// A running VMM, or one that has ended. Clones name the same process; dropping it leaves the process alone.
#[derive(Debug, Clone)]
pub struct Process {
    identity: Identity,
    cgroup: Cgroup,
    /// A companion has none.
    scratch: Option<Scratch>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Process {
    /// Takes charge of a process that an earlier agent started: `None` when it has ended, also when its pid now names
    /// another process or one outside the group. `log` is where it was started to print to.
    pub fn adopt(identity: &Identity, cgroup: &Cgroup, log: &Path) -> Result<Option<Self>, Error> {
        // First the descriptor, then the comparison: what is compared cannot be replaced afterwards.
        let Some(pidfd) = open(identity.pid)? else { return Ok(None) };
        if Identity::of(identity.pid) != Some(*identity) || !cgroup.pids()?.contains(&identity.pid) {
            return Ok(None);
        }
        Self::watch(*identity, cgroup.clone(), pidfd, log).map(Some)
    }

    /// Begins to watch. Needs a tokio runtime; its task also reaps the process if it is our child.
    fn watch(identity: Identity, cgroup: Cgroup, pidfd: OwnedFd, log: &Path) -> Result<Self, Error> {
        let scratch = match Scratch::of(identity.pid) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            scratch => Some(scratch.map_err(|source| Error::Watch { pid: identity.pid, source })?),
        };
        // SAFETY: the `AsyncFd` owns the descriptor and never gives it away, so it stays open and the same for as long as it
        // is registered.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
            .map_err(|error| Error::Watch { pid: identity.pid, source: error.into() })?;
        let (sender, exit) = watch::channel(None);
        // Without it there is nothing to bound.
        let log = File::options().append(true).open(log).ok();
        tokio::spawn(async move {
            loop {
                match timeout(LOG_LOOK, pidfd.readable()).await {
                    Ok(Ok(_)) => break,
                    // Readiness can only fail when the runtime goes away, and this task with it.
                    Ok(Err(_)) => return,
                    Err(_) => log.as_ref().map_or((), bound),
                }
            }
            sender.send_replace(Some(reap(pidfd.get_ref())));
        });
        Ok(Self { identity, cgroup, scratch, exit })
    }

    /// What to write down in order to adopt it later.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// What a VMM has written; `None` of a companion, and of a VMM that ended as soon as it was executed.
    pub fn scratch(&self) -> Option<&Scratch> {
        self.scratch.as_ref()
    }

    /// The group all its processes are in.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Resolves when it has ended; for any number of callers, at any time.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        match ended {
            Some(exit) => exit,
            // The runtime that watched it is shutting down. Nobody can be told anything any more.
            None => std::future::pending().await,
        }
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Asks it to end, by SIGTERM, and waits until it has.
    pub async fn terminate(&self) -> Result<Exit, Error> {
        let pid = self.identity.pid;
        // As in `adopt`. One that has ended is not asked.
        if let Some(pidfd) = open(pid)?.filter(|_| Identity::of(pid) == Some(self.identity)) {
            let sent = pidfd_send_signal(&pidfd, Signal::TERM);
            sent.or_else(|error| if error == Errno::SRCH { Ok(()) } else { Err(error) })
                .map_err(|source| Error::Signal { pid, source: source.into() })?;
        }
        Ok(self.exited().await)
    }

    /// Kills it and everything it started, and waits until the group is empty. Repeatable.
    pub async fn kill(&self) -> Result<Exit, Error> {
        self.cgroup.kill().await?;
        Ok(self.exited().await)
    }
}

/// Begins a log that has grown too long anew. Its writer appends, so it goes on at the beginning.
fn bound(log: &File) {
    if log.metadata().is_ok_and(|file| file.len() > LOG_LIMIT) {
        let _ = log.set_len(0).and_then(|()| (&*log).write_all(b"[earlier output was dropped]\n"));
    }
}

fn open(pid: u32) -> Result<Option<OwnedFd>, Error> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Ok(None),
        Err(error) => Err(Error::Watch { pid, source: error.into() }),
    }
}

/// Collects the status of an ended process; only its parent may.
fn reap(pidfd: &impl AsFd) -> Exit {
    match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
        Ok(Some(status)) => status
            .exit_status()
            .map(Exit::Code)
            .or_else(|| status.terminating_signal().map(Exit::Signal))
            .unwrap_or(Exit::Unknown),
        Ok(None) | Err(_) => Exit::Unknown,
    }
}

/// Field 22 of a `/proc/PID/stat` text. The second field, the name, may itself have blanks and parentheses.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let stat = "71 (a) b (c)) S 1 71 71 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 2379776 0 18446744073709551615";
        assert_eq!(start_ticks(stat), Some(4711));
        assert_eq!(start_ticks("71 (a) S 1"), None);
        assert_eq!(start_ticks(""), None);
    }

    #[test]
    fn this_process_has_an_identity_and_nobody_has_pid_0() {
        let me = Identity::of(std::process::id()).unwrap();
        assert_eq!(Identity::of(me.pid), Some(me));
        assert_eq!(Identity::of(0), None);
    }
}
