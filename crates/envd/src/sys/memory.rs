//! What the allocator keeps for itself, and which pages are mapped.

use std::io;

const MADV_POPULATE_READ: libc::c_int = 22;

/// Blocks from this size on come from the kernel and go back to it; so does what is free at the heap's end beyond it. Bytes.
const THRESHOLD: libc::c_int = 128 * 1024;

/// Makes the allocator give memory back. By default each thread has a heap of its own that keeps what one large answer
/// took, and the guest has better uses for it. Call it before there are threads.
pub fn keep_little() {
    let options = [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, THRESHOLD), (libc::M_TRIM_THRESHOLD, THRESHOLD)];
    for (option, value) in options {
        // SAFETY: it sets numbers of the allocator's own, under its lock, and takes no pointers. What it refuses changes nothing.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Has every page between two addresses of this process in memory, and mapped for reading.
pub fn populate(start: usize, end: usize) -> io::Result<()> {
    // SAFETY: this advice reads into memory what is mapped there, and changes nothing; an address range that is not mapped is
    // an error.
    let result = unsafe { libc::madvise(start as *mut libc::c_void, end - start, MADV_POPULATE_READ) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
