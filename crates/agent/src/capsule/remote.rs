//! A paused capsule in the object store: putting it there, and taking it from there.
//!
//! An upload is a manifest with the record, header, VMM state, disk and generations of a pause. The disk's chunks that the
//! image has are not in it, so who adopts the capsule needs that image, which is there too ([`crate::images`]).
//!
//! What is adopted is a paused capsule like any other, but for its memory: its directory has a directory [`files::REMOTE`]
//! with the header and, for each generation that this host has not, a file that is filled as it is read
//! ([`objects::Lazy`]). Who resumes it has its pager read there and bring what is missing. Once all of it has come,
//! [`complete`] hands the generations to the host's own store. Nobody but the pager knows a memory that is half here.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::CapsuleId;
use objects::{Chunk, Entry, Manifest, Objects, Sent, Source};
use serde::{Deserialize, Serialize};
use snapshot::{Header, Snapshot, Store};
use tracing::{debug, info};

use super::files;
use super::pager;
use super::record::{Base, Journal, Phase, Record};
use crate::host::{Host, blocking};
use crate::images;

/// Without a byte of the memory having come for so long, nobody waits for the rest.
const STUCK: Duration = Duration::from_secs(60);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The step that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This host is not told of one.
    #[error("this host has no object store")]
    NoObjects,
    /// The object store refused, or has something else than it should.
    #[error("using the object store")]
    Objects(#[source] objects::Error),
    /// What was saved could not be read.
    #[error("reading what was saved")]
    Read(#[source] io::Error),
    /// The saved memory could not be read.
    #[error("reading the saved memory")]
    Memory(#[source] snapshot::OpenError),
    /// The memory could not be kept from being collected, or taken over.
    #[error("taking over the memory")]
    Store(#[source] snapshot::Error),
    /// There is no upload of that capsule.
    #[error("the object store has no capsule {0}")]
    Unknown(CapsuleId),
    /// What there is describes no capsule that can be resumed.
    #[error("what the object store has of the capsule is damaged: {0}")]
    Damaged(&'static str),
    /// The image under its disk is not here, and cannot come.
    #[error("neither this host nor the object store has the image `{0}`, which it was made from")]
    NoImage(String),
    /// The disk could not be made or read.
    #[error("using the root disk")]
    Disk(#[source] disk::Error),
    /// It is here already, in some state.
    #[error("the capsule is being adopted already")]
    Busy,
    /// What came could not be put in its place.
    #[error("keeping what came from the object store")]
    Keep(#[source] io::Error),
    /// What is missing of its memory cannot come.
    #[error("some of its memory is not in the object store any more")]
    Incomplete,
    /// Nothing of it came for a while.
    #[error("its memory has not all come from the object store, and nothing more comes")]
    Stuck,
    /// What would bring it is gone, or the VMM is.
    #[error("the capsule ended while its memory came from the object store")]
    Ended,
}

impl Error {
    /// Whether the same may succeed later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Objects(error) if error.is_passing())
    }

    /// Whether what was uploaded is of no use.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Objects(error) => matches!(
                error,
                objects::Error::Missing(_) | objects::Error::Damaged { .. } | objects::Error::Manifest { .. }
            ),
            Self::Damaged(_) | Self::Disk(disk::Error::ImageChanged(_)) => true,
            _ => false,
        }
    }
}

/// What an upload says of itself.
#[derive(Serialize, Deserialize)]
struct Description {
    capsule: Record,
}

/// What a capsule's upload is called.
pub fn name(id: CapsuleId) -> String {
    format!("capsules/{id}")
}

/// Uploads the pause that `record` describes, which stays as it is until this ends.
pub async fn upload(host: &Host, objects: &Objects, dir: &Path, record: Record) -> Result<Sent, Error> {
    let Base::Snapshot(saved) = &record.base else { return Err(Error::Damaged("it has no snapshot")) };
    let header = dir.join(files::memory(saved.number));
    // A merge may replace the header and have its generations collected meanwhile.
    let held = host.memory.hold(&header).map_err(Error::Store)?;
    let sources = sources(host, dir, header, &files::state(saved.number), record.image.as_deref()).await?;
    let (id, image) = (record.spec.id, record.image.clone());
    let description = Description { capsule: record };
    let description = serde_json::to_vec(&description).expect("a record has only JSON types");
    let sent = objects.upload(&name(id), description, sources).await.map_err(Error::Objects)?;
    drop(held);
    if let Some(image) = image {
        images::upload(host, objects, &image).await?;
    }
    Ok(sent)
}

/// The file name of the image under the disk of an upload, if that is a capsule's.
pub fn image(manifest: &Manifest) -> Option<String> {
    serde_json::from_slice::<Description>(&manifest.description).ok()?.capsule.image
}

/// Whether the object store has the pause that `record` describes, that and not an earlier one, and all that it needs.
pub async fn has(host: &Host, objects: &Objects, record: &Record) -> Result<bool, Error> {
    let manifest = match objects.manifest(&name(record.spec.id)).await {
        // An upload replaces it.
        Err(objects::Error::Manifest { .. }) => None,
        manifest => manifest.map_err(Error::Objects)?,
    };
    let Some(manifest) = manifest else { return Ok(false) };
    let is_ours = |Description { capsule }| capsule.spec.id == record.spec.id && capsule.base == record.base;
    if !serde_json::from_slice(&manifest.description).is_ok_and(is_ours) {
        return Ok(false);
    }
    match images::under(&manifest) {
        Some(image) => images::upload(host, objects, &image).await,
        None => Ok(true),
    }
}

/// The files of what was saved in `dir`, whose header has to be held.
pub async fn sources(
    host: &Host,
    dir: &Path,
    header: PathBuf,
    state: &str,
    image: Option<&str>,
) -> Result<Vec<Source>, Error> {
    let image = image.map(|name| host.image_file(name));
    let (generations, dir, state) = (host.memory.generations().to_owned(), dir.to_owned(), state.to_owned());
    let disks = host.disks.clone();
    let open = move || {
        let snapshot = Snapshot::open(&generations, &header).map_err(Error::Memory)?;
        let disk = disks.flat(&dir.join(files::DISK)).map_err(Error::Disk)?;
        open_sources(&dir, &state, disk, image.as_deref(), &snapshot).map_err(Error::Read)
    };
    blocking(open).await
}

fn open_sources(
    dir: &Path,
    state: &str,
    disk: File,
    image: Option<&Path>,
    snapshot: &Snapshot,
) -> io::Result<Vec<Source>> {
    let plain = |name: &str, file| Source { name: name.into(), file, base: None, is_named_by_content: false };
    let mut header = File::from(rustix::fs::memfd_create("header", rustix::fs::MemfdFlags::CLOEXEC)?);
    header.write_all(&snapshot.header().encode())?;
    let mut disk = plain(files::DISK, disk);
    disk.base = match image.map(File::open) {
        // Then all of the disk is sent.
        Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => None,
        image => image.transpose()?.map(|file| below(&disk.file, file)).transpose()?,
    };
    let mut sources = vec![plain(files::MEMORY, header), plain(files::STATE, File::open(dir.join(state))?), disk];
    for data in snapshot.files() {
        let mut source = plain(&data.generation().id.to_string(), data.file().try_clone()?);
        source.is_named_by_content = true;
        sources.push(source);
    }
    Ok(sources)
}

/// The image of a disk, to upload the disk without what they share.
fn below(disk: &File, image: File) -> io::Result<objects::Base> {
    let same = disk::same_ranges(disk, &image)?;
    Ok(objects::Base { file: image, same })
}

/// Makes the capsule `id`, which is not on this host, one that is paused here and whose generation is above `generation`.
/// When that fails nothing of it is here.
pub async fn adopt(host: &Arc<Host>, id: CapsuleId, generation: u64) -> Result<Journal, Error> {
    let objects = host.objects.clone().ok_or(Error::NoObjects)?;
    let manifest = objects.manifest(&name(id)).await.map_err(Error::Objects)?.ok_or(Error::Unknown(id))?;
    let description: Description =
        serde_json::from_slice(&manifest.description).map_err(|_| Error::Damaged("its record cannot be read"))?;
    let mut record = description.capsule;
    let Base::Snapshot(saved) = record.base.clone() else { return Err(Error::Damaged("it has no snapshot")) };
    if record.spec.id != id {
        return Err(Error::Damaged("it is another capsule"));
    }
    // Until it is whole: who dies meanwhile leaves garbage.
    record.phase = Phase::Starting;
    record.generation = record.generation.max(generation) + 1;
    (record.slot, record.vmm, record.pager) = (None, None, None);
    (record.uploaded, record.uploaded_to) = (Some(saved.number), host.store());
    record.is_remote = true;
    let dir = host.capsules().join(id.to_string());
    let mut journal = Journal::create_with(dir.clone(), record).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::Busy,
        _ => Error::Keep(error),
    })?;
    let adopted = async {
        let image = journal.record().image.clone();
        let state = files::state(saved.number);
        let missing = place(host, &objects, &dir, &state, &saved.state, image.as_deref(), &manifest).await?;
        let is_whole = missing.is_empty();
        let missing = Manifest { description: Vec::new(), files: missing }.encode();
        let missing = missing.map_err(|_| Error::Damaged("its memory has files that are not acceptable"))?;
        fs::write(dir.join(files::REMOTE).join(files::REMOTE_FILES), missing).map_err(Error::Keep)?;
        let durable = dir.clone();
        let keep = move || files::sync_all_in(&durable.join(files::REMOTE)).and_then(|()| files::sync_all_in(&durable));
        blocking(keep).await.map_err(Error::Keep)?;
        journal.commit(|record| record.phase = Phase::Paused).map_err(Error::Keep)?;
        // It may be that every generation is here, as where it was uploaded.
        if is_whole { complete(&host.memory, &mut journal).await } else { Ok(()) }
    };
    let adopted = adopted.await;
    match adopted {
        Ok(()) => {
            info!(capsule = %id, is_remote = journal.record().is_remote, "adopted from the object store");
            Ok(journal)
        }
        Err(error) => {
            if let Err(left) = files::remove_all(&host.memory, &dir) {
                tracing::warn!(capsule = %id, error = %left, "left behind by an adoption");
            }
            Err(error)
        }
    }
}

