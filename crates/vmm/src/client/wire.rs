//! Bodies of requests and answers: exactly the fields that are sent, no more, because the VMM refuses those it does not know.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, Feature, Version};

/// Bytes that the guest may send per [`REFILL_MS`]: 200 MiB a second.
const BANDWIDTH: u64 = 200 << 20;
/// Bytes that it may send at once, and only once, on top of that.
const BURST: u64 = 100 << 20;
/// Milliseconds in which the bandwidth is given out anew.
const REFILL_MS: u64 = 1000;

/// The one network interface, and the id it has in snapshots.
const INTERFACE: &str = "eth0";

/// A guest to be booted. Paths are as the VMM sees them.
#[derive(Debug, Clone, Copy)]
pub struct Boot<'a> {
    /// Kernel image, ELF.
    pub kernel: &'a Path,
    /// Kernel command line.
    pub boot_args: &'a str,
    /// Root disk, writable.
    pub rootfs: &'a Path,
    /// 1 to 32.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// Name of the tap device in the VMM's network namespace.
    pub tap: &'a str,
    /// The guest's hardware address, six colon-separated octets.
    pub mac: &'a str,
    /// What the guest is told that fits into one packet; none says nothing, which is 1500.
    pub mtu: Option<u16>,
}

impl<'a> Boot<'a> {
    /// The requests that configure it, in the order the VMM needs: the metadata service names an interface.
    pub(super) fn requests(&self, version: Version) -> [(&'static str, Configure<'a>); 6] {
        let drive = Drive { drive_id: "rootfs", path_on_host: self.rootfs, is_root_device: true, is_read_only: false };
        let limiter =
            RateLimiter { bandwidth: TokenBucket { size: BANDWIDTH, refill_time: REFILL_MS, one_time_burst: BURST } };
        let interface = NetworkInterface {
            iface_id: INTERFACE,
            host_dev_name: self.tap,
            guest_mac: self.mac,
            // Who is not told learns it from what does not get through.
            mtu: self.mtu.filter(|_| version.has(Feature::Mtu)),
            tx_rate_limiter: limiter,
        };
        let machine = MachineConfig {
            vcpu_count: self.vcpus,
            mem_size_mib: self.memory_mib,
            smt: false,
            track_dirty_pages: true,
        };
        [
            ("/boot-source", Configure::BootSource { kernel_image_path: self.kernel, boot_args: self.boot_args }),
            ("/drives/rootfs", Configure::Drive(drive)),
            ("/network-interfaces/eth0", Configure::Network(interface)),
            ("/machine-config", Configure::Machine(machine)),
            ("/mmds/config", Configure::Mmds { version: "V2", network_interfaces: [INTERFACE] }),
            ("/entropy", Configure::Entropy {}),
        ]
    }
}

/// One body of the configuration.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Configure<'a> {
    BootSource { kernel_image_path: &'a Path, boot_args: &'a str },
    Drive(Drive<'a>),
    Network(NetworkInterface<'a>),
    Machine(MachineConfig),
    Mmds { version: &'static str, network_interfaces: [&'static str; 1] },
    Entropy {},
}

#[derive(Debug, Serialize)]
pub(super) struct Drive<'a> {
    drive_id: &'static str,
    path_on_host: &'a Path,
    is_root_device: bool,
    is_read_only: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct NetworkInterface<'a> {
    iface_id: &'static str,
    host_dev_name: &'a str,
    guest_mac: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u16>,
    tx_rate_limiter: RateLimiter,
}

#[derive(Debug, Serialize)]
pub(super) struct RateLimiter {
    bandwidth: TokenBucket,
}

