//! Copy-on-write files: what a disk has of its own, as device-mapper's persistent snapshots keep it, and of which image the
//! rest is.
//!
//! ```text
//! chunk 0      the header that the kernel writes with the first table: magic, valid, version, sectors in a chunk
//! chunk 1      an area: 256 exceptions, each (chunk of the disk, chunk of this file); the first whose second half is 0 ends all
//! chunk 2-257  what these hold
//! chunk 258    the next area, and so on
//! ```
//!
//! Which image it is over, and how large the disk is, is in an attribute of the file that only the privileged may set:
//! nothing that a guest writes to its disk can make it a view of something else. A file without it is a plain disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, XattrFlags};
use rustix::io::Errno;

use crate::backend::share_or_copy;

/// What is copied when a byte of it is written, in bytes; also the sector size of what is below.
pub(crate) const CHUNK: u64 = 4096;
/// The same as device-mapper counts it.
pub(crate) const CHUNK_SECTORS: u64 = CHUNK / SECTOR;
pub(crate) const SECTOR: u64 = 512;

const ATTRIBUTE: &str = "trusted.wrenn.cow";
/// An image's name is at most 64 characters, a digest as many, and a size 20.
const ATTRIBUTE_MAX: usize = 256;

/// `SnAp`, as the kernel has it.
const MAGIC: u32 = 0x7041_6e53;
/// Exceptions in an area.
const IN_AREA: u64 = CHUNK / 16;
/// Most chunks that are copied at once.
const RUN: u64 = 256;

/// What a copy-on-write file is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cow {
    /// Size of the disk in bytes, a multiple of [`CHUNK`].
    pub(crate) size: u64,
    /// The file name of the image. Behind its end the disk begins as zeros.
    pub(crate) image: String,
}

