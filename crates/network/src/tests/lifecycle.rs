//! Making, removing and sweeping slots, with `ip` and `nft` as oracles.

use std::collections::HashSet;
use std::fs;
use std::sync::{Mutex, mpsc};
use std::time::Instant;

use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

use super::machine::{assert_same, instance, inventory, json, network, on_own_machine, sh};
use crate::{Claim, Error, Network, Slot, Step};

const STEPS: [Step; 7] =
    [Step::Firewall, Step::Namespace, Step::Sysctl, Step::Tap, Step::Links, Step::Rules, Step::HostEnd];

#[test]
fn a_slot_has_everything_and_leaves_nothing() {
    on_own_machine(|| {
        let network = network();
        let before = inventory();
        let slot = network.claim().unwrap().slot();
        assert_eq!(slot, Slot::MIN);
        network.create(slot).unwrap();

        assert_eq!(sh("cat /proc/sys/net/ipv4/ip_forward"), "1\n");
        let link = &json("ip -j -d addr show wrenn-veth1")[0];
        assert_eq!(link["linkinfo"]["info_kind"], "veth");
        assert_eq!(link["operstate"], "UP");
        assert_eq!(
            (&link["addr_info"][0]["local"], &link["addr_info"][0]["prefixlen"]),
            (&"10.12.0.2".into(), &31.into())
        );
        let route = &json("ip -j route show 10.11.0.1")[0];
        assert_eq!((&route["gateway"], &route["dev"]), (&"10.12.0.3".into(), &"wrenn-veth1".into()));

        let inside = |command: &str| json(&format!("ip -n wrenn-ns-1 -j -d {command}"));
        let eth0 = &inside("addr show eth0")[0];
        assert_eq!(eth0["operstate"], "UP");
        assert_eq!(
            (&eth0["addr_info"][0]["local"], &eth0["addr_info"][0]["prefixlen"]),
            (&"10.12.0.3".into(), &31.into())
        );
        let tap = &inside("addr show tap0")[0];
        assert_eq!(
            (&tap["linkinfo"]["info_data"]["type"], &tap["linkinfo"]["info_data"]["persist"]),
            (&"tap".into(), &true.into())
        );
        assert_eq!((&tap["txqlen"], &tap["address"]), (&5000.into(), &"02:fc:00:00:00:06".into()));
        assert_eq!(
            (&tap["addr_info"][0]["local"], &tap["addr_info"][0]["prefixlen"]),
            (&"169.254.0.22".into(), &30.into())
        );
        assert_eq!(
            (&tap["addr_info"][1]["local"], &tap["addr_info"][1]["prefixlen"]),
            (&"169.254.169.254".into(), &32.into())
        );
        assert!(tap["flags"].as_array().unwrap().contains(&"UP".into()));
        assert!(inside("addr show lo")[0]["flags"].as_array().unwrap().contains(&"UP".into()));
        let neighbour = &inside("neigh show dev tap0")[0];
        assert_eq!((&neighbour["dst"], &neighbour["lladdr"]), (&"169.254.0.21".into(), &"02:fc:00:00:00:05".into()));
        assert_eq!(neighbour["state"][0], "PERMANENT");
        let default = &inside("route show default")[0];
        assert_eq!((&default["gateway"], &default["dev"]), (&"10.12.0.2".into(), &"eth0".into()));
        assert_eq!(sh("ip -n wrenn-ns-1 -6 addr"), "", "no IPv6 inside");
        assert_eq!(sh("ip netns exec wrenn-ns-1 cat /proc/sys/net/ipv4/ip_forward"), "1\n");
        assert_eq!(
            sh("ip netns exec wrenn-ns-1 nft list ruleset"),
            "table ip wrenn {\n\
             \tchain caps {\n\
             \t\ttype filter hook prerouting priority mangle; policy accept;\n\
             \t\tiifname \"tap0\" ct state new limit rate over 1000/second burst 2000 packets drop\n\
             \t\tiifname \"tap0\" ct state new ct count over 4096 drop\n\
             \t}\n\n\
             \tchain postrouting {\n\
             \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
             \t\toifname \"eth0\" ip saddr 169.254.0.21 snat to 10.12.0.3\n\
             \t}\n\n\
             \tchain prerouting {\n\
             \t\ttype nat hook prerouting priority dstnat; policy accept;\n\
             \t\tiifname \"eth0\" ip daddr 10.11.0.1 dnat to 169.254.0.21\n\
             \t}\n}\n\
             table netdev guard {\n\
             \tchain frames {\n\
             \t\ttype filter hook ingress device \"tap0\" priority filter; policy accept;\n\
             \t\t@ll,48,48 != 0x2fc00000005 drop\n\
             \t\tlimit rate over 210 mbytes/second burst 110 mbytes drop\n\
             \t\tip version 4 ip hdrlength 5 ip saddr 169.254.0.21 accept\n\
             \t\tarp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether 02:fc:00:00:00:05 arp saddr ip 169.254.0.21 \
             arp daddr ip 169.254.0.22 accept\n\
             \t\tarp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether 02:fc:00:00:00:05 arp saddr ip 169.254.0.21 \
             arp daddr ip 169.254.169.254 accept\n\
             \t\tdrop\n\
             \t}\n}\n\
             table ip guard {\n\
             \tchain input {\n\
             \t\ttype filter hook input priority filter; policy accept;\n\
             \t\tiifname \"tap0\" ct status dnat accept\n\
             \t\tiifname \"tap0\" ct state established,related accept\n\
             \t\tiifname \"tap0\" ip daddr 169.254.169.254 tcp dport 80 accept\n\
             \t\tiifname \"tap0\" ip daddr 169.254.0.22 meta l4proto icmp accept\n\
             \t\tiifname \"tap0\" drop\n\
             \t}\n\n\
             \tchain output {\n\
             \t\ttype filter hook output priority filter; policy accept;\n\
             \t\toifname \"eth0\" meta skuid 900001 drop\n\
             \t}\n}\n"
        );

        network.pool.slots.destroy(slot).unwrap();
        assert_same(&before, "at the end");
        network.pool.slots.destroy(slot).unwrap();
        assert_eq!(network.claim().unwrap().slot(), slot, "the lowest free slot");
        network.pool.slots.destroy(slot).unwrap();
        network.close().unwrap();
        assert_eq!(sh("nft list ruleset"), "");
    });
}

