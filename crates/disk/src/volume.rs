//! The XFS volume in a sparse file, for data directories whose file system cannot share blocks.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::Error;
use crate::loop_device::LoopDevice;

const GIB: u64 = 1 << 30;
/// Sector size of the loop device and of XFS on it, in bytes. Writes in whole 4 KiB pages can go past the page cache
/// below on every disk.
const SECTOR: u32 = 4096;

#[derive(Debug)]
pub(crate) struct Volume {
    mount_point: PathBuf,
}

impl Volume {
    /// Whether a volume was ever finished in `dir`.
    pub(crate) fn exists(dir: &Path) -> bool {
        file(dir).exists()
    }

    /// Makes a new volume in `dir` and mounts it. Leaves nothing when it fails.
    pub(crate) fn create(dir: &Path, mkfs: &OsStr) -> Result<Self, Error> {
        let new = dir.join("volume.xfs.new");
        let made = make(&new, size_for(dir)?, mkfs).and_then(|()| {
            fs::rename(&new, file(dir)).map_err(Error::write(&new))?;
            // What is written to the volume later must not be found under the old name, to be made anew.
            File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::directory(dir))
        });
        made.and_then(|()| Self::mount(dir)).inspect_err(|_| {
            let _ = fs::remove_dir(dir.join("volume"));
            let _ = fs::remove_file(&new);
            let _ = fs::remove_file(file(dir));
        })
    }

    /// Mounts the volume in `dir`, unless it is mounted already.
    pub(crate) fn mount(dir: &Path) -> Result<Self, Error> {
        let mount_point = dir.join("volume");
        fs::create_dir_all(&mount_point).map_err(Error::directory(&mount_point))?;
        if !is_mount_point(&mount_point)? {
            let file = file(dir);
            let device = LoopDevice::attach(&file, SECTOR).map_err(|source| Error::Loop { path: file, source })?;
            let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
            rustix::mount::mount(device.path(), &mount_point, "xfs", flags, None)
                .map_err(|source| Error::Mount { path: mount_point.clone(), source: source.into() })?;
        }
        Ok(Self { mount_point })
    }

    /// Whether the volume in `dir` is mounted.
    pub(crate) fn is_mounted(dir: &Path) -> Result<bool, Error> {
        is_mount_point(&dir.join("volume"))
    }

    pub(crate) fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    pub(crate) fn unmount(&self) -> Result<(), Error> {
        match rustix::mount::unmount(&self.mount_point, UnmountFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::BUSY) => Err(Error::Busy(self.mount_point.clone())),
            Err(source) => Err(Error::Unmount { path: self.mount_point.clone(), source: source.into() }),
        }
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("volume.xfs")
}

/// 80 % of what is free, in whole GiB, and at least 4 GiB: the file is sparse, so it may well be larger than what is
/// free.
fn size_for(dir: &Path) -> Result<u64, Error> {
    let stat =
        rustix::fs::statvfs(dir).map_err(|source| Error::Directory { path: dir.to_owned(), source: source.into() })?;
    let free = stat.f_bavail * stat.f_frsize;
    Ok((free / 5 * 4 / GIB * GIB).max(4 * GIB))
}

fn make(path: &Path, size: u64, mkfs: &OsStr) -> Result<(), Error> {
    let file = File::create(path).map_err(Error::write(path))?;
    file.set_len(size).map_err(Error::write(path))?;
    let sector = format!("size={SECTOR}");
    let output = Command::new(mkfs)
        .args(["-q", "-f", "-K", "-m", "reflink=1", "-s", &sector])
        .arg(path)
        .output()
        .map_err(Error::RunMkfs)?;
    if !output.status.success() {
        return Err(Error::Mkfs(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    file.sync_all().map_err(Error::write(path))
}

fn is_mount_point(path: &Path) -> Result<bool, Error> {
    let failed = |source: io::Error| Error::Mount { path: path.to_owned(), source };
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(failed)?;
    let targets = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(targets.map(unescape).any(|target| Path::new(&target) == path))
}

/// mountinfo writes blanks and backslashes in paths as three octal digits.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}
