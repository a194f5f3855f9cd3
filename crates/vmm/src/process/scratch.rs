//! What a VMM has written in its jail, as the agent may look at it.
//!
//! The VMM may be its guest's by now, and the agent is not to be led anywhere by it: a name is looked up in the scratch
//! directory and nowhere else, no link is followed, and what is opened is what it should be.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tokio::net::UnixStream;

use crate::{CAPSULE_DIR, SCRATCH_DIR};

/// A VMM's scratch directory. Clones are the same one; it is there for as long as one of them is, whatever becomes of the VMM.
#[derive(Debug, Clone)]
pub struct Scratch(Arc<OwnedFd>);

impl Scratch {
    /// That of a process, if it has one: `NotFound` for those that have none, and those that have ended.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        // Up to its root the path is the kernel's, from there the jail's, which its VMM cannot change.
        let inside = Path::new(CAPSULE_DIR.trim_start_matches('/')).join(SCRATCH_DIR);
        Self::at(&PathBuf::from(format!("/proc/{pid}/root")).join(inside)).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => io::ErrorKind::NotFound.into(),
            _ => error,
        })
    }

    /// The one that is that directory.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(Arc::new(rustix::fs::open(path, flags, Mode::empty())?)))
    }

    /// Opens a file in it for reading. What is no file, a link among them, is refused.
    pub fn open(&self, name: &str) -> io::Result<File> {
        // Whatever it is, opening it does not wait.
        let file = self.find(name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, FileType::RegularFile)?;
        Ok(File::from(file))
    }

    /// Removes a file from it. That it is gone already is no error.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&*self.0, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Connects to a socket in it.
    pub(crate) async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let socket = self.find(name, OFlags::PATH, FileType::Socket)?;
        // The address of a unix socket ends at 107 bytes, and this one means what was looked at.
        UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
    }

    fn find(&self, name: &str, flags: OFlags, kind: FileType) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let found = rustix::fs::openat2(&*self.0, name, flags, Mode::empty(), resolve)?;
        match FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) {
            found if found != kind => {
                Err(io::Error::new(io::ErrorKind::InvalidData, format!("it is {found:?} and not {kind:?}")))
            }
            _ => Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_in_it_leads_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        let (inside, outside) = (directory.path().join("scratch"), directory.path().join("outside"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(&outside, "of another").unwrap();
        std::fs::write(inside.join("memory"), "its own").unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        std::os::unix::fs::symlink("..", inside.join("up")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(inside.join("fifo")).status().unwrap().success());
        let _listener = tokio::net::UnixListener::bind(inside.join("api.sock")).unwrap();
        std::os::unix::fs::symlink("api.sock", inside.join("linked.sock")).unwrap();

        let scratch = Scratch::at(&inside).unwrap();
        assert_eq!(io::read_to_string(scratch.open("memory").unwrap()).unwrap(), "its own");
        for name in ["link", "up/outside", "../outside", "fifo", "api.sock", ".", "none"] {
            assert!(scratch.open(name).is_err(), "{name} was opened");
        }
        scratch.connect("api.sock").await.unwrap();
        for name in ["linked.sock", "memory", "fifo", "none"] {
            assert!(scratch.connect(name).await.is_err(), "{name} was connected to");
        }
        assert!(Scratch::at(&inside.join("up")).is_err());
        scratch.remove("memory").unwrap();
        scratch.remove("memory").unwrap();
        scratch.remove("link").unwrap();
        assert!(outside.exists() && !inside.join("memory").exists());
    }
}
