//! Images and copy-on-write root disks.
//!
//! A capsule's root disk is a private, writable file that begins as an immutable image. [`Disks::open`] finds out how
//! the data directory can make one without copying: by reflink where its file system can, on an XFS volume in a loop
//! device where it cannot, and by a sparse copy when there is neither. Everything that shares blocks (images, capsule
//! directories) lives below [`Disks::root`].
//!
//! This crate owns the volume, its mount and its loop device, and the `images` directory. It does not look inside a
//! file system image, and it does not know what a capsule is: where a disk goes and when it is removed is the caller's.
//!
//! Every call blocks on the file system; none takes part in an async runtime.

mod backend;
mod error;
mod extents;
mod image;
mod loop_device;
mod sparse;
mod volume;

#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

pub use backend::Backend;
pub use error::Error;
pub use extents::own_bytes;
pub use image::{ImageName, InvalidName};
use volume::Volume;

/// The images and root disks of one data directory.
///
/// Dropping it leaves the volume mounted, as a killed agent does, and the next [`Disks::open`] uses it as it is:
/// capsules outlive the agent. [`Disks::close`] is the orderly end.
#[derive(Debug)]
pub struct Disks {
    backend: Backend,
    root: PathBuf,
    volume: Option<Volume>,
}

/// A data directory that is only looked at, see [`Disks::view`].
#[derive(Debug)]
pub struct View {
    root: PathBuf,
    /// The volume, if it was mounted for this.
    mounted: Option<Volume>,
}

impl View {
    /// As [`Disks::root`].
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Unmounts what was mounted to be looked at.
    pub fn close(mut self) -> Result<(), Error> {
        self.mounted.take().map_or(Ok(()), |volume| volume.unmount())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Only when something failed, which is what is told then.
        let _ = self.mounted.take().map(|volume| volume.unmount());
    }
}

impl Disks {
    /// Prepares `dir`, an existing directory that no other agent uses.
    ///
    /// A volume that was made before is used whatever else the directory could do, because the disks are in it; if it
    /// cannot be mounted, that is an error and not a reason to begin afresh without them.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::open_with(dir, "mkfs.xfs".as_ref())
    }

    fn open_with(dir: &Path, mkfs: &OsStr) -> Result<Self, Error> {
        let dir = fs::canonicalize(dir).map_err(Error::directory(dir))?;
        let disks = if Volume::exists(&dir) {
            Self::on(Volume::mount(&dir)?)
        } else if Backend::Reflink.works_in(&dir)? {
            Self { backend: Backend::Reflink, root: dir, volume: None }
        } else {
            match Volume::create(&dir, mkfs) {
                Ok(volume) => Self::on(volume),
                Err(error @ Error::NoSpace { .. }) => return Err(error),
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "no XFS volume here: root disks will be whole copies, slow to make and large"
                    );
                    Self { backend: Backend::Copy, root: dir, volume: None }
                }
            }
        };
        let images = disks.images();
        fs::create_dir_all(&images).map_err(Error::directory(&images))?;
        tracing::info!(backend = ?disks.backend, root = %disks.root.display(), "root disks are ready");
        Ok(disks)
    }

    fn on(volume: Volume) -> Self {
        Self { backend: Backend::Reflink, root: volume.mount_point().to_owned(), volume: Some(volume) }
    }

    /// Where images and capsule directories live: the data directory, or the volume mounted in it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// How root disks are made here.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Takes a built image file into the `images` directory and returns its path there, which is made of `name` and
    /// its content. Taking the same content again changes nothing. Holes stay holes.
    pub fn import_image(&self, src: &Path, name: &ImageName) -> Result<PathBuf, Error> {
        image::import(src, name, &self.images(), self.backend)
    }

    /// Makes what is in `dir` visible as it is: a volume that is not mounted is, until the view is closed. Nothing is made.
    pub fn view(dir: &Path) -> Result<View, Error> {
        let dir = fs::canonicalize(dir).map_err(Error::directory(dir))?;
        if !Volume::exists(&dir) {
            return Ok(View { root: dir, mounted: None });
        }
        let was_mounted = Volume::is_mounted(&dir)?;
        // As ever, not to be read only: should this process be killed, the next to come uses what is mounted.
        let volume = Volume::mount(&dir)?;
        Ok(View { root: volume.mount_point().to_owned(), mounted: (!was_mounted).then_some(volume) })
    }

    /// Unmounts the volume, which also frees its loop device. [`Error::Busy`] when something still uses it.
    pub fn close(&self) -> Result<(), Error> {
        self.volume.as_ref().map_or(Ok(()), Volume::unmount)
    }

    /// Where imported images are.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }
}
