//! What a starting agent does with the capsules that an earlier one left: those that run are taken over as they are, those
//! that are paused stay paused, and everything else is given back.
//!
//! | the record says | and | it is then |
//! |---|---|---|
//! | starting, stopping | | given back |
//! | running | the VMM is there | running |
//! | pausing | the VMM is there | running: nothing was committed |
//! | pausing | the VMM is gone, the snapshot whole | paused: only the record is missing |
//! | running, pausing | else | given back: the guest is gone |
//! | paused | | paused; what still runs of it is ended |
//! | resuming | | paused, with the disk that the pause had |
//! | nothing: there is none | | given back |
//! | nothing, or it is given back | there is a note of it | hibernated; any other makes the note void |
//! | nothing that can be read | | left alone: it may be paused. Nothing of it runs, and the audit names it |

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use api::CapsuleId;
use tracing::{error, info, warn};
use vmm::client::VmState;
use vmm::process::Process;

use super::driver::{spawn_adopted, spawn_paused};
use super::pager;
use super::record::{Base, Journal, Phase, Record, Saved};
use super::release::{release, stop};
use super::start::Running;
use super::{Handle, files, remote};
use crate::guest::Guest;
use crate::host::{Host, collect};
use crate::point;

/// Reading what was left behind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of all capsules could not be read.
    #[error("reading the capsules of an earlier run")]
    Read(#[source] std::io::Error),
    /// The network of an earlier run could not be cleaned.
    #[error("removing networks of an earlier run")]
    Network(#[source] network::Error),
    /// The disks of an earlier run could not be taken back.
    #[error("taking back disks of an earlier run")]
    Disks(#[source] disk::Error),
    /// The processes of an earlier run could not be listed.
    #[error("looking for processes of an earlier run")]
    Processes(#[source] vmm::cgroup::Error),
}

/// What a capsule's directory turns out to be.
enum Found {
    Running(Journal, Running),
    Paused(Journal),
    Garbage(PathBuf, Option<Journal>),
    /// What it is cannot be told, so its directory stays. Why was logged.
    Unknown,
}

/// Takes over or gives back everything an earlier agent had, and hands out the capsules that are there.
pub async fn recover(host: &Arc<Host>) -> Result<Vec<(CapsuleId, Handle)>, Error> {
    let mut running = Vec::new();
    let mut paused = Vec::new();
    let mut garbage = Vec::new();
    for entry in std::fs::read_dir(host.capsules()).map_err(Error::Read)? {
        match find(host, entry.map_err(Error::Read)?.path()).await {
            Found::Running(journal, found) => running.push((journal, found)),
            Found::Paused(journal) => paused.push(journal),
            Found::Garbage(dir, journal) => garbage.push((dir, journal)),
            Found::Unknown => {}
        }
    }
    let known: HashSet<CapsuleId> = running.iter().map(|(journal, _)| journal.record().spec.id).collect();
    for name in host.cgroups.list().map_err(Error::Processes)? {
        if !name.parse().is_ok_and(|id| known.contains(&id)) {
            let cgroup = host.cgroups.child(&name);
            cgroup.kill().await.map_err(Error::Processes)?;
            cgroup.remove().await.map_err(Error::Processes)?;
        }
    }
    for (dir, mut journal) in garbage {
        let Some(id) = dir.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()) else {
            warn!(dir = %dir.display(), "this is not a capsule's directory; it is left alone");
            continue;
        };
        let released = release(host, id, &dir, journal.as_mut()).await;
        for error in released.err().unwrap_or_default() {
            error!(dir = %dir.display(), error = crate::chain(&error), "left behind by an earlier run, and still there");
        }
        info!(dir = %dir.display(), "gave back what an earlier run left");
    }
    for journal in &mut paused {
        let (id, dir) = (journal.record().spec.id, journal.dir().to_owned());
        for error in stop(host, id, &dir, Some(journal)).await.err().unwrap_or_default() {
            error!(capsule = %id, error = crate::chain(&error), "left behind by an earlier run, and still there");
        }
        journal.stored_in(host.store().as_deref());
        if let Err(error) = pause_again(journal) {
            error!(capsule = %id, %error, "a pause of an earlier run could not be recorded");
        }
    }
    for journal in running.iter().map(|(journal, _)| journal).chain(&paused) {
        let keep = match &journal.record().base {
            Base::Snapshot(saved) => Some(saved.number),
            Base::Boot | Base::Lost => None,
        };
        files::tidy(&host.memory, journal.dir(), keep);
        remote::tidy(journal);
    }
    for entry in std::fs::read_dir(host.passing_all()).map_err(Error::Read)? {
        point::discard(&host.memory, &entry.map_err(Error::Read)?.path());
    }
    collect(&host.memory);
    for (journal, _) in &mut running {
        let Record { spec, slot, .. } = journal.record();
        match slot.map(|slot| host.take_over_slot(slot)) {
            Some(Ok(claim)) => journal.hold(claim),
            Some(Err(error)) => {
                error!(capsule = %spec.id, error = crate::chain(&error), "it will not give back its slot")
            }
            None => {}
        }
    }
    let keep = running.iter().filter_map(|(journal, _)| journal.record().slot).collect();
    host.sweep_networks(&keep).map_err(Error::Network)?;
    let disks: Vec<_> = running.iter().map(|(journal, _)| journal.dir().join(files::DISK)).collect();
    host.disks.sweep(&disks).map_err(Error::Disks)?;
    for (journal, _) in &running {
        let Record { spec, slot, egress, .. } = journal.record();
        if let Some(slot) = slot
            && !egress.is_open()
            && let Err(error) = host.egress.set(*slot, egress).await
        {
            // The rules that it had are there still, and who is sent to a filter that is not there gets nowhere.
            error!(capsule = %spec.id, error = crate::chain(&error), "what the capsule may reach is less than it should be");
        }
    }
    let running = running.into_iter().map(|(journal, found)| {
        let id = journal.record().spec.id;
        info!(capsule = %id, "took over a running capsule");
        (id, spawn_adopted(host.clone(), journal, found))
    });
    let paused = paused.into_iter().map(|journal| {
        let id = journal.record().spec.id;
        info!(capsule = %id, "found a paused capsule");
        (id, spawn_paused(host.clone(), journal))
    });
    let mut found: Vec<_> = running.chain(paused).collect();
    for note in host.hibernated_notes().map_err(Error::Read)? {
        let id = note.id();
        if found.iter().any(|(here, _)| *here == id) {
            host.drop_hibernated(id).map_err(Error::Read)?;
        } else {
            found.push((id, note.handle()));
        }
    }
    Ok(found)
}

/// Makes the record say that the capsule is paused and nothing of it runs, after its disk was put back to what the pause
/// had. Repeatable, like all of what follows a crash.
pub fn pause_again(journal: &mut Journal) -> io::Result<()> {
    if let Base::Snapshot(saved) = &journal.record().base {
        let disk = journal.dir().join(files::disk(saved.number));
        if journal.record().phase == Phase::Resuming && disk.exists() {
            std::fs::rename(disk, journal.dir().join(files::DISK))?;
            files::sync(journal.dir())?;
        }
    }
    let is_change = journal.record().phase != Phase::Paused;
    // It is so, and the next agent comes to the same without being told.
    let noted = journal.note(|record| {
        record.phase = Phase::Paused;
        record.slot = None;
        record.vmm = None;
        record.pager = None;
        record.generation += u64::from(is_change);
    });
    noted.and_then(|()| files::sync(journal.dir()))
}

/// What is in `dir`.
async fn find(host: &Arc<Host>, dir: PathBuf) -> Found {
    let mut journal = match Journal::open(dir.clone()) {
        Ok(Some(journal)) => journal,
        Ok(None) => return Found::Garbage(dir, None),
        Err(error) => {
            error!(dir = %dir.display(), %error, "a capsule's record cannot be read; its directory is left alone");
            return Found::Unknown;
        }
    };
    match journal.record().phase {
        Phase::Starting | Phase::Stopping => Found::Garbage(dir, Some(journal)),
        Phase::Paused | Phase::Resuming => Found::Paused(journal),
        Phase::Running | Phase::Pausing => {
            if let Some(running) = takeover(host, &journal).await {
                if let Err(error) = undo_pause(host, &mut journal) {
                    let error = crate::chain(&error);
                    error!(dir = %dir.display(), error, "a pause that may be whole cannot be undone; it is left alone");
                    return Found::Unknown;
                }
                return match go_on(&journal, &running).await {
                    true => Found::Running(journal, running),
                    false => Found::Garbage(dir, Some(journal)),
                };
            }
            match finish(&mut journal) {
                Ok(true) => Found::Paused(journal),
                Ok(false) => Found::Garbage(dir, Some(journal)),
                Err(error) => {
                    error!(dir = %dir.display(), %error, "it cannot be told whether a pause is whole; it is left alone");
                    Found::Unknown
                }
            }
        }
    }
}

/// The processes of a capsule, if they can be taken over.
async fn takeover(host: &Host, journal: &Journal) -> Option<Running> {
    let record = journal.record();
    let slot = record.slot?;
    let cgroup = host.cgroup(record.spec.id);
    let process = Process::adopt(record.vmm.as_ref()?, &cgroup, &journal.dir().join(files::VMM_LOG)).ok()??;
    let pager = match &record.pager {
        // One that has served everything is not missed.
        Some(identity) => match Process::adopt(identity, &cgroup, &journal.dir().join(files::PAGER_LOG)).ok()? {
            None if !pager::is_whole(journal.dir()) => {
                warn!(capsule = %record.spec.id, "the process that serves its memory is gone");
                return None;
            }
            pager => pager,
        },
        None => None,
    };
    let guest = Arc::new(Guest::new(slot.host_ip(), record.token.clone()));
    // The record does not say whether it was told to go on after it was saved; its driver asks.
    guest.hold();
    Some(Running { process, pager, guest })
}

/// Sees to it that what was saved of a guest that is about to go on is not taken for a pause any more.
fn undo_pause(host: &Host, journal: &mut Journal) -> Result<(), snapshot::Error> {
    if journal.record().phase != Phase::Pausing {
        return Ok(());
    }
    let noted = journal.note(|record| {
        record.phase = Phase::Running;
        record.generation += 1;
    });
    let Err(error) = noted else { return Ok(()) };
    error!(capsule = %journal.record().spec.id, %error, "writing the record of a capsule that was being paused");
    // As long as the record says that, it is one if its header is there.
    host.memory.remove(&journal.dir().join(files::memory(journal.record().snapshots)))
}

/// Makes sure that the guest runs, whatever the earlier agent was doing with it. False when that cannot be.
async fn go_on(journal: &Journal, running: &Running) -> bool {
    let id = journal.record().spec.id;
    let resumed = async {
        let client = running.client().await?;
        if client.instance_info().await?.state == VmState::Paused {
            client.resume().await?;
        }
        Ok::<(), vmm::client::Error>(())
    };
    if let Err(error) = resumed.await {
        error!(capsule = %id, error = crate::chain(&error), "the VMM of an earlier run does not answer");
        return false;
    }
    if journal.record().base == Base::Lost {
        // It may have been about to be saved, with its processes stopped, for as long as there was no agent.
        running.guest.wake().await;
    }
    true
}

/// Completes a pause whose snapshot is whole, but which no record speaks of yet. False when there is none.
fn finish(journal: &mut Journal) -> io::Result<bool> {
    let record = journal.record();
    let number = record.snapshots;
    if record.phase != Phase::Pausing || !journal.dir().join(files::memory(number)).try_exists()? {
        return Ok(false);
    }
    let state = match files::digest(&journal.dir().join(files::state(number))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        digest => digest?,
    };
    // Written with what follows, or found again by the next agent.
    let _ = journal.note(|record| record.base = Base::Snapshot(Saved { number, state }));
    Ok(true)
}
