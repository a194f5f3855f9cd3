//! The kernel's random generator, which a snapshot copies.

use rustix::fd::AsRawFd;
use std::fs::File;
use std::io;

/// `_IOW('R', 0x03, int[2])`: `struct rand_pool_info`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Mixes `entropy` in, all of it counted as random, and makes every generator start from that at once.
pub fn reseed(entropy: &[u8]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/urandom")?;
    // Bits, bytes, then the bytes themselves in whole words.
    let mut info = vec![entropy.len() as u32 * 8, entropy.len() as u32];
    info.extend(entropy.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_ne_bytes(word)
    }));
    // SAFETY: the request reads two integers and then as many bytes as the second says, all of which `info` holds.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) };
    info.fill(0);
    if added < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument.
    let reseeded = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
