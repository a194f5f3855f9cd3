//! Slots that are made ahead and used again.

use std::collections::HashSet;
use std::net::UdpSocket;
use std::path::Path;

use super::guest::{Guest, SERVER_IP, internet, next, udp};
use super::machine::{assert_same, inventory, network, on_own_machine, pooled, sh};
use crate::{Error, Slot, Step};

#[test]
fn a_slot_is_there_before_it_is_asked_for() {
    on_own_machine(|| {
        network().close().unwrap();
        let before = inventory();
        let network = pooled(3);
        assert!(sh("ls /run/wrenn/slots").is_empty(), "nothing is made before it is known whose slots are whose");
        network.sweep(&HashSet::new()).unwrap();
        let numbers = |slots: Vec<Slot>| slots.into_iter().map(Slot::get).collect::<Vec<_>>();
        assert_eq!(numbers(network.pool.settle()), [1, 2, 3]);
        let taken = network.claim().unwrap();
        assert_eq!(taken.slot().get(), 1);
        // No more is made of it now: what this would make, it would make twice.
        network.create(taken.slot()).unwrap();
        sh("ip netns exec wrenn-ns-1 ip link show tap0");
        assert_eq!(numbers(network.pool.settle()), [2, 3, 4]);
        network.give_back(taken).unwrap();
        // The lowest stay.
        assert_eq!(numbers(network.pool.settle()), [2, 3, 1]);
        network.give_back(taken).unwrap();
        assert_eq!(numbers(network.pool.settle()), [2, 3, 1], "it had been given back");
        network.sweep(&HashSet::new()).unwrap();
        assert_eq!(numbers(network.pool.settle()), [2, 3, 1], "the pool's are not swept");
        network.close().unwrap();
        assert_same(&before, "at the end");
    });
}

#[test]
fn a_slot_is_given_back_by_who_has_it_and_once() {
    on_own_machine(|| {
        network().close().unwrap();
        let before = inventory();
        for ready in [0, 1] {
            let network = pooled(ready);
            network.sweep(&HashSet::new()).unwrap();
            let take = || {
                network.pool.settle();
                let claim = network.claim().unwrap();
                network.create(claim.slot()).unwrap();
                claim
            };
            let first = take();
            network.give_back(first).unwrap();
            let second = take();
            assert_eq!(second.slot(), first.slot());
            network.set_policy(second.slot(), &super::policy::off()).unwrap();
            // It is another's by now, and stays as that has it.
            let used = state_of(second.slot());
            network.give_back(first).unwrap();
            network.pool.settle();
            assert_eq!(state_of(second.slot()), used);
            assert!(matches!(network.take_over(second.slot()), Err(Error::NotOurs(_))));
            network.give_back(second).unwrap();
            network.close().unwrap();
            assert_same(&before, "at the end");
        }
    });
}

#[test]
fn a_claim_holds_until_its_slot_could_be_given_back() {
    on_own_machine(|| {
        let network = network();
        let claim = network.claim().unwrap();
        network.create(claim.slot()).unwrap();
        *network.pool.slots.steps.fail_after.lock().unwrap() = Some(Step::Links);
        network.give_back(claim).unwrap_err();
        *network.pool.slots.steps.fail_after.lock().unwrap() = None;
        assert_ne!(network.claim().unwrap().slot(), claim.slot());
        network.give_back(claim).unwrap();
        assert_eq!(network.claim().unwrap().slot(), claim.slot());
    });
}

#[test]
fn what_runs_on_is_taken_over_once() {
    on_own_machine(|| {
        let first = network();
        let slots = [(); 2].map(|()| {
            let slot = first.claim().unwrap().slot();
            first.create(slot).unwrap();
            slot
        });
        drop(first);
        let second = pooled(1);
        let claim = second.take_over(slots[0]).unwrap();
        assert!(second.take_over(slots[0]).is_err());
        second.sweep(&HashSet::from([slots[0]])).unwrap();
        second.pool.settle();
        assert!(second.take_over(slots[1]).is_err(), "it is in the pool");
        second.give_back(claim).unwrap();
        second.pool.settle();
        second.close().unwrap();
    });
}

#[test]
fn more_than_are_ready_can_be_had() {
    on_own_machine(|| {
        network().close().unwrap();
        let before = inventory();
        let network = pooled(2);
        network.sweep(&HashSet::new()).unwrap();
        network.pool.settle();
        let claims: Vec<_> = (0..6)
            .map(|_| {
                let claim = network.claim().unwrap();
                network.create(claim.slot()).unwrap();
                claim
            })
            .collect();
        assert_eq!(claims.iter().map(|claim| claim.slot()).collect::<HashSet<_>>().len(), 6);
        claims.iter().for_each(|&claim| network.give_back(claim).unwrap());
        assert_eq!(network.pool.settle().len(), 2);
        assert_eq!(sh("ls /run/wrenn/slots | wc -l"), "2\n");
        network.close().unwrap();
        assert_same(&before, "at the end");
    });
}

