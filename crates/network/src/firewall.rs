//! The two nftables tables: one of this instance on the host, and one inside each namespace.
//!
//! The host's table has a fixed number of rules. What distinguishes slots are elements of its sets, so neither making
//! a slot nor a packet's way costs more with more slots. Its chains decide about our veths' traffic and let everything
//! else pass on to whoever else has rules; no table but our own is ever touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::Ipv4Addr;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;

use crate::guard;
use crate::limits::{CONNECTIONS, NEW_CONNECTIONS_BURST, NEW_CONNECTIONS_PER_SECOND};
use crate::netlink::{Error, NETFILTER, Socket};
use crate::nft::{self, Batch, Expr, Hook, Key, Memory, Query, ifname};
use crate::ranges::{self, Range};
use crate::slot::{GUEST_ADDRESS, Slot, TAP, UPLINK_IN_NETNS, VETH};
use crate::traffic::Traffic;

/// The host's ends of our veth pairs.
const VETHS: &str = "veths";
/// Which source addresses may come in by which veth, and how much did.
const SOURCES: &str = "sources";
/// How much went out by each veth.
const RECEIVED: &str = "received";
/// The veths, each with the rate at which its guest begins connections.
const NEW_CONNECTIONS_OF: &str = "new_connections";
/// The veths whose guests have connections, each with those that it began.
const CONNECTIONS_OF: &str = "connections";
/// The addresses that leave by an uplink in disguise.
const ADDRESSES: &str = "addresses";
/// The interfaces by which guests reach the internet.
const UPLINKS: &str = "uplinks";
/// Destinations that no guest reaches.
const FORBIDDEN: &str = "forbidden";

/// What no guest reaches and nobody can allow: the slots' addresses, 10.11.0.0/16 and 10.12.0.0/16, and what is no host's
/// address.
const CLOSED: [Range; 4] = [
    (Ipv4Addr::new(0, 0, 0, 0), Ipv4Addr::new(0, 255, 255, 255)),
    (Ipv4Addr::new(10, 11, 0, 0), Ipv4Addr::new(10, 12, 255, 255)),
    (Ipv4Addr::new(127, 0, 0, 0), Ipv4Addr::new(127, 255, 255, 255)),
    (Ipv4Addr::new(224, 0, 0, 0), Ipv4Addr::new(255, 255, 255, 255)),
];

/// What no guest reaches unless the operator allows it: private ranges, shared ones of providers, and link-local, where clouds
/// keep their metadata.
const PRIVATE: [Range; 5] = [
    (Ipv4Addr::new(10, 0, 0, 0), Ipv4Addr::new(10, 255, 255, 255)),
    (Ipv4Addr::new(100, 64, 0, 0), Ipv4Addr::new(100, 127, 255, 255)),
    (Ipv4Addr::new(169, 254, 0, 0), Ipv4Addr::new(169, 254, 255, 255)),
    (Ipv4Addr::new(172, 16, 0, 0), Ipv4Addr::new(172, 31, 255, 255)),
    (Ipv4Addr::new(192, 168, 0, 0), Ipv4Addr::new(192, 168, 255, 255)),
];

/// The floor under every policy: what is closed, what the operator denies, and what is private and not allowed by the operator.
fn forbidden(allow: &[Range], deny: &[Range]) -> Vec<Range> {
    ranges::merge(&[&CLOSED[..], deny, &ranges::subtract(&PRIVATE, allow)].concat())
}

/// How often a guest may begin connections.
const RATE: Memory = Memory::RateOver { per_second: NEW_CONNECTIONS_PER_SECOND, burst: NEW_CONNECTIONS_BURST };
/// How many it may have.
const MOST: Memory = Memory::ConnectionsOver(CONNECTIONS);