/// Puts what the upload has in `dir`: state and disk whole, the header in [`files::REMOTE`] with those generations that are
/// here. Says which are not.
pub async fn place(
    host: &Host,
    objects: &Objects,
    dir: &Path,
    state: &str,
    digest: &str,
    image: Option<&str>,
    manifest: &Manifest,
) -> Result<Vec<Entry>, Error> {
    let (remote, state, rootfs) = (dir.join(files::REMOTE), dir.join(state), dir.join(files::DISK));
    fs::create_dir(&remote).map_err(Error::Keep)?;
    fetch(objects, manifest, files::STATE, state.clone()).await?;
    fetch(objects, manifest, files::MEMORY, remote.join(files::MEMORY)).await?;
    if blocking(move || files::digest(&state)).await.map_err(Error::Keep)? != digest {
        return Err(Error::Damaged("the VMM's state is another"));
    }

    let disk = entry(manifest, files::DISK)?;
    if disk.chunks.contains(&Chunk::Base) {
        let image = image.ok_or(Error::Damaged("it has a disk over an image that it does not name"))?;
        images::fetch(host, objects, image).await?;
        host.clone_disk(&host.image_file(image), &rootfs).await.map_err(Error::Disk)?;
        let file = File::options().read(true).write(true).open(&rootfs).map_err(Error::Keep)?;
        objects.download(disk, file).await.map_err(Error::Objects)?;
    } else {
        fetch(objects, manifest, files::DISK, rootfs).await?;
    }

    let header = fs::read(remote.join(files::MEMORY)).map_err(Error::Keep)?;
    let header = Header::decode(&header).map_err(|_| Error::Damaged("its memory's header cannot be read"))?;
    let mut missing = Vec::new();
    for generation in header.generations() {
        let name = generation.id.to_string();
        match fs::hard_link(host.memory.generations().join(&name), remote.join(&name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(entry(manifest, &name)?.clone()),
            linked => linked.map_err(Error::Keep)?,
        }
    }
    debug!(dir = %dir.display(), missing = missing.len(), "adopted all but the memory");
    Ok(missing)
}

fn entry<'a>(manifest: &'a Manifest, name: &str) -> Result<&'a Entry, Error> {
    manifest.file(name).ok_or(Error::Damaged("a file is not in it"))
}

