//! Giving back what a record names, in the reverse order of acquiring it. Every step is idempotent and every step is
//! tried, so the same function ends a healthy capsule, a half-made one, and what a killed agent left behind.

use std::path::Path;

use api::CapsuleId;

use super::record::Record;
use crate::host::Host;

/// What could not be given back. The directory stays then, so that the next start of the agent tries again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VMM would not die, or its cgroup would not go.
    #[error("ending the VMM")]
    Vmm(#[source] vmm::cgroup::Error),
    /// The network stayed.
    #[error("removing the network")]
    Network(#[source] network::Error),
    /// The directory stayed.
    #[error("removing the capsule's directory")]
    Directory(#[source] std::io::Error),
}

/// Ends the capsule `id`, whose directory is `dir`, and gives back what `record` names (or what its id alone tells).
pub async fn release(host: &Host, id: CapsuleId, dir: &Path, record: Option<&Record>) -> Result<(), Vec<Error>> {
    let mut errors = Vec::new();
    let cgroup = host.cgroup(id);
    if let Err(error) = cgroup.kill().await {
        errors.push(Error::Vmm(error));
    }
    if let Err(error) = cgroup.remove().await {
        errors.push(Error::Vmm(error));
    }
    if let Some(slot) = record.and_then(|record| record.slot)
        && let Err(error) = host.destroy_network(slot).await
    {
        errors.push(Error::Network(error));
    }
    if errors.is_empty()
        && let Err(error) = tokio::fs::remove_dir_all(dir).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        errors.push(Error::Directory(error));
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}
