//! The virtual machine monitor as this project sees it: a process that speaks Firecracker's HTTP API.
//!
//! This crate owns everything between "here is a directory with a root disk, a network namespace and an empty cgroup" and
//! "a VMM runs there and does what its API was told":
//!
//! * [`process`] starts the VMM in its jail, sees it end, and adopts it again after the agent itself was killed;
//! * [`jail`] is what a VMM sees, who it is and what it may do;
//! * [`client`] speaks the API, by the version the VMM says it has, with a limit on every call;
//! * [`cgroup`] groups all processes of a capsule, so that none can be missed when it is killed, and limits them together;
//! * [`kvm`] finds out whether `/dev/kvm` can run a guest, rather than whether it exists.
//!
//! It refuses to know what a capsule is for, how its disk and network were made, or which of the two programs that speak
//! this API (`firecracker`, `firecracker-qemu`) it drives.

pub mod cgroup;
pub mod client;
pub mod jail;
pub mod kvm;
pub mod process;

/// Where every VMM finds what its capsule's agent gave it, wherever that is on the host.
///
/// Firecracker records paths in its snapshots and opens the same ones on restore. As this path means another directory
/// in each VMM's mount namespace, a snapshot of one capsule can be restored for any other.
pub const CAPSULE_DIR: &str = "/run/wrenn/vm";

/// Where every VMM finds the guest kernel.
pub const KERNEL: &str = "/run/wrenn/vmlinux";

/// Name of a directory inside [`CAPSULE_DIR`]. The VMM finds a tmpfs there that nobody else has: for its socket, its state
/// and dumps of the guest's memory. The agent reads it through [`process::Process::scratch`].
pub const SCRATCH_DIR: &str = "scratch";

/// Name of the API socket in the scratch directory.
pub const API_SOCKET: &str = "api.sock";
