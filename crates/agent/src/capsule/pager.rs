//! The pager of a capsule, as the agent sees it: a process that serves the memory of a guest that did not boot, until all of it
//! has come, and without which that guest cannot go on.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::error;
use vmm::cgroup::Cgroup;
use vmm::process::{Companion, Exit, Process};

use super::record::Journal;
use super::start::{Error, Running};
use super::{Spec, files, save};
use crate::host::Host;

/// From a pager's start until it can serve; one whose memory is in an object store asks that first.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// Pause between two looks for what the pager says.
const READY_PAUSE: Duration = Duration::from_millis(1);
/// What a pager exits with when the snapshot is of no use.
pub const DAMAGED: Exit = Exit::Code(10);
/// What a pager exits with when memory did not come from the object store.
const STARVED: Exit = Exit::Code(13);
/// How long a save may go on whose guest has lost its pager.
const UNPAGED: Duration = Duration::from_secs(5);

/// Which memory a pager serves.
pub enum Served {
    /// That of the capsule's snapshot of this number.
    Own(u32),
    /// That which has not all come yet.
    Remote,
}

/// Starts a pager and waits until it can serve. What is needed first is learned from `working_set`, and written to it if it is
/// to be.
pub async fn start(
    host: &Host,
    spec: &Spec,
    dir: &Path,
    user: u32,
    served: Served,
    working_set: Option<(PathBuf, bool)>,
) -> Result<Process, Error> {
    match std::fs::remove_file(dir.join(files::PAGER_LOG)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::Place(error)),
        _ => {}
    }
    let (binary, words) = &host.config.pager;
    let (memory, generations) = match served {
        Served::Own(number) => (PathBuf::from(files::memory(number)), host.memory.generations().to_owned()),
        Served::Remote => (Path::new(files::REMOTE).join(files::MEMORY), PathBuf::from(files::REMOTE)),
    };
    let (socket, user) = (Path::new(files::VM).join(files::PAGER_SOCKET), user.to_string());
    let to_come = Path::new(files::REMOTE).join(files::REMOTE_FILES);
    let mut args: Vec<&std::ffi::OsStr> = words.iter().map(AsRef::as_ref).collect();
    args.extend([
        // Relative, because the address of a socket ends at 107 bytes and paths do not.
        "--socket".as_ref(),
        socket.as_os_str(),
        "--vmm-uid".as_ref(),
        user.as_ref(),
        "--header".as_ref(),
        memory.as_os_str(),
        "--generations".as_ref(),
        generations.as_os_str(),
    ]);
    if let Some((path, is_noted)) = &working_set {
        args.extend(["--prefetch".as_ref(), path.as_os_str()]);
        if *is_noted {
            args.extend(["--record".as_ref(), path.as_os_str()]);
        }
    }
    let mut environment = Vec::new();
    if let Served::Remote = served {
        let objects = host.config.objects.as_ref().ok_or(Error::NoObjects)?;
        args.extend(["--objects".as_ref(), objects.address().as_ref(), "--to-come".as_ref(), to_come.as_os_str()]);
        environment.extend(objects.environment());
    }
    let cgroup = host.cgroup(spec.id);
    let log = dir.join(files::PAGER_LOG);
    let companion = Companion { binary, args: &args, environment: &environment, dir, cgroup: &cgroup, log: &log };
    let pager = companion.spawn().await.map_err(Error::Pager)?;
    let ready = async {
        while !has_said(dir, "ready") {
            if let Some(exit) = pager.exit() {
                return Err(Error::PagerDied(exit));
            }
            tokio::time::sleep(READY_PAUSE).await;
        }
        Ok(())
    };
    match tokio::time::timeout(READY_LIMIT, ready).await {
        Ok(ready) => ready.map(|()| pager),
        Err(_) => Err(Error::PagerSilent),
    }
}

/// Resolves when a pager ends though it is needed; never for one that has done its work, or where there is none.
pub async fn lost(pager: Option<&Process>, dir: &Path) -> Exit {
    let Some(pager) = pager else { return std::future::pending().await };
    let exit = pager.exited().await;
    // Of one that an earlier agent started nobody could be told how it ended, so what it said itself counts.
    if is_whole(dir) || has_said(dir, "vmm gone") { std::future::pending().await } else { exit }
}

/// Whether the pager of the capsule in `dir` has ended because it was not needed any more.
pub fn is_whole(dir: &Path) -> bool {
    has_said(dir, "whole")
}

/// What is told of the capsule in `dir`, whose pager ended though it is needed.
pub fn reason(exit: Exit, dir: &Path) -> String {
    match exit {
        STARVED => {
            // It may have been this host that could not take it, and only the pager knows.
            let log = std::fs::read_to_string(dir.join(files::PAGER_LOG)).unwrap_or_default();
            let why = log.lines().rev().find_map(|line| line.strip_prefix("error: ")).unwrap_or("it did not say why");
            format!("memory that it needed from the object store is not here: {why}")
        }
        exit => format!("the process that serves its memory ended by itself ({exit})"),
    }
}

/// Whether the pager of the capsule in `dir` has said that.
pub fn has_said(dir: &Path, word: &str) -> bool {
    std::fs::read_to_string(dir.join(files::PAGER_LOG)).is_ok_and(|log| log.lines().any(|line| line == word))
}

/// Sees to it that a save of a guest ends that has lost its pager: such a guest may stand still at any page that had not come.
pub struct Watch<'a> {
    pager: Option<&'a Process>,
    dir: PathBuf,
    cgroup: Cgroup,
}

impl<'a> Watch<'a> {
    pub fn over(host: &Host, journal: &Journal, running: &'a Running) -> Self {
        let (dir, cgroup) = (journal.dir().to_owned(), host.cgroup(journal.record().spec.id));
        Self { pager: running.pager.as_ref(), dir, cgroup }
    }

    /// What came of the save, and how the pager ended if it did.
    pub async fn during<T>(self, save: impl Future<Output = T>) -> (T, Option<Exit>) {
        tokio::pin!(save);
        let lost = tokio::select! {
            biased;
            saved = &mut save => return (saved, None),
            exit = lost(self.pager, &self.dir) => Some(exit),
        };
        // What has come may be all that is to be saved.
        if let Ok(saved) = tokio::time::timeout(UNPAGED, &mut save).await {
            return (saved, lost);
        }
        if let Err(error) = self.cgroup.kill().await {
            error!(dir = %self.dir.display(), error = crate::chain(&error), "ending a VMM that has lost its memory");
        }
        (save.await, lost)
    }
}

/// Why a save failed, of a guest whose pager ended like that.
pub fn why(failed: &save::Failed, lost: Option<Exit>) -> String {
    let why = crate::chain(failed);
    match lost {
        Some(exit) => format!("the process that serves its memory ended by itself ({exit}), and so {why}"),
        None => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pager_that_starved_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let of = |exit| reason(exit, dir.path());
        assert!(of(STARVED).ends_with("it did not say why"));
        let log = "ready\nerror: fetch the page of guest memory at 0x1000: No space left on device (os error 28)\n";
        std::fs::write(dir.path().join(files::PAGER_LOG), log).unwrap();
        assert!(of(STARVED).contains("object store") && of(STARVED).contains("No space left"), "{}", of(STARVED));
        assert!(!of(DAMAGED).contains("object store"));
    }
}
