//! What a file takes for itself alone: `FIEMAP`, which says of every extent whether another file shares it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{self, Updater};

/// `_IOWR('f', 11, struct fiemap)`: its size is that of the head, whatever follows.
const FS_IOC_FIEMAP: ioctl::Opcode = ioctl::opcode::read_write::<Head>(b'f', 11);
const EXTENT_LAST: u32 = 1;
const EXTENT_SHARED: u32 = 0x2000;
/// How many extents are asked for at once.
const AT_ONCE: usize = 128;

/// `struct fiemap` without its extents.
#[repr(C)]
struct Head {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Map {
    head: Head,
    extents: [Extent; AT_ONCE],
}

/// Bytes that go when the file at `path` does: what is allocated to it and shared with no other file. Where the file system
/// does not say what is shared, all that is allocated to it.
pub fn own_bytes(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    let (mut start, mut own) = (0, 0);
    loop {
        let head = Head { start, length: u64::MAX - start, flags: 0, mapped: 0, room: AT_ONCE as u32, reserved: 0 };
        let mut map = Map { head, extents: [Extent::default(); AT_ONCE] };
        // SAFETY: the request reads the head and writes it and at most `room` extents after it; `map` has as many, all of
        // its bytes are initialised integers before and after, and it outlives the call.
        match unsafe { ioctl::ioctl(&file, Updater::<FS_IOC_FIEMAP, Map>::new(&mut map)) } {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => return Ok(file.metadata()?.blocks() * 512),
            Err(error) => return Err(error.into()),
        }
        let mapped = &map.extents[..AT_ONCE.min(map.head.mapped as usize)];
        own +=
            mapped.iter().filter(|extent| extent.flags & EXTENT_SHARED == 0).map(|extent| extent.length).sum::<u64>();
        match mapped.last() {
            Some(last) if last.flags & EXTENT_LAST == 0 => start = last.logical.saturating_add(last.length),
            _ => return Ok(own),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::{Backend, Disks};

    const MIB: u64 = 1 << 20;

    fn written(path: &Path, at: u64, len: u64) {
        let file = File::options().create(true).truncate(false).write(true).open(path).unwrap();
        file.write_all_at(&vec![7; len as usize], at).unwrap();
        file.sync_all().unwrap();
    }

    #[test]
    fn a_clone_takes_what_was_written_to_it() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let disks = Disks::open(dir.path(), "extents", None).unwrap();
        let [image, clone] = ["image", "clone"].map(|name| disks.root().join(name));
        // More extents than are asked for at once.
        (0..300).for_each(|part| written(&image, part * 128 * 1024, 64 * 1024));
        let whole = own_bytes(&image).unwrap();
        assert!((300 * 64 * 1024..40 * MIB).contains(&whole), "{whole}");
        disks.create(&image, &clone, Some(200 * MIB)).unwrap();
        if disks.backend() == Backend::Reflink {
            assert_eq!((own_bytes(&image).unwrap(), own_bytes(&clone).unwrap()), (0, 0));
        }
        let before = own_bytes(&clone).unwrap();
        written(&clone, 0, 4 * MIB);
        written(&clone, 100 * MIB, 4 * MIB);
        let grown = own_bytes(&clone).unwrap() - before;
        assert!((8 * MIB..9 * MIB).contains(&grown), "{grown}");
        disks.close().unwrap();
    }

    #[test]
    fn where_nobody_knows_what_is_shared_it_is_what_is_allocated() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("file");
        written(&path, 8 * MIB, MIB);
        assert_eq!(own_bytes(&path).unwrap(), MIB);
    }
}
