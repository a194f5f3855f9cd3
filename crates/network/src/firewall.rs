//! The two nftables tables: one of this instance on the host, and one inside each namespace.
//!
//! The host's table has a fixed number of rules. What distinguishes slots are elements of its sets, so neither making
//! a slot nor a packet's way costs more with more slots. Its chains decide about our veths' traffic and let everything
//! else pass on to whoever else has rules; no table but our own is ever touched.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;

use rustix::io::Errno;

use crate::netlink::{Error, NETFILTER, Socket};
use crate::nft::{Batch, Expr, Hook, Key, ifname};
use crate::slot::{GUEST_ADDRESS, Slot, UPLINK_IN_NETNS};

/// The host's ends of our veth pairs.
const VETHS: &str = "veths";
/// Which source addresses may come in by which veth.
const SOURCES: &str = "sources";
/// The addresses that leave by an uplink in disguise.
const ADDRESSES: &str = "addresses";
/// The interfaces by which guests reach the internet.
const UPLINKS: &str = "uplinks";
/// Destinations that no guest reaches.
const FORBIDDEN: &str = "forbidden";

/// Destinations that no guest reaches, first address and the one after the last.
const FORBIDDEN_RANGES: [(Ipv4Addr, Ipv4Addr); 2] = [
    // Every slot's addresses: 10.11.0.0/16 and 10.12.0.0/16.
    (Ipv4Addr::new(10, 11, 0, 0), Ipv4Addr::new(10, 13, 0, 0)),
    // Link-local, where clouds keep their metadata.
    (Ipv4Addr::new(169, 254, 0, 0), Ipv4Addr::new(169, 255, 0, 0)),
];

/// This instance's table on the host.
pub(crate) struct Firewall {
    table: String,
}

impl Firewall {
    pub(crate) fn new(instance: &str) -> Self {
        Self { table: format!("wrenn_{instance}") }
    }

    /// Makes the table anew with these slots in it. What an earlier process left is replaced in the same transaction,
    /// so that running capsules are never without it.
    pub(crate) fn rebuild(&self, slots: &[Slot], uplinks: &BTreeSet<String>) -> Result<(), Error> {
        let mut batch = self.batch();
        // Only what exists can be deleted.
        batch.add_table();
        batch.delete_table();
        batch.add_table();
        batch.add_set(VETHS, &Key::Ifname);
        batch.add_set(SOURCES, &Key::IfnameIpv4);
        batch.add_set(ADDRESSES, &Key::Ipv4);
        batch.add_set(UPLINKS, &Key::Ifname);
        batch.add_set(FORBIDDEN, &Key::Ipv4Range);
        for (first, end) in FORBIDDEN_RANGES {
            batch.add_range(FORBIDDEN, first, end);
        }
        batch.add_elements(UPLINKS, &uplinks.iter().map(|name| ifname(name)).collect::<Vec<_>>());
        add_slots(&mut batch, slots);
        add_chains(&mut batch);
        transact(batch)
    }

    pub(crate) fn add(&self, slot: Slot) -> Result<(), Error> {
        let mut batch = self.batch();
        add_slots(&mut batch, &[slot]);
        transact(batch)
    }

    /// Deletes what of the slot is there.
    pub(crate) fn delete(&self, slot: Slot) -> Result<(), Error> {
        let [first, second] = sources(slot);
        let elements: [(&str, &[u8]); 4] = [
            (SOURCES, &first),
            (SOURCES, &second),
            (ADDRESSES, &slot.veth_netns_ip().octets()),
            (VETHS, &ifname(&slot.veth())),
        ];
        let delete = |elements: &[(&str, &[u8])]| {
            let mut batch = self.batch();
            elements.iter().for_each(|(set, key)| batch.delete_element(set, key));
            transact(batch)
        };
        match delete(&elements) {
            // Some are missing and the kernel deleted none; or the whole table is, and so are they.
            Err(error) if error.is(Errno::NOENT) => elements.iter().try_for_each(|&element| match delete(&[element]) {
                Err(error) if error.is(Errno::NOENT) => Ok(()),
                result => result,
            }),
            result => result,
        }
    }

    /// Removes the whole table.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        let mut batch = self.batch();
        batch.add_table();
        batch.delete_table();
        transact(batch)
    }

    fn batch(&self) -> Batch<'_> {
        Batch::new(libc::NFPROTO_INET, &self.table)
    }
}

/// A packet comes in from the guest's side with the address of the namespace's end, or as an answer to what was sent
/// to the slot's host address.
fn sources(slot: Slot) -> [[u8; libc::IFNAMSIZ + 4]; 2] {
    [slot.veth_netns_ip(), slot.host_ip()].map(|address| {
        let mut key = [0; libc::IFNAMSIZ + 4];
        key[..libc::IFNAMSIZ].copy_from_slice(&ifname(&slot.veth()));
        key[libc::IFNAMSIZ..].copy_from_slice(&address.octets());
        key
    })
}