/// An element's key is never longer.
type Element = (&'static str, Vec<u8>);

/// This instance's table on the host.
pub(crate) struct Firewall {
    table: String,
    /// What no guest reaches.
    forbidden: Vec<Range>,
    /// Kept, because closing one waits until the kernel has freed all that was deleted, which takes as long as making
    /// several slots. None after an error, of which answers may be left in it.
    socket: Mutex<Option<Socket>>,
}

impl Firewall {
    /// With what the operator allows of what is closed by default, and denies of the rest.
    pub(crate) fn new(instance: &str, allow: &[Range], deny: &[Range]) -> Self {
        Self { table: format!("wrenn_{instance}"), forbidden: forbidden(allow, deny), socket: Mutex::default() }
    }

    /// Makes the table with these slots in it. One that an earlier process left is kept if it is what we would make, with all
    /// that it has counted, and is otherwise replaced in the same transaction: running capsules are never without it.
    pub(crate) fn open(&self, slots: &[Slot], uplinks: &BTreeSet<String>) -> Result<(), Error> {
        let mut rules = self.batch();
        add_sets(&mut rules, uplinks, &self.forbidden);
        add_chains(&mut rules);
        let mut digest = DefaultHasher::new();
        rules.bytes().hash(&mut digest);
        let comment = format!("wrenn {:016x}", digest.finish());

        let found = self.with_socket(|socket| self.query(socket).table())?;
        let is_ours = found == Some((nft::userdata(&comment), rules.rules()));
        let mut batch = self.batch();
        if !is_ours {
            // Only what exists can be deleted.
            batch.add_table();
            batch.delete_table();
            batch.add_table_with(&comment);
            add_sets(&mut batch, uplinks, &self.forbidden);
            add_chains(&mut batch);
        }
        add_slots(&mut batch, slots);
        self.transact(batch)
    }

    pub(crate) fn add(&self, slot: Slot) -> Result<(), Error> {
        let mut batch = self.batch();
        add_slots(&mut batch, &[slot]);
        self.transact(batch)
    }

    /// Makes all that is remembered of the slot as that of a new one.
    pub(crate) fn reset(&self, slot: Slot) -> Result<(), Error> {
        let mut batch = self.batch();
        elements(slot).iter().for_each(|(set, key)| batch.delete_element(set, key));
        forget_connections(&mut batch, slot);
        add_slots(&mut batch, &[slot]);
        self.transact(batch)
    }

    /// Deletes what of the slot is there.
    pub(crate) fn delete(&self, slot: Slot) -> Result<(), Error> {
        let elements = elements(slot);
        let delete = |elements: &[Element]| {
            let mut batch = self.batch();
            elements.iter().for_each(|(set, key)| batch.delete_element(set, key));
            forget_connections(&mut batch, slot);
            self.transact(batch)
        };
        match delete(&elements) {
            // Some are missing and the kernel deleted none; or the whole table is, and so are they.
            Err(error) if error.is(Errno::NOENT) => {
                elements.iter().try_for_each(|element| match delete(std::slice::from_ref(element)) {
                    Err(error) if error.is(Errno::NOENT) => Ok(()),
                    result => result,
                })
            }
            result => result,
        }
    }

    /// What each slot sent, and what it was sent.
    pub(crate) fn traffic(&self) -> Result<BTreeMap<Slot, Traffic>, Error> {
        let (sent, received) = self.with_socket(|socket| {
            let query = self.query(socket);
            Ok((query.counters(SOURCES)?, query.counters(RECEIVED)?))
        })?;
        let received: HashMap<_, _> = received.into_iter().collect();
        let mut all: BTreeMap<Slot, Traffic> = BTreeMap::new();
        for (key, sent) in sent {
            let name = &key[..libc::IFNAMSIZ.min(key.len())];
            let (Some(slot), Some(&received)) = (slot_of(name), received.get(name)) else { continue };
            let traffic = all.entry(slot).or_insert(Traffic { received, ..Traffic::default() });
            // It has two addresses.
            traffic.sent = traffic.sent + sent;
        }
        Ok(all)
    }

    /// Removes the whole table.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        let mut batch = self.batch();
        batch.add_table();
        batch.delete_table();
        self.transact(batch)
    }

    fn batch(&self) -> Batch<'_> {
        Batch::new(libc::NFPROTO_INET, &self.table)
    }

    fn transact(&self, batch: Batch<'_>) -> Result<(), Error> {
        self.with_socket(|socket| socket.transact(batch.finish()))
    }

    /// Talks to netfilter on the host, one at a time.
    pub(crate) fn with_socket<T>(&self, work: impl FnOnce(&Socket) -> Result<T, Error>) -> Result<T, Error> {
        let mut kept = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = match kept.take() {
            Some(socket) => socket,
            None => Socket::open(NETFILTER)?,
        };
        let result = work(&socket)?;
        *kept = Some(socket);
        Ok(result)
    }

    fn query<'a>(&'a self, socket: &'a Socket) -> Query<'a> {
        Query::new(socket, libc::NFPROTO_INET, &self.table)
    }
}

