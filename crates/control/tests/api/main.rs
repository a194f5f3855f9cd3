//! The control plane from outside: its routes over HTTP, a real database, and the fake agent behind it.
//!
//! Every test runs on SQLite and on PostgreSQL.

mod capsules;
mod edge;
mod edge_raw;
mod events;
mod exec;
mod files;
mod fork;
mod hibernate;
mod network;
mod pause;
mod pty;
mod reconcile;
mod refusals;
mod slow;
mod snapshots;
mod socket;
mod streams;
mod world;
