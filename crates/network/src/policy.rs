//! What one slot's guest may reach, by a table of its own in the slot's namespace.
//!
//! It stands before everything that the host's table decides, and can only take away: whatever it lets pass still comes to
//! the host, with the floor that is there. A slot without a policy has no such table. A packet is judged by its destination,
//! whether or not a connection was let through before, and the answers to it by their source: so a table that is replaced
//! cuts what it does not allow, in one transaction. Connections that the host began into the slot are not its business.
//!
//! Where names count, connections and questions go to a filter that listens in the namespace, on the tap's address. What the
//! filter itself sends is no guest's packet and comes by here no more, but by the host's table like everything else.

use std::net::Ipv4Addr;

use crate::netlink::{Error, Requests, Socket};
use crate::nft::{Batch, Expr, Hook, Key};
use crate::ranges::{self, Range};
use crate::slot::{TAP, TAP_ADDRESS};

/// The guest's metadata, which a VMM may serve in the namespace: it never leaves it.
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(crate) const HTTP: u16 = 80;
const DNS: u16 = 53;

const TABLE: &str = "policy";
const ALLOW: &str = "allow";
const DENY: &str = "deny";

/// What a guest may reach, above the floor. The default is everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// May be reached whatever `deny` says.
    pub allow: Vec<Range>,
    /// May not be reached.
    pub deny: Vec<Range>,
    /// Who decides about what `allow` does not have.
    pub filter: Option<Filter>,
}

/// The ports of a filter of names, on the tap's address in the slot's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter {
    /// Takes TCP connections.
    pub tcp: u16,
    /// Takes questions, over UDP and TCP.
    pub dns: u16,
}

/// Has the namespace of `socket` follow the policy, and no other, from the next packet on.
pub(crate) fn set(socket: &Socket, policy: &Policy) -> Result<(), Error> {
    socket.transact(batch(policy))
}

fn batch(policy: &Policy) -> Requests {
    let mut batch = Batch::new(libc::NFPROTO_IPV4, TABLE);
    // Only what exists can be deleted.
    batch.add_table();
    batch.delete_table();
    if *policy == Policy::default() {
        return batch.finish();
    }
    batch.add_table();
    for (name, listed) in [(ALLOW, &policy.allow), (DENY, &policy.deny)] {
        batch.add_set(name, &Key::Ipv4Range, None);
        batch.add_ranges(name, &ranges::merge(listed));
    }
    if let Some(filter) = policy.filter {
        redirect(&mut batch, filter);
    }
    decide(&mut batch, policy.filter.is_some());
    batch.finish()
}

/// Sends to the filter what it is to decide about.
fn redirect(batch: &mut Batch<'_>, Filter { tcp, dns }: Filter) {
    use Expr::*;

    let hook = Hook { kind: "nat", number: libc::NF_INET_PRE_ROUTING, priority: libc::NF_IP_PRI_NAT_DST };
    batch.add_chain("redirect", &hook);
    batch.add_rule("redirect", &[Iifname(TAP), Daddr(METADATA), Accept]);
    // Whomever the guest asks, and even if it may reach them.
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
        batch.add_rule("redirect", &[Iifname(TAP), Protocol(protocol), Port(DNS), DnatPort(TAP_ADDRESS, dns)]);
    }
    batch.add_rule("redirect", &[Iifname(TAP), DaddrIn(ALLOW), Accept]);
    batch.add_rule("redirect", &[Iifname(TAP), Protocol(libc::IPPROTO_TCP), DnatPort(TAP_ADDRESS, tcp)]);
}

fn decide(batch: &mut Batch<'_>, has_filter: bool) {
    use Expr::*;

    let hook = Hook { kind: "filter", number: libc::NF_INET_FORWARD, priority: libc::NF_IP_PRI_FILTER };
    batch.add_chain("forward", &hook);
    // What the host began.
    batch.add_rule("forward", &[Iifname(TAP), Reply, Accept]);
    if has_filter {
        // Of connections from before there was a filter.
        for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
            batch.add_rule("forward", &[Iifname(TAP), Protocol(protocol), Port(DNS), Drop]);
        }
    }
    batch.add_rule("forward", &[Iifname(TAP), DaddrIn(ALLOW), Accept]);
    // Told, so that nobody waits for what will not come.
    batch.add_rule("forward", &[Iifname(TAP), DaddrIn(DENY), Protocol(libc::IPPROTO_TCP), Reset]);
    batch.add_rule("forward", &[Iifname(TAP), DaddrIn(DENY), Prohibited]);
    // What routers on the way to an allowed address say, such as how much fits into a packet.
    batch.add_rule("forward", &[Oifname(TAP), Related, Accept]);
    batch.add_rule("forward", &[Oifname(TAP), Reply, SaddrIn(ALLOW), Accept]);
    batch.add_rule("forward", &[Oifname(TAP), Reply, SaddrIn(DENY), Drop]);
}