/// The slot whose veth has this name.
fn slot_of(name: &[u8]) -> Option<Slot> {
    let name = std::str::from_utf8(name).ok()?.trim_end_matches('\0');
    Slot::new(name.strip_prefix(VETH)?.parse().ok()?)
}

/// All elements of a slot, by their sets.
fn elements(slot: Slot) -> [Element; 6] {
    let veth = || ifname(&slot.veth()).to_vec();
    // A packet comes in from the guest's side with the address of the namespace's end, or as an answer to what was sent
    // to the slot's host address.
    let source = |address: Ipv4Addr| [veth(), address.octets().to_vec()].concat();
    [
        (SOURCES, source(slot.veth_netns_ip())),
        (SOURCES, source(slot.host_ip())),
        (ADDRESSES, slot.veth_netns_ip().octets().to_vec()),
        (VETHS, veth()),
        (RECEIVED, veth()),
        (NEW_CONNECTIONS_OF, veth()),
    ]
}

fn add_sets(batch: &mut Batch<'_>, uplinks: &BTreeSet<String>, forbidden: &[Range]) {
    batch.add_set(VETHS, &Key::Ifname, None);
    batch.add_set(SOURCES, &Key::IfnameIpv4, Some(Memory::Counter));
    batch.add_set(RECEIVED, &Key::Ifname, Some(Memory::Counter));
    batch.add_set(NEW_CONNECTIONS_OF, &Key::Ifname, Some(RATE));
    batch.add_set(CONNECTIONS_OF, &Key::IfnameDynamic(Slot::MAX.get().into()), None);
    batch.add_set(ADDRESSES, &Key::Ipv4, None);
    batch.add_set(UPLINKS, &Key::Ifname, None);
    batch.add_set(FORBIDDEN, &Key::Ipv4Range, None);
    batch.add_ranges(FORBIDDEN, forbidden);
    batch.add_elements(UPLINKS, &uplinks.iter().map(|name| ifname(name)).collect::<Vec<_>>());
}

/// Removes the element that counts the guest's connections. It is there only while it has had some lately, and only what
/// exists can be deleted.
fn forget_connections(batch: &mut Batch<'_>, slot: Slot) {
    let veth = ifname(&slot.veth());
    batch.add_elements(CONNECTIONS_OF, &[veth]);
    batch.delete_element(CONNECTIONS_OF, &veth);
}

fn add_slots(batch: &mut Batch<'_>, slots: &[Slot]) {
    let mut sets: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    for (set, key) in slots.iter().copied().flat_map(elements) {
        sets.entry(set).or_default().push(key);
    }
    sets.iter().for_each(|(set, keys)| batch.add_elements(set, keys));
}

