//! What pid 1 does before it serves: mounts, names, network, root file system, control groups.
//!
//! Nothing here is fatal. A guest with a defect that somebody can look into beats one that panics, so each step that fails
//! is logged and the rest goes on; only a guest without `/proc` could not serve.

mod mounts;
mod names;
mod network;
mod power;
mod root_disk;

pub use names::rename;
pub use power::shut_down_on_signal;

use crate::cgroup::{self, Cgroups};
use std::path::Path;

/// envd's own priority, against the weight of all processes together. Processes get 0 back.
const NICE: i32 = -10;
/// envd's own limit of open files.
const OPEN_FILES: u64 = 524_288;

/// Makes the guest habitable. Called once, before any thread starts.
pub fn run() -> Cgroups {
    log_failures("mounting", mounts::mount_all());
    step("setting the host name", names::set());
    step("configuring the network", network::configure());
    step("growing the root file system", root_disk::grow());
    step("giving the machine an id", crate::snapshot::ensure_machine_id());
    // Whoever runs short of something, it should not be envd.
    step("exempting envd from the out-of-memory killer", std::fs::write("/proc/self/oom_score_adj", "-1000"));
    step("raising envd's priority", rustix::process::setpriority_process(None, NICE).map_err(Into::into));
    step("raising envd's limit of open files", raise_open_files());
    Cgroups::create(Path::new(cgroup::ROOT)).unwrap_or_else(|error| {
        tracing::warn!(%error, "no control groups");
        Cgroups::none()
    })
}

fn raise_open_files() -> std::io::Result<()> {
    let limit = rustix::process::Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    Ok(rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)?)
}

fn step(what: &str, result: std::io::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(%error, "{what} failed");
    }
}

fn log_failures(what: &str, failures: Vec<(&str, std::io::Error)>) {
    for (target, error) in failures {
        tracing::warn!(target, %error, "{what} failed");
    }
}
