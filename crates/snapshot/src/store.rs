//! The generations of one data directory, and which of them are in use.
//!
//! Generations lie in one directory, each under its id, immutable once there. Headers lie with who owns them. A
//! generation is in use while a header refers to it, or something that runs is about to; the rest is garbage. Nothing
//! about that is stored: it is read from the headers when the store is opened and kept up from then on, which is why
//! every header of the directory is placed and removed through this store.
//!
//! The order of every operation is such that a crash leaves garbage at worst: a generation is durable before a header
//! refers to it, and a header is durably gone or replaced before its generations are collected.

mod error;
mod pack;
mod references;
mod write;

#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

pub use error::Error;
use references::{Pin, References, ids, lock};
use write::Writer;

use crate::data::{DataFile, offset_of};
use crate::open::{self, Snapshot, read_header};
use crate::{Generation, Header, Id, PAGE_SIZE, merge};

/// In the names of files that are being written: before the id of a generation, after the name of a header.
pub const TEMPORARY: &str = ".tmp-";

/// The generations of one data directory. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    generations: PathBuf,
    references: Arc<Mutex<References>>,
}

/// A header that the store cannot vouch for.
#[derive(Debug)]
pub struct Broken {
    /// The header.
    pub path: PathBuf,
    /// What is wrong with it or its generations.
    pub error: Error,
}

/// A pause's memory, durable but for the header that says so. Dropped without [`Store::commit`] it is garbage.
#[derive(Debug)]
pub struct Packed {
    header: Header,
    bytes_written: u64,
    _pin: Pin,
}

/// Keeps the generations of a header from being collected for as long as it is there, see [`Store::hold`].
#[derive(Debug)]
pub struct Held {
    _pin: Pin,
}

/// What became of a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// The header now refers to fewer generations. How many bytes were written for it.
    Done(u64),
    /// There are not enough generations to be worth it.
    NotDue,
    /// It was stopped; nothing has changed.
    Stopped,
    /// The header was replaced or removed meanwhile; nothing has changed.
    Superseded,
}

/// What was garbage and is gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Files.
    pub files: u64,
    /// Their length together.
    pub bytes: u64,
}

/// What is in a data directory.
#[derive(Debug, Default)]
pub struct Audit {
    /// Generations that are in use, and their bytes.
    pub used: Collected,
    /// Generations and leftovers that nothing refers to, and their bytes: what [`Store::collect`] removes.
    pub garbage: Collected,
    /// Files that are none of ours.
    pub foreign: Vec<PathBuf>,
    /// Headers that cannot be read, or whose generations are missing or not whole.
    pub broken: Vec<Broken>,
}

impl Store {
    /// Opens the store in `dir`, where the directory `generations` is made if it is not there. `headers` are all
    /// headers of the data directory: a generation that none of them refers to is garbage.
    ///
    /// Says which headers are of no use. One that cannot be read keeps everything from being collected until it is
    /// [removed](Self::remove), as nobody knows what it needs.
    pub fn open(dir: &Path, headers: impl IntoIterator<Item = PathBuf>) -> Result<(Self, Vec<Broken>), Error> {
        let generations = dir.join("generations");
        fs::create_dir_all(&generations).map_err(Error::directory(&generations))?;
        let store = Self { generations, references: Arc::default() };
        let mut broken = Vec::new();
        for path in headers {
            remove_leftovers(&path)?;
            let known = match read_header(&path) {
                Ok(header) => {
                    let is_missing = |of: &&Generation| !store.generations.join(of.id.to_string()).exists();
                    let missing = header.generations().iter().find(is_missing);
                    broken.extend(missing.map(|generation| Broken {
                        path: path.clone(),
                        error: Error::Missing { path: path.clone(), id: generation.id },
                    }));
                    Some(ids(&header))
                }
                Err(source) => {
                    let is_missing = matches!(&source, open::Error::ReadHeader { source, .. }
                        if source.kind() == io::ErrorKind::NotFound);
                    broken.push(Broken { path: path.clone(), error: Error::Open { path: path.clone(), source } });
                    if is_missing {
                        continue;
                    }
                    None
                }
            };
            lock(&store.references).put(&path, known);
        }
        Ok((store, broken))
    }

