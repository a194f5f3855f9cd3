//! How the bytes of a file get to their place; the parent module says what is promised.

use super::Error;
use super::download::read_full_at;
use super::place::Target;
use crate::metadata;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// From how many bytes on a body no longer waits in memory. The most that one batch holds, too.
pub const SMALL: usize = 1 << 20;

/// The contents of a file, or the next part of them: copied together, so that the connection reads into the same memory again,
/// and refilled, so that a long upload takes no more. Memory that is new to the process costs more than the copy.
#[derive(Debug, Default)]
pub struct Batch(Vec<u8>);

impl Batch {
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn is_full(&self) -> bool {
        self.0.len() >= SMALL
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Writes everything where the file stands. On failure, how much was written before it.
    fn write(&self, file: &mut File) -> Result<(), (usize, io::Error)> {
        let mut written = 0;
        while written < self.0.len() {
            match file.write(&self.0[written..]) {
                Ok(0) => return Err((written, io::ErrorKind::WriteZero.into())),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((written, error)),
            }
        }
        Ok(())
    }
}

/// Makes `contents` the whole file.
pub fn whole(target: &Target, contents: &Batch, metadata: &BTreeMap<String, String>) -> Result<(), Error> {
    if target.existing.is_some() {
        return overwrite(target, contents, metadata);
    }
    let flags = (OFlags::NOFOLLOW | OFlags::CLOEXEC).bits();
    let opened = File::options().write(true).create_new(true).mode(0o666).custom_flags(flags as i32).open(&target.path);
    let mut file = match opened {
        // It has come into being since.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return overwrite(target, contents, metadata),
        opened => opened.map_err(Error::io("creating", &target.path))?,
    };
    let filled = fchown(&file, Some(target.uid), Some(target.gid))
        .and_then(|()| contents.write(&mut file).map_err(|(_, error)| error))
        .map_err(Error::io("writing", &target.path))
        .and_then(|()| describe(&file, target, metadata));
    if filled.is_err() {
        remove(&target.path);
    }
    filled
}

/// Makes `contents` the whole of a file that is there, in place.
fn overwrite(target: &Target, contents: &Batch, metadata: &BTreeMap<String, String>) -> Result<(), Error> {
    let writing = || Error::io("writing", &target.path);
    let flags = (OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    let mut file = match File::options().read(true).write(true).custom_flags(flags as i32).open(&target.path) {
        Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
            let mut replacement = Replacement::open(target)?;
            replacement.write(contents)?;
            return replacement.commit(metadata);
        }
        opened => opened.map_err(writing())?,
    };
    let found = file.metadata().map_err(writing())?;
    super::place::regular(&target.path, &found)?;
    // What is about to be lost, should it be needed again. Its blocks are there, so that putting it back needs no room.
    let mut before = vec![0; contents.0.len().min(usize::try_from(found.len()).unwrap_or(usize::MAX))];
    let kept = read_full_at(&file, &mut before, 0).map_err(writing())?;
    before.truncate(kept);
    fchown(&file, Some(target.uid), Some(target.gid)).map_err(writing())?;

    let length = contents.0.len() as u64;
    let (touched, failed) = match contents.write(&mut file) {
        Ok(()) => (before.len(), describe(&file, target, metadata)),
        Err((touched, error)) => (touched, Err(writing()(error))),
    };
    if failed.is_err() {
        let restored = file.write_all_at(&before[..touched.min(before.len())], 0);
        if let Err(error) = restored.and_then(|()| file.set_len(found.len())) {
            tracing::error!(path = %target.path.display(), %error, "a file that could not be written is damaged");
        }
        return failed;
    }
    if length < found.len() {
        file.set_len(length).map_err(writing())?;
    }
    Ok(())
}

/// A file on its way to becoming another one, or a new one. Dropped before [`Replacement::commit`], it leaves nothing.
#[derive(Debug)]
pub struct Replacement {
    file: File,
    target: Target,
    /// A directory on the same mount where hardly anybody watches.
    staging: PathBuf,
    /// The name it has meanwhile, on file systems that know no files without one.
    name: Option<Name>,
}

impl Replacement {
    pub fn open(target: &Target) -> Result<Replacement, Error> {
        let creating = || Error::io::<io::Error>("creating", &target.path);
        let staging = top_of_mount(&target.directory).map_err(Error::io("creating", &target.path))?;
        let mode = Mode::from_raw_mode(0o666);
        let unnamed = rustix::fs::open(&staging, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, mode);
        let (file, name) = match unnamed {
            Ok(file) => (File::from(file), None),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let create = |path: &Path| File::options().write(true).create_new(true).mode(0o666).open(path);
                let (file, name) = Name::make(&staging, create).map_err(creating())?;
                (file, Some(name))
            }
            Err(error) => return Err(creating()(error.into())),
        };
        fchown(&file, Some(target.uid), Some(target.gid)).map_err(creating())?;
        if let Some(existing) = target.existing {
            file.set_permissions(Permissions::from_mode(existing.mode)).map_err(creating())?;
        }
        Ok(Replacement { file, target: target.clone(), staging, name })
    }

