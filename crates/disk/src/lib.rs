//! Images and copy-on-write root disks.
//!
//! A capsule's root disk is one private file that begins as an immutable image. [`Disks::open`] finds out how the data
//! directory can make one without copying: by reflink where its file system can, on an XFS volume in a loop device where
//! it cannot, and by a sparse copy when there is neither. Where it is told to, by device-mapper: the file then has only what was
//! written, and a block device over it and the image is what a VMM is given. Everything that shares blocks (images,
//! capsule directories) lives below [`Disks::root`].
//!
//! A file says by itself which of these it is, so a directory may have both, and callers do not care: they move and remove
//! disks as the files that they are, [attach](Disks::attach) one before a VMM opens it and [detach](Disks::detach) it when
//! that is gone, and leave copying, syncing and reading to this crate.
//!
//! This crate owns the volume, its mount and its loop device, the `images` directory, and block devices over disks. It does
//! not look inside a file system image, and it does not know what a capsule is: where a disk goes and when it is removed is
//! the caller's.
//!
//! Every call blocks on the file system; none takes part in an async runtime.

mod backend;
mod cow;
mod device_mapper;
mod devices;
mod error;
mod extents;
mod image;
mod loop_device;
mod sparse;
mod volume;

#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

pub use backend::{Backend, UnknownBackend};
use backend::{Filled, name, share_or_copy, unnamed_beside};
use cow::{CHUNK, Cow};
use devices::Devices;
pub use error::Error;
pub use extents::{own_bytes, same_ranges};
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
    devices: Devices,
}

/// What a VMM is given as a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attached {
    /// The disk's own file.
    File,
    /// A block device in its place.
    Device(PathBuf),
}

