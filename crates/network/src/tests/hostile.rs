//! A guest that means harm, with nothing between it and its tap: each row of the attack surface that is the network's.
//!
//! That a frame gets nowhere is seen by one that may pass and is sent after it. Each attack is also made against a slot that
//! has lost its walls, where it succeeds: what is tested is the wall and not the attack.

use std::collections::HashSet;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;

use super::guest::{Guest, SERVER_IP, internet, next, udp};
use super::machine::{network, on_own_machine, sh};
use super::raw::*;
use crate::slot::{GUEST_ADDRESS, GUEST_MAC, TAP_ADDRESS, TAP_MAC};
use crate::{Network, Slot};

const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// What a datagram that may pass says.
const GOOD: &[u8] = b"this may pass";
/// What no datagram may say that arrives.
const EVIL: &[u8] = b"this is evil!";

struct World {
    network: Network,
    a: Slot,
    attacker: RawGuest,
    b: (Slot, Guest),
    /// On the wire behind the uplink.
    outside: Ear,
}

impl World {
    fn new() -> Self {
        let internet = internet();
        // A provider that would deliver whatever leaves the machine.
        sh("ip -n internet route add local default dev lo table 100; ip -n internet rule add iif eth0 table 100
            # It does not say back what it does not want to hear.
            ip netns exec internet nft 'add table ip mute; add chain ip mute output { type filter hook output priority 0; }'
            ip netns exec internet nft add rule ip mute output icmp type destination-unreachable drop");
        let network = network();
        let slot = || {
            let slot = network.claim().unwrap().slot();
            network.create(slot).unwrap();
            slot
        };
        let (a, b) = (slot(), slot());
        let mut attacker = RawGuest::start(a);
        // The gateway's answer says that the tap is up.
        attacker.says_until_heard(&frame(ARP, &arp(1, GUEST_MAC, GUEST_ADDRESS, TAP_ADDRESS)));
        let b = (b, Guest::start(b));
        let outside = Ear::at(&internet);
        Self { network, a, attacker, b, outside }
    }

    /// Whether anything of these frames leaves the machine.
    fn leaves(&mut self, frames: &[Vec<u8>]) -> bool {
        frames.iter().for_each(|frame| self.attacker.says(frame));
        self.attacker.says(&Packet::udp(SERVER, 5000, GOOD).frame());
        self.outside.hears(EVIL, GOOD)
    }

    /// Takes the walls away, inside and on the host, and lets the namespace disguise and forward whatever comes, also to the
    /// metadata's address.
    fn without_walls(&self) {
        let a = self.a.netns();
        sh(&format!(
            "nft delete table inet wrenn_0123abcd; ip netns exec {a} nft delete table netdev guard
             ip netns exec {a} nft delete table ip guard; ip -n {a} addr del 169.254.169.254/32 dev tap0
             for conf in all default tap0 eth0; do
                 ip netns exec {a} sysctl -qw net.ipv4.conf.$conf.rp_filter=0 net.ipv4.conf.$conf.accept_source_route=1 \
                     net.ipv4.conf.$conf.accept_local=1 net.ipv4.conf.$conf.route_localnet=1
             done
             for conf in all default up0 wrenn-veth1; do
                 sysctl -qw net.ipv4.conf.$conf.rp_filter=0 net.ipv4.conf.$conf.accept_source_route=1 \
                     net.ipv4.conf.$conf.accept_local=1 net.ipv4.conf.$conf.route_localnet=1
             done"
        ));
    }

    fn end(self) {
        let Self { network, attacker, b, .. } = self;
        drop((attacker, b));
        network.sweep(&HashSet::new()).unwrap();
        network.close().unwrap();
    }
}

/// No attack of these leaves the machine, and each does when there are no walls.
fn stay_inside(attacks: impl FnOnce(&World) -> Vec<(String, Vec<Vec<u8>>)> + Send) {
    on_own_machine(|| {
        let mut world = World::new();
        let attacks = attacks(&world);
        for (what, frames) in &attacks {
            assert!(!world.leaves(frames), "{what} left");
        }
        world.without_walls();
        for (what, frames) in &attacks {
            assert!(world.leaves(frames), "{what} does not leave even where nothing is in its way: it tests nothing");
        }
        world.end();
    });
}

#[test]
fn private_ranges_and_metadata_are_out_of_reach() {
    stay_inside(|_| {
        let to = |address: &str| {
            let to = address.parse().unwrap();
            (format!("a datagram to {address}"), vec![Packet::udp(to, 53, EVIL).frame()])
        };
        [
            "10.0.0.1",
            "10.11.200.1",
            "10.255.255.255",
            "172.16.0.1",
            "172.31.255.254",
            "192.168.0.1",
            "192.168.255.1",
            "100.64.0.1",
            "100.127.255.255",
            "169.254.169.254",
            "169.254.1.1",
        ]
        .map(to)
        .into()
    });
}

#[test]
fn nobody_sends_under_another_address() {
    stay_inside(|world| {
        let from = |from: Ipv4Addr| {
            let packet = Packet { from, ..Packet::udp(SERVER, 5000, EVIL) };
            (format!("a datagram from {from}"), vec![packet.frame()])
        };
        let public = Ipv4Addr::new(203, 0, 113, 9);
        // Its own address on the host is not one under which it may leave either.
        [world.b.0.veth_netns_ip(), world.b.0.host_ip(), world.a.host_ip(), public].map(from).into()
    });
}

#[test]
fn nobody_sends_from_another_mac() {
    stay_inside(|_| {
        let packet = Packet::udp(SERVER, 5000, EVIL).bytes();
        let from = |mac: [u8; 6]| (format!("a frame from {mac:x?}"), vec![frame_from(mac, IPV4, &packet)]);
        [[2, 0, 0, 0, 0, 1], TAP_MAC].map(from).into()
    });
}

#[test]
fn fragments_hide_nothing() {
    stay_inside(|world| {
        let metadata = Packet::udp(Ipv4Addr::new(169, 254, 169, 254), 80, &[EVIL, &[7; 2000]].concat());
        let spoofed =
            Packet { from: world.b.0.veth_netns_ip(), ..Packet::udp(SERVER, 5000, &[EVIL, &[7; 2000]].concat()) };
        // Whoever decides by the first fragment alone would let the rest go where it wants.
        let later = Packet { offset: 100, content: EVIL.to_vec(), ..Packet::udp(Ipv4Addr::new(10, 0, 0, 1), 80, EVIL) };
        let whole = Packet { more_follows: false, ..later };
        let first = Packet { more_follows: true, ..Packet::udp(Ipv4Addr::new(10, 0, 0, 1), 80, &[7; 792]) };
        vec![
            ("metadata in fragments".into(), metadata.fragments(1400)),
            ("another's address in fragments".into(), spoofed.fragments(1400)),
            ("a late fragment to a private address".into(), vec![first.frame(), whole.frame()]),
        ]
    });
}

#[test]
fn no_packet_chooses_its_way() {
    stay_inside(|_| {
        // A loose source route by way of the server, and one that only asks to be recorded.
        let route = [&[131, 7, 4][..], &SERVER.octets(), &[0]].concat();
        let record = [7, 7, 4, 0, 0, 0, 0, 0].to_vec();
        let with = |options: Vec<u8>| vec![Packet { options, ..Packet::udp(SERVER, 5000, EVIL) }.frame()];
        vec![("a record of its route".into(), with(record)), ("a source route".into(), with(route))]
    });
}

#[test]
fn what_belongs_to_no_connection_does_not_leave_undisguised() {
    stay_inside(|_| {
        let flags = |flags: u8, name: &str| {
            let packet = Packet::new(SERVER, TCP, segment(GUEST_ADDRESS, SERVER, 5000, flags, EVIL));
            (format!("a TCP segment with {name}"), vec![packet.frame()])
        };
        let answer = Packet::new(SERVER, ICMP, icmp(0, 0, &[&[0, 1, 0, 1][..], EVIL].concat()));
        vec![
            flags(0x04, "RST"),
            flags(0x3f, "every flag"),
            flags(0, "none"),
            ("an answer to no question".into(), vec![answer.frame()]),
        ]
    });
}

#[test]
fn neither_the_host_nor_another_guest_hears_any_protocol() {
    on_own_machine(|| {
        let mut world = World::new();
        let [host, b] = [UdpSocket::bind("0.0.0.0:5000").unwrap(), udp(&world.b.1.netns, "0.0.0.0:5000")];
        let local = UdpSocket::bind("127.0.0.1:9725").unwrap();
        let (b_ip, b_inside) = (world.b.0.host_ip(), world.b.0.veth_netns_ip());
        let uplink = Ipv4Addr::new(192, 0, 2, 1);
        let gateway = world.a.veth_host_ip();
        let attack = |world: &mut World| {
            for to in [b_ip, b_inside, uplink, gateway] {
                world.attacker.says(&Packet::udp(to, 5000, EVIL).frame());
                Packet::udp(to, 5000, &[EVIL, &[7; 2000]].concat())
                    .fragments(8)
                    .iter()
                    .for_each(|part| world.attacker.says(part));
            }
            for to in [Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST, Ipv4Addr::new(224, 0, 0, 1)] {
                world.attacker.says(&Packet::udp(to, 9725, EVIL).frame());
                world.attacker.says(&Packet::udp(to, 5000, EVIL).frame());
            }
            world.leaves(&[]);
        };
        attack(&mut world);
        let say = UdpSocket::bind("0.0.0.0:0").unwrap();
        for (socket, at) in
            [(&host, "127.0.0.1:5000".to_owned()), (&local, "127.0.0.1:9725".into()), (&b, format!("{b_ip}:5000"))]
        {
            say.send_to(b"from the host", &at).unwrap();
            assert_eq!(next(socket), "from the host", "{at}");
        }
        world.without_walls();
        attack(&mut world);
        let evil = std::str::from_utf8(EVIL).unwrap();
        for socket in [&host, &b] {
            assert!(next(socket).starts_with(evil));
        }
        world.end();
    });
}

#[test]
fn pings_go_unanswered_but_by_the_gateway() {
    on_own_machine(|| {
        let mut world = World::new();
        let uplink = Ipv4Addr::new(192, 0, 2, 1);
        let addresses =
            [world.b.0.host_ip(), world.b.0.veth_netns_ip(), uplink, world.a.veth_host_ip(), world.a.veth_netns_ip()];
        let ask = |world: &mut World, to: Ipv4Addr| {
            world.attacker.says(&Packet::new(to, ICMP, icmp(8, 0, &[&[0, 7, 0, 1][..], EVIL].concat())).frame());
        };
        let answer = |heard: &[u8]| {
            let is_one = heard[12..14] == IPV4.to_be_bytes() && heard[23] == ICMP && heard[34] == 0;
            is_one.then(|| Ipv4Addr::from(<[u8; 4]>::try_from(&heard[26..30]).unwrap()))
        };
        for to in addresses {
            ask(&mut world, to);
            // From further away than the others are, and several times.
            for _ in 0..3 {
                ask(&mut world, SERVER);
                let heard = world.attacker.hears(|heard| answer(heard).is_some());
                assert_eq!(answer(&heard), Some(SERVER), "{to} answers");
            }
        }
        world.without_walls();
        for to in addresses {
            ask(&mut world, to);
            world.attacker.hears(|heard| answer(heard) == Some(to));
        }
        world.end();
    });
}

#[test]
fn arp_tells_a_guest_nothing_and_is_told_nothing_by_it() {
    on_own_machine(|| {
        let mut world = World::new();
        let a = world.a.netns();
        let neighbours = || sh(&format!("ip -n {a} neigh show nud all | sort"));
        let before = neighbours();
        let own = world.a.veth_netns_ip();
        let evil = [2, 0, 0, 0, 0, 9];
        let asked = frame(ARP, &arp(1, GUEST_MAC, GUEST_ADDRESS, TAP_ADDRESS));
        // Which slot it is in: whoever has that address says so.
        let probes = |world: &mut World| {
            world.attacker.says(&frame(ARP, &arp(1, GUEST_MAC, GUEST_ADDRESS, own)));
            world.attacker.says(&asked);
            let heard = world.attacker.hears(|heard| heard[12..14] == ARP.to_be_bytes());
            Ipv4Addr::from(<[u8; 4]>::try_from(&heard[28..32]).unwrap())
        };
        assert_eq!(probes(&mut world), TAP_ADDRESS, "the slot tells which one it is");
        for (operation, mac, sender, about) in [
            (2, evil, TAP_ADDRESS, TAP_ADDRESS),
            (2, evil, GUEST_ADDRESS, TAP_ADDRESS),
            (1, evil, GUEST_ADDRESS, TAP_ADDRESS),
            (1, GUEST_MAC, Ipv4Addr::new(169, 254, 0, 20), TAP_ADDRESS),
            (1, evil, Ipv4Addr::new(169, 254, 0, 23), TAP_ADDRESS),
            (2, GUEST_MAC, world.a.veth_host_ip(), world.a.veth_host_ip()),
        ] {
            for from in [GUEST_MAC, mac] {
                world.attacker.says(&frame_from(from, ARP, &arp(operation, mac, sender, about)));
            }
        }
        world.leaves(&[]);
        assert_eq!(neighbours(), before, "the guest has changed who is who");

        world.without_walls();
        assert_eq!(probes(&mut world), own);
        world.attacker.says(&frame(ARP, &arp(1, evil, Ipv4Addr::new(169, 254, 0, 20), TAP_ADDRESS)));
        world.leaves(&[]);
        assert_ne!(neighbours(), before);
        world.end();
    });
}

#[test]
fn ipv6_and_vlans_are_not_spoken() {
    on_own_machine(|| {
        let mut world = World::new();
        let a = world.a.netns();
        // Even where somebody has switched it on.
        sh(&format!("ip netns exec {a} sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.tap0.disable_ipv6=0"));
        sh(&format!("ip -n {a} -6 addr add fe80::1/64 dev tap0 nodad"));
        // An echo request to every node of the link.
        let mut echo = vec![128, 0, 0, 0, 0, 1, 0, 1];
        let (from, to) = (
            [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x21],
            [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        );
        let sum = icmpv6_checksum(&from, &to, &echo);
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
        let packet = [&[0x60, 0, 0, 0, 0, 8, 58, 255][..], &from, &to, &echo].concat();
        let ping = |world: &mut World| {
            world.attacker.says(&frame(IPV6, &packet));
            world.attacker.says(&frame(ARP, &arp(1, GUEST_MAC, GUEST_ADDRESS, TAP_ADDRESS)));
            // Who wants to answer looks for who asked.
            let looks = |heard: &[u8]| heard[12..14] == IPV6.to_be_bytes() && heard[54] == 135 && heard[62..78] == from;
            let heard = world.attacker.hears(|heard| heard[12..14] == ARP.to_be_bytes() || looks(heard));
            heard[12..14] == IPV6.to_be_bytes()
        };
        assert!(!ping(&mut world), "IPv6 is answered");
        // A tag before the packet is no way around what is looked at. One with a priority alone is taken off by the kernel.
        let spoofed = Packet { from: Ipv4Addr::new(203, 0, 113, 9), ..Packet::udp(SERVER, 5000, EVIL) };
        let tagged = frame(VLAN, &[&[0x20, 0][..], &IPV4.to_be_bytes(), &spoofed.bytes()].concat());
        assert!(!world.leaves(std::slice::from_ref(&tagged)));

        world.without_walls();
        assert!(ping(&mut world), "it is not answered even where nothing is in its way");
        assert!(world.leaves(&[tagged]));
        world.end();
    });
}

fn icmpv6_checksum(from: &[u8; 16], to: &[u8; 16], message: &[u8]) -> u16 {
    let bytes = [&from[..], to, &(message.len() as u32).to_be_bytes(), &[0, 0, 0, 58], message].concat();
    let mut sum: u32 = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[test]
fn the_namespace_has_no_door_for_its_guest() {
    on_own_machine(|| {
        let mut world = World::new();
        let netns = world.a.netns_path();
        let own = world.a.veth_netns_ip();
        // Whatever would listen there one day.
        let sockets = [udp(&netns, "0.0.0.0:5000"), udp(&netns, "0.0.0.0:15053")];
        let knock = |world: &mut World| {
            for to in [TAP_ADDRESS, own] {
                for port in [5000, 15053] {
                    world.attacker.says(&Packet::udp(to, port, EVIL).frame());
                }
            }
            world.leaves(&[]);
        };
        knock(&mut world);
        for (socket, port) in sockets.iter().zip([5000, 15053]) {
            udp(&netns, "0.0.0.0:0").send_to(GOOD, format!("127.0.0.1:{port}")).unwrap();
            assert_eq!(next(socket).as_bytes(), GOOD);
        }
        world.without_walls();
        knock(&mut world);
        for socket in &sockets {
            assert_eq!(next(socket).as_bytes(), EVIL);
        }
        world.end();
    });
}

#[test]
fn what_the_operator_says_moves_the_floor_and_no_further() {
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap();
        (first.parse().unwrap(), last.parse().unwrap())
    };
    on_own_machine(|| {
        let netns = internet();
        sh("ip -n internet route add local default dev lo table 100; ip -n internet rule add iif eth0 table 100");
        let config = crate::Config {
            allow: vec![range("0.0.0.0-255.255.255.255")],
            deny: vec![range("203.0.113.0-203.0.113.255")],
            ..super::machine::config("0123abcd")
        };
        let network = Network::open(&config).unwrap();
        let slot = network.claim().unwrap().slot();
        network.create(slot).unwrap();
        let guest = Guest::start(slot);
        let server = udp(Path::new("/run/netns/internet"), "0.0.0.0:5000");
        let says = |to: &str| {
            let socket = udp(&guest.netns, "169.254.0.21:0");
            // What is out of reach may be told at once, by the guest's own kernel even.
            let _ = socket.send_to(b"told", format!("{to}:5000"));
            socket.send_to(b"end", (SERVER_IP, 5000)).unwrap();
            let told = next(&server) == "told";
            if told {
                assert_eq!(next(&server), "end");
            }
            told
        };
        for to in ["10.0.0.1", "192.168.1.1", "169.254.1.1", "100.64.0.1"] {
            assert!(says(to), "{to} is allowed");
        }
        // The VMM's metadata, the operator's own no, other capsules, and what is no destination at all.
        for to in [
            "169.254.169.254",
            "203.0.113.7",
            "10.11.0.9",
            "10.12.0.1",
            "127.0.0.1",
            "0.0.0.1",
            "240.0.0.1",
            "224.0.0.1",
        ] {
            assert!(!says(to), "{to} is out of reach");
        }
        drop((guest, netns));
        network.sweep(&HashSet::new()).unwrap();
        network.close().unwrap();
    });
}
