//! The contract between the control plane and a host agent: generated types, and a client for either kind of address.
//!
//! Owns where an agent is ([`Endpoint`]) and how to get there ([`Transport`]). Refuses to decide anything: no retries, no
//! timeouts beyond that of connecting, no state.

mod client;
pub mod egress;
mod endpoint;
pub mod full;
pub mod port;

/// Messages, client and service trait, generated from `proto/hostagent/v1/host_agent.proto`.
#[allow(missing_docs, clippy::all, dead_code)]
pub mod proto {
    connectrpc::include_generated!("contract.rs");
}

pub use client::{CALLS, GuestFiles, GuestProcesses, Lifecycle, REFUSAL_HEADER, Transport};
pub use endpoint::{Endpoint, Error};
pub use proto::hostagent::v1::*;
