//! What callers can do with files. Each function blocks.

use crate::filesystem::entry::{Owners, bare, entry};
use crate::user::User;
use guest_api::LIST_ENTRIES;
use guest_api::filesystem::{EntryInfo, FileType};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

/// How many levels of a tree are open at once while it is removed.
const MAX_REMOVE_LEVELS: usize = 64;

/// What directories made here are open to.
const DIRECTORY_MODE: u32 = 0o755;

/// Why an operation did not come about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("path not found: {0}")]
    NotFound(String),
    #[error("directory already exists: {0}")]
    Exists(String),
    #[error("path is not a directory: {0}")]
    NotDirectory(String),
    #[error("too many links, or a cyclic one, on the way to {0}")]
    Loop(String),
    #[error("{0} lies on another file system than its destination: it can be copied there, not moved")]
    OtherFilesystem(String),
    #[error("the root directory stays")]
    Root,
    #[error("{0} has more than {LIST_ENTRIES} entries to the depth asked for")]
    TooMany(String),
    #[error("cannot {what} {path}")]
    Io { what: &'static str, path: String, source: io::Error },
}

impl Error {
    /// The same few errors mean the same whatever was done.
    pub(super) fn new(what: &'static str, path: &Path, source: io::Error) -> Error {
        let shown = path.to_string_lossy().into_owned();
        match Errno::from_io_error(&source) {
            Some(Errno::NOENT) => Error::NotFound(shown),
            Some(Errno::NOTDIR) => Error::NotDirectory(shown),
            Some(Errno::LOOP) => Error::Loop(shown),
            _ => Error::Io { what, path: shown, source },
        }
    }
}

/// Describes what is at `path`, links not followed.
pub fn stat(path: &Path) -> Result<EntryInfo, Error> {
    match entry(path, &Owners::load()) {
        // Below a file there is nothing.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Err(Error::NotFound(path.display().to_string())),
        described => described.map_err(|source| Error::new("describe", path, source)),
    }
}

/// Makes a directory that was not there, and its parents.
pub fn make_dir(path: &Path, user: &User) -> Result<EntryInfo, Error> {
    if !ensure_dir(path, user)? {
        return Err(Error::Exists(path.display().to_string()));
    }
    stat(path)
}

/// Makes the directory and those above it, as far as they are missing: 0755, and the user's. Tells whether the last one was
/// missing. `NotDirectory` when something else is in the way.
pub fn ensure_dir(path: &Path, user: &User) -> Result<bool, Error> {
    let failed = |path: &Path, error: Errno| Error::new("make directory", path, error.into());
    let mut made = false;
    let mut ways: Vec<&Path> = path.ancestors().collect();
    ways.reverse();
    for way in ways {
        made = match rustix::fs::mkdir(way, Mode::from_raw_mode(DIRECTORY_MODE)) {
            Ok(()) => {
                hand_over(way, user).map_err(|error| failed(way, error))?;
                true
            }
            Err(Errno::EXIST) => false,
            // What is above exists, then, but as a link to nothing.
            Err(Errno::NOENT) => return Err(Error::NotDirectory(path.display().to_string())),
            Err(error) => return Err(failed(way, error)),
        };
    }
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(made),
        Ok(_) => Err(Error::NotDirectory(path.display().to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NotDirectory(path.display().to_string())),
        Err(source) => Err(Error::new("make directory", path, source)),
    }
}

/// Gives a directory just made to the user, whatever the umask did to it, and whatever took its place meanwhile.
fn hand_over(path: &Path, user: &User) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty())?;
    rustix::fs::fchmod(&directory, Mode::from_raw_mode(DIRECTORY_MODE))?;
    if user.uid != 0 || user.gid != 0 {
        rustix::fs::fchown(&directory, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
    }
    Ok(())
}

/// Moves within a file system, and makes the parents of the destination. What is at the destination is replaced, unless it
/// is a directory with something in it.
pub fn rename(source: &Path, destination: &Path, user: &User) -> Result<EntryInfo, Error> {
    // Before anything is made for it.
    std::fs::symlink_metadata(source).map_err(|error| Error::new("move", source, error))?;
    let parent = destination.parent().ok_or(Error::Root)?;
    ensure_dir(parent, user)?;
    std::fs::rename(source, destination).map_err(|error| match error.kind() {
        io::ErrorKind::CrossesDevices => Error::OtherFilesystem(source.display().to_string()),
        _ => Error::new("move", source, error),
    })?;
    stat(destination)
}

/// Removes what is at `path` with everything inside; links are removed, not followed. False when nothing
/// was there, or somebody else was faster.
pub fn remove(path: &Path) -> Result<bool, Error> {
    let parent = path.parent().ok_or(Error::Root)?;
    let Some(name) = path.file_name() else { return Err(Error::Root) };
    let removed = open_directory(CWD, parent, OFlags::empty()).and_then(|parent| remove_at(parent.as_fd(), name));
    match removed {
        Ok(()) => Ok(true),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(error) => Err(Error::new("remove", path, error.into())),
    }
}

