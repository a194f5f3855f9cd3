//! Control groups: one per capsule, under one per agent.
//!
//! The group is how the processes of a capsule are found and killed, also when the agent that started them is long dead,
//! so it is used on every host. Limits are a second use, and only there where the host gave cgroup 2 its controllers.
//! Only the unified hierarchy is known; version 1 hierarchies are left alone.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use crate::jail::Size;

/// How long a killed group may take to become empty, and an empty group to be removable.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// What could not be done to a group.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No cgroup 2 hierarchy is mounted in this mount namespace.
    #[error("no cgroup 2 file system is mounted; mount one with `mount -t cgroup2 none /sys/fs/cgroup`")]
    NotMounted,
    /// A file or directory of the hierarchy refused.
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
    /// Processes are still in the group after its time to drain.
    #[error("{} still has processes: {pids:?}", path.display())]
    Busy {
        /// The group.
        path: PathBuf,
        /// What is in it.
        pids: Vec<u32>,
    },
}

/// The controllers that limit something here.
pub const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Memory beyond what is the guest's, in MiB: the VMM, its pager, and what the kernel has for both.
const OVERHEAD_MIB: u64 = 512;
/// Processors beyond the guest's, for its disk and network, its VMM and its pager.
const OVERHEAD_CPUS: u64 = 1;
/// Threads of a pager.
const PAGER_TASKS: u64 = 64;
/// What a capsule may have read, and written, in a second: bytes and requests.
const IO_BYTES: u64 = 1 << 30;
const IO_REQUESTS: u64 = 100_000;

/// What a capsule's processes may use together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory, the guest's and the VMM's own together.
    memory_bytes: u64,
    /// Processors.
    cpus: u64,
    /// Share of the processors under contention, 1 to 10000; 100 is what an unlimited group has.
    cpu_weight: u64,
    /// Processes and threads.
    pids: u64,
    /// The device that its disk is on, by numbers.
    device: Option<(u32, u32)>,
}

impl Limits {
    /// Those of a capsule of that size, whose disk is in `dir`.
    pub fn of(size: &Size, dir: &Path) -> Self {
        // A dump of the guest's memory takes as much once more.
        let memory_mib = 2 * u64::from(size.memory_mib) + OVERHEAD_MIB;
        let vcpus = u64::from(size.vcpus);
        Self {
            memory_bytes: memory_mib << 20,
            cpus: vcpus + OVERHEAD_CPUS,
            cpu_weight: (100 * vcpus).clamp(1, 10_000),
            pids: size.tasks() + PAGER_TASKS,
            device: device_of(dir),
        }
    }
}

/// One group, existing or not; every operation on it may be repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The group above all capsules of one agent: `{mount point of cgroup 2}/wrenn-{instance}`.
    pub fn root(instance: &str) -> Result<Self, Error> {
        Ok(Self { path: mount_point()?.join(format!("wrenn-{instance}")) })
    }

    /// The group `name` inside this one.
    pub fn child(&self, name: &str) -> Self {
        Self { path: self.path.join(name) }
    }

    /// Where it is in the file system.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory, and gives it the controllers that its parent has.
    ///
    /// A controller that cannot be handed down is no error: limits are then not enforced, as on a host without it.
    pub fn create(&self) -> Result<(), Error> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(self.refused("create", "")(error));
            }
            _ => {}
        }
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
        for controller in controllers.split_whitespace().filter(|name| CONTROLLERS.contains(name)) {
            if let Err(error) = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}")) {
                tracing::warn!(%error, controller, group = %self.path.display(), "controller not available: no limit");
            }
        }
        Ok(())
    }

    /// Sets the limits whose controllers the group has.
    pub fn set_limits(&self, limits: &Limits) -> Result<(), Error> {
        const PERIOD: u64 = 100_000;
        let io = limits.device.map(|(major, minor)| {
            format!("{major}:{minor} rbps={IO_BYTES} wbps={IO_BYTES} riops={IO_REQUESTS} wiops={IO_REQUESTS}")
        });
        for (file, value) in [
            ("memory.max", limits.memory_bytes.to_string()),
            // What a guest has in memory is not written to a disk as it is.
            ("memory.swap.max", "0".to_owned()),
            // A VMM that lost one of its processes is no VMM: all of the group goes, or none.
            ("memory.oom.group", "1".to_owned()),
            ("cpu.max", format!("{} {PERIOD}", limits.cpus * PERIOD)),
            ("cpu.weight", limits.cpu_weight.to_string()),
            ("pids.max", limits.pids.to_string()),
        ] {
            if self.path.join(file).exists() {
                fs::write(self.path.join(file), value).map_err(self.refused("write", file))?;
            }
        }
        if let Some(io) = io
            && self.path.join("io.max").exists()
            && let Err(error) = fs::write(self.path.join("io.max"), &io)
        {
            // Not every device can be limited, and none of them says so before.
            tracing::debug!(%error, io, group = %self.path.display(), "no limit of disk traffic");
        }
        Ok(())
    }

    /// The processes in it; none when it does not exist.
    pub fn pids(&self) -> Result<Vec<u32>, Error> {
        let text = self.read("cgroup.procs")?.unwrap_or_default();
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// The groups directly inside it, by name; none when it does not exist.
    pub fn list(&self) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(self.refused("list", ""))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(self.refused("list", ""))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Kills every process in it and in the groups inside it, and waits until none is left.
    pub async fn kill(&self) -> Result<(), Error> {
        let end = Instant::now() + DRAIN_LIMIT;
        while self.populated()? {
            if Instant::now() >= end {
                return Err(Error::Busy { path: self.path.clone(), pids: self.pids()? });
            }
            self.send_kill()?;
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Removes the empty group, waiting for dying processes to leave it. Refuses when any lives in it: killing is said
    /// explicitly, never implied.
    pub async fn remove(&self) -> Result<(), Error> {
        let end = Instant::now() + DRAIN_LIMIT;
        loop {
            match fs::remove_dir(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.kind() != io::ErrorKind::ResourceBusy => {
                    return Err(self.refused("remove", "")(error));
                }
                Err(error) if !self.list()?.is_empty() => return Err(self.refused("remove", "")(error)),
                Err(_) if Instant::now() >= end => {
                    return Err(Error::Busy { path: self.path.clone(), pids: self.pids()? });
                }
                Err(_) => sleep(Duration::from_millis(1)).await,
            }
        }
    }

    /// One round of SIGKILL, without waiting for its effect.
    pub(crate) fn send_kill(&self) -> Result<(), Error> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            // Kernels before 5.14 have no such file. A process that forks meanwhile is met by the next round.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.send_kill_one_by_one(),
            Err(error) if gone(&error) => Ok(()),
            result => result.map_err(self.refused("write", "cgroup.kill")),
        }
    }

    fn send_kill_one_by_one(&self) -> Result<(), Error> {
        for name in self.list()? {
            self.child(&name).send_kill_one_by_one()?;
        }
        for pid in self.pids()? {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // It may have ended by itself since it was listed.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        Ok(())
    }

    /// Whether a process lives in it or in a group inside it. A zombie does not.
    fn populated(&self) -> Result<bool, Error> {
        Ok(self.read("cgroup.events")?.is_some_and(|text| text.lines().any(|line| line == "populated 1")))
    }

    fn read(&self, file: &str) -> Result<Option<String>, Error> {
        match fs::read_to_string(self.path.join(file)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(self.refused("read", file)(error)),
        }
    }

    fn refused<'a>(&'a self, doing: &'static str, file: &'a str) -> impl FnOnce(io::Error) -> Error + 'a {
        move |source| Error::File { doing, path: self.path.join(file), source }
    }
}

