//! The file systems every Linux program expects.

use rustix::fs::Mode;
use rustix::mount::{MountFlags, mount};
use std::ffi::CStr;
use std::io;

struct Mount {
    source: &'static CStr,
    target: &'static str,
    kind: &'static CStr,
    flags: MountFlags,
    options: Option<&'static CStr>,
}

/// Links that programs expect beside the kernel's device nodes.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts what is not mounted yet, in order; returns what could not be.
pub fn mount_all() -> Vec<(&'static str, io::Error)> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let volatile = MountFlags::NOSUID | MountFlags::NODEV;
    let devices = MountFlags::NOSUID | MountFlags::NOEXEC;
    let of = |source, target, kind, flags, options| Mount { source, target, kind, flags, options };
    let mounts = [
        of(c"proc", "/proc", c"proc", plain, None),
        of(c"sysfs", "/sys", c"sysfs", plain, None),
        of(c"devtmpfs", "/dev", c"devtmpfs", MountFlags::NOSUID, Some(c"mode=0755")),
        of(c"devpts", "/dev/pts", c"devpts", devices, Some(c"gid=5,mode=0620,ptmxmode=0666")),
        of(c"tmpfs", "/dev/shm", c"tmpfs", volatile, Some(c"mode=1777")),
        of(c"tmpfs", "/run", c"tmpfs", volatile, Some(c"mode=0755")),
        of(c"tmpfs", "/tmp", c"tmpfs", volatile, Some(c"mode=1777")),
        of(c"cgroup2", crate::cgroup::ROOT, c"cgroup2", plain, None),
    ];
    let mut failures = Vec::new();
    for mount in mounts {
        if let Err(error) = mount.apply() {
            failures.push((mount.target, error));
        }
    }
    for (to, link) in LINKS {
        match rustix::fs::symlink(to, link) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => failures.push((link, error.into())),
        }
    }
    failures
}

impl Mount {
    fn apply(&self) -> io::Result<()> {
        match rustix::fs::mkdir(self.target, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            // On a root that is read-only or a target below a file system of its own, the mount says what is wrong.
            Err(_) => {}
        }
        if self.is_mounted()? {
            return Ok(());
        }
        match mount(self.source, self.target, self.kind, self.flags, self.options) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether this kind of file system is there already, as the kernel mounts `/dev` by itself.
    fn is_mounted(&self) -> io::Result<bool> {
        let parent = std::path::Path::new(self.target).parent().unwrap_or(std::path::Path::new("/"));
        Ok(rustix::fs::stat(self.target)?.st_dev != rustix::fs::stat(parent)?.st_dev)
    }
}
