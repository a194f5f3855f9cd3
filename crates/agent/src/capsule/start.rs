//! Starting a capsule: slot, then network and disk at once, then the VMM, then the guest's first answer.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use network::slot::{GUEST_MAC, TAP};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use vmm::client::{Boot, Client};
use vmm::process::{Launch, Process};

use super::Spec;
use super::record::{Journal, Phase};
use crate::guest::{self, Guest};
use crate::host::Host;

/// From the VMM's start to the guest's first answer. A loaded machine without KVM needs seconds; nothing needs this.
const GUEST_LIMIT: Duration = Duration::from_secs(90);
/// From the VMM's exec to its API.
const SOCKET_LIMIT: Duration = Duration::from_secs(20);

/// What the guest kernel is told: a quiet serial console, its address, and envd as its init.
const BOOT_ARGS: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=1 pci=off random.trust_cpu=on \
    i8042.noaux i8042.nomux i8042.dumbkbd \
    ip=169.254.0.21::169.254.0.22:255.255.255.252:capsule:eth0:off init=/usr/local/bin/envd";

/// What a guest reads from its metadata service; E2B's names.
#[derive(Serialize)]
struct Metadata {
    #[serde(rename = "instanceID")]
    instance_id: String,
    #[serde(rename = "envID")]
    env_id: String,
}

/// The step of a start that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The record could not be written.
    #[error("writing the capsule's record")]
    Record(#[source] io::Error),
    /// No network slot could be claimed.
    #[error("claiming a network slot")]
    Claim(#[source] network::Error),
    /// The network could not be made.
    #[error("making the capsule's network")]
    Network(#[source] network::Error),
    /// The image is not on this host.
    #[error("this host has no image `{0}`")]
    NoImage(String),
    /// The root disk could not be made.
    #[error("making the root disk")]
    Disk(#[source] disk::Error),
    /// The VMM's cgroup could not be made.
    #[error("making the VMM's control group")]
    Cgroup(#[source] vmm::cgroup::Error),
    /// The VMM process could not be started.
    #[error("starting the VMM")]
    Launch(#[source] vmm::process::Error),
    /// The VMM refused what it was asked.
    #[error("configuring the VMM")]
    Configure(#[source] vmm::client::Error),
    /// The VMM ended before the guest answered.
    #[error("the VMM ended during the start ({0})")]
    Died(String),
    /// The guest booted for too long.
    #[error("the guest did not answer within {} s", GUEST_LIMIT.as_secs())]
    Silent,
    /// The guest answered, but not as it must.
    #[error("preparing the guest")]
    Guest(#[source] guest::Error),
    /// Somebody destroyed the capsule meanwhile.
    #[error("destroyed during the start")]
    Cancelled,
}

/// A capsule that runs: what its driver holds.
pub struct Running {
    /// The VMM.
    pub process: Process,
    /// The way into the guest.
    pub guest: Arc<Guest>,
}

/// Makes the capsule that `journal` describes. On failure the caller releases what the journal names.
pub async fn start(host: &Host, journal: &mut Journal, cancelled: &CancellationToken) -> Result<Running, Error> {
    let spec = journal.record().spec.clone();
    let image = host.images.get(&spec.image).ok_or_else(|| Error::NoImage(spec.image.clone()))?;
    // Each step says when it is done: `WRENN_LOG=agent=debug` shows where a start's time goes, and benchmarks read it.
    debug!(capsule = %spec.id, "recorded");

    let slot = host.claim_slot().map_err(Error::Claim)?;
    journal.update(|record| record.slot = Some(slot)).map_err(Error::Record)?;
    debug!(capsule = %spec.id, "slot claimed");

    let rootfs = journal.dir().join("rootfs.ext4");
    let size = u64::from(spec.disk_mib) << 20;
    // Both are waited for even if one fails: what is half-made must not grow behind the back of the release.
    let (network, disk) = tokio::join!(
        host.create_network(slot).inspect(|_| debug!(capsule = %spec.id, "network made")),
        host.clone_image(image, &rootfs, size).inspect(|_| debug!(capsule = %spec.id, "disk made")),
    );
    network.map_err(Error::Network)?;
    disk.map_err(Error::Disk)?;
    stop_if(cancelled)?;

    let cgroup = host.cgroup(spec.id);
    cgroup.create().map_err(Error::Cgroup)?;
    let launch = Launch {
        binary: &host.config.vmm,
        id: &spec.id.to_string(),
        dir: journal.dir(),
        netns: &slot.netns_path(),
        cgroup: &cgroup,
        log: &journal.dir().join("vmm.log"),
    };
    let process = launch.spawn().await.map_err(Error::Launch)?;
    journal.update(|record| record.vmm = Some(process.identity())).map_err(Error::Record)?;
    debug!(capsule = %spec.id, "VMM executed");

    let boot = Boot {
        kernel: &host.config.kernel,
        boot_args: BOOT_ARGS,
        rootfs: &Path::new(vmm::CAPSULE_DIR).join("rootfs.ext4"),
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        tap: TAP,
        mac: &GUEST_MAC.map(|octet| format!("{octet:02X}")).join(":"),
    };
    let guest = Guest::new(slot.host_ip(), journal.record().token.clone());
    let socket = journal.dir().join(vmm::API_SOCKET);
    let (vmm_version, envd_version) = tokio::select! {
        booted = bring_up(&process, &socket, &boot, &guest, &spec) => booted?,
        exit = process.exited() => return Err(Error::Died(exit.to_string())),
        () = tokio::time::sleep(GUEST_LIMIT) => return Err(Error::Silent),
        () = cancelled.cancelled() => return Err(Error::Cancelled),
    };
    journal
        .update(|record| {
            record.phase = Phase::Running;
            record.generation += 1;
            record.versions = host.versions(vmm_version, envd_version);
        })
        .map_err(Error::Record)?;
    Ok(Running { process, guest: Arc::new(guest) })
}

/// From a VMM that was just started to a guest that has answered. Returns the versions of both.
async fn bring_up(
    process: &Process,
    socket: &Path,
    boot: &Boot<'_>,
    guest: &Guest,
    spec: &Spec,
) -> Result<(String, String), Error> {
    let client = Client::connect(socket, SOCKET_LIMIT, process).await.map_err(Error::Configure)?;
    debug!(capsule = %spec.id, "VMM listens");
    client.configure(boot).await.map_err(Error::Configure)?;
    let metadata = Metadata { instance_id: spec.id.to_string(), env_id: spec.template_id.clone() };
    client.put_mmds(&metadata).await.map_err(Error::Configure)?;
    debug!(capsule = %spec.id, "VMM configured");
    client.start().await.map_err(Error::Configure)?;
    debug!(capsule = %spec.id, "guest started");
    let health = guest.first_answer().await.map_err(Error::Guest)?;
    debug!(capsule = %spec.id, "guest answered");
    guest.init(&spec.default_env).await.map_err(Error::Guest)?;
    debug!(capsule = %spec.id, "guest prepared");
    Ok((client.version().to_string(), health.version))
}

fn stop_if(cancelled: &CancellationToken) -> Result<(), Error> {
    if cancelled.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}