/// Makes the file `path` what the upload has as `name`.
async fn fetch(objects: &Objects, manifest: &Manifest, name: &'static str, path: PathBuf) -> Result<(), Error> {
    let file = File::options().read(true).write(true).create_new(true).open(path).map_err(Error::Keep)?;
    objects.download(entry(manifest, name)?, file).await.map_err(Error::Objects)
}

/// Makes a memory that has all come this host's own.
pub async fn complete(memory: &Store, journal: &mut Journal) -> Result<(), Error> {
    let Base::Snapshot(saved) = journal.record().base.clone() else { return Err(Error::Damaged("it has no snapshot")) };
    let (memory, dir) = (memory.clone(), journal.dir().to_owned());
    let remote = dir.join(files::REMOTE);
    let adopt = move || memory.adopt(&remote.join(files::MEMORY), &remote, &dir.join(files::memory(saved.number)));
    blocking(adopt).await.map_err(Error::Store)?;
    journal.commit(|record| record.is_remote = false).map_err(Error::Keep)?;
    info!(capsule = %journal.record().spec.id, "all of its memory is here");
    tidy(journal);
    Ok(())
}

/// Removes what a completed memory left behind.
pub fn tidy(journal: &Journal) {
    if journal.record().is_remote {
        return;
    }
    match fs::remove_dir_all(journal.dir().join(files::REMOTE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(dir = %journal.dir().display(), %error, "what came from the object store stays twice for now");
        }
        _ => {}
    }
}

/// Resolves when all of the memory of the capsule in `dir` has come.
pub async fn arrived(dir: &Path) {
    while !pager::has_said(dir, "fetched") {
        tokio::time::sleep(LOOK / 4).await;
    }
}

/// The same, for who cannot wait for ever.
pub async fn awaited(dir: &Path) -> Result<(), Error> {
    let mut last = (come(dir), tokio::time::Instant::now());
    loop {
        tokio::select! {
            () = arrived(dir) => return Ok(()),
            () = tokio::time::sleep(LOOK) => {}
        }
        if pager::has_said(dir, "incomplete") {
            return Err(Error::Incomplete);
        }
        let now = come(dir);
        if now != last.0 {
            last = (now, tokio::time::Instant::now());
        } else if last.1.elapsed() >= STUCK {
            return Err(Error::Stuck);
        }
    }
}

/// How much has come, in blocks.
fn come(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir.join(files::REMOTE)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks()).sum()
}
