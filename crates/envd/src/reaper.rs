//! The one place that waits for children.
//!
//! As init, envd inherits every orphan and must reap it; as process server it must not lose the exit status of a process it
//! started. Both are `waitpid(-1)`, so one reaper does it and hands each status to whoever started that pid:
//!
//! - a pid of our own is entered before it can exit: the kernel writes it into the [`Birth`] we registered before the clone,
//!   ahead of the child's first instruction, so even a child that dies at once finds its owner;
//! - any other pid is an orphan and is forgotten.
//!
//! Signals go through here too: a pid stays ours, and cannot be recycled, exactly as long as it is entered.

use crate::sys::spawn::{self, Spawn};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use std::collections::HashMap;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Resolves once, with how the process ended.
pub type Exit = oneshot::Receiver<WaitStatus>;

/// See the module's documentation.
#[derive(Default)]
pub struct Reaper {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    owned: HashMap<Pid, oneshot::Sender<WaitStatus>>,
    births: Vec<Birth>,
}

/// A clone under way.
struct Birth {
    /// 0 until the kernel has written the pid.
    pid: Arc<AtomicI32>,
    owner: oneshot::Sender<WaitStatus>,
}

impl Reaper {
    /// Starts a process, to be reaped by [`Reaper::run`]. Blocks until it has executed its program.
    pub fn spawn(&self, what: &Spawn<'_>) -> Result<(Pid, Exit), spawn::Error> {
        let (owner, exit) = oneshot::channel();
        let pid = Arc::new(AtomicI32::new(0));
        self.lock().births.push(Birth { pid: Arc::clone(&pid), owner });
        let result = spawn::spawn(what, &pid);

        let mut inner = self.lock();
        // Absent when the process has ended and was reaped already; its status waits in `exit`.
        let birth =
            inner.births.iter().position(|birth| Arc::ptr_eq(&birth.pid, &pid)).map(|i| inner.births.swap_remove(i));
        let pid = result?;
        if let Some(birth) = birth {
            inner.owned.insert(pid, birth.owner);
        }
        Ok((pid, exit))
    }

    /// Sends a signal to the process group that `leader`, a process of ours, leads. False when it has ended.
    pub fn signal_group(&self, leader: Pid, signal: Signal) -> bool {
        let inner = self.lock();
        inner.owned.contains_key(&leader) && rustix::process::kill_process_group(leader, signal).is_ok()
    }

    /// Reaps for ever.
    pub async fn run(&self) -> std::io::Result<()> {
        let mut changed = signal(SignalKind::child())?;
        loop {
            self.reap();
            changed.recv().await;
        }
    }

    /// Reaps what has ended. The lock is held across wait and hand-over, so that nobody signals a pid in between.
    fn reap(&self) {
        let mut inner = self.lock();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let owner = inner.owned.remove(&pid).or_else(|| {
                let mut births = inner.births.iter();
                let born = births.position(|birth| birth.pid.load(Ordering::Acquire) == pid.as_raw_nonzero().get())?;
                Some(inner.births.swap_remove(born).owner)
            });
            if let Some(owner) = owner {
                // Nobody listens when the start failed.
                let _ = owner.send(status);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
