//! Holding still: file systems, and envd's own memory in large pages.

use rustix::fd::{AsFd, AsRawFd};
use std::io;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`.
const FIFREEZE: libc::Ioctl = 0xC004_5877;
const FITHAW: libc::Ioctl = 0xC004_5878;
const MADV_COLLAPSE: libc::c_int = 25;

/// Writes a file system and blocks every change to it until [`thaw`]; one that is frozen already stays so.
pub fn freeze(directory: impl AsFd) -> io::Result<()> {
    ask(directory, FIFREEZE, libc::EBUSY)
}

/// Lets changes pass again; one that is not frozen stays so.
pub fn thaw(directory: impl AsFd) -> io::Result<()> {
    ask(directory, FITHAW, libc::EINVAL)
}

fn ask(directory: impl AsFd, what: libc::Ioctl, already: libc::c_int) -> io::Result<()> {
    // SAFETY: both requests ignore their argument.
    if unsafe { libc::ioctl(directory.as_fd().as_raw_fd(), what, 0) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(already) => Ok(()),
        error => Err(error),
    }
}

/// Puts the memory between two addresses of this process into large pages where it can.
pub fn collapse(start: usize, end: usize) -> io::Result<()> {
    // SAFETY: this advice moves pages without changing what they hold, whatever lies there; an address range that is not
    // mapped is an error.
    let result = unsafe { libc::madvise(start as *mut libc::c_void, end - start, MADV_COLLAPSE) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