#[test]
fn the_host_s_table_says_what_it_means() {
    on_own_machine(|| {
        sh(
            "ip link add up0 type veth peer name up1; ip link set up0 up; ip addr add 192.0.2.1/24 dev up0; ip route add default via 192.0.2.2",
        );
        let network = network();
        for _ in 0..2 {
            network.create(network.claim().unwrap().slot()).unwrap();
        }
        // All of it but its comment, which is a digest of the rest.
        let table = sh("nft list table inet wrenn_0123abcd | grep -v comment");
        assert_eq!(table, include_str!("host-table.nft"));
        network.sweep(&HashSet::new()).unwrap();
        network.close().unwrap();
    });
}

#[test]
#[expect(clippy::print_stderr, reason = "a figure to read, not to assert")]
fn fifty_slots_at_once_and_back() {
    on_own_machine(|| {
        let network = network();
        let before = inventory();
        let took = Mutex::new(Vec::new());
        let round = || {
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        for _ in 0..50_usize.div_ceil(8) {
                            let start = Instant::now();
                            let slot = network.claim().unwrap().slot();
                            network.create(slot).unwrap();
                            took.lock().unwrap().push(start.elapsed());
                        }
                    });
                }
            });
        };
        round();
        let slots = network.pool.slots.claims.all().unwrap();
        assert_eq!(slots.len(), 56);
        assert_eq!(slots.last().unwrap().get(), 56, "no slot was passed over");
        std::thread::scope(|scope| {
            for part in slots.chunks(7) {
                scope.spawn(|| part.iter().for_each(|&slot| network.pool.slots.destroy(slot).unwrap()));
            }
        });
        assert_same(&before, "at the end");

        // And one after the other, for the time that one takes.
        let mut alone: Vec<_> = (0..20)
            .map(|_| {
                let start = Instant::now();
                network.create(network.claim().unwrap().slot()).unwrap();
                start.elapsed()
            })
            .collect();
        network.sweep(&HashSet::new()).unwrap();
        let mut took = took.into_inner().unwrap();
        took.sort();
        alone.sort();
        eprintln!("a create took {:?} (median) alone, {:?} with 8 at once", alone[10], took[took.len() / 2]);
        assert_same(&before, "at the end");
    });
}