    /// The directory of the generations, for [`Snapshot::open`].
    pub fn generations(&self) -> &Path {
        &self.generations
    }

    /// Stores the pages of `diff` that the guest wrote since `parent`, or since it was booted, and makes them durable.
    ///
    /// `diff` is the file of a `Diff` snapshot on a tmpfs: as long as the memory, with data where pages were written and
    /// holes elsewhere. Written zeros are zeros, whatever the parent has there; they take no space, and neither do pages that
    /// are what the parent has. `parent` is the header the guest was resumed from; nothing of it changes.
    pub fn pack(&self, diff: &File, parent: Option<&Path>) -> Result<Packed, Error> {
        let pages = pack::memory_pages(diff)?;
        let parent = parent.map(|path| self.pinned(path)).transpose()?;
        let parent = parent.as_ref().map(|parent| &parent.header);
        let (id, generation) = (random_id()?, random_id()?);
        let pin = self.pin(parent.map(ids).unwrap_or_default(), generation);
        let mut writer = Writer::create(&self.generations, generation)?;
        let before = parent.map(|parent| pack::Before::open(&self.generations, parent));
        let written = pack::pack(diff, pages, before.as_ref(), &mut writer)?;
        let generation = Generation { id: generation, pages: writer.pages() };
        let header = merge::overlay(id, pages, parent, &written, generation)?;
        let bytes_written = writer.commit()?;
        Ok(Packed { header, bytes_written, _pin: pin })
    }

    /// Places the header of what was packed at `path`, durably and by one rename: a crash leaves what was there before,
    /// or this. Its directory must exist.
    pub fn commit(&self, packed: &Packed, path: &Path) -> Result<(), Error> {
        self.place(path, &packed.header, None).map(|_| ())
    }

    /// Makes `to` another header of the same memory as `from`: a fork, or a capsule made from a template.
    pub fn link(&self, from: &Path, to: &Path) -> Result<(), Error> {
        let from = self.pinned(from)?;
        self.place(to, &from.header, None).map(|_| ())
    }

    /// Takes over a memory that came from elsewhere: its header, which comes to be at `path`, and from the directory `files`
    /// those of its generations that are not here. They are checked page by page, made durable, and stay in `files` too.
    /// Repeatable, whatever came of it before.
    pub fn adopt(&self, header: &Path, files: &Path, path: &Path) -> Result<(), Error> {
        let failed = |source| Error::Open { path: header.to_owned(), source };
        let read = read_header(header).map_err(failed)?;
        // Before it is looked which are there: those must not be collected meanwhile.
        let _pin = Pin::new(&self.references, &mut lock(&self.references), ids(&read));
        for generation in read.generations() {
            let name = generation.id.to_string();
            let (from, to) = (files.join(&name), self.generations.join(&name));
            if to.exists() {
                DataFile::open(&to, *generation).map_err(Error::Generation)?;
                continue;
            }
            let data = DataFile::open(&from, *generation).map_err(Error::Generation)?;
            data.verify().map_err(Error::Generation)?;
            data.file().sync_all().map_err(Error::write(&from))?;
            match fs::hard_link(&from, &to) {
                // Somebody else took over the same one.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                linked => linked.map_err(Error::write(&to))?,
            }
        }
        sync_directory(&self.generations)?;
        self.place(path, &read, None).map(|_| ())
    }

    /// Keeps what the header at `path` refers to now, for another process to open it: whether that finds this header or one
    /// that a merge puts in its place meanwhile, all of its generations are there.
    pub fn hold(&self, path: &Path) -> Result<Held, Error> {
        let references = &mut lock(&self.references);
        let referrer = references.get(path).ok_or_else(|| Error::Unknown(path.to_owned()))?;
        let used = referrer.generations.clone().unwrap_or_default();
        Ok(Held { _pin: Pin::new(&self.references, references, used) })
    }

