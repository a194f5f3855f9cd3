//! What the kernel remembers of connections, and makes it forget.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use crate::attributes::{Attributes, Reader};
use crate::netlink::{Error, Requests, Socket};
use crate::slot::Slot;

/// `struct nfgenmsg`: family, version, resource.
const GENMSG: usize = 4;
/// Deletions that are sent together: far below what a message holds.
const TOGETHER: usize = 256;
/// New ones may come while those that were found are deleted.
const ROUNDS: usize = 5;

/// Forgets every connection of the socket's network namespace.
pub(crate) fn forget_all(socket: &Socket) -> Result<(), Error> {
    let mut requests = Requests::default();
    push(&mut requests, "forget all connections", IPCTNL_MSG_CT_DELETE, 0, libc::AF_UNSPEC, |_| {});
    socket.transact(requests)
}

/// Forgets, on the host, every connection that a slot's guest began, or that was begun to it.
pub(crate) fn forget(socket: &Socket, slot: Slot) -> Result<(), Error> {
    for end in [End::From(slot.veth_netns_ip()), End::To(slot.host_ip())] {
        for _ in 0..ROUNDS {
            let found = end.connections(socket)?;
            if found.is_empty() {
                break;
            }
            for some in found.chunks(TOGETHER) {
                delete(socket, some)?;
            }
        }
    }
    Ok(())
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
    fn connections(self, socket: &Socket) -> Result<Vec<Connection>, Error> {
        // Kernels that do not know the filter tell everything.
        let (kind, address, flag) = match self {
            Self::From(address) => (CTA_IP_V4_SRC, address, CTA_FILTER_F_CTA_IP_SRC),
            Self::To(address) => (CTA_IP_V4_DST, address, CTA_FILTER_F_CTA_IP_DST),
        };
        let mut request = Requests::default();
        push(&mut request, "list connections", IPCTNL_MSG_CT_GET, libc::NLM_F_DUMP, libc::AF_INET, |a| {
            a.nest(CTA_TUPLE_ORIG, |a| a.nest(CTA_TUPLE_IP, |a| a.bytes(kind, &address.octets())));
            a.nest(CTA_FILTER, |a| {
                // The only numbers here that are not big-endian.
                a.bytes(CTA_FILTER_ORIG_FLAGS, &flag.to_ne_bytes());
                a.bytes(CTA_FILTER_REPLY_FLAGS, &0u32.to_ne_bytes());
            });
        });
        let answers = socket.ask(&request)?;
        let is_ours = |connection: &Reader<'_>| {
            let ip = connection.nested(CTA_TUPLE_ORIG).and_then(|tuple| tuple.nested(CTA_TUPLE_IP));
            ip.and_then(|ip| ip.address(kind)) == Some(address)
        };
        let connections = answers.iter().map(|answer| Reader(answer.get(GENMSG..).unwrap_or_default()));
        let keys = |connection: Reader<'_>| {
            let keys = connection.all().filter(|(kind, _)| matches!(*kind, CTA_TUPLE_ORIG | CTA_ID | CTA_ZONE));
            keys.map(|(kind, value)| (kind, value.to_owned())).collect()
        };
        Ok(connections.filter(is_ours).map(keys).collect())
    }
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
        // It has ended by itself; whether others are left is seen in the next round.
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
