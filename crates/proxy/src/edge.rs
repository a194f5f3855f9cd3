//! What the heads of strangers' requests and of guests' answers say, and what of it may travel on: decided here, by the head
//! alone, so that it can be tried with whatever a stranger may think of (`fuzz/targets/proxy.rs`).

pub mod address;
pub mod credentials;
pub mod forwarded;
pub mod strict;
