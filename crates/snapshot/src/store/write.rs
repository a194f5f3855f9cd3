//! Writing a generation's data file, from nothing to committed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Error, TEMPORARY, sync_directory};
use crate::data::{encode_head, file_len, offset_of};
use crate::{Generation, Id, PAGE_SIZE};

/// What is written at once.
const BUFFER: usize = 1 << 20;
const PAGE: usize = PAGE_SIZE as usize;

/// A data file that is being written. Dropped before it is committed, it is removed.
pub(super) struct Writer {
    id: Id,
    directory: PathBuf,
    temporary: PathBuf,
    file: File,
    buffer: Box<[u8]>,
    /// Bytes of the buffer that are pages to write.
    filled: usize,
    /// Pages accepted, in the buffer or the file.
    pages: u32,
    checksums: Vec<u8>,
    is_committed: bool,
}

impl Writer {
    pub(super) fn create(directory: &Path, id: Id) -> Result<Self, Error> {
        let temporary = directory.join(format!("{TEMPORARY}{id}"));
        let file =
            OpenOptions::new().write(true).create_new(true).open(&temporary).map_err(Error::write(&temporary))?;
        Ok(Self {
            id,
            directory: directory.to_owned(),
            temporary,
            file,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            filled: 0,
            pages: 0,
            checksums: Vec::new(),
            is_committed: false,
        })
    }

    /// Pages accepted so far; the next one has this number.
    pub(super) fn pages(&self) -> u32 {
        self.pages
    }

    /// Room for at least one page and at most `len` bytes of whole pages. Those that are put at its start are taken
    /// over by [`accept`](Self::accept).
    pub(super) fn room(&mut self, len: u64) -> Result<&mut [u8], Error> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        let room = &mut self.buffer[self.filled..];
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(room.len());
        Ok(&mut room[..len])
    }

    /// Takes over the first `pages` of the room.
    pub(super) fn accept(&mut self, pages: usize) {
        let end = self.filled + pages * PAGE;
        for page in self.buffer[self.filled..end].chunks_exact(PAGE) {
            self.checksums.extend(crc32fast::hash(page).to_le_bytes());
        }
        self.filled = end;
        // A buffer has few pages, and who writes has counted them all in 32 bits.
        self.pages += pages as u32;
    }

    fn flush(&mut self) -> Result<(), Error> {
        let written = offset_of(self.pages) - self.filled as u64;
        self.put(&self.buffer[..self.filled], written)?;
        self.filled = 0;
        Ok(())
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<(), Error> {
        self.file.write_all_at(bytes, at).map_err(Error::write(&self.temporary))
    }

    /// Makes the file durable under its own name, and says how many bytes that took. From here on it is a generation,
    /// or garbage if no header comes to refer to it. Without any page there is nothing to make.
    pub(super) fn commit(mut self) -> Result<u64, Error> {
        if self.pages == 0 {
            return Ok(0);
        }
        self.flush()?;
        self.put(&self.checksums, offset_of(self.pages))?;
        self.put(&encode_head(Generation { id: self.id, pages: self.pages }), 0)?;
        self.file.sync_all().map_err(Error::write(&self.temporary))?;
        let path = self.directory.join(self.id.to_string());
        fs::rename(&self.temporary, &path).map_err(Error::write(&path))?;
        self.is_committed = true;
        sync_directory(&self.directory)?;
        Ok(file_len(self.pages))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.is_committed {
            // What cannot be removed now is collected later.
            let _: io::Result<()> = fs::remove_file(&self.temporary);
        }
    }
}
