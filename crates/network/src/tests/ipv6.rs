//! IPv6 ends at the tap.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::machine::{network, on_own_machine, sh};
use super::wire::Wire;

const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xFE80, 0, 0, 0, 0, 0xFCFF, 0xFE00, 5);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xFF02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xFF02, 0, 0, 0, 0, 0, 0, 2);
const SOMEWHERE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xDB8, 0, 0, 0, 0, 0, 7);
const ICMPV6: u8 = 58;
const UDP: u8 = 17;

/// An IPv6 packet; nobody who drops it looks at its checksum.
fn packet(next: u8, to: Ipv6Addr, content: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((content.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(LINK_LOCAL.octets());
    packet.extend(to.octets());
    packet.extend(content);
    packet
}

#[test]
fn no_ipv6_of_a_guest_leaves_its_tap() {
    on_own_machine(|| {
        let network = network();
        let slot = network.claim().unwrap().slot();
        network.create(slot).unwrap();
        for link in ["wrenn-ns-1 eth0", "wrenn-ns-1 tap0"] {
            let (netns, link) = link.split_once(' ').unwrap();
            assert_eq!(sh(&format!("ip -n {netns} -6 addr show dev {link}")), "");
        }
        assert_eq!(sh("ip -6 addr show dev wrenn-veth1"), "");
        // Whatever comes out on the host's side, before any rule is asked.
        sh("nft add table netdev watch
            nft add chain netdev watch in '{ type filter hook ingress device \"wrenn-veth1\" priority -500; }'
            nft add rule netdev watch in meta protocol ip6 counter; nft add rule netdev watch in meta protocol ip counter");
        let counted = |protocol: &str| {
            let line = sh(&format!("nft list chain netdev watch in | grep 'protocol {protocol} '"));
            line.split_whitespace().skip_while(|word| *word != "packets").nth(1).unwrap().parse::<u64>().unwrap()
        };
        let mut wire = Wire::open(slot);
        let attempts = [
            // Router and neighbour solicitation, an advertisement of itself as everybody's router, an echo.
            packet(ICMPV6, ALL_ROUTERS, &[133, 0, 0, 0, 0, 0, 0, 0]),
            packet(ICMPV6, ALL_NODES, &[&[135, 0, 0, 0, 0, 0, 0, 0], &SOMEWHERE.octets()[..]].concat()),
            packet(ICMPV6, ALL_NODES, &[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]),
            packet(ICMPV6, SOMEWHERE, &[128, 0, 0, 0, 0, 1, 0, 1]),
            packet(UDP, SOMEWHERE, &[0, 7, 0, 7, 0, 8, 0, 0]),
        ];
        for attempt in &attempts {
            wire.send(0x86DD, attempt);
        }
        // This comes after them along the same way, and is seen.
        wire.send_udp(7, (Ipv4Addr::new(198, 51, 100, 7), 7), b"hello");
        assert_eq!((counted("ip6"), counted("ip")), (0, 1));

        // Where a namespace carries IPv6, they do come out: but no further.
        sh("ip netns exec wrenn-ns-1 sh -c 'cd /proc/sys/net/ipv6/conf; for link in all eth0 tap0
                do echo 0 > $link/disable_ipv6; echo 1 > $link/forwarding; done'
            ip -n wrenn-ns-1 -6 route add default dev eth0; ip -n wrenn-ns-1 link set tap0 promisc on
            nft add table inet beyond
            nft add chain inet beyond in '{ type filter hook prerouting priority -200; }'
            nft add rule inet beyond in iifname wrenn-veth1 meta nfproto ipv6 counter");
        sh(
            "ip -n wrenn-ns-1 -6 addr add fe80::1/64 dev tap0 nodad; ip netns exec wrenn-ns-1 sh -c 'echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6'",
        );
        while counted("ip6") == 0 {
            std::thread::yield_now();
        }
        assert!(sh("nft list chain inet beyond in").contains("counter packets 0 bytes 0"));
        network.pool.slots.destroy(slot).unwrap();
        sh("nft delete table netdev watch; nft delete table inet beyond");
        network.close().unwrap();
    });
}
