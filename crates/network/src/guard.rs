//! What may come out of a guest at all, by rules on its tap and in its namespace: frames of its own address that carry its own
//! IPv4 packets, and the questions by which it finds its gateway.
//!
//! Everything else is dropped before any part of the host's network looks at it: other senders, IPv6, VLANs, other protocols,
//! IPv4 options (with which a packet could choose its way), and claims about whose address is whose. What arrives and is
//! meant for the namespace itself ends here too, but for what was put there for guests.

use crate::limits::{EGRESS_BURST, EGRESS_BYTES_PER_SECOND};
use crate::netlink::{Error, Socket};
use crate::nft::{Batch, Expr, Hook, Memory};
use crate::policy::{HTTP, METADATA};
use crate::slot::{GUEST_ADDRESS, GUEST_MAC, TAP, TAP_ADDRESS, UPLINK_IN_NETNS};

const TABLE: &str = "guard";
/// What a VMM lets through that does not hold back its guest, or not any more.
const RATE: Memory = Memory::BytesOver { per_second: EGRESS_BYTES_PER_SECOND, burst: EGRESS_BURST };

/// Puts the guard into the namespace of `socket`, which has none. `user` is whose VMM is in it.
pub(crate) fn set(user: u32, socket: &Socket) -> Result<(), Error> {
    socket.transact(frames().finish())?;
    socket.transact(packets(user).finish())
}

/// On the tap, before anything else sees a frame.
fn frames() -> Batch<'static> {
    use Expr::*;

    /// The sender's address of an Ethernet frame.
    const SENDER: usize = 6;
    /// Version and length of an IPv4 header, which is 20 bytes long without options.
    const IPV4_WITHOUT_OPTIONS: u8 = 0x45;
    /// Of an ARP message: that it is about Ethernet and IPv4, and who says it.
    const KINDS: [u8; 6] = [0, 1, 8, 0, 6, 4];
    const SAYS: usize = 8;
    const ABOUT: usize = 24;
    let says = [&GUEST_MAC[..], &GUEST_ADDRESS.octets()].concat();

    let mut batch = Batch::new(libc::NFPROTO_NETDEV, TABLE);
    batch.add_table();
    batch.add_device_chain("frames", TAP);
    batch.add_rule("frames", &[LinkIsNot(SENDER, &GUEST_MAC), Drop]);
    batch.add_rule("frames", &[Remembered(RATE), Drop]);
    batch.add_rule(
        "frames",
        &[Ethertype(libc::ETH_P_IP), NetworkIs(0, &[IPV4_WITHOUT_OPTIONS]), Saddr(GUEST_ADDRESS), Accept],
    );
    for known in [TAP_ADDRESS, METADATA] {
        let about = known.octets();
        let message = [
            Ethertype(libc::ETH_P_ARP),
            NetworkIs(0, &KINDS),
            NetworkIs(SAYS, &says),
            NetworkIs(ABOUT, &about),
            Accept,
        ];
        batch.add_rule("frames", &message);
    }
    batch.add_rule("frames", &[Drop]);
    batch
}

/// To the namespace itself, and from it.
fn packets(user: u32) -> Batch<'static> {
    use Expr::*;

    let mut batch = Batch::new(libc::NFPROTO_IPV4, TABLE);
    batch.add_table();
    let hook = Hook { kind: "filter", number: libc::NF_INET_LOCAL_IN, priority: libc::NF_IP_PRI_FILTER };
    batch.add_chain("input", &hook);
    // What a policy sent to a filter that listens here, and nothing that was sent to it directly.
    batch.add_rule("input", &[Iifname(TAP), Redirected, Accept]);
    batch.add_rule("input", &[Iifname(TAP), Established, Accept]);
    batch.add_rule("input", &[Iifname(TAP), Daddr(METADATA), Protocol(libc::IPPROTO_TCP), Port(HTTP), Accept]);
    batch.add_rule("input", &[Iifname(TAP), Daddr(TAP_ADDRESS), Protocol(libc::IPPROTO_ICMP), Accept]);
    batch.add_rule("input", &[Iifname(TAP), Drop]);
    // A VMM that its guest has taken over has sockets here. They lead to the guest and nowhere else.
    let hook = Hook { kind: "filter", number: libc::NF_INET_LOCAL_OUT, priority: libc::NF_IP_PRI_FILTER };
    batch.add_chain("output", &hook);
    batch.add_rule("output", &[Oifname(UPLINK_IN_NETNS), Sender(user), Drop]);
    batch
}