/// `BTRFS_SUPER_MAGIC`.
const BTRFS: u64 = 0x9123_683E;

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
    /// Prepares `dir`, an existing directory that no other agent uses; `instance` names it in what is machine-wide. Disks are
    /// made by `backend`, or else in the best way that needs nothing but the directory.
    ///
    /// A volume that was made before is used whatever else the directory could do, because the disks are in it; if it
    /// cannot be mounted, that is an error and not a reason to begin afresh without them.
    pub fn open(dir: &Path, instance: &str, backend: Option<Backend>) -> Result<Self, Error> {
        Self::open_with(dir, instance, backend, "mkfs.xfs".as_ref())
    }

    fn open_with(dir: &Path, instance: &str, backend: Option<Backend>, mkfs: &OsStr) -> Result<Self, Error> {
        let dir = fs::canonicalize(dir).map_err(Error::directory(dir))?;
        let volume = match backend {
            _ if Volume::exists(&dir) => Some(Volume::mount(&dir)?),
            None | Some(Backend::Reflink) if !Backend::Reflink.works_in(&dir)? => match Volume::create(&dir, mkfs) {
                Ok(volume) => Some(volume),
                Err(error) if backend.is_some() || matches!(error, Error::NoSpace { .. }) => return Err(error),
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "no XFS volume here: root disks will be whole copies, slow to make and large"
                    );
                    return Self::ready(dir, instance, Backend::Copy, None);
                }
            },
            _ => None,
        };
        let root = volume.as_ref().map_or(dir, |volume| volume.mount_point().to_owned());
        let backend = backend.unwrap_or(Backend::Reflink);
        if backend == Backend::DeviceMapper {
            devices::mapper()?;
            let statfs = rustix::fs::statfs(&root);
            if statfs.map_err(|error| Error::directory(&root)(error.into()))?.f_type as u64 == BTRFS {
                return Err(Error::Unreservable(root));
            }
        }
        Self::ready(root, instance, backend, volume)
    }

    fn ready(root: PathBuf, instance: &str, backend: Backend, volume: Option<Volume>) -> Result<Self, Error> {
        let images = root.join("images");
        fs::create_dir_all(&images).map_err(Error::directory(&images))?;
        tracing::info!(?backend, root = %root.display(), "root disks are ready");
        Ok(Self { backend, root, volume, devices: Devices::new(instance, images) })
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
        image::import(src, name, None, &self.images(), self.backend)
    }

    /// The same for an image of which it is known what [`import_image`](Self::import_image) says of its content.
    /// [`Error::ImageChanged`] where it is not that.
    pub fn import_known_image(&self, src: &Path, name: &ImageName, digest: &str) -> Result<PathBuf, Error> {
        image::import(src, name, Some(digest), &self.images(), self.backend)
    }

    /// Makes `dest`, a disk that begins as `image`, in full or not at all. `dest` must not exist; its directory must. `size` in
    /// bytes enlarges it with zeros at the end (the guest grows its file system).
    pub fn create(&self, image: &Path, dest: &Path, size: Option<u64>) -> Result<(), Error> {
        let src = File::open(image).map_err(Error::read(image))?;
        let image_size = src.metadata().map_err(Error::read(image))?.len();
        if let Some(asked) = size.filter(|&asked| asked < image_size) {
            return Err(Error::TooSmall { asked, image: image.to_owned(), image_size });
        }
        let new = unnamed_beside(dest)?;
        match self.backend {
            Backend::DeviceMapper => {
                let size = size.unwrap_or(image_size);
                for (path, size) in [(image, image_size), (dest, size)] {
                    if !size.is_multiple_of(CHUNK) {
                        return Err(Error::Uneven { path: path.to_owned(), size });
                    }
                }
                let imported = image.parent() == Some(&self.images());
                let file_name = image.file_name().and_then(OsStr::to_str).filter(|_| imported);
                let file_name = file_name.ok_or_else(|| Error::NotImported(image.to_owned()))?;
                Cow { size, image: file_name.to_owned() }.mark(&new).map_err(Error::write(dest))?;
            }
            Backend::Reflink | Backend::Copy => {
                self.backend.fill(&src, &new).map_err(Error::write(dest))?;
                if let Some(size) = size {
                    new.set_len(size).map_err(Error::write(dest))?;
                }
            }
        }
        name(&new, dest).map_err(Error::write(dest))
    }

    /// Makes `dest`, another disk that is what `disk` is now, in full or not at all. `disk` may be attached: whoever writes to
    /// it has to stand still. It may also be a file that is no disk of this crate's, which becomes a plain one.
    pub fn copy(&self, disk: &Path, dest: &Path) -> Result<(), Error> {
        let (new, _) = self.copy_unnamed(disk, dest)?;
        name(&new, dest).map_err(Error::write(dest))
    }

    /// The same, where what is found after a power cut has to be all of it: `dest` is that whenever its name is durable, which
    /// is the caller's to see to, by syncing its directory.
    pub fn copy_durably(&self, disk: &Path, dest: &Path) -> Result<(), Error> {
        let (new, filled) = self.copy_unnamed(disk, dest)?;
        // Before the name: somebody else's sync, or the file system's timer, may make that durable at once, and the length.
        if !filled.is_durable_with_name(&new).map_err(Error::write(dest))? {
            new.sync_all().map_err(Error::write(dest))?;
        }
        name(&new, dest).map_err(Error::write(dest))
    }

    fn copy_unnamed(&self, disk: &Path, dest: &Path) -> Result<(File, Filled), Error> {
        let src = File::open(disk).map_err(Error::read(disk))?;
        let new = unnamed_beside(dest)?;
        let filled = match Cow::of(&src).map_err(Error::disk(disk))? {
            None => self.backend.fill(&src, &new).map_err(Error::write(dest))?,
            Some(cow) => {
                let copy = || share_or_copy(&src, &new).map_err(Error::write(dest));
                let filled = self.devices.while_still(disk, copy)?;
                cow::trim(&new).map_err(Error::disk(disk))?;
                cow.mark(&new).map_err(Error::write(dest))?;
                filled
            }
        };
        Ok((new, filled))
    }

    /// Makes the disk ready for one VMM, and says what that opens. A copy-on-write disk gets its device, and the space that
    /// it may ever take: [`Error::NoSpace`] when there is not as much. Of a VMM that had it before nothing may be left.
    pub fn attach(&self, disk: &Path) -> Result<Attached, Error> {
        let file = File::options().read(true).write(true).open(disk).map_err(Error::disk(disk))?;
        match Cow::of(&file).map_err(Error::disk(disk))? {
            None => Ok(Attached::File),
            Some(cow) => self.devices.attach(disk, &file, &cow).map(Attached::Device),
        }
    }

    /// Takes back what [`attach`](Self::attach) gave, once no process has it any more; waits a while for the last to let
    /// it go, and is [`Error::Busy`] then. Repeatable, also when the disk is gone.
    pub fn detach(&self, disk: &Path) -> Result<(), Error> {
        match File::open(disk) {
            Ok(file) if Cow::of(&file).is_ok_and(|cow| cow.is_none()) => Ok(()),
            Ok(_) => self.devices.detach(disk),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::disk(disk)(error)),
            Err(_) => match self.devices.detach(disk) {
                // Who may not use it has made none.
                Err(Error::NoDeviceMapper(_)) => Ok(()),
                detached => detached,
            },
        }
    }

    /// Takes back what any disk but those of `keep` was given, as what an earlier run left.
    pub fn sweep(&self, keep: &[PathBuf]) -> Result<(), Error> {
        self.devices.sweep(keep)
    }

    /// Makes durable all that was written to the disk, whoever wrote it.
    pub fn sync(&self, disk: &Path) -> Result<(), Error> {
        if self.cow(disk)?.is_some() {
            self.devices.sync(disk)?;
        }
        File::open(disk).and_then(|file| file.sync_all()).map_err(Error::write(disk))
    }

    /// A file with all of what a disk is that is not attached: its own, or one without a name that is made for this. What is all
    /// zeros takes no space in that.
    pub fn flat(&self, disk: &Path) -> Result<File, Error> {
        let file = File::open(disk).map_err(Error::disk(disk))?;
        let Some(cow) = Cow::of(&file).map_err(Error::disk(disk))? else { return Ok(file) };
        let image = self.images().join(&cow.image);
        let below = File::open(&image).map_err(Error::read(&image))?;
        let flat = unnamed_beside(disk)?;
        cow::flatten(&file, &cow, &below, &flat).map_err(Error::disk(disk))?;
        Ok(flat)
    }

    fn cow(&self, disk: &Path) -> Result<Option<Cow>, Error> {
        File::open(disk).and_then(|file| Cow::of(&file)).map_err(Error::disk(disk))
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

    /// Removes what is left of devices and unmounts the volume, which also frees its loop device. [`Error::Busy`] when
    /// something still uses it.
    pub fn close(&self) -> Result<(), Error> {
        self.devices.sweep(&[])?;
        self.volume.as_ref().map_or(Ok(()), Volume::unmount)
    }

    /// Where imported images are.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }
}

/// The file name of the image that a disk needs to be read; `None` for one that is whole by itself.
pub fn image_under(disk: &Path) -> Result<Option<String>, Error> {
    let cow = File::open(disk).and_then(|file| Cow::of(&file)).map_err(Error::disk(disk))?;
    Ok(cow.map(|cow| cow.image))
}
