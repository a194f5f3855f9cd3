//! How much went through a slot.

use std::ops::Add;

/// Packets, and their bytes without link headers. Several segments of one connection that travel as one packet count as
/// one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { packets: self.packets + other.packets, bytes: self.bytes + other.bytes }
    }
}

/// What went through a slot since it was made or taken from the pool. An agent that starts anew goes on counting; one of
/// another version begins at nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// What the guest sent with an address that is its own, whether or not it was let through.
    pub sent: Count,
    /// What was sent to the guest, by the host or from the internet, before its rate was limited.
    pub received: Count,
}
