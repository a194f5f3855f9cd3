//! What a starting agent does with the capsules that an earlier one left: those that run are taken over as they are,
//! everything else is given back.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use api::CapsuleId;
use tracing::{error, info, warn};
use vmm::process::Process;

use super::Handle;
use super::driver::spawn_adopted;
use super::record::{Journal, Phase};
use super::release::release;
use super::start::Running;
use crate::guest::Guest;
use crate::host::Host;

/// Reading what was left behind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of all capsules could not be read.
    #[error("reading the capsules of an earlier run")]
    Read(#[source] std::io::Error),
    /// The network of an earlier run could not be cleaned.
    #[error("removing networks of an earlier run")]
    Network(#[source] network::Error),
    /// The processes of an earlier run could not be listed.
    #[error("looking for processes of an earlier run")]
    Processes(#[source] vmm::cgroup::Error),
}

/// Takes over or gives back everything an earlier agent had, and hands out the capsules that run.
pub async fn recover(host: &Arc<Host>) -> Result<Vec<(CapsuleId, Handle)>, Error> {
    let mut running = Vec::new();
    let mut garbage = Vec::new();
    for entry in std::fs::read_dir(host.capsules()).map_err(Error::Read)? {
        let dir = entry.map_err(Error::Read)?.path();
        match takeover(host, dir.clone()) {
            Some(found) => running.push(found),
            None => garbage.push(dir),
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
    for dir in garbage {
        let Some(id) = dir.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()) else {
            warn!(dir = %dir.display(), "this is not a capsule's directory; it is left alone");
            continue;
        };
        let journal = Journal::open(dir.clone());
        let released = release(host, id, &dir, journal.as_ref().map(Journal::record)).await;
        for error in released.err().unwrap_or_default() {
            error!(dir = %dir.display(), error = crate::chain(&error), "left behind by an earlier run, and still there");
        }
        info!(dir = %dir.display(), "gave back what an earlier run left");
    }
    let keep = running.iter().filter_map(|(journal, _)| journal.record().slot).collect();
    host.sweep_networks(&keep).map_err(Error::Network)?;
    Ok(running
        .into_iter()
        .map(|(journal, found)| {
            let id = journal.record().spec.id;
            info!(capsule = %id, "took over a running capsule");
            (id, spawn_adopted(host.clone(), journal, found))
        })
        .collect())
}

/// The capsule in `dir` if it runs and can be taken over.
fn takeover(host: &Host, dir: PathBuf) -> Option<(Journal, Running)> {
    let journal = Journal::open(dir)?;
    let record = journal.record();
    let slot = record.slot.filter(|_| record.phase == Phase::Running)?;
    let process = Process::adopt(record.vmm.as_ref()?, &host.cgroup(record.spec.id)).ok()??;
    let guest = Arc::new(Guest::new(slot.host_ip(), record.token.clone()));
    Some((journal, Running { process, guest }))
}
