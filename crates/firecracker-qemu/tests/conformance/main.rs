//! The contract, tested against whatever binary `FIRECRACKER_BIN` names (by default ours), through nothing but its API,
//! its files and its guest. What only we refuse or only we have is not tested here but in unit tests.
//!
//! `make test-host` runs it on a real Firecracker. What that does otherwise for a reason is in `tests/host/differences`.
//!
//! Each test makes its own network namespace and scratch directory and, at its end, fails if a process, a namespace or
//! a file is left. Needs root, `ip` (iproute2), and a kernel: `WRENN_KERNEL`, or the newest in the image cache.

mod host;

mod balloon;
mod boot;
mod clones;
mod limits;
mod metadata;
mod pause;
mod requests;
mod restore;
mod snapshots;
mod store;
