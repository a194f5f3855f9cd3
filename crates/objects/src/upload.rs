//! Uploading: cutting files into chunks, and sending what is not there.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::lease::{Lease, Work};
use crate::store::{AT_ONCE, blocking};
use crate::{CHUNK, Chunk, Entry, Error, Hash, Manifest, Objects};

/// Fast, and half the size for what memory and disks hold.
const LEVEL: i32 = 1;
/// How long an upload waits for garbage to be collected.
const PATIENCE: Duration = Duration::from_secs(60);

/// A file to upload. It must not change meanwhile.
#[derive(Debug)]
pub struct Source {
    /// What it is called in the manifest.
    pub name: String,
    /// The file.
    pub file: File,
    /// What is underneath, and named in place of being sent.
    pub base: Option<Base>,
    /// A file of this name and size never has another content, so that what an earlier upload of it says holds.
    pub is_named_by_content: bool,
}

/// The image below a disk.
#[derive(Debug)]
pub struct Base {
    /// What it has at the same place as the disk is not sent.
    pub file: File,
    /// Where both are known to be the same, so that neither is read; in order, none next to another.
    pub same: Vec<Range<u64>>,
}

/// What an upload took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Chunks that were not there.
    pub chunks: u64,
    /// Bytes sent for them, compressed.
    pub bytes: u64,
}

impl Objects {
    /// Uploads `files` under `name`, in place of what is there by that name. When this fails or is dropped, what was there
    /// before still is; chunks that were sent are found by the next try.
    pub async fn upload(&self, name: &str, description: Vec<u8>, files: Vec<Source>) -> Result<Sent, Error> {
        let manifest_path = self.manifest_path(name)?;
        let mut lease = Lease::take(self, Work::Upload, PATIENCE).await?;
        let sent = Counts::default();
        let made = async {
            // One that cannot be read is about to be replaced.
            let before = match self.manifest(name).await {
                Err(Error::Manifest { .. }) => None,
                before => before?,
            };
            let known = Mutex::new(HashSet::new());
            let mut entries = Vec::with_capacity(files.len());
            for source in files {
                let before = before.as_ref().filter(|_| source.is_named_by_content);
                entries.push(self.send(source, before, &known, &sent).await?);
            }
            Manifest { description, files: entries }.encode().map_err(Error::Encode)
        };
        let done = async {
            let manifest = lease.during(made).await?;
            lease.leave_if_dropped();
            self.put(&manifest_path, manifest).await?;
            // It may have been on the way for long. One that is gone by now names nothing.
            self.head(&manifest_path).await?.map_or(Ok(()), |written| lease.check_at(&written))
        };
        let done = done.await;
        lease.give_back().await;
        done?;
        Ok(Sent { chunks: sent.chunks.into_inner(), bytes: sent.bytes.into_inner() })
    }

    async fn send(
        &self,
        source: Source,
        before: Option<&Manifest>,
        known: &Mutex<HashSet<Hash>>,
        sent: &Counts,
    ) -> Result<Entry, Error> {
        let Source { name, file, base, .. } = source;
        let failed = Error::file("read", &name);
        let size = file.metadata().map_err(&failed)?.len();
        let before = before.and_then(|manifest| manifest.file(&name)).filter(|entry| entry.size == size);
        let base_size = base.as_ref().map_or(Ok(0), |base| base.file.metadata().map(|metadata| metadata.len()));
        let base_size = base_size.map_err(&failed)?;
        let (base, same) = base.map_or((None, Vec::new()), |base| (Some(Arc::new(base.file)), base.same));
        let holes = holes(&file, size).map_err(&failed)?;
        let file = Arc::new(file);
        let mut entry = Entry { name: name.clone(), size, chunks: Vec::new() };
        let count = usize::try_from(size.div_ceil(CHUNK)).map_err(|_| Error::Changed(name.clone()))?;
        let chunks = (0..count).map(|index| {
            let (file, base, range) = (file.clone(), base.clone(), entry.range(index));
            let is_hole = holes.contains(&index);
            let is_same = same.get(same.partition_point(|same| same.end < range.end));
            let is_same = is_same.is_some_and(|same| same.start <= range.start);
            let before = before.map(|entry| entry.chunks[index]);
            let name = &name;
            async move {
                match before {
                    Some(Chunk::Zero) => return Ok(Chunk::Zero),
                    Some(Chunk::Stored(hash)) if self.is_there(hash, known).await? => return Ok(Chunk::Stored(hash)),
                    Some(Chunk::Stored(_) | Chunk::Base) | None => {}
                }
                // What its owner has not written is not read: of most disks that is nearly all.
                if is_same {
                    return Ok(Chunk::Base);
                }
                if is_hole && range.start >= base_size {
                    return Ok(Chunk::Zero);
                }
                let read = move || classify(&file, base.as_deref(), range.start, (range.end - range.start) as usize);
                let (chunk, content) = blocking(read).await.map_err(Error::file("read", name))?;
                if let Chunk::Stored(hash) = chunk
                    && !self.is_there(hash, known).await?
                {
                    let compressed = blocking(move || zstd::bulk::compress(&content, LEVEL)).await;
                    let compressed = compressed.map_err(Error::file("compress", name))?;
                    let bytes = compressed.len() as u64;
                    self.put(&self.chunk_path(hash), compressed).await?;
                    sent.chunks.fetch_add(1, Ordering::Relaxed);
                    sent.bytes.fetch_add(bytes, Ordering::Relaxed);
                    known.lock().unwrap_or_else(PoisonError::into_inner).insert(hash);
                }
                Ok(chunk)
            }
        });
        let chunks: Vec<Chunk> = futures::stream::iter(chunks).buffered(AT_ONCE).try_collect().await?;
        if file.metadata().map_err(&failed)?.len() != size {
            return Err(Error::Changed(name));
        }
        entry.chunks = chunks;
        Ok(entry)
    }

    async fn is_there(&self, hash: Hash, known: &Mutex<HashSet<Hash>>) -> Result<bool, Error> {
        if known.lock().unwrap_or_else(PoisonError::into_inner).contains(&hash) {
            return Ok(true);
        }
        let is_there = self.head(&self.chunk_path(hash)).await?.is_some();
        if is_there {
            known.lock().unwrap_or_else(PoisonError::into_inner).insert(hash);
        }
        Ok(is_there)
    }
}

#[derive(Default)]
struct Counts {
    chunks: AtomicU64,
    bytes: AtomicU64,
}

/// What a chunk is, and its content.
fn classify(file: &File, base: Option<&File>, at: u64, len: usize) -> io::Result<(Chunk, Vec<u8>)> {
    let mut content = vec![0; len];
    file.read_exact_at(&mut content, at)?;
    if let Some(base) = base {
        let mut below = vec![0; len];
        // An image that ends here has nothing that could be the same.
        let is_same = match base.read_exact_at(&mut below, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            read => read.map(|()| below == content)?,
        };
        if is_same {
            return Ok((Chunk::Base, content));
        }
    }
    let chunk = if content.iter().all(|byte| *byte == 0) { Chunk::Zero } else { Chunk::Stored(Hash::of(&content)) };
    Ok((chunk, content))
}

/// The chunks that are whole in holes of the file.
fn holes(file: &File, size: u64) -> io::Result<HashSet<usize>> {
    let mut holes = HashSet::new();
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => size,
            data => data?,
        };
        let end = if data >= size { size.div_ceil(CHUNK) } else { data / CHUNK };
        holes.extend((at.div_ceil(CHUNK)..end).map(|index| index as usize));
        at = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
            Err(Errno::NXIO) => size,
            hole => hole?,
        };
    }
    Ok(holes)
}