fn add_slots(batch: &mut Batch<'_>, slots: &[Slot]) {
    batch.add_elements(VETHS, &slots.iter().map(|slot| ifname(&slot.veth())).collect::<Vec<_>>());
    batch.add_elements(SOURCES, &slots.iter().copied().flat_map(sources).collect::<Vec<_>>());
    batch.add_elements(ADDRESSES, &slots.iter().map(|slot| slot.veth_netns_ip().octets()).collect::<Vec<_>>());
}

fn add_chains(batch: &mut Batch<'_>) {
    use Expr::*;

    // Before connections are looked up: a guest cannot speak for another one, and not IPv6.
    let hook = Hook { kind: "filter", number: libc::NF_INET_PRE_ROUTING, priority: libc::NF_IP_PRI_RAW };
    batch.add_chain("prerouting", &hook);
    batch.add_rule("prerouting", &[Ipv4, IifnameSaddrIn(SOURCES), Accept]);
    batch.add_rule("prerouting", &[IifnameIn(VETHS), Drop]);

    // To the host itself: only answers.
    let hook = Hook { kind: "filter", number: libc::NF_INET_LOCAL_IN, priority: libc::NF_IP_PRI_FILTER };
    batch.add_chain("input", &hook);
    batch.add_rule("input", &[IifnameIn(VETHS), Established, Accept]);
    batch.add_rule("input", &[IifnameIn(VETHS), Drop]);

    // Into a slot: only answers. Out of it: by an uplink or not at all.
    let hook = Hook { kind: "filter", number: libc::NF_INET_FORWARD, priority: libc::NF_IP_PRI_FILTER };
    batch.add_chain("forward", &hook);
    batch.add_rule("forward", &[OifnameIn(VETHS), Established, Accept]);
    batch.add_rule("forward", &[OifnameIn(VETHS), Drop]);
    batch.add_rule("forward", &[IifnameIn(VETHS), Ipv4, DaddrIn(FORBIDDEN), Drop]);
    batch.add_rule("forward", &[IifnameIn(VETHS), OifnameIn(UPLINKS), Accept]);
    batch.add_rule("forward", &[IifnameIn(VETHS), Drop]);

    let hook = Hook { kind: "nat", number: libc::NF_INET_POST_ROUTING, priority: libc::NF_IP_PRI_NAT_SRC };
    batch.add_chain("postrouting", &hook);
    batch.add_rule("postrouting", &[Ipv4, SaddrIn(ADDRESSES), OifnameIn(UPLINKS), Masquerade]);
}

/// The table inside a namespace, sent through a socket of it: the guest appears as the namespace's end of the veth
/// pair, and what is sent to the slot's host address goes to the guest.
pub(crate) fn translate_in_netns(slot: Slot, socket: &Socket) -> Result<(), Error> {
    use Expr::*;

    let mut batch = Batch::new(libc::NFPROTO_IPV4, "wrenn");
    batch.add_table();
    let hook = Hook { kind: "nat", number: libc::NF_INET_POST_ROUTING, priority: libc::NF_IP_PRI_NAT_SRC };
    batch.add_chain("postrouting", &hook);
    batch.add_rule("postrouting", &[Oifname(UPLINK_IN_NETNS), Saddr(GUEST_ADDRESS), Snat(slot.veth_netns_ip())]);
    let hook = Hook { kind: "nat", number: libc::NF_INET_PRE_ROUTING, priority: libc::NF_IP_PRI_NAT_DST };
    batch.add_chain("prerouting", &hook);
    batch.add_rule("prerouting", &[Iifname(UPLINK_IN_NETNS), Daddr(slot.host_ip()), Dnat(GUEST_ADDRESS)]);
    socket.transact(&batch.finish())
}

fn transact(batch: Batch<'_>) -> Result<(), Error> {
    Socket::open(NETFILTER)?.transact(&batch.finish())
}

/// The interfaces of the IPv4 default routes; none on a machine that has no way out.
pub(crate) fn uplinks() -> std::io::Result<BTreeSet<String>> {
    // Columns: interface, destination, gateway, flags, three counters, mask.
    let table = fs::read_to_string("/proc/thread-self/net/route")?;
    let default = |line: &str| {
        let columns: Vec<_> = line.split_whitespace().collect();
        match columns[..] {
            [name, "00000000", _, _, _, _, _, "00000000", ..] if name != "*" => Some(name.to_owned()),
            _ => None,
        }
    };
    Ok(table.lines().filter_map(default).collect())
}
