//! Giving back what a record names, in the reverse order of acquiring it. Every step is idempotent and every step is
//! tried, so the same functions end a healthy capsule, put one aside, and clean up after a half-made one or a killed agent.

use std::path::Path;

use api::CapsuleId;

use super::files;
use super::record::Journal;
use crate::host::{Host, collect};

/// What could not be given back. The directory stays then, so that the next start of the agent tries again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VMM or its pager would not die, or their cgroup would not go.
    #[error("ending the VMM")]
    Vmm(#[source] vmm::cgroup::Error),
    /// The network stayed.
    #[error("removing the network")]
    Network(#[source] network::Error),
    /// The root disk is still in use.
    #[error("taking back the root disk")]
    Disk(#[source] disk::Error),
    /// The directory stayed.
    #[error("removing the capsule's directory")]
    Directory(#[source] std::io::Error),
}

/// Ends what runs of the capsule `id`, whose directory is `dir`, and frees its disk's device and its network, whose slot
/// `journal` forgets then. A slot that an earlier agent claimed is swept with the rest. Its files stay.
pub async fn stop(host: &Host, id: CapsuleId, dir: &Path, mut journal: Option<&mut Journal>) -> Result<(), Vec<Error>> {
    let mut errors = Vec::new();
    let cgroup = host.cgroup(id);
    if let Err(error) = cgroup.kill().await {
        errors.push(Error::Vmm(error));
    }
    if let Err(error) = cgroup.remove().await {
        errors.push(Error::Vmm(error));
    }
    // While a process may be left, it is in the one and has the other.
    if errors.is_empty() {
        if let Err(error) = files::remove_vm(dir) {
            errors.push(Error::Directory(error));
        }
        if let Some(journal) = &mut journal
            && let Some(claim) = journal.claim()
        {
            match host.destroy_network(claim).await {
                // Whatever else fails, and whatever can be written of it.
                Ok(()) => journal.let_go(),
                Err(error) => errors.push(Error::Network(error)),
            }
        }
    }
    // Last: the VMM has let it go.
    if let Err(error) = host.detach_disk(&dir.join(files::DISK)).await {
        errors.push(Error::Disk(error));
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Ends the capsule `id`, whose directory is `dir`, and gives back all of it.
pub async fn release(host: &Host, id: CapsuleId, dir: &Path, journal: Option<&mut Journal>) -> Result<(), Vec<Error>> {
    stop(host, id, dir, journal).await?;
    files::remove_all(&host.memory, dir).map_err(|error| vec![Error::Directory(error)])?;
    collect(&host.memory);
    Ok(())
}
