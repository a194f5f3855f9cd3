//! The interfaces by which guests reach the internet.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use crate::netlink::{ROUTE, Socket};
use crate::route;

/// The MTU where no uplink says another.
const ETHERNET: u32 = 1500;
/// What IPv4 promises to carry, and what a veth pair can have at most.
const BOUNDS: (u32, u32) = (576, 65535);

/// The interfaces of the IPv4 default routes; none on a machine that has no way out.
pub(crate) fn all() -> io::Result<BTreeSet<String>> {
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

/// What fits through every one of them, so that a guest learns of it from its own link and not from what gets lost.
pub(crate) fn mtu(uplinks: &BTreeSet<String>) -> io::Result<u32> {
    let socket = Socket::open(ROUTE)?;
    let mut smallest = None;
    for uplink in uplinks {
        let mtu = route::mtu(&socket, uplink)?;
        smallest = smallest.into_iter().chain(mtu).min();
    }
    Ok(smallest.unwrap_or(ETHERNET).clamp(BOUNDS.0, BOUNDS.1))
}
