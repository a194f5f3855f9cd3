//! The guest agent: init and process server inside a capsule.
//!
//! One static binary. As pid 1 it first makes the guest habitable ([`init`]); then, as anywhere else, it serves processes and files
//! over HTTP ([`http`]) and Connect. It knows nothing of capsules, hosts or the platform: what it must know comes by `/init`.
//!
//! It refuses to look users up through the C library (a static binary cannot load its plug-ins), to run anything at start
//! that a request could do later, and to hold more output in memory than [`process::log`] says.

pub mod cgroup;
pub mod clock;
pub mod control;
pub mod files;
pub mod filesystem;
pub mod freeze;
pub mod http;
pub mod init;
mod maps;
pub mod metadata;
pub mod metrics;
pub mod mmds;
pub mod netlink;
pub mod path;
pub mod ports;
pub mod process;
pub mod reaper;
mod rewrite;
pub mod rpc;
pub mod settings;
pub mod snapshot;
pub mod sys;
pub mod user;

/// What `--version`, `/health` and `/init` say.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
