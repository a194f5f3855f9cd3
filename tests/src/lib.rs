//! What end-to-end tests share: a `wrenn up` of their own, and the count of what the machine holds.

mod machine;
mod up;

pub use machine::Machine;
pub use up::{Options, Up};
