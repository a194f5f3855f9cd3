//! The expressions of rules: what a packet is asked, and what is done with it.

use std::ffi::c_int;
use std::net::Ipv4Addr;

use super::ifname;
use crate::attributes::Attributes;

/// Registers are 4 bytes wide; a longer value goes on in the next ones.
const REGISTER: u32 = libc::NFT_REG32_00 as u32;
/// The first register after an interface name, where a concatenation goes on.
const AFTER_IFNAME: u32 = REGISTER + 4;

/// The link and the network header of a packet.
const LINK_HEADER: u32 = libc::NFT_PAYLOAD_LL_HEADER as u32;
const NETWORK_HEADER: u32 = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
const TRANSPORT_HEADER: u32 = libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32;

// A bit for each state of a connection, of either direction.
const INVALID: u32 = 1 << 0;
const ESTABLISHED: u32 = 1 << 1;
const RELATED: u32 = 1 << 2;
const NEW: u32 = 1 << 3;

/// What remembers packets: for a whole rule, or for each element of a set.
#[derive(Clone, Copy)]
pub(crate) enum Memory {
    /// Counts packets and bytes, and always matches.
    Counter,
    /// Matches packets above that many in a second, once `burst` of them were sent at once.
    RateOver { per_second: u64, burst: u32 },
    /// Matches packets that make it more bytes than that in a second, once `burst` of them were sent at once.
    BytesOver { per_second: u64, burst: u32 },
    /// Matches packets whose connection is one too many.
    ConnectionsOver(u32),
}

