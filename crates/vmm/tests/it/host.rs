//! What a VMM is started in: a cgroup, a network namespace and a directory, all counted when the test ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use vmm::cgroup::Cgroup;
use vmm::jail::Size;
use vmm::process::Launch;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Whom a VMM of these tests runs as: below the agents' own, of which others may be running.
pub const USER: u32 = 899_000;
pub const SIZE: Size = Size { vcpus: 1, memory_mib: 128, disk_mib: 64 };

pub struct Host {
    pub root: Cgroup,
    pub cgroup: Cgroup,
    pub netns: PathBuf,
    /// The capsule's own directory.
    pub dir: PathBuf,
    pub log: PathBuf,
    /// What stands for a guest kernel.
    pub kernel: PathBuf,
    pub program: PathBuf,
    name: String,
    directory: PathBuf,
    /// Empty in a process that only borrows what its parent made.
    owned: Option<tempfile::TempDir>,
}

impl Host {
    pub fn new() -> Self {
        let name = format!("vmmtest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = tempfile::tempdir().unwrap();
        let host = Self::of(name, directory.path().to_owned(), Some(directory));
        fs::create_dir(&host.dir).unwrap();
        fs::write(&host.kernel, "").unwrap();
        host.root.create().unwrap();
        host.cgroup.create().unwrap();
        host.cgroup.create().unwrap();
        ip(&["netns", "add", &host.name]);
        host
    }

    /// The host whose [`Host::inheritance`] is in the environment.
    pub fn inherited(variable: &str) -> Option<Self> {
        let text = std::env::var(variable).ok()?;
        let mut parts = text.split(' ').map(str::to_owned);
        let mut next = || parts.next().unwrap();
        let mut host = Self::of(next(), next().into(), None);
        host.program = next().into();
        Some(host)
    }

    pub fn inheritance(&self, program: &Path) -> String {
        format!("{} {} {}", self.name, self.directory.display(), program.display())
    }

    fn of(name: String, directory: PathBuf, owned: Option<tempfile::TempDir>) -> Self {
        let root = Cgroup::root(&name).unwrap();
        Self {
            cgroup: root.child("cl-test"),
            root,
            netns: Path::new("/run/netns").join(&name),
            dir: directory.join("capsule"),
            log: directory.join("vmm.log"),
            kernel: directory.join("vmlinux"),
            program: PathBuf::new(),
            name,
            directory,
            owned,
        }
    }

    /// Name of its network namespace.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A program that ignores its arguments and runs `script`.
    pub fn program(&self, script: &str) -> PathBuf {
        let path = self.directory.join(format!("vmm-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    pub fn launch<'a>(&'a self, binary: &'a Path) -> Launch<'a> {
        Launch {
            binary,
            id: "cl-test",
            dir: &self.dir,
            kernel: &self.kernel,
            netns: &self.netns,
            cgroup: &self.cgroup,
            log: &self.log,
            user: USER,
            size: SIZE,
        }
    }

    /// Gives everything back, and fails if something cannot be given back because it is still used.
    pub async fn end(mut self) {
        self.cgroup.remove().await.unwrap();
        self.root.remove().await.unwrap();
        assert!(!self.root.path().exists());
        ip(&["netns", "delete", &self.name]);
        drop(self.owned.take());
        assert!(!self.directory.exists());
    }
}

impl Drop for Host {
    /// After a failed test: what can be done without waiting.
    fn drop(&mut self) {
        if self.owned.is_some() {
            let _ = fs::write(self.root.path().join("cgroup.kill"), "1");
            let _ = fs::remove_dir(self.cgroup.path());
            let _ = fs::remove_dir(self.root.path());
            let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
        }
    }
}

pub fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}

/// Looks until it is so; the limit is only there to end a test that would hang.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let look = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(300), look).await.unwrap_or_else(|_| panic!("never: {what}"));
}
