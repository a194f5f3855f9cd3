//! The contract between the control plane and a host agent: generated types, and a client for either kind of address.

/// Messages, client and service trait, generated from `proto/hostagent/v1/host_agent.proto`.
#[allow(missing_docs, clippy::all, dead_code)]
pub mod proto {
    connectrpc::include_generated!("contract.rs");
}

pub use proto::hostagent::v1::*;