#[derive(Debug, Serialize)]
pub(super) struct TokenBucket {
    size: u64,
    refill_time: u64,
    one_time_burst: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct MachineConfig {
    vcpu_count: u32,
    mem_size_mib: u32,
    smt: bool,
    track_dirty_pages: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Action {
    pub(super) action_type: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct StateChange {
    pub(super) state: &'static str,
}

/// How much of the memory a snapshot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum SnapshotKind {
    /// All of it.
    Full,
    /// The pages written since the last snapshot, boot or load; the rest are holes.
    Diff,
}

#[derive(Debug, Serialize)]
pub(super) struct SnapshotCreate<'a> {
    pub(super) snapshot_type: SnapshotKind,
    pub(super) snapshot_path: &'a Path,
    pub(super) mem_file_path: &'a Path,
}

/// Where the memory of a restored guest comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory<'a> {
    /// A file, mapped privately; it must not change while the guest lives.
    File(&'a Path),
    /// A socket on which somebody takes the guest's page faults.
    Uffd(&'a Path),
}

/// A snapshot to be restored. Paths are as the VMM sees them.
#[derive(Debug, Clone, Copy)]
pub struct Load<'a> {
    /// The state file.
    pub state: &'a Path,
    /// The memory.
    pub memory: Memory<'a>,
    /// Whether the guest runs on at once.
    pub resume: bool,
    /// Whether writes are tracked from now on, so that the next snapshot can be a [`SnapshotKind::Diff`].
    pub track_dirty_pages: bool,
    /// Another tap device than the one in the snapshot.
    pub tap: Option<&'a str>,
    /// Another vsock path than the one in the snapshot.
    pub vsock: Option<&'a Path>,
    /// Whether the guest's clock is set to the present. Needs a snapshot that has a clock.
    pub clock_realtime: bool,
}

impl<'a> Load<'a> {
    /// The body in the words of `version`.
    pub(super) fn request(&self, version: Version) -> Result<SnapshotLoad<'a>, Error> {
        if self.vsock.is_some() {
            version.require(Feature::VsockOverride)?;
        }
        if self.clock_realtime {
            version.require(Feature::ClockRealtime)?;
        }
        let (backend_type, backend_path) = match self.memory {
            Memory::File(path) => ("File", path),
            Memory::Uffd(path) => ("Uffd", path),
        };
        let renamed = version.has(Feature::TrackDirtyPagesOnLoad);
        Ok(SnapshotLoad {
            snapshot_path: self.state,
            mem_backend: MemoryBackend { backend_type, backend_path },
            resume_vm: self.resume,
            track_dirty_pages: renamed.then_some(self.track_dirty_pages),
            enable_diff_snapshots: (!renamed).then_some(self.track_dirty_pages),
            network_overrides: self.tap.map(|tap| [NetworkOverride { iface_id: INTERFACE, host_dev_name: tap }]),
            vsock_override: self.vsock.map(|path| VsockOverride { uds_path: path }),
            clock_realtime: self.clock_realtime.then_some(true),
        })
    }
}

#[derive(Debug, Serialize)]
pub(super) struct SnapshotLoad<'a> {
    snapshot_path: &'a Path,
    mem_backend: MemoryBackend<'a>,
    resume_vm: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    track_dirty_pages: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    enable_diff_snapshots: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_overrides: Option<[NetworkOverride<'a>; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vsock_override: Option<VsockOverride<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    clock_realtime: Option<bool>,
}

#[derive(Debug, Serialize)]
struct MemoryBackend<'a> {
    backend_type: &'static str,
    backend_path: &'a Path,
}

#[derive(Debug, Serialize)]
struct NetworkOverride<'a> {
    iface_id: &'static str,
    host_dev_name: &'a str,
}

#[derive(Debug, Serialize)]
struct VsockOverride<'a> {
    uds_path: &'a Path,
}

/// What the guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum VmState {
    /// Neither booted nor restored.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

/// What the VMM says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct InstanceInfo {
    /// The id it was started with.
    pub id: String,
    /// What its guest is doing.
    pub state: VmState,
    /// Its version, as text.
    pub vmm_version: String,
    /// Its name.
    pub app_name: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct VersionInfo {
    pub(super) firecracker_version: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Fault {
    pub(super) fault_message: String,
}