#[test]
fn a_failure_in_any_step_leaves_only_the_claim() {
    on_own_machine(|| {
        let network = network();
        let before = inventory();
        for step in STEPS {
            let slot = network.claim().unwrap().slot();
            let claimed = inventory();
            *network.pool.slots.steps.fail_after.lock().unwrap() = Some(step);
            let error = network.create(slot).unwrap_err();
            assert!(matches!(&error, Error::Create { source, .. } if source.step == step), "{error:?}");
            assert_same(&claimed, &format!("after {step:?}"));
            *network.pool.slots.steps.fail_after.lock().unwrap() = None;
            // The same slot can be made afterwards.
            network.create(slot).unwrap();
            network.pool.slots.destroy(slot).unwrap();
            assert_same(&before, "at the end");
        }
    });
}

#[test]
fn what_a_killed_process_left_at_any_step_is_swept() {
    on_own_machine(|| {
        let network = network();
        let before = inventory();
        network.close().unwrap();
        for step in STEPS {
            let killed = super::machine::network();
            let slot = killed.claim().unwrap().slot();
            *killed.pool.slots.steps.fail_after.lock().unwrap() = Some(step);
            // Without the undo of `create`, as a kill would leave it.
            killed.pool.slots.build(slot).unwrap_err();
            assert_ne!(inventory(), before);
            drop(killed);

            let next = super::machine::network();
            assert_eq!(next.sweep(&HashSet::new()).unwrap(), [slot]);
            assert_same(&before, &format!("after {step:?}"));
            next.close().unwrap();
        }
    });
}

#[test]
fn a_restart_keeps_what_runs_and_sweeps_the_rest() {
    on_own_machine(|| {
        let first = network();
        let slots: Vec<_> = (0..3).map(|_| first.claim().unwrap().slot()).collect();
        slots.iter().for_each(|&slot| first.create(slot).unwrap());
        first.pool.slots.destroy(slots[0]).unwrap();
        let kept = inventory();
        first.create(first.claim().unwrap().slot()).unwrap();
        drop(first);

        let second = network();
        assert_eq!(second.sweep(&HashSet::from([slots[1], slots[2]])).unwrap(), [slots[0]]);
        assert_same(&kept, "the table has been rebuilt with what was kept");
        second.close().unwrap();
        assert_same(&kept, "the table stays while slots need it");
        let third = network();
        third.sweep(&HashSet::new()).unwrap();
        third.close().unwrap();
        assert_eq!(sh("nft list ruleset"), "");
    });
}

#[test]
fn a_restart_that_finds_nothing_to_change_changes_nothing() {
    on_own_machine(|| {
        let first = network();
        first.sweep(&HashSet::new()).unwrap();
        let kept = inventory();
        drop(first);
        let second = network();
        assert_eq!(second.sweep(&HashSet::new()).unwrap(), []);
        assert_same(&kept, "the table is taken over");
        second.close().unwrap();
    });
}

#[test]
fn two_instances_share_a_machine() {
    on_own_machine(|| {
        sh(
            "nft add table inet somebody; nft add chain inet somebody forward '{ type filter hook forward priority 0; }'",
        );
        sh("nft add rule inet somebody forward iifname wrenn-veth1 counter; ip netns add wrenn-ns-other");
        let before = inventory();
        let (a, b) = (network(), instance("deadbeef"));
        let mut slots = Vec::new();
        for network in [&a, &b, &a, &b] {
            let slot = network.claim().unwrap().slot();
            network.create(slot).unwrap();
            slots.push(slot.get());
        }
        assert_eq!(slots, [1, 2, 3, 4]);
        let of_b = inventory();
        let b_slot = Slot::new(2).unwrap();
        assert!(matches!(a.create(b_slot), Err(Error::NotOurs(slot)) if slot == b_slot));
        a.pool.slots.destroy(b_slot).unwrap();
        assert_same(&of_b, "another's slot is not touched");

        assert_eq!(a.sweep(&HashSet::new()).unwrap().len(), 2);
        assert_eq!(a.claim().unwrap().slot().get(), 1);
        assert_eq!(b.claim().unwrap().slot().get(), 5, "b's hint is past what a gave back");
        sh("ip netns exec wrenn-ns-2 true; ip netns exec wrenn-ns-4 true");
        for network in [a, b] {
            network.sweep(&HashSet::new()).unwrap();
            network.close().unwrap();
        }
        assert_same(&before, "at the end");
        sh("ip netns del wrenn-ns-other");
    });
}

