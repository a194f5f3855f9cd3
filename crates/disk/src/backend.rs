use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::str::FromStr;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::{Error, sparse};

/// How a root disk comes from an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The file system shares the image's blocks until they are written (`FICLONE`: XFS, btrfs). Disks take space as they are
    /// written, and more may be promised than there is.
    Reflink,
    /// A device of the kernel's takes what was not written from the image (dm-snapshot). A disk that is in use has all the
    /// space that it may ever take: none is attached that could run out of it.
    DeviceMapper,
    /// Every block with data is copied.
    Copy,
}

/// How a file came to be what another is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    /// It has the other's blocks.
    Shared,
    /// It has blocks of its own, which the kernel writes when it likes.
    Copied,
}

/// `XFS_SUPER_MAGIC`.
const XFS: u64 = 0x5846_5342;

impl Filled {
    /// Whether who finds the name that `file` is given next finds all of the file, though nothing of it was synced. Before it
    /// shares blocks XFS writes what is dirty of them, and whose they are goes into its log before the name does, which is
    /// read in that order after a power cut. Other file systems promise no such order between a file and a directory, and
    /// blocks that were copied are in no log.
    pub(crate) fn is_durable_with_name(self, file: &File) -> std::io::Result<bool> {
        Ok(self == Self::Shared && rustix::fs::fstatfs(file)?.f_type as u64 == XFS)
    }
}

/// The text is none of `reflink`, `device-mapper` and `copy`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("disks are made by `reflink`, `device-mapper` or `copy`")]
pub struct UnknownBackend;

impl FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(text: &str) -> Result<Self, UnknownBackend> {
        match text {
            "reflink" => Ok(Self::Reflink),
            "device-mapper" => Ok(Self::DeviceMapper),
            "copy" => Ok(Self::Copy),
            _ => Err(UnknownBackend),
        }
    }
}

impl Backend {
    /// Has `dest`, an empty file, be what `src` is: a plain disk or an image.
    pub(crate) fn fill(self, src: &File, dest: &File) -> std::io::Result<Filled> {
        match self {
            Self::Reflink => Ok(rustix::fs::ioctl_ficlone(dest, src).map(|()| Filled::Shared)?),
            Self::DeviceMapper => share_or_copy(src, dest),
            Self::Copy => sparse::copy(src, dest).map(|()| Filled::Copied),
        }
    }

    /// Tries it: whether this is the right way in `dir` is the file system's to say.
    pub(crate) fn works_in(self, dir: &Path) -> Result<bool, Error> {
        let probe = dir.join("probe");
        let mut src = unnamed_beside(&probe)?;
        src.write_all(&[1; 4096]).map_err(Error::write(&probe))?;
        Ok(self.fill(&src, &unnamed_beside(&probe)?).is_ok())
    }
}

/// Has `dest`, an empty file, be what `src` is, at the least cost that its file system allows.
pub(crate) fn share_or_copy(src: &File, dest: &File) -> std::io::Result<Filled> {
    match rustix::fs::ioctl_ficlone(dest, src) {
        Ok(()) => Ok(Filled::Shared),
        Err(_) => sparse::copy(src, dest).map(|()| Filled::Copied),
    }
}

/// A file with no name yet in the directory of `path`: what is never named never has to be cleaned up.
pub(crate) fn unnamed_beside(path: &Path) -> Result<File, Error> {
    let dir = path.parent().unwrap_or(Path::new("."));
    rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))
        .map(File::from)
        .map_err(Error::write(path))
}

/// Gives an unnamed file its name; fails with `EEXIST` rather than replace another.
pub(crate) fn name(file: &File, path: &Path) -> Result<(), Errno> {
    let fd = std::os::fd::AsRawFd::as_raw_fd(file);
    rustix::fs::linkat(CWD, format!("/proc/self/fd/{fd}"), CWD, path, AtFlags::SYMLINK_FOLLOW)
}
