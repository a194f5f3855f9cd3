//! Files, but for their contents: what they are, making, moving, listing and removing them, and watching directories.
//!
//! envd acts as root and makes what it makes for the calling user; who may call is the token's matter. Everything here but
//! [`rpc`] blocks, and [`rpc`] runs it away from the runtime's own threads.

pub mod entry;
pub mod operations;
pub mod rpc;
pub mod watch;
pub mod watchers;
