//! What the kernel remembers of connections, and makes it forget.

use std::fs;
use std::net::Ipv4Addr;

use rustix::io::Errno;

use crate::attributes::{Attributes, Reader};
use crate::netlink::{Error, Requests, Socket};
use crate::slot::Slot;

/// `struct nfgenmsg`: family, version, resource.
const GENMSG: usize = 4;
/// Deletions that are sent together: far below what a message holds.
const TOGETHER: usize = 256;
/// Up to so many are listed at once and looked through here: the kernel goes through its whole table for each list.
const FEW: u64 = 10_000;

/// Forgets every connection of the socket's network namespace, which is also this thread's.
pub(crate) fn forget_all(socket: &Socket) -> Result<(), Error> {
    if count() == Some(0) {
        return Ok(());
    }
    let mut requests = Requests::default();
    push(&mut requests, "forget all connections", IPCTNL_MSG_CT_DELETE, 0, libc::AF_UNSPEC, |_| {});
    socket.transact(requests)
}

/// Forgets, on the host, every connection that a slot's guest began, or that was begun to it. It must not be able to begin
/// any more.
pub(crate) fn forget(socket: &Socket, slot: Slot) -> Result<(), Error> {
    let ends = [End::From(slot.veth_netns_ip()), End::To(slot.host_ip())];
    let filters = match count() {
        Some(0) => vec![],
        Some(..=FEW) => vec![None],
        _ => ends.map(Some).to_vec(),
    };
    for filter in filters {
        let found = list(socket, filter, &ends)?;
        found.chunks(TOGETHER).try_for_each(|some| delete(socket, some))?;
    }
    Ok(())
}

/// How many connections this thread's network namespace has.
fn count() -> Option<u64> {
    fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").ok()?.trim().parse().ok()
}

/// The attributes by which a connection is found again: its tuple, its id, and its zone if it has one.
type Connection = Vec<(u16, Vec<u8>)>;

/// Where a connection was begun, or to where.
#[derive(Clone, Copy)]
enum End {
    From(Ipv4Addr),
    To(Ipv4Addr),
}

impl End {
    fn is_of(self, connection: Reader<'_>) -> bool {
        let (kind, address) = match self {
            Self::From(address) => (CTA_IP_V4_SRC, address),
            Self::To(address) => (CTA_IP_V4_DST, address),
        };
        let ip = connection.nested(CTA_TUPLE_ORIG).and_then(|tuple| tuple.nested(CTA_TUPLE_IP));
        ip.and_then(|ip| ip.address(kind)) == Some(address)
    }

    /// Kernels that do not know the filter tell everything.
    fn write(self, a: &mut Attributes<'_>) {
        let (kind, address, flag) = match self {
            Self::From(address) => (CTA_IP_V4_SRC, address, CTA_FILTER_F_CTA_IP_SRC),
            Self::To(address) => (CTA_IP_V4_DST, address, CTA_FILTER_F_CTA_IP_DST),
        };
        a.nest(CTA_TUPLE_ORIG, |a| a.nest(CTA_TUPLE_IP, |a| a.bytes(kind, &address.octets())));
        a.nest(CTA_FILTER, |a| {
            // The only numbers here that are not big-endian.
            a.bytes(CTA_FILTER_ORIG_FLAGS, &flag.to_ne_bytes());
            a.bytes(CTA_FILTER_REPLY_FLAGS, &0u32.to_ne_bytes());
        });
    }
}

/// Every connection with one of these ends; the kernel is asked only for those that pass `filter`.
fn list(socket: &Socket, filter: Option<End>, ends: &[End]) -> Result<Vec<Connection>, Error> {
    let mut request = Requests::default();
    push(&mut request, "list connections", IPCTNL_MSG_CT_GET, libc::NLM_F_DUMP, libc::AF_INET, |a| {
        if let Some(end) = filter {
            end.write(a);
        }
    });
    let answers = socket.ask(&request)?;
    let connections = answers.iter().map(|answer| Reader(answer.get(GENMSG..).unwrap_or_default()));
    let keys = |connection: Reader<'_>| {
        let keys = connection.all().filter(|(kind, _)| matches!(*kind, CTA_TUPLE_ORIG | CTA_ID | CTA_ZONE));
        keys.map(|(kind, value)| (kind, value.to_owned())).collect()
    };
    Ok(connections.filter(|connection| ends.iter().any(|end| end.is_of(*connection))).map(keys).collect())
}

fn delete(socket: &Socket, connections: &[Connection]) -> Result<(), Error> {
    let mut requests = Requests::default();
    for connection in connections {
        push(&mut requests, "forget a connection", IPCTNL_MSG_CT_DELETE, 0, libc::AF_INET, |a| {
            for (kind, value) in connection {
                let nested = if *kind == CTA_TUPLE_ORIG { libc::NLA_F_NESTED as u16 } else { 0 };
                a.bytes(kind | nested, value);
            }
        });
    }
    match socket.transact(requests) {
        // It has ended by itself; the others were deleted all the same.
        Err(error) if error.is(Errno::NOENT) => Ok(()),
        result => result,
    }
}

fn push(
    requests: &mut Requests,
    label: &'static str,
    message: u16,
    flags: i32,
    family: i32,
    write: impl FnOnce(&mut Attributes<'_>),
) {
    requests.push(label, (libc::NFNL_SUBSYS_CTNETLINK << 8) as u16 | message, flags, |bytes| {
        bytes.extend([family as u8, 0, 0, 0]);
        write(&mut Attributes(bytes));
    });
}

// Of linux/netfilter/nfnetlink_conntrack.h.
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
const CTA_FILTER_F_CTA_IP_SRC: u32 = 1 << 0;
const CTA_FILTER_F_CTA_IP_DST: u32 = 1 << 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::netlink::NETFILTER;
    use crate::tests::machine::{on_own_machine, sh};

    #[test]
    fn the_kernel_s_filter_finds_what_is_found_without_it() {
        on_own_machine(|| {
            sh("nft add table ip t; nft add chain ip t c '{ type filter hook output priority 0; }'
                nft add rule ip t c ct state new accept; ip addr add 10.11.0.1/32 dev lo; ip addr add 10.12.0.3/32 dev lo");
            let send = |from: &str, to: &str| UdpSocket::bind(from).unwrap().send_to(b"hello", to).unwrap();
            send("10.12.0.3:1", "127.0.0.1:1000");
            send("127.0.0.1:2", "10.11.0.1:1000");
            send("127.0.0.1:3", "127.0.0.1:1000");
            let slot = Slot::MIN;
            let ends = [End::From(slot.veth_netns_ip()), End::To(slot.host_ip())];
            let socket = Socket::open(NETFILTER).unwrap();
            let found = list(&socket, None, &ends).unwrap();
            assert_eq!(found.len(), 2);
            let each = ends.map(|end| list(&socket, Some(end), &ends).unwrap());
            assert_eq!(each.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
            assert!(each.iter().flatten().all(|connection| found.contains(connection)));
            forget(&socket, slot).unwrap();
            assert_eq!(count(), Some(1));
            forget_all(&socket).unwrap();
            assert_eq!(count(), Some(0));
        });
    }
}
