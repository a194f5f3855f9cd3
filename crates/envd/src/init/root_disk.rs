//! A capsule's root disk may be larger than the image it was cloned from; its file system then grows into it, mounted.

use crate::sys::disk;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const SUPERBLOCK_AT: u64 = 1024;
const MAGIC: u16 = 0xEF53;

/// Grows the root file system if it is ext4 on a device that has room.
pub fn grow() -> io::Result<()> {
    let Some(device) = root_device()? else { return Ok(()) };
    let device = File::open(device)?;
    let mut superblock = [0; 1024];
    device.read_exact_at(&mut superblock, SUPERBLOCK_AT)?;
    let Some(geometry) = Geometry::read(&superblock) else { return Ok(()) };
    let room = disk::device_bytes(&device)? / geometry.block_bytes;
    if room <= geometry.blocks {
        return Ok(());
    }
    disk::grow_ext4(File::open("/")?, room)
}

/// The device node of `/`, if it is on a block device.
fn root_device() -> io::Result<Option<String>> {
    let device = rustix::fs::stat("/")?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let uevent = match std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    Ok(uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")).map(|name| format!("/dev/{name}")))
}

/// What of an ext4 superblock says how large the file system is.
#[derive(Debug, PartialEq, Eq)]
struct Geometry {
    block_bytes: u64,
    blocks: u64,
}

impl Geometry {
    /// `None` if this is no ext4.
    fn read(superblock: &[u8; 1024]) -> Option<Geometry> {
        const WITH_64_BIT: u64 = 0x80;
        let u32_at = |at: usize| -> Option<u64> {
            Some(u32::from_le_bytes(superblock.get(at..at + 4)?.try_into().ok()?).into())
        };
        if u16::from_le_bytes([superblock[0x38], superblock[0x39]]) != MAGIC {
            return None;
        }
        let high = if u32_at(0x60)? & WITH_64_BIT != 0 { u32_at(0x150)? } else { 0 };
        let block_bytes = 1024u64.checked_shl(u32_at(0x18)? as u32).filter(|bytes| (1024..=65_536).contains(bytes))?;
        Some(Geometry { block_bytes, blocks: u32_at(0x4)? | high << 32 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> [u8; 1024] {
        let mut superblock = [0; 1024];
        superblock[0x38..0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        superblock[0x4..0x8].copy_from_slice(&1000u32.to_le_bytes());
        superblock[0x18] = 2;
        superblock[0x150] = 1;
        superblock
    }

    #[test]
    fn reads_the_size() {
        let mut superblock = superblock();
        assert_eq!(Geometry::read(&superblock), Some(Geometry { block_bytes: 4096, blocks: 1000 }));
        superblock[0x60] = 0x80;
        assert_eq!(Geometry::read(&superblock), Some(Geometry { block_bytes: 4096, blocks: 1000 + (1 << 32) }));
    }

    #[test]
    fn refuses_what_is_no_ext4() {
        assert_eq!(Geometry::read(&[0; 1024]), None);
        for shift in [7, 63, 64, 255] {
            let mut superblock = superblock();
            superblock[0x18] = shift;
            assert_eq!(Geometry::read(&superblock), None, "{shift}");
        }
    }
}
