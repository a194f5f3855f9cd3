use std::io;
use std::path::{Path, PathBuf};

/// What failed, by what we were doing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system below `path` is full, or its quota is used up.
    #[error("no space left for {}", path.display())]
    NoSpace {
        /// The file that could not be written.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A clone or import was asked of a file that is not there.
    #[error("there is no image {}", .0.display())]
    ImageMissing(PathBuf),
    /// A root disk cannot be smaller than the image it begins as. Sizes are bytes.
    #[error("a disk of {asked} bytes cannot hold the image {}, which has {image_size}", image.display())]
    TooSmall {
        /// The size asked for.
        asked: u64,
        /// The image.
        image: PathBuf,
        /// Its size.
        image_size: u64,
    },
    /// The volume is in use, so it stays mounted; or a disk, so it stays attached.
    #[error("{} is still in use", .0.display())]
    Busy(PathBuf),
    /// The kernel has no device-mapper.
    #[error("open /dev/mapper/control (modprobe dm-snapshot dm-zero)")]
    NoDeviceMapper(#[source] io::Error),
    /// No space can be reserved below that directory, because every write takes new space there.
    #[error("no space can be reserved for disks in {}, which is on btrfs", .0.display())]
    Unreservable(PathBuf),
    /// A disk or image is not a whole number of pages long.
    #[error("{} has {size} bytes, which is no multiple of 4096", path.display())]
    Uneven {
        /// The image, or the disk that was asked for.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Only an image that was imported can be under a copy-on-write disk.
    #[error("{} was not imported", .0.display())]
    NotImported(PathBuf),
    /// A device could not be made, looked for or removed.
    #[error("{doing} {}", path.display())]
    Device {
        /// What was being done, as a verb.
        doing: &'static str,
        /// To which disk or image.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The kernel found that a disk is not all there any more, and refuses all of it.
    #[error("the kernel has given up the disk {}", .0.display())]
    GivenUp(PathBuf),
    /// A disk could not be read, or is no disk.
    #[error("read the disk {}", path.display())]
    Disk {
        /// The disk.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A directory could not be found, made or written.
    #[error("prepare the directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// An image could not be read.
    #[error("read the image {}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A disk or image could not be written.
    #[error("write {}", path.display())]
    Write {
        /// The file that was to appear.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// An image changed while it was being imported, or is not the one that it should be.
    #[error("the image {} is not what it was, or should be", .0.display())]
    ImageChanged(PathBuf),
    /// `mkfs.xfs` could not be run.
    #[error("run mkfs.xfs (Debian package xfsprogs)")]
    RunMkfs(#[source] io::Error),
    /// `mkfs.xfs` ran and refused.
    #[error("mkfs.xfs failed: {0}")]
    Mkfs(String),
    /// No loop device could be attached to the volume's file.
    #[error("attach a loop device to {}", path.display())]
    Loop {
        /// The volume's file.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The volume could not be mounted.
    #[error("mount {}", path.display())]
    Mount {
        /// The mount point.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The volume could not be unmounted.
    #[error("unmount {}", path.display())]
    Unmount {
        /// The mount point.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn directory(path: &Path) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Directory { path: path.to_owned(), source }
    }

    /// For opening and reading an image: a missing one has its own variant.
    pub(crate) fn read(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| match source.kind() {
            io::ErrorKind::NotFound => Self::ImageMissing(path.to_owned()),
            _ => Self::Read { path: path.to_owned(), source },
        }
    }

    pub(crate) fn device(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Device { doing, path: path.to_owned(), source }
    }

    pub(crate) fn disk(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| Self::Disk { path: path.to_owned(), source }
    }

    /// For everything that writes: a full file system has its own variant.
    pub(crate) fn write<E: Into<io::Error>>(path: &Path) -> impl Fn(E) -> Self {
        |source| match source.into() {
            source if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                Self::NoSpace { path: path.to_owned(), source }
            }
            source => Self::Write { path: path.to_owned(), source },
        }
    }
}
