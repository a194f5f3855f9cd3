//! Growing the root file system while it is mounted.

use rustix::fd::{AsFd, AsRawFd};
use std::io;

/// `_IOW('f', 16, __u64)`: the new size in file system blocks.
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;

/// The size of a block device in bytes.
pub fn device_bytes(device: impl AsFd) -> io::Result<u64> {
    let mut bytes = 0u64;
    /// `_IOR(0x12, 114, size_t)`.
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
    // SAFETY: the request writes one u64 to the address given, which is a live one.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// Grows the ext4 file system that `root`, a directory on it, belongs to.
pub fn grow_ext4(root: impl AsFd, blocks: u64) -> io::Result<()> {
    // SAFETY: the request reads one u64 from the address given, which is a live one.
    let result = unsafe { libc::ioctl(root.as_fd().as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