#[test]
fn claims_are_found_quickly_and_run_out() {
    on_own_machine(|| {
        let network = network();
        let slots: Vec<_> = std::iter::from_fn(|| network.claim().ok()).map(Claim::slot).collect();
        assert_eq!(slots.len(), 32767);
        assert!(matches!(network.claim(), Err(Error::Exhausted)));
        network.pool.slots.destroy(slots[4711]).unwrap();
        assert_eq!(network.claim().unwrap().slot(), slots[4711]);
        // One that was given back by somebody else is found in the end.
        fs::remove_file("/run/wrenn/slots/17").unwrap();
        assert_eq!(network.claim().unwrap().slot().get(), 17);
    });
}

#[test]
fn a_leftover_without_a_claim_does_not_block_its_slot_for_ever() {
    on_own_machine(|| {
        let network = network();
        let before = inventory();
        let slot = network.claim().unwrap().slot();
        network.create(slot).unwrap();
        fs::remove_file("/run/wrenn/slots/1").unwrap();

        assert_eq!(network.pool.slots.claims.claim().unwrap().unwrap().get(), 2);
        network.pool.slots.destroy(Slot::new(2).unwrap()).unwrap();
        network.pool.slots.claims.release(slot).unwrap();
        let again = instance("deadbeef");
        assert_eq!(again.claim().unwrap().slot(), slot);
        let error = again.create(slot).unwrap_err();
        assert!(matches!(&error, Error::Create { source, .. } if source.step == Step::Namespace), "{error:?}");
        // The failed attempt has removed what was in its way.
        again.create(slot).unwrap();
        again.pool.slots.destroy(slot).unwrap();
        again.close().unwrap();
        network.pool.slots.firewall.delete(slot).unwrap();
        assert_same(&before, "at the end");
    });
}

#[test]
fn what_cannot_be_removed_keeps_its_claim() {
    on_own_machine(|| {
        let network = network();
        let slot = network.claim().unwrap().slot();
        network.create(slot).unwrap();
        // A mount below the name makes it busy in a way that no retry of ours resolves.
        sh("umount /run/netns/wrenn-ns-1; rm /run/netns/wrenn-ns-1; mkdir /run/netns/wrenn-ns-1");
        let error = network.pool.slots.destroy(slot).unwrap_err();
        assert!(matches!(&error, Error::Destroy(left) if left.0.len() == 1 && left.0[0].1.step == Step::Namespace));
        assert!(error.to_string().starts_with("remove a slot: network namespace of slot 1 ("), "{error}");
        assert!(network.pool.slots.claims.owns(slot).unwrap());
        assert!(!sh("ip -o link").contains("wrenn-veth1"), "the other steps were done");
        sh("rmdir /run/netns/wrenn-ns-1");
        network.pool.slots.destroy(slot).unwrap();
        assert!(!network.pool.slots.claims.owns(slot).unwrap());
    });
}

#[test]
fn a_vmm_s_mount_namespace_does_not_keep_another_slot_s_network() {
    on_own_machine(|| {
        let network = network();
        let slot = network.claim().unwrap().slot();
        network.create(slot).unwrap();
        // By its number: the machine under this one may have a slot of the same name.
        let namespace =
            format!("net:[{}]", std::os::unix::fs::MetadataExt::ino(&fs::metadata(slot.netns_path()).unwrap()));
        let (ready, is_ready) = mpsc::channel();
        let (destroyed, is_destroyed) = mpsc::channel();
        std::thread::scope(|scope| {
            // A VMM started now has a private copy of every mount of this moment.
            let vmm = scope.spawn(move || {
                // SAFETY: descriptors stay shared.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
                rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
                let mounts = || fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
                let had = mounts().contains(&namespace);
                ready.send(()).unwrap();
                is_destroyed.recv().unwrap();
                (had, mounts().contains(&namespace))
            });
            is_ready.recv().unwrap();
            network.pool.slots.destroy(slot).unwrap();
            destroyed.send(()).unwrap();
            assert_eq!(vmm.join().unwrap(), (true, false));
        });
    });
}

#[test]
fn an_instance_s_name_is_checked() {
    for name in ["", "0123abc", "0123abcde", "0123ABCD", "0123abc;", "../../.."] {
        let config = super::machine::config(name);
        assert!(matches!(Network::open(&config), Err(Error::Instance(given)) if given == name));
    }
}
