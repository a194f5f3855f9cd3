//! What one guest may do, and that it is that one alone.

use std::net::{Ipv4Addr, UdpSocket};
use std::thread::JoinHandle;
use std::time::Instant;

use super::guest::{SERVER_IP, internet, udp};
use super::machine::{json, network, on_own_machine, sh};
use super::wire::{ICMP, UDP, Wire};
use crate::limits::{CONNECTIONS, NEW_CONNECTIONS_BURST, NEW_CONNECTIONS_PER_SECOND};
use crate::{Network, Slot};

/// A server that answers every datagram, and counts them.
struct Server {
    address: Ipv4Addr,
    socket: UdpSocket,
    thread: JoinHandle<u64>,
}

impl Server {
    fn start() -> Self {
        let socket = udp(&internet(), &format!("{SERVER_IP}:7"));
        let answers = socket.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            let (mut buffer, mut count) = ([0; 100], 0);
            while let Ok((length @ 1.., from)) = answers.recv_from(&mut buffer) {
                count += 1;
                let _ = answers.send_to(&buffer[..length], from);
            }
            count
        });
        Self { address: SERVER_IP.parse().unwrap(), socket, thread }
    }

    /// How many datagrams came.
    fn end(self) -> u64 {
        self.socket.send_to(b"", (self.address, 7)).unwrap();
        self.thread.join().unwrap()
    }
}

fn slot(network: &Network) -> (Slot, Wire) {
    let slot = network.claim().unwrap().slot();
    network.create(slot).unwrap();
    (slot, Wire::open(slot))
}

fn end(network: Network) {
    network.sweep(&Default::default()).unwrap();
    network.close().unwrap();
}

/// Whether an answer comes to a datagram of a new connection.
fn is_answered(wire: &mut Wire, from: u16, server: &Server) -> bool {
    wire.send_udp(from, (server.address, 7), b"hello");
    wire.next(UDP).is_some()
}

#[test]
fn a_guest_that_begins_too_much_is_dropped_alone() {
    on_own_machine(|| {
        let server = Server::start();
        let network = network();
        let ((a_slot, mut a), (b_slot, mut b)) = (slot(&network), slot(&network));
        const SENT: u64 = 20_000;
        let begun = Instant::now();
        for round in 0..20 {
            for number in 0..1000 {
                a.send_udp(10_000 + round * 1000 + number, (server.address, 7), b"flood");
            }
            assert!(is_answered(&mut b, 2000 + round, &server), "B is not touched");
        }
        // Its frames were worked through as they were written.
        let most = u64::from(NEW_CONNECTIONS_BURST) + NEW_CONNECTIONS_PER_SECOND * (begun.elapsed().as_secs() + 1);
        let traffic = network.traffic().unwrap();
        let passed = traffic[&a_slot].sent.packets;
        assert!(
            passed >= NEW_CONNECTIONS_BURST.into() && passed <= most.min(SENT - 1),
            "{passed} of {SENT}, most {most}"
        );
        assert_eq!((traffic[&b_slot].sent.packets, traffic[&b_slot].received.packets), (20, 20));
        assert!(server.end() <= passed + 20, "what was not let through did not come");
        end(network);
    });
}

#[test]
fn connections_of_any_protocol_are_counted_for_each_guest() {
    on_own_machine(|| {
        let server = Server::start();
        let network = network();
        let ((_, mut a), (_, mut b)) = (slot(&network), slot(&network));
        // The same rules with a smaller number, that can be reached one by one.
        let table = "inet wrenn_0123abcd";
        let rule = sh(&format!("nft list chain {table} caps | grep '@connections'"));
        let smaller = rule.trim().replace(&format!("over {CONNECTIONS}"), "over 4");
        assert_ne!(rule.trim(), smaller);
        sh(&format!("nft flush chain {table} caps; nft add rule {table} caps '{smaller}'"));
        for from in [1001, 1002] {
            assert!(is_answered(&mut a, from, &server));
        }
        for id in [1, 2] {
            a.ping(id, server.address);
            assert!(a.next(ICMP).is_some(), "ping {id}");
        }
        // Four are all. What is there already goes on; B's answers show that A's were worked through.
        a.send_udp(1003, (server.address, 7), b"one more");
        a.ping(3, server.address);
        assert!(is_answered(&mut a, 1001, &server));
        a.ping(2, server.address);
        assert!(a.next(ICMP).is_some());
        for from in 1000..1004 {
            assert!(is_answered(&mut b, from, &server));
        }
        assert_eq!(server.end(), 3 + 4);
        assert_eq!(
            sh("grep -c 'src=10.12.0.3 dst=198.51.100.7 sport=1003' /proc/thread-self/net/nf_conntrack || true"),
            "0\n"
        );
        assert_eq!(
            sh("grep -c 'src=10.12.0.5 dst=198.51.100.7 sport=1003' /proc/thread-self/net/nf_conntrack || true"),
            "1\n"
        );
        end(network);
    });
}

#[test]
fn a_namespace_tracks_no_more_than_the_host() {
    on_own_machine(|| {
        let network = network();
        let (_, mut a) = slot(&network);
        // To an address that the host refuses: the host tracks none of it.
        for from in 0..30_000 {
            a.send_udp(1000 + from, (Ipv4Addr::new(10, 12, 0, 2), 7), b"flood");
        }
        let tracked: u32 =
            sh("ip netns exec wrenn-ns-1 cat /proc/sys/net/netfilter/nf_conntrack_count").trim().parse().unwrap();
        assert!(tracked <= CONNECTIONS, "{tracked}");
        assert!(tracked >= NEW_CONNECTIONS_BURST, "{tracked}");
        assert_eq!(sh("cat /proc/sys/net/netfilter/nf_conntrack_count"), "0\n");
        end(network);
    });
}

#[test]
fn what_a_guest_receives_is_shaped_on_the_host() {
    on_own_machine(|| {
        let network = network();
        let (slot, _wire) = slot(&network);
        let shape = || {
            let qdisc = json("tc -j qdisc show dev wrenn-veth1")[0].clone();
            (qdisc["kind"].clone(), qdisc["options"]["rate"].clone(), qdisc["options"]["burst"].clone())
        };
        let limits = ("tbf".into(), (200 << 20).into(), (100 << 20).into());
        assert_eq!(shape(), limits);
        sh("tc qdisc change dev wrenn-veth1 root handle 1: tbf rate 8kbit burst 2000 limit 3000");
        // Ten datagrams of 1 KB are more than that holds.
        let before = network.traffic().unwrap()[&slot].received;
        let host = UdpSocket::bind("0.0.0.0:0").unwrap();
        (0..10).for_each(|_| drop(host.send_to(&[0; 1000], (slot.host_ip(), 9))));
        let dropped = json("tc -s -j qdisc show dev wrenn-veth1")[0]["drops"].as_u64().unwrap();
        assert!(dropped >= 5, "{dropped}");
        let sent = network.traffic().unwrap()[&slot].received.packets - before.packets;
        assert_eq!(sent, 10, "they are counted before");
        network.pool.slots.clean(slot).unwrap();
        assert_eq!(shape(), limits);
        end(network);
    });
}