fn add_chains(batch: &mut Batch<'_>) {
    use Expr::*;

    // Before connections are looked up: a guest cannot speak for another one, and not IPv6.
    let hook = Hook { kind: "filter", number: libc::NF_INET_PRE_ROUTING, priority: libc::NF_IP_PRI_RAW };
    batch.add_chain("prerouting", &hook);
    batch.add_rule("prerouting", &[Ipv4, IifnameSaddrIn(SOURCES), Accept]);
    batch.add_rule("prerouting", &[IifnameIn(VETHS), Drop]);

    // What a guest begins, wherever it goes: not too often, not too much. One that is dropped here is not tracked.
    let hook = Hook { kind: "filter", number: libc::NF_INET_PRE_ROUTING, priority: libc::NF_IP_PRI_MANGLE };
    batch.add_chain("caps", &hook);
    batch.add_rule("caps", &[New, IifnameIn(NEW_CONNECTIONS_OF), Drop]);
    batch.add_rule("caps", &[New, IifnameIn(VETHS), RememberedByIifname(CONNECTIONS_OF, MOST), Drop]);

    // To the host itself: only answers.
    let hook = Hook { kind: "filter", number: libc::NF_INET_LOCAL_IN, priority: libc::NF_IP_PRI_FILTER };
    batch.add_chain("input", &hook);
    batch.add_rule("input", &[IifnameIn(VETHS), Established, Accept]);
    batch.add_rule("input", &[IifnameIn(VETHS), Drop]);

    // Into a slot: only answers. Out of it: by an uplink or not at all, and not what would leave undisguised because no
    // connection is known that it belongs to.
    let hook = Hook { kind: "filter", number: libc::NF_INET_FORWARD, priority: libc::NF_IP_PRI_FILTER };
    batch.add_chain("forward", &hook);
    batch.add_rule("forward", &[OifnameIn(VETHS), ClampSegments]);
    batch.add_rule("forward", &[IifnameIn(VETHS), ClampSegments]);
    batch.add_rule("forward", &[OifnameIn(VETHS), Established, Accept]);
    batch.add_rule("forward", &[OifnameIn(VETHS), Drop]);
    batch.add_rule("forward", &[IifnameIn(VETHS), Invalid, Drop]);
    batch.add_rule("forward", &[IifnameIn(VETHS), Ipv4, DaddrIn(FORBIDDEN), Drop]);
    batch.add_rule("forward", &[IifnameIn(VETHS), OifnameIn(UPLINKS), Accept]);
    batch.add_rule("forward", &[IifnameIn(VETHS), Drop]);

    // After everybody else's rules have decided about what goes into a slot.
    let hook = Hook { kind: "filter", number: libc::NF_INET_POST_ROUTING, priority: libc::NF_IP_PRI_NAT_SRC + 1 };
    batch.add_chain("received", &hook);
    batch.add_rule("received", &[OifnameIn(RECEIVED)]);

    let hook = Hook { kind: "nat", number: libc::NF_INET_POST_ROUTING, priority: libc::NF_IP_PRI_NAT_SRC };
    batch.add_chain("postrouting", &hook);
    batch.add_rule("postrouting", &[Ipv4, SaddrIn(ADDRESSES), OifnameIn(UPLINKS), Masquerade]);
}

/// The only tables inside a namespace, sent through a socket of it: the guest appears as the namespace's end of the veth
/// pair, and what is sent to the slot's host address goes to the guest. The limits are those of the host's table, for what
/// the namespace itself tracks. `user` is whose VMM is in it.
pub(crate) fn fill_netns(slot: Slot, user: u32, socket: &Socket) -> Result<(), Error> {
    use Expr::*;

    let mut batch = Batch::new(libc::NFPROTO_IPV4, "wrenn");
    batch.flush_namespace();
    batch.add_table();
    let hook = Hook { kind: "filter", number: libc::NF_INET_PRE_ROUTING, priority: libc::NF_IP_PRI_MANGLE };
    batch.add_chain("caps", &hook);
    batch.add_rule("caps", &[Iifname(TAP), New, Remembered(RATE), Drop]);
    batch.add_rule("caps", &[Iifname(TAP), New, Remembered(MOST), Drop]);
    let hook = Hook { kind: "nat", number: libc::NF_INET_POST_ROUTING, priority: libc::NF_IP_PRI_NAT_SRC };
    batch.add_chain("postrouting", &hook);
    batch.add_rule("postrouting", &[Oifname(UPLINK_IN_NETNS), Saddr(GUEST_ADDRESS), Snat(slot.veth_netns_ip())]);
    let hook = Hook { kind: "nat", number: libc::NF_INET_PRE_ROUTING, priority: libc::NF_IP_PRI_NAT_DST };
    batch.add_chain("prerouting", &hook);
    batch.add_rule("prerouting", &[Iifname(UPLINK_IN_NETNS), Daddr(slot.host_ip()), Dnat(GUEST_ADDRESS)]);
    socket.transact(batch.finish())?;
    guard::set(user, socket)
}
