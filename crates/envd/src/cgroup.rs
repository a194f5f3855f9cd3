//! Control groups: one parent per class of process, with a CPU weight, and a leaf below it for each process.
//!
//! The leaf has no controllers, so making one is cheap; it exists so that a timeout can kill all of a process's descendants,
//! those that left its session included. A leaf whose descendants live on stays until they have gone.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Where init mounts the hierarchy.
pub const ROOT: &str = "/sys/fs/cgroup";

/// What the classes are accounted and limited by; each costs a little at every start of a guest.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

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

    /// The kernel's default is 100. envd itself stays in the root group at a raised priority (`init`).
    fn cpu_weight(self) -> &'static str {
        match self {
            Class::User => "100",
            Class::Pty => "200",
        }
    }
}

/// The hierarchy of a guest, or nothing where envd is not init.
pub struct Cgroups {
    root: Option<PathBuf>,
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
        Cgroups { root: None, next: AtomicU64::new(0), leftovers: Mutex::default() }
    }

    /// Makes the classes below `root`, a cgroup2 mount, with the controllers it offers enabled.
    pub fn create(root: &Path) -> io::Result<Cgroups> {
        let offered = std::fs::read_to_string(root.join("cgroup.controllers"))?;
        let wanted = CONTROLLERS.iter().filter(|wanted| offered.split_whitespace().any(|name| name == **wanted));
        let enable: Vec<String> = wanted.map(|controller| format!("+{controller}")).collect();
        std::fs::write(root.join("cgroup.subtree_control"), enable.join(" "))?;
        for class in Class::ALL {
            let directory = root.join(class.name());
            match std::fs::create_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            if offered.split_whitespace().any(|controller| controller == "cpu") {
                std::fs::write(directory.join("cpu.weight"), class.cpu_weight())?;
            }
        }
        Ok(Cgroups { root: Some(root.to_owned()), ..Cgroups::none() })
    }

    /// A group for one process; `None` where there is no hierarchy.
    pub fn leaf(self: &Arc<Self>, class: Class) -> io::Result<Option<Leaf>> {
        let Some(root) = &self.root else { return Ok(None) };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = root.join(class.name()).join(number.to_string());
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