    /// Removes a header, durably. What only it referred to is garbage then. One that is not there is removed already.
    pub fn remove(&self, path: &Path) -> Result<(), Error> {
        let before = {
            let mut references = lock(&self.references);
            match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(|source| Error::Remove { path: path.to_owned(), source })?,
            }
            let before = references.get(path).and_then(|referrer| referrer.generations.clone()).unwrap_or_default();
            let before = Pin::new(&self.references, &mut references, before);
            references.remove(path);
            before
        };
        settle(before, directory_of(path))
    }

    /// Rewrites the generations of the header at `path` into one if there are [`MERGE_AT`](crate::MERGE_AT) or more,
    /// and replaces the header. Its memory stays what it is, and whoever has it open can go on reading.
    ///
    /// Meant for a thread of its own, off the way of any pause. `stop` ends it soon; a pause or removal of the same
    /// header meanwhile wins; being killed leaves garbage at worst.
    pub fn merge(&self, path: &Path, stop: &AtomicBool) -> Result<Merged, Error> {
        let old = self.pinned(path)?;
        if !merge::is_due(&old.header) {
            return Ok(Merged::NotDue);
        }
        let fold = merge::fold(&old.header)?;
        let snapshot = Snapshot::with_header(&self.generations, old.header.clone()).map_err(Error::Generation)?;
        let id = random_id()?;
        let _pin = self.pin(Vec::new(), id);
        let mut writer = Writer::create(&self.generations, id)?;
        for run in &fold.copied {
            let file = &snapshot.files()[usize::from(run.generation)];
            let (mut at, end) = (offset_of(run.page), offset_of(run.page + run.pages));
            while at < end {
                if stop.load(Ordering::Relaxed) {
                    return Ok(Merged::Stopped);
                }
                let room = writer.room(end - at)?;
                file.read_exact_at(room, at).map_err(Error::Generation)?;
                let len = room.len() as u64;
                writer.accept((len / PAGE_SIZE) as usize);
                at += len;
            }
        }
        let header = fold.apply(&old.header, id)?;
        let bytes_written = writer.commit()?;
        let is_placed = self.place(path, &header, Some(old.commit))?;
        Ok(if is_placed { Merged::Done(bytes_written) } else { Merged::Superseded })
    }

    /// Removes every generation that nothing refers to, and what unfinished writes left.
    pub fn collect(&self) -> Result<Collected, Error> {
        let mut collected = Collected::default();
        for (path, id, bytes) in self.files()? {
            let Some(id) = id else { continue };
            // Locked for each file and not for all: a pause must not wait for many files to be removed.
            let references = lock(&self.references);
            if let Some(unreadable) = references.unreadable() {
                return Err(Error::Blocked(unreadable.to_owned()));
            }
            if references.is_used(id) {
                continue;
            }
            match fs::remove_file(&path) {
                // Whoever collects at the same time, or wrote it and gave up, was first.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                removed => removed.map_err(|source| Error::Remove { path, source })?,
            }
            collected.files += 1;
            collected.bytes += bytes;
        }
        Ok(collected)
    }

    /// Compares what is there with what is referred to, and opens every snapshot. Pages are not read.
    pub fn audit(&self) -> Result<Audit, Error> {
        let mut audit = Audit::default();
        for (path, id, bytes) in self.files()? {
            let Some(id) = id else {
                audit.foreign.push(path);
                continue;
            };
            let is_used = lock(&self.references).is_used(id);
            let counted = if is_used { &mut audit.used } else { &mut audit.garbage };
            counted.files += 1;
            counted.bytes += bytes;
        }
        let headers = lock(&self.references).paths();
        for path in headers {
            if let Err(source) = Snapshot::open(&self.generations, &path) {
                audit.broken.push(Broken { path: path.clone(), error: Error::Open { path, source } });
            }
        }
        Ok(audit)
    }

    /// Every file of the directory: its path, the generation that it is or was to be, and its length.
    fn files(&self) -> Result<Vec<(PathBuf, Option<Id>, u64)>, Error> {
        let failed = Error::directory(&self.generations);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.generations).map_err(&failed)? {
            let entry = entry.map_err(&failed)?;
            let len = match entry.metadata() {
                // It was a temporary one, and is committed or gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata.map_err(&failed)?.len(),
            };
            let name = entry.file_name();
            let id = name.to_str().map(|name| name.strip_prefix(TEMPORARY).unwrap_or(name)).and_then(Id::parse);
            files.push((entry.path(), id, len));
        }
        Ok(files)
    }

    /// Reads a header and pins its generations: exactly those, whatever happens to it meanwhile.
    fn pinned(&self, path: &Path) -> Result<Pinned, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        let (file, commit, pin) = {
            let mut references = lock(&self.references);
            let referrer = references.get(path).ok_or_else(|| Error::Unknown(path.to_owned()))?;
            let (commit, used) = (referrer.commit, referrer.generations.clone().unwrap_or_default());
            // Headers are replaced under this lock, so this file is the one with those references.
            let file = File::open(path);
            (file, commit, Pin::new(&self.references, &mut references, used))
        };
        let mut bytes = Vec::new();
        file.and_then(|mut file| file.read_to_end(&mut bytes))
            .map_err(|source| failed(open::Error::ReadHeader { path: path.to_owned(), source }))?;
        let header =
            Header::decode(&bytes).map_err(|source| failed(open::Error::Header { path: path.to_owned(), source }))?;
        Ok(Pinned { header, commit, _pin: pin })
    }

    fn pin(&self, mut ids: Vec<Id>, new: Id) -> Pin {
        ids.push(new);
        Pin::new(&self.references, &mut lock(&self.references), ids)
    }

    /// Writes a header to `path`, and tells whether it did: not if another commit than `expected` is there.
    ///
    /// The generations of `header` must be pinned.
    fn place(&self, path: &Path, header: &Header, expected: Option<u64>) -> Result<bool, Error> {
        let mut name = path.as_os_str().to_owned();
        name.push(format!("{TEMPORARY}{}", random_id()?));
        let temporary = Temporary(PathBuf::from(name));
        File::create_new(&temporary.0)
            .and_then(|mut file| file.write_all(&header.encode()).and_then(|()| file.sync_all()))
            .map_err(Error::write(&temporary.0))?;
        let before = {
            let mut references = lock(&self.references);
            let there = references.get(path);
            if expected.is_some() && there.map(|referrer| referrer.commit) != expected {
                return Ok(false);
            }
            let before = there.and_then(|referrer| referrer.generations.clone()).unwrap_or_default();
            fs::rename(&temporary.0, path).map_err(Error::write(path))?;
            let before = Pin::new(&self.references, &mut references, before);
            references.put(path, Some(ids(header)));
            before
        };
        settle(before, directory_of(path))?;
        Ok(true)
    }
}

