//! What one capsule may do to the network, in one place. Excess is dropped for that capsule alone.

/// Connections of a guest that the machine tracks at the same time, of any protocol: TCP that has not ended, UDP and
/// ICMP that was answered or sent lately. Every one takes some 300 bytes of the kernel's, twice.
pub const CONNECTIONS: u32 = 4096;
/// Connections that a guest may begin in a second, of any protocol.
pub const NEW_CONNECTIONS_PER_SECOND: u64 = 1000;
/// How many of those it may begin at once before that rate counts: a browser, a package manager, a test suite.
pub const NEW_CONNECTIONS_BURST: u32 = 2000;

/// Bytes per second towards a guest, sustained. The VMM holds back the other direction at the same.
pub const INGRESS_BYTES_PER_SECOND: u32 = 200 << 20;
/// Bytes that may go to a guest at once.
pub const INGRESS_BURST: u32 = 100 << 20;
/// Bytes per second from a guest, and at once, beyond which its tap drops: somewhat more than what a VMM lets through that
/// holds it back, as Firecracker does.
pub(crate) const EGRESS_BYTES_PER_SECOND: u64 = 210 << 20;
pub(crate) const EGRESS_BURST: u32 = 110 << 20;
/// Bytes that wait when a guest is sent more than that, 20 ms of them; what comes then is dropped, so that senders see it.
pub(crate) const INGRESS_QUEUE: u32 = 4 << 20;
