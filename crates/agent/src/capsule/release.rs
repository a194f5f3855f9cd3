//! Giving back what a record names, in the reverse order of acquiring it. Every step is idempotent and every step is
//! tried, so the same functions end a healthy capsule, put one aside, and clean up after a half-made one or a killed agent.

use std::path::Path;

use api::CapsuleId;

use super::files;
use super::record::Record;
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

/// Ends what runs of the capsule `id`, whose directory is `dir`, and frees its network and its disk's device, as `record` names
/// it (or its id alone tells). Its files stay.
pub async fn stop(host: &Host, id: CapsuleId, dir: &Path, record: Option<&Record>) -> Result<(), Vec<Error>> {
    let mut errors = Vec::new();
    let cgroup = host.cgroup(id);
    if let Err(error) = cgroup.kill().await {
        errors.push(Error::Vmm(error));
    }
    if let Err(error) = cgroup.remove().await {
        errors.push(Error::Vmm(error));
    }
    if errors.is_empty()
        && let Err(error) = files::remove_vm(dir)
    {
        errors.push(Error::Directory(error));
    }
    if let Some(slot) = record.and_then(|record| record.slot)
        && let Err(error) = host.destroy_network(slot).await
    {
        errors.push(Error::Network(error));
    }
    // Last: the VMM has let it go.
    if let Err(error) = host.detach_disk(&dir.join(files::DISK)).await {
        errors.push(Error::Disk(error));
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Ends the capsule `id`, whose directory is `dir`, and gives back all of it.
pub async fn release(host: &Host, id: CapsuleId, dir: &Path, record: Option<&Record>) -> Result<(), Vec<Error>> {
    stop(host, id, dir, record).await?;
    files::remove_all(&host.memory, dir).map_err(|error| vec![Error::Directory(error)])?;
    collect(&host.memory);
    Ok(())
}
