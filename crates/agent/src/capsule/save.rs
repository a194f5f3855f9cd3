//! Saving a running capsule, in two ways that share their parts: [`pause`] puts it aside, [`capture`] keeps what it is now
//! as a point for others and lets it go on.
//!
//! The VMM writes the guest's memory to a tmpfs of its own; what was written since the last snapshot and is not zero is
//! packed from there into a generation on disk. Until that is done the record says that the capsule has no base
//! ([`Base::Lost`]): the VMM has forgotten what was written before, so a snapshot that fails must be followed by a full one.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use snapshot::Packed;
use tracing::{debug, warn};
use vmm::client::{Client, Feature, SnapshotKind};
use vmm::process::Scratch;

use super::files;
use super::record::{Base, Journal, Phase, Record, Saved};
use super::start::Running;
use crate::host::{Host, blocking, collect};

/// Names of what the VMM writes in its scratch directory.
const DUMP: &str = "memory";
const STATE: &str = "state";

/// The largest state of a VMM, in bytes. Those of `firecracker-qemu` have some hundred KiB.
const STATE_LIMIT: u64 = 32 << 20;

/// The step of a save that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The record could not be written.
    #[error("writing the capsule's record")]
    Record(#[source] io::Error),
    /// The VMM refused what it was asked.
    #[error("asking the VMM")]
    Vmm(#[source] vmm::client::Error),
    /// What the VMM wrote could not be used.
    #[error("reading what the VMM wrote")]
    Dump(#[source] io::Error),
    /// The memory could not be stored.
    #[error("storing the memory")]
    Memory(#[source] snapshot::Error),
    /// Some of its memory is still in the object store.
    #[error("waiting for the rest of its memory")]
    Remote(#[source] super::remote::Error),
    /// The disk could not be shared.
    #[error("cloning the root disk")]
    Disk(#[source] disk::Error),
    /// The disk could not be made durable.
    #[error("writing out the root disk")]
    Sync(#[source] disk::Error),
    /// What was saved could not be made durable or put in its place.
    #[error("keeping what was saved")]
    Keep(#[source] io::Error),
}

/// A save that failed.
#[derive(Debug, thiserror::Error)]
#[error("{}", if *.goes_on { "the capsule goes on" } else { "the guest stands still" })]
pub struct Failed {
    /// At what.
    #[source]
    pub error: Error,
    /// Whether the guest runs as before. If not, its VMM is of no use any more.
    pub goes_on: bool,
}

/// Saves the capsule and leaves it standing still, recorded as paused: from then on nothing that runs of it is needed.
pub async fn pause(host: &Arc<Host>, journal: &mut Journal, running: &Running) -> Result<(), Failed> {
    let mut save = Save::begin(journal, Phase::Pausing).map_err(|error| Failed { error, goes_on: true })?;
    running.prepare().await;
    let saved = async {
        let client = running.client().await.map_err(Error::Vmm)?;
        client.pause().await.map_err(Error::Vmm)?;
        save.dump(&client, journal).await?;
        let disk = journal.dir().join(files::DISK);
        let (synced, packed) = tokio::join!(host.sync_disk(&disk), save.pack(host, journal, running));
        // Before there is a header: who finds that, and no VMM, takes the pause for whole.
        synced.map_err(Error::Sync)?;
        save.keep(host, journal, packed?).await
    };
    let saved = saved.await;
    give_back_dump(journal.dir(), running).await;
    let (error, whole) = match saved {
        Ok(saved) => match journal.commit(|record| save.done(record, Phase::Paused, saved.clone())) {
            Ok(()) => return Ok(()),
            Err(error) => (Error::Record(error), Some(saved)),
        },
        Err(error) => (error, None),
    };
    let is_said = may_say_paused(journal);
    let undone = journal.note(|record| save.undo(record)).and_then(|()| files::sync(journal.dir()));
    // Where the record may say that it is paused, what was saved must stay. Where it says that it is being paused, what was
    // saved must go, or it is taken for a whole pause once the VMM is gone.
    let is_gone = (undone.is_ok() || !is_said) && save.discard(host, journal);
    if let (Err(again), false, Some(saved)) = (&undone, is_gone, whole) {
        // The next agent finds a pause, whatever is done here. What was saved is whole.
        warn!(dir = %journal.dir().display(), error = again as &dyn std::error::Error, "paused, with a record that may not say so");
        let _ = journal.note(|record| save.done(record, Phase::Paused, saved));
        return Ok(());
    }
    Err(Failed { error, goes_on: go_on(journal.dir(), running).await })
}

/// After a commit that failed: whether the record on disk is the new one all the same.
fn may_say_paused(journal: &Journal) -> bool {
    match Journal::open(journal.dir().to_owned()) {
        Ok(Some(found)) => found.record().phase == Phase::Paused,
        Ok(None) | Err(_) => true,
    }
}

/// Writes what the capsule is now into `dest`, an empty directory: header, VMM state and disk of a point. The guest stands
/// still while the VMM writes its memory, and goes on while that is packed. Says what the state file's digest is.
pub async fn capture(
    host: &Arc<Host>,
    journal: &mut Journal,
    running: &Running,
    dest: &Path,
) -> Result<String, Failed> {
    let mut save = Save::begin(journal, Phase::Running).map_err(|error| Failed { error, goes_on: true })?;
    running.prepare().await;
    let stopped = async {
        let client = running.client().await.map_err(Error::Vmm)?;
        client.pause().await.map_err(Error::Vmm)?;
        save.dump(&client, journal).await?;
        let (disk, clone) = (journal.dir().join(files::DISK), dest.join(files::DISK));
        host.clone_disk(&disk, &clone).await.map_err(Error::Disk)?;
        Ok(client.version().has(Feature::DiffsOnDiffs))
    };
    let stopped = stopped.await;
    let goes_on = go_on(journal.dir(), running).await;
    debug!(dir = %journal.dir().display(), "goes on");
    let kept = async {
        let is_base = stopped?;
        let packed = save.pack(host, journal, running).await?;
        let saved = save.keep(host, journal, packed).await?;
        save.place(host, journal, dest).await?;
        let digest = saved.state.clone();
        let done = |record: &mut Record| match is_base {
            true => save.done(record, Phase::Running, saved),
            false => save.undo(record),
        };
        journal.update(done).map_err(Error::Record)?;
        Ok((digest, is_base))
    };
    let kept = kept.await;
    give_back_dump(journal.dir(), running).await;
    match kept {
        Ok((digest, is_base)) if goes_on => {
            files::tidy(&host.memory, journal.dir(), is_base.then_some(save.number));
            Ok(digest)
        }
        Ok(_) => Err(Failed { error: Error::Dump(io::ErrorKind::BrokenPipe.into()), goes_on }),
        Err(error) => {
            // On disk it has no base, which is as true.
            let _ = journal.update(|record| save.undo(record));
            save.discard(host, journal);
            Err(Failed { error, goes_on })
        }
    }
}

/// Lets the guest run again, and its processes with it; those that it does not within a while, its driver lets go on.
async fn go_on(dir: &Path, running: &Running) -> bool {
    let resumed = async { running.client().await?.resume().await };
    if let Err(error) = resumed.await {
        warn!(dir = %dir.display(), error = &error as &dyn std::error::Error, "the guest stands still");
        return false;
    }
    running.guest.wake().await;
    true
}

/// What the VMM has written.
fn scratch(running: &Running) -> Result<Scratch, Error> {
    running.process.scratch().cloned().ok_or_else(|| Error::Dump(io::ErrorKind::NotFound.into()))
}

/// Removes what the VMM has written, whatever came of it: it is memory beside what the capsule was promised, which may go on for
/// long.
async fn give_back_dump(dir: &Path, running: &Running) {
    let Ok(scratch) = scratch(running) else { return };
    let removed = blocking(move || scratch.remove(DUMP).and_then(|()| scratch.remove(STATE)));
    if let Err(error) = removed.await {
        warn!(dir = %dir.display(), %error, "what the VMM wrote for a save stays until the next");
    }
}

/// Keeps what the VMM wrote of its own state, whatever that is: nobody but a VMM reads it.
fn keep_state(scratch: &Scratch, state: &Path) -> Result<String, Error> {
    let mut written = scratch.open(STATE).map_err(Error::Dump)?.take(STATE_LIMIT + 1);
    let mut kept = File::create(state).map_err(Error::Keep)?;
    if io::copy(&mut written, &mut kept).map_err(Error::Keep)? > STATE_LIMIT {
        return Err(Error::Dump(io::ErrorKind::FileTooLarge.into()));
    }
    kept.sync_all().map_err(Error::Keep)?;
    files::digest(state).map_err(Error::Keep)
}

/// The guest's memory as the VMM wrote it, which is to have so many bytes.
fn dumped(scratch: &Scratch, size: u64) -> io::Result<File> {
    let memory = scratch.open(DUMP)?;
    match memory.metadata()?.len() == size {
        true => Ok(memory),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "the guest's memory has another size")),
    }
}

/// One snapshot in the making.
struct Save {
    number: u32,
    /// What it adds to.
    base: Base,
    /// Whether the VMM may have forgotten what was written since `base`.
    dumped: bool,
}

impl Save {
    fn begin(journal: &mut Journal, phase: Phase) -> Result<Self, Error> {
        let base = journal.record().base.clone();
        let begun = journal.update(|record| {
            record.phase = phase;
            record.snapshots += 1;
            record.base = Base::Lost;
        });
        begun.map_err(Error::Record)?;
        Ok(Self { number: journal.record().snapshots, base, dumped: false })
    }

    /// Has the VMM write its state and the memory where nobody else sees it.
    async fn dump(&mut self, client: &Client, journal: &Journal) -> Result<(), Error> {
        self.dumped = true;
        let kind = match self.base {
            Base::Boot | Base::Snapshot(_) => SnapshotKind::Diff,
            Base::Lost => SnapshotKind::Full,
        };
        let inside = Path::new(vmm::CAPSULE_DIR).join(vmm::SCRATCH_DIR);
        let (state, memory) = (inside.join(STATE), inside.join(DUMP));
        let size = journal.record().spec.memory_mib;
        client.create_snapshot(kind, &state, &memory, size).await.map_err(Error::Vmm)?;
        debug!(dir = %journal.dir().display(), ?kind, "dumped");
        Ok(())
    }

    /// Makes what was dumped durable, but for the header and the record that say so.
    async fn pack(&self, host: &Arc<Host>, journal: &Journal, running: &Running) -> Result<(Packed, Saved), Error> {
        let dir = journal.dir().to_owned();
        let parent = match &self.base {
            Base::Snapshot(saved) => Some(dir.join(files::memory(saved.number))),
            Base::Boot | Base::Lost => None,
        };
        let (scratch, store, number) = (scratch(running)?, host.memory.clone(), self.number);
        let size = u64::from(journal.record().spec.memory_mib) << 20;
        let packed = blocking(move || {
            let digest = keep_state(&scratch, &dir.join(files::state(number)))?;
            let memory = dumped(&scratch, size).map_err(Error::Dump)?;
            let packed = store.pack(&memory, parent.as_deref()).map_err(Error::Memory)?;
            Ok((packed, Saved { number, state: digest }))
        });
        let packed = packed.await;
        debug!(dir = %journal.dir().display(), "packed");
        packed
    }

    /// Makes what was packed the capsule's snapshot, durably, but for the record.
    async fn keep(
        &self,
        host: &Arc<Host>,
        journal: &Journal,
        (packed, saved): (Packed, Saved),
    ) -> Result<Saved, Error> {
        let (store, header) = (host.memory.clone(), journal.dir().join(files::memory(self.number)));
        blocking(move || store.commit(&packed, &header)).await.map_err(Error::Memory)?;
        Ok(saved)
    }

    /// Gives a point its share of the snapshot.
    async fn place(&self, host: &Arc<Host>, journal: &Journal, dest: &Path) -> Result<(), Error> {
        let (store, dir, dest, number) = (host.memory.clone(), journal.dir().to_owned(), dest.to_owned(), self.number);
        let place = move || {
            fs::copy(dir.join(files::state(number)), dest.join(files::STATE)).map_err(Error::Keep)?;
            store.link(&dir.join(files::memory(number)), &dest.join(files::MEMORY)).map_err(Error::Memory)
        };
        blocking(place).await
    }

    /// What is recorded when all of it is in place.
    fn done(&self, record: &mut Record, phase: Phase, saved: Saved) {
        record.phase = phase;
        record.base = Base::Snapshot(saved);
        if phase == Phase::Paused {
            record.generation += 1;
        }
    }

    /// What is recorded when nothing came of it, or nothing that the next one could add to.
    fn undo(&self, record: &mut Record) {
        record.phase = Phase::Running;
        record.base = if self.dumped { Base::Lost } else { self.base.clone() };
    }

    /// Removes what came of it. False when its header stayed, which would be taken for a whole pause.
    fn discard(&self, host: &Host, journal: &Journal) -> bool {
        let keep = match &journal.record().base {
            Base::Snapshot(saved) => Some(saved.number),
            Base::Boot | Base::Lost => None,
        };
        files::tidy(&host.memory, journal.dir(), keep);
        // It may have taken the last of the disk.
        collect(&host.memory);
        !journal.dir().join(files::memory(self.number)).exists()
    }
}
