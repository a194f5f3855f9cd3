//! Block devices over copy-on-write files, for as long as a VMM has them.
//!
//! ```text
//! wrenn-INSTANCE-CAPSULE-rootfs.ext4   snapshot: what the disk has of its own, else what is below. The VMM's.
//!   ├─ loop over the capsule's copy-on-write file, all of which is reserved
//!   └─ wrenn-INSTANCE-image-DIGEST     the image, and zeros behind it without an end: read only, one for all
//!        └─ loop over the image, read only
//! ```
//!
//! Nothing here is remembered: a device that is there is found by its name, and one that holds another keeps it, so all of it
//! survives an agent that is killed. Who removes the last device over an image also removes the image's.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::Error;
use crate::cow::{self, CHUNK, CHUNK_SECTORS, Cow, SECTOR};
use crate::device_mapper::{DeviceMapper, Target};
use crate::loop_device::LoopDevice;

/// Sectors of a device over an image: 64 TiB, more than any disk has.
const IMAGE_SECTORS: u64 = 1 << 37;

#[derive(Debug)]
pub(crate) struct Devices {
    prefix: String,
    images: PathBuf,
    /// Whoever removes an image's device must not meet one that is about to use it.
    changes: Mutex<()>,
}

impl Devices {
    pub(crate) fn new(instance: &str, images: PathBuf) -> Self {
        Self { prefix: format!("wrenn-{instance}-"), images, changes: Mutex::new(()) }
    }

    /// What the device over a disk is called.
    fn name(&self, disk: &Path) -> String {
        let part =
            |path: Option<&Path>| path.and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        format!("{}{}-{}", self.prefix, part(disk.parent()), part(Some(disk)))
    }

    fn images_prefix(&self) -> String {
        format!("{}image-", self.prefix)
    }

    /// Makes the device over `disk`, after all that it may ever take was reserved. Returns where it is.
    pub(crate) fn attach(&self, disk: &Path, file: &File, cow: &Cow) -> Result<PathBuf, Error> {
        let (mapper, name) = (mapper()?, self.name(disk));
        // It would be of an earlier run, whose VMM is gone.
        mapper.remove_when_unused(&name).map_err(Error::device("remove the stale device of", disk))?;
        let made = cow::reserve(file, cow.room()).map_err(Error::write(disk)).and_then(|()| {
            let _one_at_a_time = self.lock();
            self.make(&mapper, &name, disk, cow)
        });
        made.inspect_err(|_| {
            // What it failed of is told.
            let _ = self.remove_images(&mapper);
            trim(disk, file);
        })
    }

    fn make(&self, mapper: &DeviceMapper, name: &str, disk: &Path, cow: &Cow) -> Result<PathBuf, Error> {
        let image = self.image(mapper, &self.images.join(&cow.image))?;
        let failed = || Error::device("make a device over", disk);
        let store = LoopDevice::over(disk, CHUNK as u32).map_err(failed())?;
        let store = (store.numbers().map_err(failed())?, store);
        // `O`: should the store ever be full, writes fail and nothing else. It cannot be, as all of it is reserved.
        let snapshot = Target {
            start: 0,
            length: cow.size / SECTOR,
            kind: "snapshot",
            parameters: format!("/dev/dm-{image} {} PO {CHUNK_SECTORS}", store.0),
        };
        let minor = mapper.create(name, false, &[snapshot]).map_err(failed())?;
        // From here on the device keeps the loop device.
        drop(store);
        let status = mapper.status(name).map_err(failed())?;
        if status.starts_with("Invalid") {
            mapper.remove_when_unused(name).map_err(Error::device("remove the device of", disk))?;
            return Err(Error::GivenUp(disk.to_owned()));
        }
        Ok(node(minor))
    }

    /// The minor number of the device over an image, which is made if it is not there.
    fn image(&self, mapper: &DeviceMapper, image: &Path) -> Result<u32, Error> {
        let failed = || Error::device("make a device over", image);
        let file = image.file_name().unwrap_or_default();
        let digest = Sha256::digest(file.as_encoded_bytes());
        let name = format!("{}{}", self.images_prefix(), hex::encode(&digest[..8]));
        if let Some(minor) = mapper.find(&name).map_err(failed())? {
            return Ok(minor);
        }
        let size = fs::metadata(image).map_err(Error::read(image))?.len();
        let below = LoopDevice::read_only(image, CHUNK as u32).map_err(failed())?;
        let sectors = size / SECTOR;
        let parameters = format!("{} 0", below.numbers().map_err(failed())?);
        let targets = [
            Target { start: 0, length: sectors, kind: "linear", parameters },
            Target { start: sectors, length: IMAGE_SECTORS - sectors, kind: "zero", parameters: String::new() },
        ];
        mapper.create(&name, true, &targets).map_err(failed())
    }

