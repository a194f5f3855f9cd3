use std::fs::File;
use std::io::Write;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::{Error, sparse};

/// How a root disk comes from an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The file system shares the image's blocks until they are written (`FICLONE`: XFS, btrfs).
    Reflink,
    /// Every block with data is copied.
    Copy,
}

impl Backend {
    /// Makes `dest`, a writable disk that begins as `image`, in full or not at all. `dest` must not exist; its
    /// directory must. `size` in bytes enlarges it with a hole at the end (the guest grows its file system).
    pub fn clone(self, image: &Path, dest: &Path, size: Option<u64>) -> Result<(), Error> {
        let src = File::open(image).map_err(Error::read(image))?;
        let image_size = src.metadata().map_err(Error::read(image))?.len();
        if let Some(asked) = size.filter(|&asked| asked < image_size) {
            return Err(Error::TooSmall { asked, image: image.to_owned(), image_size });
        }
        let new = unnamed_beside(dest)?;
        self.fill(&src, &new).map_err(Error::write(dest))?;
        if let Some(size) = size {
            new.set_len(size).map_err(Error::write(dest))?;
        }
        name(&new, dest).map_err(Error::write(dest))
    }

    pub(crate) fn fill(self, src: &File, dest: &File) -> std::io::Result<()> {
        match self {
            Self::Reflink => Ok(rustix::fs::ioctl_ficlone(dest, src)?),
            Self::Copy => sparse::copy(src, dest),
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