impl Packed {
    /// The memory's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was written to disk for it, without the header. Bytes.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }
}

struct Pinned {
    header: Header,
    commit: u64,
    _pin: Pin,
}

/// A header's temporary file, removed if it is still there.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It was renamed if all went well. What cannot be removed now is when the store is next opened.
        let _: io::Result<()> = fs::remove_file(&self.0);
    }
}

/// Removes what unfinished commits left beside a header.
fn remove_leftovers(header: &Path) -> Result<(), Error> {
    let (directory, Some(name)) = (directory_of(header), header.file_name()) else { return Ok(()) };
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::directory(directory))?,
    };
    let mut prefix = name.to_owned();
    prefix.push(TEMPORARY);
    for entry in entries {
        let entry = entry.map_err(Error::directory(directory))?;
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            let path = entry.path();
            fs::remove_file(&path).map_err(|source| Error::Remove { path, source })?;
        }
    }
    Ok(())
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a header's removal or replacement durable. Until then a loss of power may bring the old one back, so what it
/// needs stays pinned.
fn settle(before: Pin, directory: &Path) -> Result<(), Error> {
    // A directory that went with its header is as durably gone as the one it was in says.
    let there = directory.ancestors().find(|directory| directory.exists()).unwrap_or(directory);
    sync_directory(there).inspect_err(|_| before.keep())
}

/// Makes the names in a directory durable.
fn sync_directory(directory: &Path) -> Result<(), Error> {
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(Error::directory(directory))
}

fn random_id() -> Result<Id, Error> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(Error::Random)?;
    Ok(Id(id))
}