/// Removes a name with everything inside, through descriptors, so that nobody can make it wander off by putting links in
/// its way. Of a tree that is deeper than descriptors should be spent on, the deep part is first moved up.
fn remove_at(parent: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    struct Level {
        directory: OwnedFd,
        name: OsString,
        names: Vec<OsString>,
    }
    let enter = |parent: BorrowedFd<'_>, name: &OsStr| {
        let directory = open_directory(parent, name, OFlags::NOFOLLOW)?;
        let names = names_in(&directory)?;
        Ok(Level { directory, name: name.to_owned(), names })
    };
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        done => return done,
    }
    let mut levels = vec![enter(parent, name)?];
    let mut moved_up = 0u64;
    loop {
        let deep = levels.len() >= MAX_REMOVE_LEVELS;
        let Some(level) = levels.last_mut() else { return Ok(()) };
        let Some(name) = level.names.pop() else {
            // What came in meanwhile makes this fail, and is for whoever put it there.
            let name = std::mem::take(&mut level.name);
            levels.pop();
            let above = levels.last().map_or(parent, |level| level.directory.as_fd());
            match rustix::fs::unlinkat(above, &name, AtFlags::REMOVEDIR) {
                Err(Errno::NOENT) if !levels.is_empty() => continue,
                Ok(()) => continue,
                Err(error) => return Err(error),
            }
        };
        match rustix::fs::unlinkat(&level.directory, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) if deep => {
                let up = OsString::from(format!(".removing-{}-{moved_up}", std::process::id()));
                moved_up += 1;
                let from = levels.last().map_or(parent, |level| level.directory.as_fd());
                let top = &levels[0].directory;
                rustix::fs::renameat_with(from, &name, top, &up, RenameFlags::NOREPLACE)?;
                levels[0].names.push(up);
            }
            Err(Errno::ISDIR) => match enter(level.directory.as_fd(), &name) {
                Ok(below) => levels.push(below),
                // It went, or became something else, which is gone with the next call at the latest.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
}

/// Everything below a directory down to `depth` levels, parents before children, names in byte order. Only `path` itself may
/// be a link; the paths in the answer begin with it as it is. What vanishes meanwhile is left out; what cannot be described
/// or read is there, without what is not known.
pub fn list(path: &Path, depth: u32) -> Result<Vec<EntryInfo>, Error> {
    let failed = |error: Errno| match error {
        Errno::NOTDIR if std::fs::metadata(path).is_err() => Error::NotFound(path.display().to_string()),
        error => Error::new("list", path, error.into()),
    };
    let owners = Owners::load();
    let depth = depth.max(1) as usize;
    let mut entries = Vec::new();
    let mut levels = vec![(path.to_owned(), names(path, OFlags::empty()).map_err(failed)?.into_iter())];
    while let Some((directory, names_left)) = levels.last_mut() {
        let Some(name) = names_left.next() else {
            levels.pop();
            continue;
        };
        let path_of = directory.join(name);
        let described = match entry(&path_of, &owners) {
            Ok(described) => described,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(_) => bare(&path_of),
        };
        if entries.len() == LIST_ENTRIES {
            return Err(Error::TooMany(path.display().to_string()));
        }
        let is_directory = described.r#type == FileType::FILE_TYPE_DIRECTORY && !described.is_symlink;
        entries.push(described);
        if is_directory && levels.len() < depth {
            let below = names(&path_of, OFlags::NOFOLLOW).unwrap_or_default();
            levels.push((path_of, below.into_iter()));
        }
    }
    Ok(entries)
}

/// The names in a directory, in byte order.
pub(super) fn names(directory: &Path, flags: OFlags) -> Result<Vec<OsString>, Errno> {
    let mut names = names_in(&open_directory(CWD, directory, flags)?)?;
    names.sort_unstable();
    Ok(names)
}

fn open_directory(at: BorrowedFd<'_>, path: impl rustix::path::Arg, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

fn names_in(directory: &OwnedFd) -> Result<Vec<OsString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    Ok(names)
}

/// Whether a directory is on a file system that does not tell of what happens to it elsewhere.
pub fn is_on_network(path: &Path) -> Result<bool, Errno> {
    /// NFS, CIFS, SMB, SMB 2, FUSE, 9P, Ceph, AFS: numbers of the kernel's.
    const MAGIC: [u32; 8] =
        [0x6969, 0xFF53_4D42, 0x517B, 0xFE53_4D42, 0x6573_5546, 0x0102_1997, 0x00C3_6400, 0x5346_414F];
    let kind = rustix::fs::statfs(path)?.f_type;
    // The kernel extends the sign of some; four bytes are what counts.
    Ok(MAGIC.contains(&(kind as u32)))
}
