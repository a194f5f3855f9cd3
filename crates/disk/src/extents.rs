//! Where files are on their file system: `FIEMAP`, which says where every extent is and whether another file shares it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{self, Updater};

use crate::sparse::data_ranges;

/// `_IOWR('f', 11, struct fiemap)`: its size is that of the head, whatever follows.
const FS_IOC_FIEMAP: ioctl::Opcode = ioctl::opcode::read_write::<Head>(b'f', 11);
/// What was written is given its place first.
const FLAG_SYNC: u32 = 1;
const EXTENT_LAST: u32 = 1;
const EXTENT_MERGED: u32 = 0x1000;
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
    let Some(extents) = extents(&file, 0)? else { return Ok(file.metadata()?.blocks() * 512) };
    Ok(extents.iter().filter(|extent| extent.flags & EXTENT_SHARED == 0).map(|extent| extent.length).sum())
}

/// Ranges in which the content of two files is the same because nobody wrote to either, or because they share it; in order,
/// none next to another. Where the file system does not say what is shared, they are the holes of both. What was written to
/// either meanwhile may not be seen.
pub fn same_ranges(one: &File, other: &File) -> io::Result<Vec<Range<u64>>> {
    let metadata = [one.metadata()?, other.metadata()?];
    let is_one_place = metadata[0].dev() == metadata[1].dev();
    let len = metadata[0].len().min(metadata[1].len());
    let [mut one, mut other] = [pieces(one, len)?.into_iter().peekable(), pieces(other, len)?.into_iter().peekable()];
    let (mut same, mut at): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
    while at < len {
        let mut end = len;
        let mut content = |pieces: &mut std::iter::Peekable<std::vec::IntoIter<Piece>>| {
            while pieces.next_if(|piece| piece.range.end <= at).is_some() {}
            match pieces.peek() {
                Some(piece) if piece.range.start <= at => {
                    end = end.min(piece.range.end);
                    piece.place.map_or(Content::Unknown, |place| Content::At(place + (at - piece.range.start)))
                }
                next => {
                    end = next.map_or(end, |next| end.min(next.range.start));
                    Content::Hole
                }
            }
        };
        let is_same = match (content(&mut one), content(&mut other)) {
            (Content::Hole, Content::Hole) => true,
            (Content::At(one), Content::At(other)) => is_one_place && one == other,
            _ => false,
        };
        match same.last_mut() {
            _ if !is_same => {}
            Some(last) if last.end == at => last.end = end,
            _ => same.push(at..end),
        }
        at = end;
    }
    Ok(same)
}

/// A range of a file that is no hole.
struct Piece {
    range: Range<u64>,
    /// Where on the file system it begins, if other files can have the same place.
    place: Option<u64>,
}

enum Content {
    Hole,
    At(u64),
    Unknown,
}

/// What of the file below `len` is not a hole.
fn pieces(file: &File, len: u64) -> io::Result<Vec<Piece>> {
    let Some(extents) = extents(file, FLAG_SYNC)? else {
        return data_ranges(file, len).map(|range| Ok(Piece { range: range?, place: None })).collect();
    };
    let is_shared = |extent: &Extent| extent.flags & !(EXTENT_LAST | EXTENT_MERGED) == EXTENT_SHARED;
    let piece = |extent: Extent| Piece {
        range: extent.logical..extent.logical.saturating_add(extent.length),
        place: is_shared(&extent).then_some(extent.physical),
    };
    Ok(extents.into_iter().map(piece).collect())
}

/// All extents of the file, in order; nothing where the file system does not say.
fn extents(file: &File, flags: u32) -> io::Result<Option<Vec<Extent>>> {
    let (mut start, mut all) = (0, Vec::new());
    loop {
        let head = Head { start, length: u64::MAX - start, flags, mapped: 0, room: AT_ONCE as u32, reserved: 0 };
        let mut map = Map { head, extents: [Extent::default(); AT_ONCE] };
        // SAFETY: the request reads the head and writes it and at most `room` extents after it; `map` has as many, all of
        // its bytes are initialised integers before and after, and it outlives the call.
        match unsafe { ioctl::ioctl(file, Updater::<FS_IOC_FIEMAP, Map>::new(&mut map)) } {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        all.extend_from_slice(&map.extents[..AT_ONCE.min(map.head.mapped as usize)]);
        match all.last() {
            Some(last) if map.head.mapped > 0 && last.flags & EXTENT_LAST == 0 => {
                start = last.logical.saturating_add(last.length);
            }
            _ => return Ok(Some(all)),
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

    #[test]
    fn what_is_the_same_needs_no_reading() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let disks = Disks::open(dir.path(), "same", None).unwrap();
        let [image, clone] = ["image", "clone"].map(|name| disks.root().join(name));
        (0..300).for_each(|part| written(&image, part * 128 * 1024, 64 * 1024));
        disks.create(&image, &clone, Some(200 * MIB)).unwrap();
        let [image, clone] = [image, clone].map(|path| File::options().read(true).write(true).open(path).unwrap());
        let len = image.metadata().unwrap().len();
        let knows = disks.backend() == Backend::Reflink;
        let same = same_ranges(&clone, &image).unwrap();
        if knows {
            assert_eq!(same, std::slice::from_ref(&(0..len)));
        } else {
            let holes = (0..299).map(|part| part * 128 * 1024 + 64 * 1024..(part + 1) * 128 * 1024);
            assert_eq!(same, holes.collect::<Vec<_>>());
        }
        // Not synced: the blocks that are shared until it is are not what a reader sees.
        clone.write_all_at(&[8; 4096], 10 * MIB).unwrap();
        clone.write_all_at(&[8; 4096], 10 * MIB + 64 * 1024).unwrap();
        clone.write_all_at(&[8; 4096], 100 * MIB).unwrap();
        let same = same_ranges(&clone, &image).unwrap();
        if knows {
            let hole = 10 * MIB + 64 * 1024;
            assert_eq!(same, [0..10 * MIB, 10 * MIB + 4096..hole, hole + 4096..len]);
        }
        for range in same {
            let [mut one, mut other] = [0; 2].map(|byte| vec![byte; (range.end - range.start) as usize]);
            clone.read_exact_at(&mut one, range.start).unwrap();
            image.read_exact_at(&mut other, range.start).unwrap();
            assert!(one == other, "{range:?}");
        }
        drop((image, clone));
        disks.close().unwrap();
    }

    #[test]
    fn files_of_two_file_systems_share_only_holes() {
        let [one, other] = ["/dev/shm", "/var/tmp"].map(|dir| tempfile::tempfile_in(dir).unwrap());
        for file in [&one, &other] {
            file.set_len(4 * MIB).unwrap();
            file.write_all_at(&[7; 4096], MIB).unwrap();
        }
        assert_eq!(same_ranges(&one, &other).unwrap(), [0..MIB, MIB + 4096..4 * MIB]);
    }
}