impl Cow {
    /// What the file is over; `None` for a plain disk.
    pub(crate) fn of(file: &File) -> io::Result<Option<Self>> {
        let mut value = [0; ATTRIBUTE_MAX];
        let len = match rustix::fs::fgetxattr(file, ATTRIBUTE, &mut value) {
            Ok(len) => len,
            // Also file systems that have no attributes have no such file.
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let text = std::str::from_utf8(&value[..len]).ok();
        let cow = text.and_then(|text| text.split_once(' ')).and_then(|(size, image)| {
            let is_name = !image.is_empty() && !image.contains('/') && image != "." && image != "..";
            let size = size.parse().ok().filter(|size| size % CHUNK == 0)?;
            is_name.then(|| Self { size, image: image.to_owned() })
        });
        cow.map(Some).ok_or_else(|| invalid("its attribute says nothing of an image"))
    }

    /// Has `file` be over that.
    pub(crate) fn mark(&self, file: &File) -> io::Result<()> {
        let value = format!("{} {}", self.size, self.image);
        Ok(rustix::fs::fsetxattr(file, ATTRIBUTE, value.as_bytes(), XattrFlags::empty())?)
    }

    /// How large the file has to be so that every chunk of the disk can be written and the areas are never full, in bytes.
    pub(crate) fn room(&self) -> u64 {
        let areas = self.size / CHUNK / IN_AREA + 1;
        (1 + areas * (1 + IN_AREA)) * CHUNK
    }
}

/// Gives `file` all the space that it may ever take, so that no write to it fails for want of that, also of blocks that
/// another file shares. What it has stays.
pub(crate) fn reserve(file: &File, room: u64) -> Result<(), Errno> {
    match rustix::fs::fallocate(file, FallocateFlags::UNSHARE_RANGE, 0, room) {
        Err(Errno::OPNOTSUPP | Errno::INVAL) => rustix::fs::fallocate(file, FallocateFlags::empty(), 0, room),
        reserved => reserved,
    }
}

/// Calls `each` with the runs of chunks that the file has of its own: from which chunk of the disk, in which chunk of the file,
/// and how many. Returns how much of the file that takes, in bytes; what is behind that is of no use.
pub(crate) fn walk(file: &File, mut each: impl FnMut(u64, u64, u64) -> io::Result<()>) -> io::Result<u64> {
    let mut chunk = [0; CHUNK as usize];
    read_or_zero(file, &mut chunk, 0)?;
    let word = |chunk: &[u8], at: usize| u32::from_le_bytes(chunk[at..at + 4].try_into().expect("four bytes"));
    if word(&chunk, 0) == 0 {
        return Ok(0);
    }
    if word(&chunk, 0) != MAGIC || word(&chunk, 8) != 1 || u64::from(word(&chunk, 12)) != CHUNK_SECTORS {
        return Err(invalid("it does not begin as a copy-on-write store does"));
    }
    if word(&chunk, 4) != 1 {
        return Err(invalid("the kernel gave it up"));
    }
    let mut used = 0;
    let mut run = (0, 0, 0);
    for area in 0.. {
        let at = 1 + area * (1 + IN_AREA);
        read_or_zero(file, &mut chunk, at * CHUNK)?;
        used = used.max(at + 1);
        for exception in chunk.chunks_exact(16) {
            let half = |at: usize| u64::from_le_bytes(exception[at..at + 8].try_into().expect("eight bytes"));
            let (old, new) = (half(0), half(8));
            if new == 0 {
                if run.2 > 0 {
                    each(run.0, run.1, run.2)?;
                }
                return Ok(used * CHUNK);
            }
            used = used.max(new + 1);
            if run.2 > 0 && run.2 < RUN && old == run.0 + run.2 && new == run.1 + run.2 {
                run.2 += 1;
                continue;
            }
            if run.2 > 0 {
                each(run.0, run.1, run.2)?;
            }
            run = (old, new, 1);
        }
    }
    unreachable!("areas are read until one ends")
}

/// Writes to `dest`, an empty file, what the disk of `file` is over `image`. What is all zeros takes no space in it.
pub(crate) fn flatten(file: &File, cow: &Cow, image: &File, dest: &File) -> io::Result<()> {
    share_or_copy(image, dest)?;
    dest.set_len(cow.size)?;
    let mut buffer = vec![0; (RUN * CHUNK) as usize];
    let end = cow.size / CHUNK;
    walk(file, |old, new, count| {
        if old.checked_add(count).is_none_or(|last| last > end) {
            return Err(invalid("it has more than the disk"));
        }
        let part = &mut buffer[..(count * CHUNK) as usize];
        file.read_exact_at(part, new * CHUNK)?;
        for (index, chunk) in part.chunks_exact(CHUNK as usize).enumerate() {
            let at = (old + index as u64) * CHUNK;
            if chunk.iter().any(|&byte| byte != 0) {
                dest.write_all_at(chunk, at)?;
            } else {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(dest, flags, at, CHUNK)?;
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// Gives back what `file` has and does not need.
pub(crate) fn trim(file: &File) -> io::Result<()> {
    let used = walk(file, |_, _, _| Ok(()))?;
    if file.metadata()?.len() > used { file.set_len(used) } else { Ok(()) }
}

/// Behind its end the file is zeros.
fn read_or_zero(file: &File, chunk: &mut [u8], at: u64) -> io::Result<()> {
    chunk.fill(0);
    let mut got = 0;
    while got < chunk.len() {
        match file.read_at(&mut chunk[got..], at + got as u64)? {
            0 => break,
            more => got += more,
        }
    }
    Ok(())
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store as the kernel writes it: the chunks of the disk in the order in which they were first written.
    fn store(chunks: &[(u64, u8)]) -> File {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        for (at, word) in [MAGIC, 1, 1, CHUNK_SECTORS as u32].iter().enumerate() {
            file.write_all_at(&word.to_le_bytes(), at as u64 * 4).unwrap();
        }
        for (index, &(old, byte)) in chunks.iter().enumerate() {
            let (area, within) = (index as u64 / IN_AREA, index as u64 % IN_AREA);
            let at = 1 + area * (1 + IN_AREA);
            let new = at + 1 + within;
            let exception: Vec<u8> = [old.to_le_bytes(), new.to_le_bytes()].concat();
            file.write_all_at(&exception, at * CHUNK + within * 16).unwrap();
            file.write_all_at(&[byte; CHUNK as usize], new * CHUNK).unwrap();
        }
        file
    }

    fn cow(chunks: u64) -> Cow {
        Cow { size: chunks * CHUNK, image: "base.img".into() }
    }

    #[test]
    fn an_attribute_says_what_a_file_is_over_and_nothing_in_the_file_does() {
        let file = store(&[(1, 1)]);
        assert_eq!(Cow::of(&file).unwrap(), None);
        cow(7).mark(&file).unwrap();
        assert_eq!(Cow::of(&file).unwrap(), Some(cow(7)));
        for bad in ["", "4096", "4095 base", "x base", "4096 ", "4096 ../base", "4096 .."] {
            rustix::fs::fsetxattr(&file, ATTRIBUTE, bad.as_bytes(), XattrFlags::empty()).unwrap();
            assert_eq!(Cow::of(&file).unwrap_err().kind(), io::ErrorKind::InvalidData, "{bad:?}");
        }
    }

    #[test]
    fn a_flat_disk_is_the_image_with_what_was_written_and_zeros_take_no_space() {
        let image = tempfile::tempfile_in("/var/tmp").unwrap();
        image.write_all_at(&[9; 4 * CHUNK as usize], 0).unwrap();
        // More than one area, runs and none, zeros over the image and behind its end.
        let mut chunks = vec![(3, 0), (1, 5), (2, 6), (999, 7), (998, 0)];
        chunks.extend((100..500).map(|old| (old, (old % 5) as u8)));
        let file = store(&chunks);
        let dest = tempfile::tempfile_in("/var/tmp").unwrap();
        flatten(&file, &cow(1000), &image, &dest).unwrap();
        let mut expected = vec![0; 1000 * CHUNK as usize];
        expected[..4 * CHUNK as usize].fill(9);
        for (old, byte) in chunks {
            expected[(old * CHUNK) as usize..((old + 1) * CHUNK) as usize].fill(byte);
        }
        let mut found = vec![0; expected.len()];
        dest.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
        assert_eq!(dest.metadata().unwrap().len(), 1000 * CHUNK);
        let with_data = expected.chunks(CHUNK as usize).filter(|chunk| chunk[0] != 0).count() as u64;
        assert!(
            std::os::unix::fs::MetadataExt::blocks(&dest.metadata().unwrap()) * 512 <= with_data * CHUNK + 64 * 1024
        );
        assert!(flatten(&file, &cow(999), &image, &tempfile::tempfile_in("/var/tmp").unwrap()).is_err());
    }

    #[test]
    fn what_is_reserved_and_not_used_is_given_back_and_nothing_else() {
        let count = |file: &File| {
            let mut chunks = Vec::new();
            walk(file, |old, new, count| {
                chunks.extend((0..count).map(|index| (old + index, new + index)));
                Ok(())
            })
            .map(|used| (used, chunks))
        };
        // Also where an area is just full, and the next one is empty.
        for written in [0, 1, 255, 256, 257, 600] {
            let chunks: Vec<_> = (0..written).map(|old| (old * 3, 1)).collect();
            let file = store(&chunks);
            let before = count(&file).unwrap();
            assert_eq!(before.1.len(), written as usize);
            let disk = cow(2000);
            reserve(&file, disk.room()).unwrap();
            assert!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512 >= disk.room());
            trim(&file).unwrap();
            assert_eq!(file.metadata().unwrap().len(), before.0);
            assert_eq!(count(&file).unwrap(), before);
            assert!(before.0 <= disk.room());
        }
        let new = tempfile::tempfile_in("/var/tmp").unwrap();
        reserve(&new, cow(10).room()).unwrap();
        trim(&new).unwrap();
        assert_eq!(new.metadata().unwrap().len(), 0, "the kernel has not even begun it");
    }

    #[test]
    fn there_is_room_for_every_chunk_and_the_areas_that_find_them() {
        for chunks in [1, 255, 256, 257, 511, 512, 513, 1_310_720] {
            // The kernel takes chunk after chunk and leaves out where areas are.
            let areas = chunks / IN_AREA + 1;
            let last = 1 + areas + chunks;
            assert!(cow(chunks).room() >= last * CHUNK, "{chunks}");
            assert!(cow(chunks).room() <= (chunks + chunks / 200 + 600) * CHUNK, "{chunks}");
        }
    }

    #[test]
    fn what_the_kernel_gave_up_is_not_taken_for_a_disk() {
        let file = store(&[(1, 1)]);
        file.write_all_at(&0u32.to_le_bytes(), 4).unwrap();
        assert_eq!(walk(&file, |_, _, _| Ok(())).unwrap_err().to_string(), "the kernel gave it up");
        file.write_all_at(b"ext4", 0).unwrap();
        assert_eq!(walk(&file, |_, _, _| Ok(())).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