    /// The device over `disk`, if it is there.
    pub(crate) fn find(&self, disk: &Path) -> Result<Option<PathBuf>, Error> {
        let Some(mapper) = mapper_if_any()? else { return Ok(None) };
        let minor = mapper.find(&self.name(disk)).map_err(Error::device("look for the device of", disk))?;
        Ok(minor.map(node))
    }

    /// Writes out what was written to `disk`, if there is a device over it.
    pub(crate) fn sync(&self, disk: &Path) -> Result<(), Error> {
        let Some(device) = self.find(disk)? else { return Ok(()) };
        File::open(device).and_then(|device| device.sync_all()).map_err(Error::write(disk))
    }

    /// Writes out what was written to `disk`, and holds back what comes for as long as `work` takes.
    pub(crate) fn while_still<T>(&self, disk: &Path, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        if self.find(disk)?.is_none() {
            return work();
        }
        self.sync(disk)?;
        let (mapper, name) = (mapper()?, self.name(disk));
        mapper.suspend(&name).map_err(Error::device("suspend the device of", disk))?;
        let done = work();
        mapper.resume(&name).map_err(Error::device("resume the device of", disk))?;
        done
    }

    /// Removes the device over `disk`, if there is one, and gives back what the disk does not take.
    pub(crate) fn detach(&self, disk: &Path) -> Result<(), Error> {
        if let Some(mapper) = mapper_if_any()? {
            mapper.remove_when_unused(&self.name(disk)).map_err(|source| match source.kind() {
                io::ErrorKind::ResourceBusy => Error::Busy(disk.to_owned()),
                _ => Error::device("remove the device of", disk)(source),
            })?;
            self.remove_images(&mapper)?;
        }
        if let Ok(file) = File::options().read(true).write(true).open(disk) {
            trim(disk, &file);
        }
        Ok(())
    }

    /// Removes all devices of this instance but those over the disks in `keep`.
    pub(crate) fn sweep(&self, keep: &[PathBuf]) -> Result<(), Error> {
        // Who may not use it has made none.
        let Ok(mapper) = mapper() else { return Ok(()) };
        let keep: BTreeSet<String> = keep.iter().map(|disk| self.name(disk)).collect();
        let images = self.images_prefix();
        for name in self.list(&mapper)? {
            if !name.starts_with(&images) && !keep.contains(&name) {
                let failed = Error::device("remove the stale device", Path::new(&name));
                mapper.remove_when_unused(&name).map_err(failed)?;
                tracing::info!(name, "removed a device of an earlier run");
            }
        }
        self.remove_images(&mapper)
    }

    /// Removes devices over images that nobody uses any more.
    fn remove_images(&self, mapper: &DeviceMapper) -> Result<(), Error> {
        let _one_at_a_time = self.lock();
        let images = self.images_prefix();
        for name in self.list(mapper)?.into_iter().filter(|name| name.starts_with(&images)) {
            match mapper.remove(&name) {
                Err(error) if error.kind() != io::ErrorKind::ResourceBusy => {
                    return Err(Error::device("remove the device", Path::new(&name))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn list(&self, mapper: &DeviceMapper) -> Result<Vec<String>, Error> {
        let names = mapper.list().map_err(Error::device("list the devices of", &self.images))?;
        Ok(names.into_iter().filter(|name| name.starts_with(&self.prefix)).collect())
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the kernel makes for a device, whether or not there is udev to make more.
fn node(minor: u32) -> PathBuf {
    PathBuf::from(format!("/dev/dm-{minor}"))
}

pub(crate) fn mapper() -> Result<DeviceMapper, Error> {
    DeviceMapper::open().map_err(Error::NoDeviceMapper)
}

/// `None` where the kernel has no device-mapper, and so nothing of it.
fn mapper_if_any() -> Result<Option<DeviceMapper>, Error> {
    let is_none = |error: &io::Error| {
        let none = [Errno::NOENT, Errno::NODEV, Errno::NXIO];
        error.raw_os_error().is_some_and(|code| none.iter().any(|errno| errno.raw_os_error() == code))
    };
    match DeviceMapper::open() {
        Err(error) if is_none(&error) => Ok(None),
        opened => opened.map(Some).map_err(Error::NoDeviceMapper),
    }
}

/// Space that stays reserved is only wasted.
fn trim(disk: &Path, file: &File) {
    if let Err(error) = cow::trim(file) {
        tracing::warn!(disk = %disk.display(), %error, "a disk keeps the space that was reserved for it");
    }
}
