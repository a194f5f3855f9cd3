//! As many slots as a machine has in a busy hour.

use std::net::{Ipv4Addr, UdpSocket};

use super::guest::{SERVER_IP, internet, udp};
use super::machine::{assert_same, inventory, network, on_own_machine, sh};
use super::wire::{UDP, Wire};

#[test]
fn a_thousand_slots_are_made_and_used_and_leave_nothing() {
    are_made_and_used_and_leave_nothing(250, 4);
}

/// As above, where everything takes ten times as long.
#[test]
fn fifty_slots_are_made_and_used_and_leave_nothing() {
    are_made_and_used_and_leave_nothing(50, 1);
}

fn are_made_and_used_and_leave_nothing(at_once: usize, rounds: usize) {
    on_own_machine(|| {
        let server = udp(&internet(), &format!("{SERVER_IP}:7"));
        // Making slots takes longer than a test waits for a datagram.
        server.set_read_timeout(None).unwrap();
        let answers = server.try_clone().unwrap();
        let echo = std::thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((length @ 1.., from)) = answers.recv_from(&mut buffer) {
                let _ = answers.send_to(&buffer[..length], from);
            }
        });
        let network = network();
        sh("echo 1 > /proc/sys/net/ipv6/conf/up0/disable_ipv6");
        let host = UdpSocket::bind("0.0.0.0:0").unwrap();
        let to: Ipv4Addr = SERVER_IP.parse().unwrap();
        // The uplink's neighbour is known from the start, as it would be learned at any moment.
        host.send_to(b"here", (to, 7)).unwrap();
        host.recv_from(&mut [0; 100]).unwrap();
        sh(
            "ip neigh show dev up0 | while read -r at _ mac _; do ip neigh replace $at lladdr $mac dev up0 nud permanent; done",
        );
        let before = inventory();
        for _ in 0..rounds {
            let mut slots = Vec::new();
            for _ in 0..at_once {
                let slot = network.claim().unwrap().slot();
                network.create(slot).unwrap();
                slots.push((slot, Wire::open(slot)));
                network.attached(slot).unwrap();
            }
            // With all of them there.
            for (slot, wire) in &mut slots {
                wire.send_udp(5000, (to, 7), slot.to_string().as_bytes());
                assert_eq!(wire.next(UDP), Some(slot.to_string().into_bytes()), "from the internet to slot {slot}");
                host.send_to(b"from the host", (slot.host_ip(), 6000)).unwrap();
                assert_eq!(wire.next(UDP), Some(b"from the host".to_vec()), "from the host to slot {slot}");
            }
            let traffic = network.traffic().unwrap();
            assert_eq!(traffic.len(), at_once);
            assert!(traffic.values().all(|of| (of.sent.packets, of.received.packets) == (1, 2)), "{traffic:?}");
            for (slot, wire) in slots {
                drop(wire);
                network.pool.slots.destroy(slot).unwrap();
            }
            assert_eq!(sh("grep -cE 'src=10.12|dst=10.11' /proc/thread-self/net/nf_conntrack || true"), "0\n");
        }
        assert_same(&before, "at the end");
        network.close().unwrap();
        server.send_to(b"", (to, 7)).unwrap();
        echo.join().unwrap();
    });
}
