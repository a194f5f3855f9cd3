//! Everything envd needs `unsafe` for: starting a process, handing descriptors to the runtime, and
//! the ioctls rustix does not offer.
//!
//! It owns no policy; each function does one thing to the kernel and says what it assumes.

pub mod disk;
pub mod freeze;
pub mod memory;
pub mod net;
pub mod poll;
pub mod random;
pub mod spawn;
