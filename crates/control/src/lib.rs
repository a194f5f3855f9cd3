//! The control plane: REST over a database, and the hosts it steers.
//!
//! ```text
//!   http (shapes, status numbers) ─► op (one verb, one file) ─► db (what is wanted, what was observed)
//!                                      ▲        └─► the host's agent: lifecycle calls, guest traffic
//!   tasks::reconcile ──────────────────┘
//! ```
//!
//! Owns teams, keys, templates, capsules' rows and the way to each capsule. Refuses to know virtual machines, networks and
//! disks: a host does what its contract says. What a capsule may do in which state is decided by `lifecycle`.

mod control;
mod db;
mod host;
mod http;
mod op;
mod tasks;

pub use control::{Config, Control, Error, sqlite_url};
