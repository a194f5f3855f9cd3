//! Files with holes: walking their data, and copying it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

const BUFFER: usize = 1 << 20;

/// The ranges of `file` below `len` that may hold something other than zeros, in order.
pub(crate) fn data_ranges(file: &File, len: u64) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let mut at = 0;
    std::iter::from_fn(move || match next_range(file, at, len) {
        Ok(range) => {
            let range = range?;
            at = range.end;
            Some(Ok(range))
        }
        Err(error) => {
            at = len;
            Some(Err(error.into()))
        }
    })
}

fn next_range(file: &File, at: u64, len: u64) -> Result<Option<Range<u64>>, Errno> {
    if at >= len {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        // Only a hole is left.
        Err(Errno::NXIO) => return Ok(None),
        start => start?,
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok((start < len).then_some(start..end.min(len)))
}

/// Copies `src` to `dest`, an empty file; what is a hole in `src` is one in `dest`.
pub(crate) fn copy(src: &File, dest: &File) -> io::Result<()> {
    let len = src.metadata()?.len();
    dest.set_len(len)?;
    for range in data_ranges(src, len) {
        copy_range(src, dest, range?)?;
    }
    Ok(())
}

fn copy_range(src: &File, dest: &File, range: Range<u64>) -> io::Result<()> {
    let (mut from, mut to) = (range.start, range.start);
    while from < range.end {
        let rest = usize::try_from(range.end - from).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(src, Some(&mut from), dest, Some(&mut to), rest) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // The kernel does not copy between these two file systems.
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                return copy_through_memory(src, dest, from..range.end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(src: &File, dest: &File, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut at = range.start;
    while at < range.end {
        let part = &mut buffer[..BUFFER.min(usize::try_from(range.end - at).unwrap_or(usize::MAX))];
        src.read_exact_at(part, at)?;
        dest.write_all_at(part, at)?;
        at += part.len() as u64;
    }
    Ok(())
}
