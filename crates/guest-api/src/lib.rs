//! The contract between the platform and envd, the agent inside a capsule: generated types, and a client.

/// Messages, client and service trait, generated from `proto/process/process.proto`.
#[allow(missing_docs, clippy::all, dead_code)]
pub mod proto {
    connectrpc::include_generated!("contract.rs");
}

pub use proto::process;