/// What one guest left is sought when the next has its slot.
#[test]
fn the_next_guest_finds_nothing_of_the_last() {
    on_own_machine(|| {
        network().close().unwrap();
        let before = inventory();
        let netns = internet();
        let network = pooled(1);
        network.sweep(&HashSet::new()).unwrap();
        network.pool.settle();
        let claim = network.claim().unwrap();
        let slot = claim.slot();
        network.create(slot).unwrap();
        let new = state_of(slot);

        let guest = Guest::start(slot);
        let server = udp(&netns, &format!("{SERVER_IP}:5000"));
        udp(&guest.netns, "169.254.0.21:0").send_to(b"hello", (SERVER_IP, 5000)).unwrap();
        assert_eq!(next(&server), "hello");
        let at_guest = udp(&guest.netns, "169.254.0.21:6000");
        UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"hello", (slot.host_ip(), 6000)).unwrap();
        assert_eq!(next(&at_guest), "hello");
        // As a VMM does it, or one that is no longer what it was.
        sh("ip netns exec wrenn-ns-1 nft add table netdev vmm
            ip netns exec wrenn-ns-1 nft add chain netdev vmm rate '{ type filter hook ingress device tap0 priority 0; }'
            ip -n wrenn-ns-1 addr add 169.254.169.253/32 dev tap0; ip -n wrenn-ns-1 link set tap0 mtu 900
            ip -n wrenn-ns-1 neigh add 169.254.0.23 lladdr 02:00:00:00:00:01 dev tap0
            tc -n wrenn-ns-1 qdisc add dev tap0 root tbf rate 1mbit burst 10k latency 10ms
            ip netns exec wrenn-ns-1 sh -c 'echo 0 > /proc/sys/net/ipv4/ip_forward'");
        let used = state_of(slot);
        for (what, (new, used)) in new.iter().zip(&used).enumerate() {
            assert_ne!(new, used, "{what}: this would prove nothing");
        }
        drop(guest);

        network.give_back(claim).unwrap();
        network.pool.settle();
        assert_eq!(network.claim().unwrap().slot(), slot);
        assert_eq!(state_of(slot), new);
        let traffic = network.traffic().unwrap()[&slot];
        assert_eq!(traffic, crate::Traffic::default());
        // And it works for the next one.
        let guest = Guest::start(slot);
        udp(&guest.netns, "169.254.0.21:0").send_to(b"again", (SERVER_IP, 5000)).unwrap();
        assert_eq!(next(&server), "again");
        drop((guest, server));
        network.pool.slots.destroy(slot).unwrap();
        network.close().unwrap();
        sh("ip link del up0; ip netns del internet");
        assert_same(&before, "at the end");
    });
}

/// Everything of a slot that a guest or a VMM can have changed, in words: counters, connections on the host and inside,
/// rules, links, neighbours, addresses, settings.
fn state_of(slot: Slot) -> Vec<String> {
    let inside = |command: &str| sh(&format!("ip netns exec {} {command}", slot.netns()));
    let addresses = [slot.host_ip(), slot.veth_netns_ip()].map(|address| address.to_string()).join("|");
    vec![
        sh("nft list set inet wrenn_0123abcd sources; nft list set inet wrenn_0123abcd received"),
        sh(&format!("grep -E '{addresses}' /proc/thread-self/net/nf_conntrack || true")),
        inside("cat /proc/thread-self/net/nf_conntrack"),
        inside("nft list ruleset"),
        inside("ip -d link show tap0 | sed 's/ numtxqueues.*//'"),
        inside("tc qdisc show dev tap0"),
        inside("ip neigh show nud all dev tap0"),
        inside("ip addr show tap0"),
        inside("cat /proc/sys/net/ipv4/ip_forward"),
    ]
}

#[test]
fn a_namespace_with_anything_else_in_it_is_not_used_again() {
    on_own_machine(|| {
        network().close().unwrap();
        let before = inventory();
        let network = pooled(1);
        network.sweep(&HashSet::new()).unwrap();
        for foreign in [
            "ip -n NS link add spy type veth peer name spy1",
            "ip -n NS addr add 10.99.0.1/32 dev eth0",
            "ip -n NS route add 10.98.0.0/16 via 10.12.0.2",
            "ip -n NS rule add from 10.97.0.0/16 table 7",
            "ip -n NS neigh add 10.96.0.1 lladdr 02:00:00:00:00:01 dev eth0",
            "tc -n NS qdisc add dev eth0 clsact",
        ] {
            let slot = network.pool.settle()[0];
            let inside = || {
                let netns = slot.netns();
                sh(&format!(
                    "(ip -n {netns} -br link | sed 's/[@ ].*//'; ip -n {netns} -o addr; ip -n {netns} route | sed 's/ linkdown//'
                      ip -n {netns} rule; ip -n {netns} neigh; tc -n {netns} qdisc) | sort"
                ))
            };
            let new = inside();
            let claim = network.claim().unwrap();
            assert_eq!(claim.slot(), slot);
            network.create(slot).unwrap();
            sh(&foreign.replace("NS", &slot.netns()));
            assert_ne!(inside(), new, "{foreign}");
            network.give_back(claim).unwrap();
            network.pool.settle();
            assert_eq!(inside(), new, "{foreign}");
        }
        network.close().unwrap();
        assert_same(&before, "at the end");
    });
}

#[test]
fn what_the_host_still_says_to_a_guest_does_not_reach_the_next() {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    on_own_machine(|| {
        let network = pooled(1);
        network.sweep(&HashSet::new()).unwrap();
        network.pool.settle();
        let claim = network.claim().unwrap();
        let slot = claim.slot();
        network.create(slot).unwrap();
        let guest = Guest::start(slot);
        let listener = super::guest::inside(&guest.netns, || TcpListener::bind("169.254.0.21:80")).unwrap();
        let mut stream = TcpStream::connect((slot.host_ip(), 80)).unwrap();
        let (mut inside, _) = listener.accept().unwrap();
        stream.write_all(b"for the first").unwrap();
        inside.read_exact(&mut [0; 13]).unwrap();
        drop((inside, listener, guest));
        network.give_back(claim).unwrap();
        network.pool.settle();
        // It has ended, with an error and not as if all was said.
        assert!(stream.write_all(b"for nobody").is_err());
        assert!(
            !Path::new("/proc/thread-self/net/nf_conntrack").exists()
                || !sh("cat /proc/thread-self/net/nf_conntrack").contains("10.11.0.1")
        );
        network.close().unwrap();
    });
}