/// One step of a rule. A rule goes on to its next expression only while each one matches.
pub(crate) enum Expr<'a> {
    /// The packet came in by an interface of this set.
    IifnameIn(&'a str),
    /// The packet goes out by an interface of this set.
    OifnameIn(&'a str),
    /// The packet came in by this interface.
    Iifname(&'a str),
    /// The packet goes out by this interface.
    Oifname(&'a str),
    /// The packet was sent by a process of this user here.
    Sender(u32),
    /// The packet is IPv4; addresses may be looked at only after this.
    Ipv4,
    /// The source address is in this set.
    SaddrIn(&'a str),
    /// The destination address is in this set.
    DaddrIn(&'a str),
    /// The pair of incoming interface and source address is in this set.
    IifnameSaddrIn(&'a str),
    /// The source address is this one.
    Saddr(Ipv4Addr),
    /// The destination address is this one.
    Daddr(Ipv4Addr),
    /// The packet belongs to a connection that was let through before.
    Established,
    /// The packet begins a connection.
    New,
    /// The packet belongs to no connection and cannot begin one.
    Invalid,
    Remembered(Memory),
    /// The same for each incoming interface, in a set of those. A set's own memory must not count connections: the kernel
    /// (6.18) then takes connection tracking for unused once some elements were added, and ends it for all.
    RememberedByIifname(&'a str, Memory),
    /// A TCP connection that is being made takes segments no larger than what fits along its route.
    ClampSegments,
    /// The packet belongs to a connection's other half, such as an error on its way.
    Related,
    /// The packet goes to where its connection was begun.
    Reply,
    /// The packet's connection was sent elsewhere than its sender wanted.
    Redirected,
    /// What the frame carries.
    Ethertype(c_int),
    /// The bytes at that place of the frame's header are others.
    LinkIsNot(usize, &'a [u8]),
    /// The bytes at that place of the packet's header are these.
    NetworkIs(usize, &'a [u8]),
    /// What the packet carries.
    Protocol(c_int),
    /// The port to which a TCP segment or UDP datagram goes.
    Port(u16),
    Accept,
    Drop,
    /// Ends a TCP connection, for its sender.
    Reset,
    /// Tells the sender that somebody decided that this does not pass.
    Prohibited,
    Masquerade,
    Snat(Ipv4Addr),
    Dnat(Ipv4Addr),
    DnatPort(Ipv4Addr, u16),
}

impl Expr<'_> {
    pub(super) fn write(&self, a: &mut Attributes<'_>) {
        const SADDR: u32 = 12;
        const DADDR: u32 = 16;
        match self {
            Self::IifnameIn(set) => {
                a.meta(libc::NFT_META_IIFNAME);
                a.lookup(set);
            }
            Self::OifnameIn(set) => {
                a.meta(libc::NFT_META_OIFNAME);
                a.lookup(set);
            }
            Self::Iifname(name) => {
                a.meta(libc::NFT_META_IIFNAME);
                a.compare(libc::NFT_CMP_EQ, &ifname(name));
            }
            Self::Oifname(name) => {
                a.meta(libc::NFT_META_OIFNAME);
                a.compare(libc::NFT_CMP_EQ, &ifname(name));
            }
            Self::Sender(user) => {
                a.meta(libc::NFT_META_SKUID);
                a.compare(libc::NFT_CMP_EQ, &user.to_ne_bytes());
            }
            Self::Ipv4 => {
                a.meta(libc::NFT_META_NFPROTO);
                a.compare(libc::NFT_CMP_EQ, &[libc::NFPROTO_IPV4 as u8]);
            }
            Self::SaddrIn(set) => {
                a.address(SADDR, REGISTER);
                a.lookup(set);
            }
            Self::DaddrIn(set) => {
                a.address(DADDR, REGISTER);
                a.lookup(set);
            }
            Self::IifnameSaddrIn(set) => {
                a.meta(libc::NFT_META_IIFNAME);
                a.address(SADDR, AFTER_IFNAME);
                a.lookup(set);
            }
            Self::Saddr(address) => {
                a.address(SADDR, REGISTER);
                a.compare(libc::NFT_CMP_EQ, &address.octets());
            }
            Self::Daddr(address) => {
                a.address(DADDR, REGISTER);
                a.compare(libc::NFT_CMP_EQ, &address.octets());
            }
            Self::Established => a.connection(ESTABLISHED | RELATED),
            Self::New => a.connection(NEW),
            Self::Invalid => a.connection(INVALID),
            Self::Remembered(memory) => memory.write(NFTA_LIST_ELEM, a),
            Self::RememberedByIifname(set, memory) => {
                a.meta(libc::NFT_META_IIFNAME);
                a.expression("dynset", |a| {
                    a.text(NFTA_DYNSET_SET_NAME, set);
                    a.number(NFTA_DYNSET_OP, libc::NFT_DYNSET_OP_ADD as u32);
                    a.number(NFTA_DYNSET_SREG_KEY, REGISTER);
                    memory.write(NFTA_DYNSET_EXPR, a);
                });
            }
            Self::ClampSegments => a.clamp_segments(),
            Self::Related => a.connection(RELATED),
            Self::Reply => {
                const IP_CT_DIR_REPLY: u8 = 1;
                a.of_connection(libc::NFT_CT_DIRECTION);
                a.compare(libc::NFT_CMP_EQ, &[IP_CT_DIR_REPLY]);
            }
            Self::Redirected => {
                const IPS_DST_NAT: u32 = 1 << 5;
                a.of_connection(libc::NFT_CT_STATUS);
                a.masked(&IPS_DST_NAT.to_ne_bytes());
                a.compare(libc::NFT_CMP_NEQ, &[0; 4]);
            }
            Self::Ethertype(kind) => {
                a.meta(libc::NFT_META_PROTOCOL);
                a.compare(libc::NFT_CMP_EQ, &(*kind as u16).to_be_bytes());
            }
            Self::LinkIsNot(at, bytes) => {
                a.payload(LINK_HEADER, *at, bytes.len(), REGISTER);
                a.compare(libc::NFT_CMP_NEQ, bytes);
            }
            Self::NetworkIs(at, bytes) => {
                a.payload(NETWORK_HEADER, *at, bytes.len(), REGISTER);
                a.compare(libc::NFT_CMP_EQ, bytes);
            }
            Self::Protocol(protocol) => a.protocol(*protocol),
            Self::Port(port) => {
                const DESTINATION: usize = 2;
                a.payload(TRANSPORT_HEADER, DESTINATION, 2, REGISTER);
                a.compare(libc::NFT_CMP_EQ, &port.to_be_bytes());
            }
            Self::Accept => a.verdict(libc::NF_ACCEPT),
            Self::Drop => a.verdict(libc::NF_DROP),
            Self::Reset => a.expression("reject", |a| a.number(NFTA_REJECT_TYPE, libc::NFT_REJECT_TCP_RST as u32)),
            Self::Prohibited => a.expression("reject", |a| {
                const ICMP_PKT_FILTERED: u8 = 13;
                a.number(NFTA_REJECT_TYPE, libc::NFT_REJECT_ICMP_UNREACH as u32);
                a.bytes(NFTA_REJECT_ICMP_CODE, &[ICMP_PKT_FILTERED]);
            }),
            Self::Masquerade => a.expression("masq", |_| {}),
            Self::Snat(address) => a.nat(libc::NFT_NAT_SNAT, *address, None),
            Self::Dnat(address) => a.nat(libc::NFT_NAT_DNAT, *address, None),
            Self::DnatPort(address, port) => a.nat(libc::NFT_NAT_DNAT, *address, Some(*port)),
        }
    }
}

impl Memory {
    pub(super) fn write(self, kind: u16, a: &mut Attributes<'_>) {
        const OVER: u32 = 1;
        match self {
            Self::Counter => a.expression_as(kind, "counter", |_| {}),
            Self::RateOver { per_second, burst } => a.expression_as(kind, "limit", |a| {
                a.long(NFTA_LIMIT_RATE, per_second);
                a.long(NFTA_LIMIT_UNIT, 1);
                a.number(NFTA_LIMIT_BURST, burst);
                a.number(NFTA_LIMIT_TYPE, 0);
                a.number(NFTA_LIMIT_FLAGS, OVER);
            }),
            Self::BytesOver { per_second, burst } => a.expression_as(kind, "limit", |a| {
                a.long(NFTA_LIMIT_RATE, per_second);
                a.long(NFTA_LIMIT_UNIT, 1);
                a.number(NFTA_LIMIT_BURST, burst);
                a.number(NFTA_LIMIT_TYPE, 1);
                a.number(NFTA_LIMIT_FLAGS, OVER);
            }),
            Self::ConnectionsOver(most) => a.expression_as(kind, "connlimit", |a| {
                a.number(NFTA_CONNLIMIT_COUNT, most);
                a.number(NFTA_CONNLIMIT_FLAGS, OVER);
            }),
        }
    }
}

impl Attributes<'_> {
    fn expression(&mut self, name: &str, write: impl FnOnce(&mut Attributes<'_>)) {
        self.expression_as(NFTA_LIST_ELEM, name, write);
    }

    fn expression_as(&mut self, kind: u16, name: &str, write: impl FnOnce(&mut Attributes<'_>)) {
        self.nest(kind, |a| {
            a.text(NFTA_EXPR_NAME, name);
            a.nest(NFTA_EXPR_DATA, write);
        });
    }

    fn meta(&mut self, key: c_int) {
        self.expression("meta", |a| {
            a.number(NFTA_META_KEY, key as u32);
            a.number(NFTA_META_DREG, REGISTER);
        });
    }

    /// Loads an address of the IPv4 header.
    fn address(&mut self, offset: u32, register: u32) {
        self.payload(NETWORK_HEADER, offset as usize, 4, register);
    }

    /// Loads a part of a header.
    fn payload(&mut self, header: u32, offset: usize, length: usize, register: u32) {
        self.expression("payload", |a| {
            a.number(NFTA_PAYLOAD_DREG, register);
            a.number(NFTA_PAYLOAD_BASE, header);
            a.number(NFTA_PAYLOAD_OFFSET, offset as u32);
            a.number(NFTA_PAYLOAD_LEN, length as u32);
        });
    }

    fn protocol(&mut self, protocol: c_int) {
        self.meta(libc::NFT_META_L4PROTO);
        self.compare(libc::NFT_CMP_EQ, &[protocol as u8]);
    }

    fn lookup(&mut self, set: &str) {
        self.expression("lookup", |a| {
            a.text(NFTA_LOOKUP_SET, set);
            a.number(NFTA_LOOKUP_SREG, REGISTER);
        });
    }

    fn compare(&mut self, operator: c_int, value: &[u8]) {
        self.expression("cmp", |a| {
            a.number(NFTA_CMP_SREG, REGISTER);
            a.number(NFTA_CMP_OP, operator as u32);
            a.nest(NFTA_CMP_DATA, |a| a.bytes(NFTA_DATA_VALUE, value));
        });
    }

    fn masked(&mut self, mask: &[u8]) {
        self.expression("bitwise", |a| {
            a.number(NFTA_BITWISE_SREG, REGISTER);
            a.number(NFTA_BITWISE_DREG, REGISTER);
            a.number(NFTA_BITWISE_LEN, mask.len() as u32);
            a.nest(NFTA_BITWISE_MASK, |a| a.bytes(NFTA_DATA_VALUE, mask));
            a.nest(NFTA_BITWISE_XOR, |a| a.bytes(NFTA_DATA_VALUE, &vec![0; mask.len()]));
        });
    }

    fn of_connection(&mut self, key: c_int) {
        self.expression("ct", |a| {
            a.number(NFTA_CT_KEY, key as u32);
            a.number(NFTA_CT_DREG, REGISTER);
        });
    }

    fn connection(&mut self, states: u32) {
        self.of_connection(libc::NFT_CT_STATE);
        self.masked(&states.to_ne_bytes());
        self.compare(libc::NFT_CMP_NEQ, &[0; 4]);
    }

    fn clamp_segments(&mut self) {
        const FLAGS: usize = 13;
        const SYN: u8 = 0x02;
        const RST: u8 = 0x04;
        const RT_TCPMSS: u32 = 3;
        const TCPOPT: u32 = 1;
        const OPTION_MAXSEG: u8 = 2;
        self.protocol(libc::IPPROTO_TCP);
        self.payload(TRANSPORT_HEADER, FLAGS, 1, REGISTER);
        self.masked(&[SYN | RST]);
        self.compare(libc::NFT_CMP_EQ, &[SYN]);
        self.expression("rt", |a| {
            a.number(NFTA_RT_KEY, RT_TCPMSS);
            a.number(NFTA_RT_DREG, REGISTER);
        });
        self.expression("byteorder", |a| {
            a.number(NFTA_BYTEORDER_SREG, REGISTER);
            a.number(NFTA_BYTEORDER_DREG, REGISTER);
            a.number(NFTA_BYTEORDER_OP, libc::NFT_BYTEORDER_HTON as u32);
            a.number(NFTA_BYTEORDER_LEN, 2);
            a.number(NFTA_BYTEORDER_SIZE, 2);
        });
        // It is only ever lowered.
        self.expression("exthdr", |a| {
            a.number(NFTA_EXTHDR_SREG, REGISTER);
            a.bytes(NFTA_EXTHDR_TYPE, &[OPTION_MAXSEG]);
            a.number(NFTA_EXTHDR_OFFSET, 2);
            a.number(NFTA_EXTHDR_LEN, 2);
            a.number(NFTA_EXTHDR_OP, TCPOPT);
        });
    }

    fn immediate(&mut self, register: u32, write: impl FnOnce(&mut Attributes<'_>)) {
        self.expression("immediate", |a| {
            a.number(NFTA_IMMEDIATE_DREG, register);
            a.nest(NFTA_IMMEDIATE_DATA, write);
        });
    }

    fn verdict(&mut self, code: c_int) {
        self.immediate(libc::NFT_REG_VERDICT as u32, |a| {
            a.nest(NFTA_DATA_VERDICT, |a| a.number(NFTA_VERDICT_CODE, code as u32));
        });
    }

    fn nat(&mut self, kind: c_int, address: Ipv4Addr, port: Option<u16>) {
        self.immediate(REGISTER, |a| a.bytes(NFTA_DATA_VALUE, &address.octets()));
        if let Some(port) = port {
            self.immediate(REGISTER + 1, |a| a.bytes(NFTA_DATA_VALUE, &port.to_be_bytes()));
        }
        self.expression("nat", |a| {
            a.number(NFTA_NAT_TYPE, kind as u32);
            a.number(NFTA_NAT_FAMILY, libc::NFPROTO_IPV4 as u32);
            a.number(NFTA_NAT_REG_ADDR_MIN, REGISTER);
            if port.is_some() {
                a.number(NFTA_NAT_REG_PROTO_MIN, REGISTER + 1);
            }
        });
    }
}

// Attribute numbers of linux/netfilter/nf_tables.h; libc has the values but not these.
pub(super) const NFTA_LIST_ELEM: u16 = 1;
pub(super) const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_LOOKUP_SET: u16 = 1;
const NFTA_LOOKUP_SREG: u16 = 2;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_BITWISE_XOR: u16 = 5;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_NAT_TYPE: u16 = 1;
const NFTA_NAT_FAMILY: u16 = 2;
const NFTA_NAT_REG_ADDR_MIN: u16 = 3;
const NFTA_NAT_REG_PROTO_MIN: u16 = 5;
const NFTA_REJECT_TYPE: u16 = 1;
const NFTA_REJECT_ICMP_CODE: u16 = 2;
const NFTA_LIMIT_RATE: u16 = 1;
const NFTA_LIMIT_UNIT: u16 = 2;
const NFTA_LIMIT_BURST: u16 = 3;
const NFTA_LIMIT_TYPE: u16 = 4;
const NFTA_LIMIT_FLAGS: u16 = 5;
const NFTA_CONNLIMIT_COUNT: u16 = 1;
const NFTA_CONNLIMIT_FLAGS: u16 = 2;
const NFTA_RT_DREG: u16 = 1;
const NFTA_RT_KEY: u16 = 2;
const NFTA_BYTEORDER_SREG: u16 = 1;
const NFTA_BYTEORDER_DREG: u16 = 2;
const NFTA_BYTEORDER_OP: u16 = 3;
const NFTA_BYTEORDER_LEN: u16 = 4;
const NFTA_BYTEORDER_SIZE: u16 = 5;
const NFTA_EXTHDR_TYPE: u16 = 2;
const NFTA_EXTHDR_OFFSET: u16 = 3;
const NFTA_EXTHDR_LEN: u16 = 4;
const NFTA_EXTHDR_OP: u16 = 6;
const NFTA_EXTHDR_SREG: u16 = 7;
const NFTA_DYNSET_SET_NAME: u16 = 1;
const NFTA_DYNSET_OP: u16 = 3;
const NFTA_DYNSET_SREG_KEY: u16 = 4;
const NFTA_DYNSET_EXPR: u16 = 7;
