//! The virtual machine monitor as this project sees it: a process that speaks Firecracker's HTTP API.
//!
//! This crate owns everything between "here is a directory with a root disk, a network namespace and an empty cgroup" and
//! "a VMM runs there and does what its API was told":
//!
//! * [`process`] starts the VMM in its own session, cgroup, mount and network namespace, sees it end, and adopts it again
//!   after the agent itself was killed;
//! * [`client`] speaks the API, by the version the VMM says it has, with a limit on every call;
//! * [`cgroup`] groups all processes of a capsule, so that none can be missed when it is killed;
//! * [`kvm`] finds out whether `/dev/kvm` can run a guest, rather than whether it exists.
//!
//! It refuses to know what a capsule is for, how its disk and network were made, or which of the two programs that speak
//! this API (`firecracker`, `firecracker-qemu`) it drives.

pub mod cgroup;
pub mod client;
pub mod kvm;
pub mod process;

/// Where every VMM finds its capsule's own directory, whichever that is on the host.
///
/// Firecracker records paths in its snapshots and opens the same ones on restore. As this path means another directory
/// in each VMM's mount namespace, a snapshot of one capsule can be restored for any other.
pub const CAPSULE_DIR: &str = "/run/wrenn/vm";

/// Name of the API socket inside the capsule's directory, on both sides.
pub const API_SOCKET: &str = "api.sock";

/// Name of a directory inside the capsule's directory. The VMM finds a tmpfs there that nobody else has, for dumps of the
/// guest's memory; the agent reads it through [`process::Process::sees`].
pub const DUMP_DIR: &str = "dump";
