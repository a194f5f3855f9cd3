//! Where disks and snapshots would be kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::Check;
use crate::vmm_choice::in_path;

pub(super) fn checks(dir: &Path) -> Vec<Check> {
    let place = existing(dir);
    let shares = shares_blocks(&place);
    let mut checks = vec![reflink(dir, &shares)];
    checks.push(xfs(shares == Shares::Yes));
    checks.push(space(dir, &place));
    checks
}

/// The directory itself, or the nearest above it that is there: it will be on the same file system.
fn existing(dir: &Path) -> PathBuf {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

/// Whether two files can have the same blocks until one is written to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Shares {
    Yes,
    No,
    /// It could not be tried.
    Unknown(String),
}

/// Tries it with two files that never get a name.
fn shares_blocks(dir: &Path) -> Shares {
    let attempt = || -> std::io::Result<Shares> {
        let (from, to) = (tempfile::tempfile_in(dir)?, tempfile::tempfile_in(dir)?);
        std::io::Write::write_all(&mut &from, &[1; 4096])?;
        Ok(if rustix::fs::ioctl_ficlone(&to, &from).is_ok() { Shares::Yes } else { Shares::No })
    };
    attempt().unwrap_or_else(|error| Shares::Unknown(error.to_string()))
}

fn reflink(dir: &Path, shares: &Shares) -> Check {
    let dir = dir.display();
    match shares {
        Shares::Yes => Check::ok("reflink", format!("files in {dir} can share blocks")),
        Shares::No => Check::warn(
            "reflink",
            format!("files in {dir} cannot share blocks"),
            "nothing needs doing: `wrenn up` makes an XFS volume in a file there; put the directory on XFS or btrfs to do without",
        ),
        Shares::Unknown(why) => {
            Check::warn("reflink", format!("cannot be tried in {dir}: {why}"), "run `wrenn doctor` as root")
        }
    }
}

/// Only needed for the volume that takes the place of a file system which cannot share blocks.
fn xfs(needless: bool) -> Check {
    let kernel = kernel_has_xfs();
    match in_path("mkfs.xfs") {
        _ if needless => Check::ok("xfs", "not needed: the data directory shares blocks by itself"),
        Some(_) if kernel => Check::ok("xfs", "the kernel and mkfs.xfs have it"),
        Some(_) => Check::warn(
            "xfs",
            "not in this kernel",
            "modprobe xfs; without it every capsule gets a whole copy of its disk",
        ),
        None => {
            let remedy = "apt install xfsprogs; without it every capsule gets a whole copy of its disk";
            Check::warn("xfs", "mkfs.xfs is not installed", remedy)
        }
    }
}

/// As a part of it, or as a module that it can load.
fn kernel_has_xfs() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let modules = fs::read_to_string(format!("/lib/modules/{release}/modules.dep")).unwrap_or_default();
    let loaded = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    loaded.lines().any(|line| line.trim() == "xfs") || modules.lines().any(|line| line.contains("/xfs.ko"))
}

fn space(dir: &Path, place: &Path) -> Check {
    let free = match File::open(place).and_then(|place| Ok(rustix::fs::fstatvfs(place)?)) {
        Ok(stat) => (stat.f_bavail * stat.f_frsize) >> 20,
        Err(error) => {
            return Check::warn("disk", format!("{}: {error}", place.display()), "run `wrenn doctor` as root");
        }
    };
    let found = format!("{free} MiB free for {}", dir.display());
    match free {
        ..2048 => Check::fail("disk", found, "free some, or use another --dir: images alone take 2 GiB"),
        2048..10240 => Check::warn("disk", found, "enough for a few capsules at most"),
        _ => Check::ok("disk", found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_not_there_is_judged_by_what_is_above_it() {
        let there = tempfile::tempdir().unwrap();
        assert_eq!(existing(&there.path().join("a/b/c")), there.path());
        assert_eq!(existing(Path::new("/nowhere/at/all")), Path::new("/"));
    }

    #[test]
    fn trying_to_share_blocks_leaves_nothing() {
        let there = tempfile::tempdir().unwrap();
        assert!(matches!(shares_blocks(there.path()), Shares::Yes | Shares::No));
        assert_eq!(fs::read_dir(there.path()).unwrap().count(), 0);
        assert!(matches!(shares_blocks(Path::new("/nowhere")), Shares::Unknown(_)));
    }
}
