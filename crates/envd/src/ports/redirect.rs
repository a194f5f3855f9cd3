//! The packet rule: one nftables table with one chain, written by netlink.
//!
//! ```text
//! table ip wrenn_ports { chain redirect { type filter hook prerouting priority mangle; policy accept;
//!     iifname eth0 tcp flags & (syn | ack) == syn, socket found: accept
//!     iifname eth0 tcp flags & (syn | ack) == syn: tproxy to 127.0.0.1:PORT
//! } }
//! ```
//!
//! Only the first packet of a connection is looked at twice: the rest find their socket as always. Neither connection
//! tracking nor address translation is involved.

use crate::netlink::{Requests, Socket};
use rustix::net::netlink;
use std::io;
use std::net::Ipv4Addr;

const TABLE: &str = "wrenn_ports";
const CHAIN: &str = "redirect";
const ADD: i32 = libc::NLM_F_ACK | libc::NLM_F_CREATE;
/// The first general register of 4 bytes, and the second.
const REGISTER: u32 = libc::NFT_REG32_00 as u32;
const NEXT_REGISTER: u32 = REGISTER + 1;
/// `NFT_SOCKET_MARK`.
const SOCKET_MARK: u32 = 1;
/// `NF_IP_PRI_MANGLE`.
const PRIORITY: i32 = -150;

/// Hands new connections that come in by `interface` and find no listener to the transparent listener on 127.0.0.1:`port`,
/// in place of any earlier such rule.
pub(super) fn install(interface: &str, port: u16) -> io::Result<()> {
    let mut batch = Requests::default();
    edge(&mut batch, libc::NFNL_MSG_BATCH_BEGIN);
    // Only what exists can be deleted.
    for (message, flags) in
        [(libc::NFT_MSG_NEWTABLE, ADD), (libc::NFT_MSG_DELTABLE, libc::NLM_F_ACK), (libc::NFT_MSG_NEWTABLE, ADD)]
    {
        push(&mut batch, message, flags, |a| a.text(1, TABLE));
    }
    push(&mut batch, libc::NFT_MSG_NEWCHAIN, ADD, |a| {
        a.text(1, TABLE);
        a.text(3, CHAIN);
        a.nest(4, |a| {
            a.number(1, libc::NF_INET_PRE_ROUTING as u32);
            a.number(2, PRIORITY as u32);
        });
        a.number(5, libc::NF_ACCEPT as u32);
        a.text(7, "filter");
    });
    rule(&mut batch, interface, |a| {
        // Ends the rule unless a socket is found; what it loads of one does not matter.
        a.expression("socket", |a| {
            a.number(1, SOCKET_MARK);
            a.number(2, REGISTER);
        });
        a.expression("immediate", |a| {
            a.number(1, libc::NFT_REG_VERDICT as u32);
            a.nest(2, |a| a.nest(2, |a| a.number(1, libc::NF_ACCEPT as u32)));
        });
    });
    rule(&mut batch, interface, |a| {
        for (register, value) in [(REGISTER, &Ipv4Addr::LOCALHOST.octets()[..]), (NEXT_REGISTER, &port.to_be_bytes())] {
            a.expression("immediate", |a| {
                a.number(1, register);
                a.nest(2, |a| a.bytes(1, value));
            });
        }
        a.expression("tproxy", |a| {
            a.number(1, libc::NFPROTO_IPV4 as u32);
            a.number(2, REGISTER);
            a.number(3, NEXT_REGISTER);
        });
    });
    edge(&mut batch, libc::NFNL_MSG_BATCH_END);
    Socket::open(netlink::NETFILTER)?.transact(&batch)
}

/// A rule for the first packets of connections that come in by `interface`.
fn rule(batch: &mut Requests, interface: &str, then: impl FnOnce(&mut Attributes<'_>)) {
    const TCP_FLAGS_AT: u32 = 13;
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    let mut name = [0; libc::IFNAMSIZ];
    name[..interface.len()].copy_from_slice(interface.as_bytes());
    push(batch, libc::NFT_MSG_NEWRULE, ADD | libc::NLM_F_APPEND, |a| {
        a.text(1, TABLE);
        a.text(2, CHAIN);
        a.nest(4, |a| {
            a.meta(libc::NFT_META_IIFNAME);
            a.equals(&name);
            a.meta(libc::NFT_META_L4PROTO);
            a.equals(&[libc::IPPROTO_TCP as u8]);
            a.expression("payload", |a| {
                a.number(1, REGISTER);
                a.number(2, libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32);
                a.number(3, TCP_FLAGS_AT);
                a.number(4, 1);
            });
            a.expression("bitwise", |a| {
                a.number(1, REGISTER);
                a.number(2, REGISTER);
                a.number(3, 1);
                a.nest(4, |a| a.bytes(1, &[SYN | ACK]));
                a.nest(5, |a| a.bytes(1, &[0]));
            });
            a.equals(&[SYN]);
            then(a);
        });
    });
}

fn edge(batch: &mut Requests, message: i32) {
    batch.push(message as u16, 0, |bytes| {
        bytes.extend([0, 0]);
        bytes.extend((libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes());
    });
}

fn push(batch: &mut Requests, message: i32, flags: i32, write: impl FnOnce(&mut Attributes<'_>)) {
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | message) as u16;
    batch.push(kind, flags, |bytes| {
        // `struct nfgenmsg`: family, version, resource.
        bytes.extend([libc::NFPROTO_IPV4 as u8, 0, 0, 0]);
        write(&mut Attributes(bytes));
    });
}

/// Where attributes are appended; their kinds are those of linux/netfilter/nf_tables.h, counted from 1 in each nest.
struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |bytes| bytes.extend(value));
    }

    fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |bytes| {
            bytes.extend(value.as_bytes());
            bytes.push(0);
        });
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Attributes<'_>)) {
        self.attribute(kind | libc::NLA_F_NESTED as u16, |bytes| write(&mut Attributes(bytes)));
    }

    fn expression(&mut self, name: &str, write: impl FnOnce(&mut Attributes<'_>)) {
        self.nest(1, |a| {
            a.text(1, name);
            a.nest(2, write);
        });
    }

    fn meta(&mut self, key: i32) {
        self.expression("meta", |a| {
            a.number(2, key as u32);
            a.number(1, REGISTER);
        });
    }

    fn equals(&mut self, value: &[u8]) {
        self.expression("cmp", |a| {
            a.number(1, REGISTER);
            a.number(2, libc::NFT_CMP_EQ as u32);
            a.nest(3, |a| a.bytes(1, value));
        });
    }

    fn attribute(&mut self, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        write(self.0);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}
