//! Where a caller's path leads: for whom, past which links, and to what.

use super::Error;
use crate::path;
use crate::settings::Settings;
use crate::user::{self, User};
use rustix::fs::OFlags;
use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The most symbolic links that are followed, as in the kernel.
const MAX_LINKS: usize = 40;

/// For whom files are transferred.
#[derive(Clone, Debug)]
pub struct Owner {
    user: User,
    workdir: Option<String>,
}

impl Owner {
    /// The user of that name, or the default one. Reads the disk.
    pub fn find(settings: &Settings, username: Option<&str>) -> Result<Owner, Error> {
        let defaults = settings.defaults();
        let name = username.filter(|name| !name.is_empty()).unwrap_or(&defaults.user);
        let user = user::lookup(name).map_err(Error::Users)?;
        Ok(Owner { user: user.ok_or_else(|| Error::User(name.to_owned()))?, workdir: defaults.workdir })
    }

    /// The absolute path that `given` names, without empty and `.` components. Nothing is looked up.
    pub fn path(&self, given: &str) -> Result<PathBuf, Error> {
        let path = path::resolve(given, self.workdir.as_deref(), &self.user.home)?;
        Ok(path.components().collect())
    }

    pub fn ids(&self) -> (u32, u32) {
        (self.user.uid, self.user.gid)
    }
}

/// A place that a file may be written to.
#[derive(Clone, Debug)]
pub struct Target {
    /// Past every link, in `directory`.
    pub path: PathBuf,
    /// It exists, and this is its own path.
    pub directory: PathBuf,
    /// The regular file that is there now.
    pub existing: Option<Existing>,
    pub uid: u32,
    pub gid: u32,
}

#[derive(Clone, Copy, Debug)]
pub struct Existing {
    /// Permission bits.
    pub mode: u32,
    pub device: u64,
    pub inode: u64,
}

impl Target {
    /// Follows `path` to where a file may be written, and makes the directories on the way.
    pub fn find(path: &Path, (uid, gid): (u32, u32)) -> Result<Target, Error> {
        let finding = Error::io("finding", path);
        let path = follow(path).map_err(finding)?;
        let existing = match std::fs::symlink_metadata(&path) {
            Ok(found) => {
                regular(&path, &found)?;
                Some(Existing { mode: found.mode() & 0o777, device: found.dev(), inode: found.ino() })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("finding", &path)(error)),
        };
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::Directory(path));
        };
        make(directory, uid, gid).map_err(Error::io("making directory", directory))?;
        let directory = directory.canonicalize().map_err(Error::io("finding", directory))?;
        Ok(Target { path: directory.join(name), directory, existing, uid, gid })
    }
}

/// Refuses everything but a regular file.
pub fn regular(path: &Path, found: &Metadata) -> Result<(), Error> {
    if found.is_file() {
        Ok(())
    } else if found.is_dir() {
        Err(Error::Directory(path.to_owned()))
    } else {
        Err(Error::NotRegular(path.to_owned()))
    }
}

/// Opens a regular file to read, and nothing else: a pipe would make us wait, and a device may do anything.
pub fn open(path: &Path) -> Result<(File, Metadata), Error> {
    let opening = || Error::io("opening", path);
    regular(path, &std::fs::metadata(path).map_err(opening())?)?;
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC).bits();
    let file = File::options().read(true).custom_flags(flags as i32).open(path).map_err(opening())?;
    // Something else may have come into its place.
    let found = file.metadata().map_err(opening())?;
    regular(path, &found)?;
    Ok((file, found))
}

/// The path at the end of all links, whether or not something is there.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => {
                let leads_to = std::fs::read_link(&path)?;
                path = path.parent().unwrap_or(Path::new("/")).join(leads_to);
            }
            Ok(_) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path),
            Err(error) => return Err(error),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

/// Makes a directory and those above it that are missing; new ones belong to the user.
fn make(directory: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let mut missing = Vec::new();
    for above in directory.ancestors() {
        match std::fs::metadata(above) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => return Err(rustix::io::Errno::NOTDIR.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(above),
            Err(error) => return Err(error),
        }
    }
    for directory in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o755).create(directory) {
            Ok(()) => std::os::unix::fs::chown(directory, Some(uid), Some(gid))?,
            // Somebody else has made it since, and it is theirs.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_lead_where_the_kernel_says() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir(at("d")).unwrap();
        symlink("d/new", at("relative")).unwrap();
        symlink(at("relative"), at("absolute")).unwrap();
        symlink("loop", at("loop")).unwrap();
        for link in ["relative", "absolute"] {
            let target = Target::find(&at(link), (0, 0)).unwrap();
            assert_eq!((target.path, target.directory), (at("d/new"), at("d")));
            assert!(target.existing.is_none());
        }
        assert!(matches!(Target::find(&at("loop"), (0, 0)), Err(Error::Io { .. })));
        assert!(matches!(Target::find(&at("d"), (0, 0)), Err(Error::Directory(_))));
        assert!(matches!(Target::find(Path::new("/"), (0, 0)), Err(Error::Directory(_))));
        assert!(matches!(Target::find(Path::new("/dev/null"), (0, 0)), Err(Error::NotRegular(_))));
        std::fs::write(at("file"), "").unwrap();
        assert!(matches!(Target::find(&at("file/below"), (0, 0)), Err(Error::Io { .. })));
    }

    #[test]
    fn only_new_directories_change_hands() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("old")).unwrap();
        Target::find(&root.path().join("old/a/b/file"), (12, 34)).unwrap();
        let of = |name: &str| {
            let found = std::fs::metadata(root.path().join(name)).unwrap();
            (found.uid(), found.gid(), found.mode() & 0o777)
        };
        assert_eq!((of("old").0, of("old").1), (0, 0));
        assert_eq!([of("old/a"), of("old/a/b")], [(12, 34, 0o755); 2]);
    }
}
