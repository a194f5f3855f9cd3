//! Control groups: one for all users' work, whose memory and tasks end before the machine's do, so that what runs away in
//! it is killed or refused before envd is starved, and which can be frozen as a whole; below it a parent per class of
//! process, with a CPU weight, and a leaf for each process. envd itself, and what is tagged [`SYSTEM_TAG`], stays in the
//! root group: no limit there, and a raised priority against all work together ([`crate::init`]).
//!
//! The leaf has no controllers, so making one is cheap; it exists so that a timeout can kill all of a process's descendants,
//! those that left its session included. A leaf whose descendants live on stays until they have gone.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Where init mounts the hierarchy.
pub const ROOT: &str = "/sys/fs/cgroup";

/// What the classes are accounted and limited by; each costs a little at every start of a guest.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Processes of the platform's own: they are neither limited nor frozen with users' work.
pub const SYSTEM_TAG: &str = "_system";
const WORK: &str = "work";
/// What of the machine's memory is envd's and the kernel's: a sixteenth, within these bounds. Bytes.
const RESERVE: std::ops::RangeInclusive<u64> = 24 << 20..=256 << 20;

/// What a process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A command.
    User,
    /// A terminal: a person waits for it.
    Pty,
}

impl Class {
    const ALL: [Class; 2] = [Class::User, Class::Pty];

    fn name(self) -> &'static str {
        match self {
            Class::User => "user",
            Class::Pty => "pty",
        }
    }

    /// The kernel's default is 100.
    fn cpu_weight(self) -> &'static str {
        match self {
            Class::User => "100",
            Class::Pty => "200",
        }
    }
}

/// The hierarchy of a guest, or nothing where envd is not init.
pub struct Cgroups {
    work: Option<PathBuf>,
    next: AtomicU64,
    leftovers: Mutex<Vec<PathBuf>>,
}

/// A process's own group. Dropping it removes the group, now or once it is empty.
pub struct Leaf {
    cgroups: Arc<Cgroups>,
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroups {
    /// No groups: processes stay in envd's.
    pub fn none() -> Cgroups {
        Cgroups { work: None, next: AtomicU64::new(0), leftovers: Mutex::default() }
    }

    /// Makes the classes below `root`, a cgroup2 mount, with the controllers it offers enabled.
    pub fn create(root: &Path) -> io::Result<Cgroups> {
        let offered = std::fs::read_to_string(root.join("cgroup.controllers"))?;
        let offers = |name: &str| offered.split_whitespace().any(|offered| offered == name);
        let wanted: Vec<String> =
            CONTROLLERS.iter().filter(|name| offers(name)).map(|controller| format!("+{controller}")).collect();
        std::fs::write(root.join("cgroup.subtree_control"), wanted.join(" "))?;
        let work = root.join(WORK);
        make(&work)?;
        if offers("memory") {
            let memory = std::fs::read_to_string("/proc/meminfo")?;
            if let Some(total) = total_memory(&memory) {
                std::fs::write(work.join("memory.max"), work_memory(total).to_string())?;
            }
        }
        if offers("pids") {
            let kernel = |name: &str| std::fs::read_to_string(format!("/proc/sys/kernel/{name}"));
            if let Some(all) = fewest(&[kernel("threads-max")?, kernel("pid_max")?]) {
                std::fs::write(work.join("pids.max"), work_tasks(all).to_string())?;
            }
        }
        std::fs::write(work.join("cgroup.subtree_control"), wanted.join(" "))?;
        for class in Class::ALL {
            let directory = work.join(class.name());
            make(&directory)?;
            if offers("cpu") {
                std::fs::write(directory.join("cpu.weight"), class.cpu_weight())?;
            }
        }
        Ok(Cgroups { work: Some(work), ..Cgroups::none() })
    }

    /// Stops all users' processes where they are, or lets them go on.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let Some(work) = &self.work else { return Ok(()) };
        let mut file = std::fs::File::options().write(true).open(work.join("cgroup.freeze"))?;
        file.write_all(if frozen { b"1" } else { b"0" })
    }

    /// Whether all of them have stopped.
    pub fn is_frozen(&self) -> io::Result<bool> {
        let Some(work) = &self.work else { return Ok(true) };
        Ok(std::fs::read_to_string(work.join("cgroup.events"))?.lines().any(|line| line == "frozen 1"))
    }

    /// A group for one process; `None` where there is no hierarchy.
    pub fn leaf(self: &Arc<Self>, class: Class) -> io::Result<Option<Leaf>> {
        let Some(work) = &self.work else { return Ok(None) };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = work.join(class.name()).join(number.to_string());
        std::fs::create_dir(&path)?;
        match rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(directory) => Ok(Some(Leaf { cgroups: Arc::clone(self), path, directory })),
            Err(error) => {
                let _ = std::fs::remove_dir(&path);
                Err(error.into())
            }
        }
    }
}

fn make(directory: &Path) -> io::Result<()> {
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Bytes, of `/proc/meminfo`.
fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// What users' work may have of a machine's memory.
fn work_memory(total: u64) -> u64 {
    total.saturating_sub((total / 16).clamp(*RESERVE.start(), *RESERVE.end()))
}

fn fewest(limits: &[String]) -> Option<u64> {
    limits.iter().filter_map(|limit| limit.trim().parse().ok()).min()
}

/// How many of a machine's tasks users' work may have: envd must find one when it starts a process.
fn work_tasks(all: u64) -> u64 {
    (all - all / 10).max(1)
}

impl Leaf {
    /// Kills everything in the group.
    pub fn kill(&self) -> io::Result<()> {
        std::fs::write(self.path.join("cgroup.kill"), "1")
    }
}

impl AsFd for Leaf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        let mut leftovers = self.cgroups.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        leftovers.push(std::mem::take(&mut self.path));
        leftovers.retain(|path| match std::fs::remove_dir(path) {
            Ok(()) => false,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envd_keeps_its_share_of_any_machine() {
        assert_eq!(total_memory("MemTotal:         501234 kB\nMemFree: 1 kB\n"), Some(501_234 * 1024));
        assert_eq!(total_memory("nothing"), None);
        assert_eq!(work_memory(128 << 20), 104 << 20);
        assert_eq!(work_memory(512 << 20), 480 << 20);
        assert_eq!(fewest(&["3900\n".to_owned(), "32768".to_owned(), "odd".to_owned()]), Some(3900));
        assert_eq!(work_tasks(3900), 3510);
        assert_eq!(work_memory(64 << 30), (64 << 30) - (256 << 20));
    }
}
