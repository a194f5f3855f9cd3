//! Files that are filled from the object store as they are read.
//!
//! Each is a sparse local file of the full length. What of it is there is not written down anywhere: when the files are
//! opened, what has data is compared with the chunk's name, so that whatever a crash left half-written is fetched again.

use std::collections::HashSet;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::runtime::Handle;

use crate::{CHUNK, Chunk, Entry, Error, Hash, Objects};

/// How long after a failure the next try comes.
const PAUSE: Duration = Duration::from_millis(250);
/// The same where nobody waits.
const LONG_PAUSE: Duration = Duration::from_secs(5);
/// How many chunks are fetched at the same time where nobody waits.
const FILLERS: usize = 3;

/// Some files, filled by any number of threads. Its calls block, and must come from threads that are not the runtime's.
pub struct Lazy {
    objects: Objects,
    runtime: Handle,
    files: Vec<LazyFile>,
    /// The chunks that some thread is fetching: file and index.
    claimed: Mutex<HashSet<(usize, usize)>>,
    /// Told when a claim ends.
    released: Condvar,
}

struct LazyFile {
    entry: Entry,
    file: File,
    present: Vec<AtomicBool>,
}

impl Lazy {
    /// Opens the files of `entries` in `dir`, or makes them. `runtime` must have a thread of its own.
    pub fn open(objects: Objects, runtime: Handle, dir: &Path, entries: Vec<Entry>) -> Result<Self, Error> {
        let files = entries.into_iter().map(|entry| LazyFile::open(dir, entry)).collect::<Result<_, _>>()?;
        Ok(Self { objects, runtime, files, claimed: Mutex::default(), released: Condvar::new() })
    }

    /// Which of the files is called that.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.files.iter().position(|file| file.entry.name == name)
    }

    /// Whether these bytes of a file are there.
    pub fn is_present(&self, file: usize, bytes: Range<u64>) -> bool {
        let file = &self.files[file];
        chunks(&bytes).all(|index| file.is_present(index))
    }

    /// Waits until these bytes of a file are there. While the object store is out of reach or the disk is full it tries
    /// again, for as long as `patience`.
    pub fn fetch(&self, file: usize, bytes: Range<u64>, patience: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + patience;
        chunks(&bytes).try_for_each(|index| self.fetch_chunk(file, index, deadline))
    }

    /// Fetches everything, beside whoever else fetches, and makes it durable. While the object store is out of reach or the
    /// disk is full it tries again, for ever; what cannot be had is the error in the end, when all else is there.
    pub fn fill(&self) -> Result<(), Error> {
        let all = self.files.iter().enumerate();
        let all: Vec<_> =
            all.flat_map(|(number, file)| (0..file.present.len()).map(move |index| (number, index))).collect();
        let (next, first_error) = (AtomicUsize::new(0), Mutex::new(None));
        let work = || {
            while let Some((number, index)) = all.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                loop {
                    match self.fetch_chunk(number, index, Instant::now()) {
                        Err(error) if may_pass(&error) => self.sleep(LONG_PAUSE),
                        fetched => {
                            let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
                            *first = first.take().or(fetched.err());
                            break;
                        }
                    }
                }
            }
        };
        std::thread::scope(|scope| (0..FILLERS).for_each(|_| drop(scope.spawn(work))));
        first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)?;
        let sync = |file: &LazyFile| file.file.sync_all().map_err(Error::file("write", &file.entry.name));
        self.files.iter().try_for_each(sync)
    }

    fn sleep(&self, pause: Duration) {
        // Only inside of the runtime is there a timer.
        self.runtime.block_on(async { tokio::time::sleep(pause).await });
    }

    fn fetch_chunk(&self, number: usize, index: usize, deadline: Instant) -> Result<(), Error> {
        let file = &self.files[number];
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if file.is_present(index) {
                return Ok(());
            }
            if claimed.insert((number, index)) {
                break;
            }
            claimed = self.released.wait(claimed).unwrap_or_else(PoisonError::into_inner);
        }
        drop(claimed);
        let fetched = self.fetch_claimed(file, index, deadline);
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner).remove(&(number, index));
        self.released.notify_all();
        fetched
    }

    fn fetch_claimed(&self, file: &LazyFile, index: usize, deadline: Instant) -> Result<(), Error> {
        let range = file.entry.range(index);
        let Chunk::Stored(hash) = file.entry.chunks[index] else {
            // Others are there from the beginning.
            return Ok(());
        };
        let again = |error: Error| {
            if !may_pass(&error) || Instant::now() >= deadline {
                return Err(error);
            }
            tracing::debug!(error = &error as &dyn std::error::Error, %hash, "a chunk is tried again");
            self.sleep(PAUSE);
            Ok(())
        };
        let content = loop {
            match self.runtime.block_on(self.objects.part(hash, range.end - range.start)) {
                Ok(content) => break content,
                Err(error) => again(error)?,
            }
        };
        while let Err(error) = file.file.write_all_at(&content, range.start) {
            again(Error::file("write", &file.entry.name)(error))?;
        }
        file.present[index].store(true, Ordering::Release);
        Ok(())
    }
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lazy").field("files", &self.files.len()).finish_non_exhaustive()
    }
}

impl LazyFile {
    fn open(dir: &Path, entry: Entry) -> Result<Self, Error> {
        let failed = Error::file("open", &entry.name);
        let path = dir.join(&entry.name);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(&failed)?;
        file.set_len(entry.size).map_err(&failed)?;
        let mut present = Vec::with_capacity(entry.chunks.len());
        for (index, chunk) in entry.chunks.iter().enumerate() {
            let is_present = match chunk {
                Chunk::Zero | Chunk::Base => true,
                Chunk::Stored(hash) => is_there(&file, entry.range(index), *hash).map_err(&failed)?,
            };
            present.push(AtomicBool::new(is_present));
        }
        Ok(Self { entry, file, present })
    }

    fn is_present(&self, index: usize) -> bool {
        self.present.get(index).is_none_or(|present| present.load(Ordering::Acquire))
    }
}

fn is_there(file: &File, range: Range<u64>, hash: Hash) -> io::Result<bool> {
    match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Err(Errno::NXIO) => return Ok(false),
        Ok(data) if data >= range.end => return Ok(false),
        data => data?,
    };
    let mut content = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut content, range.start)?;
    Ok(Hash::of(&content) == hash)
}

/// Whether the same may succeed later: the object store may be back then, or the disk have room.
fn may_pass(error: &Error) -> bool {
    let is_full =
        |source: &io::Error| matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    error.is_passing() || matches!(error, Error::File { source, .. } if is_full(source))
}

/// The chunks that bytes are in.
fn chunks(bytes: &Range<u64>) -> Range<usize> {
    (bytes.start / CHUNK) as usize..bytes.end.div_ceil(CHUNK) as usize
}