/// The whole device that the file system of `path` is on; `None` where that is none, or several.
fn device_of(path: &Path) -> Option<(u32, u32)> {
    let device = fs::metadata(path).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let entry = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    if !entry.join("partition").exists() {
        return Some((major, minor));
    }
    // A partition's traffic is limited with that of its disk.
    let text = fs::read_to_string(entry.parent()?.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A group removed while one of its files is open answers ENODEV, otherwise ENOENT.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Where the cgroup 2 hierarchy is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hosts that keep version 1.
pub fn mount_point() -> Result<PathBuf, Error> {
    let path = Path::new("/proc/self/mountinfo");
    let table = fs::read(path).map_err(|source| Error::File { doing: "read", path: path.to_owned(), source })?;
    find_mount_point(&table).ok_or(Error::NotMounted)
}

/// The first mount of type `cgroup2` in the text of a `mountinfo` file.
fn find_mount_point(table: &[u8]) -> Option<PathBuf> {
    table.split(|&byte| byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        // Optional fields of unknown number stand between the mount point and this separator.
        let separator = fields.iter().position(|field| field == b"-")?;
        let point = fields.get(4)?;
        (*fields.get(separator + 1)? == b"cgroup2").then(|| unescape(point))
    })
}

/// Undoes the kernel's `\ooo` for blanks and backslashes in a path.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) if *first == b'\\' => {
                path.push(byte);
                rest = &tail[3..];
            }
            _ => {
                path.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_table_makes_it_panic(table: Vec<u8>, word in "[-\\\\0-9 \n]{0,40}cgroup2") {
            find_mount_point(&table);
            find_mount_point(word.as_bytes());
        }
    }

    #[test]
    fn the_mount_point_is_found_on_pure_and_hybrid_hosts() {
        let pure = b"24 30 0:22 / /proc rw shared:12 - proc proc rw\n\
            35 24 0:29 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let hybrid = b"40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let blank = b"41 31 0:38 / /mnt/my\\040group rw shared:1 master:2 - cgroup2 none rw\n";
        assert_eq!(find_mount_point(pure), Some("/sys/fs/cgroup".into()));
        assert_eq!(find_mount_point(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_mount_point(blank), Some("/mnt/my group".into()));
        assert_eq!(find_mount_point(b"24 30 0:22 / /cgroup2 rw - proc cgroup2 rw\n"), None);
        assert_eq!(find_mount_point(b""), None);
    }

    #[test]
    fn limits_go_to_the_controllers_that_are_there() {
        let directory = tempfile::tempdir().unwrap();
        let group = Cgroup { path: directory.path().to_owned() };
        for file in ["memory.max", "pids.max", "cpu.max"] {
            fs::write(directory.path().join(file), "max").unwrap();
        }
        let size = Size { vcpus: 2, memory_mib: 1024, disk_mib: 5120 };
        group.set_limits(&Limits::of(&size, directory.path())).unwrap();
        let said = |file: &str| fs::read_to_string(directory.path().join(file)).unwrap();
        assert_eq!(said("memory.max"), (2560_u64 << 20).to_string());
        assert_eq!(said("pids.max"), "260");
        assert_eq!(said("cpu.max"), "300000 100000");
        assert!(!directory.path().join("cpu.weight").exists());
    }
}