    pub fn write(&mut self, batch: &Batch) -> Result<(), Error> {
        batch.write(&mut self.file).map_err(|(_, error)| Error::io("writing", &self.target.path)(error))
    }

    /// Appends the whole of `source`; within the kernel, and by sharing blocks where the file system can.
    pub fn append(&mut self, source: &mut File) -> io::Result<u64> {
        io::copy(source, &mut self.file)
    }

    /// Gives it the name, which from now on means this file and nothing else.
    pub fn commit(self, metadata: &BTreeMap<String, String>) -> Result<(), Error> {
        let path = &self.target.path;
        describe(&self.file, &self.target, metadata)?;
        let naming = || Error::io("naming", path);
        let name = match self.name {
            Some(name) => Some(name),
            None => match link(&self.file, path) {
                Ok(()) => None,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    Some(Name::make(&self.staging, |path| link(&self.file, path)).map_err(naming())?.1)
                }
                Err(error) => return Err(naming()(error)),
            },
        };
        if let Some(name) = name {
            std::fs::rename(&name.0, path).map_err(naming())?;
            std::mem::forget(name);
        }
        announce(&self.file, &self.target);
        Ok(())
    }
}

/// A temporary name, removed when dropped.
#[derive(Debug)]
struct Name(PathBuf);

impl Name {
    /// Has `make` make a file under a name that is free.
    fn make<T>(directory: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(T, Name)> {
        let process = std::process::id();
        for number in 0_u32.. {
            let path = directory.join(format!(".wrenn-upload-{process}-{number}"));
            match make(&path) {
                Ok(made) => return Ok((made, Name(path))),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn link(file: &File, path: &Path) -> io::Result<()> {
    Ok(rustix::fs::linkat(file, "", CWD, path, AtFlags::EMPTY_PATH)?)
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove what an upload left");
    }
}

/// Keeps with the file what the caller said about it, and nothing else.
fn describe(file: &File, target: &Target, metadata: &BTreeMap<String, String>) -> Result<(), Error> {
    match metadata::replace(file, metadata) {
        Ok(()) => Ok(()),
        Err(Errno::NOTSUP) => Err(Error::NoMetadata(target.path.clone())),
        Err(error) => Err(Error::io("describing", &target.path)(error)),
    }
}

/// Lets those who watch the directory see what they would have seen had the file been written there: after its creation, which
/// they have seen, a change of owner and a write. The file stays as it is, so that failing matters to nobody.
fn announce(file: &File, target: &Target) {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let Ok(named) = rustix::fs::open(&target.path, flags, Mode::empty()).map(File::from) else { return };
    let (Ok(ours), Ok(found)) = (file.metadata(), named.metadata()) else { return };
    if (ours.dev(), ours.ino()) != (found.dev(), found.ino()) {
        return;
    }
    let changed = fchown(&named, Some(target.uid), Some(target.gid));
    // Room for a byte that is there already: a write to those who watch, and to nobody else.
    let written = rustix::fs::fallocate(&named, FallocateFlags::KEEP_SIZE, 0, 1);
    tracing::debug!(?changed, ?written, path = %target.path.display(), "announced");
}

/// The highest directory that is on the same mount and device as this one.
fn top_of_mount(directory: &Path) -> rustix::io::Result<PathBuf> {
    let identity = |path: &Path| {
        let found = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID)?;
        Ok::<_, Errno>((found.stx_mnt_id, found.stx_dev_major, found.stx_dev_minor))
    };
    let own = identity(directory)?;
    let same = directory.ancestors().skip(1).take_while(|above| identity(above) == Ok(own));
    Ok(same.last().unwrap_or(directory).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_cannot_be_written_says_how_much_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut batch = Batch::default();
        [b"one", b"two"].into_iter().for_each(|bytes| batch.push(bytes));
        batch.write(&mut File::create(&path).unwrap()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"onetwo");
        assert_eq!(batch.write(&mut File::open(&path).unwrap()).unwrap_err().0, 0);
    }

    /// Where a file system has no files without a name, which none here is.
    #[test]
    fn a_temporary_name_goes_with_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let names = || std::fs::read_dir(directory.path()).unwrap().count();
        let target = Target::find(&directory.path().join("file"), (0, 0)).unwrap();
        let open = || {
            let create = |path: &Path| File::options().write(true).create_new(true).open(path);
            let (file, name) = Name::make(directory.path(), create).unwrap();
            let staging = directory.path().to_owned();
            let mut replacement = Replacement { file, target: target.clone(), staging, name: Some(name) };
            replacement.write(&Batch(b"contents".to_vec())).unwrap();
            replacement
        };
        let (first, second) = (open(), open());
        assert_eq!(names(), 2);
        drop(first);
        second.commit(&BTreeMap::new()).unwrap();
        assert_eq!((names(), std::fs::read(&target.path).unwrap()), (1, b"contents".to_vec()));
    }

    #[test]
    fn staging_stays_on_the_mount() {
        assert_eq!(top_of_mount(Path::new("/proc/self/fd")).unwrap(), Path::new("/proc"));
        assert_eq!(top_of_mount(Path::new("/")).unwrap(), Path::new("/"));
    }
}
