//! A writer for nftables batches: the few messages and expressions that our two tables need.
//!
//! A batch is one transaction: the kernel does all of it or nothing. Numbers in attributes are big-endian; what is
//! loaded into a register has the byte order of its source. `nft list` shows what was understood.

use std::ffi::c_int;
use std::net::Ipv4Addr;

use crate::netlink::Requests;

/// An interface name as registers and set keys hold it: padded with zeros.
pub(crate) fn ifname(name: &str) -> [u8; libc::IFNAMSIZ] {
    let mut padded = [0; libc::IFNAMSIZ];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    padded
}

/// Registers are 4 bytes wide; a longer value goes on in the next ones.
const REGISTER: u32 = libc::NFT_REG32_00 as u32;
/// The first register after an interface name, where a concatenation goes on.
const AFTER_IFNAME: u32 = REGISTER + 4;

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
    Accept,
    Drop,
    Masquerade,
    Snat(Ipv4Addr),
    Dnat(Ipv4Addr),
}

/// What a set holds, with nft's number for the type, which `nft list` needs.
pub(crate) enum Key {
    Ifname,
    Ipv4,
    /// Ranges, each an element that begins it and one that is its first address no longer in it.
    Ipv4Range,
    IfnameIpv4,
}

/// A base chain's place.
pub(crate) struct Hook {
    pub(crate) kind: &'static str,
    pub(crate) number: c_int,
    pub(crate) priority: c_int,
}

/// A transaction on one table.
pub(crate) struct Batch<'a> {
    requests: Requests,
    family: u8,
    table: &'a str,
    sets: u32,
}

const ADD: c_int = libc::NLM_F_ACK | libc::NLM_F_CREATE;

impl<'a> Batch<'a> {
    /// `family` is one of `NFPROTO_*`.
    pub(crate) fn new(family: c_int, table: &'a str) -> Self {
        let mut requests = Requests::default();
        requests.push("begin a transaction", libc::NFNL_MSG_BATCH_BEGIN as u16, 0, batch_header);
        Self { requests, family: family as u8, table, sets: 0 }
    }

    pub(crate) fn finish(mut self) -> Requests {
        self.requests.push("commit a transaction", libc::NFNL_MSG_BATCH_END as u16, 0, batch_header);
        self.requests
    }

    pub(crate) fn add_table(&mut self) {
        let table = self.table;
        self.push("add a table", libc::NFT_MSG_NEWTABLE, ADD, |a| a.text(NFTA_TABLE_NAME, table));
    }

    pub(crate) fn delete_table(&mut self) {
        let table = self.table;
        self.push("delete a table", libc::NFT_MSG_DELTABLE, libc::NLM_F_ACK, |a| a.text(NFTA_TABLE_NAME, table));
    }

    /// A base chain that accepts what none of its rules decides.
    pub(crate) fn add_chain(&mut self, name: &str, hook: &Hook) {
        let table = self.table;
        self.push("add a chain", libc::NFT_MSG_NEWCHAIN, ADD, |a| {
            a.text(NFTA_CHAIN_TABLE, table);
            a.text(NFTA_CHAIN_NAME, name);
            a.nest(NFTA_CHAIN_HOOK, |a| {
                a.number(NFTA_HOOK_HOOKNUM, hook.number as u32);
                a.number(NFTA_HOOK_PRIORITY, hook.priority as u32);
            });
            a.number(NFTA_CHAIN_POLICY, libc::NF_ACCEPT as u32);
            a.text(NFTA_CHAIN_TYPE, hook.kind);
        });
    }

    pub(crate) fn add_rule(&mut self, chain: &str, expressions: &[Expr<'_>]) {
        let table = self.table;
        self.push("add a rule", libc::NFT_MSG_NEWRULE, ADD | libc::NLM_F_APPEND, |a| {
            a.text(NFTA_RULE_TABLE, table);
            a.text(NFTA_RULE_CHAIN, chain);
            a.nest(NFTA_RULE_EXPRESSIONS, |a| expressions.iter().for_each(|expression| expression.write(a)));
        });
    }

    pub(crate) fn add_set(&mut self, name: &str, key: &Key) {
        let (table, id) = (self.table, self.sets);
        self.sets += 1;
        const TYPE_IPV4: u32 = 7;
        const TYPE_IFNAME: u32 = 41;
        let (kind, length, flags) = match key {
            Key::Ifname => (TYPE_IFNAME, libc::IFNAMSIZ, 0),
            Key::Ipv4 => (TYPE_IPV4, 4, 0),
            Key::Ipv4Range => (TYPE_IPV4, 4, libc::NFT_SET_INTERVAL),
            Key::IfnameIpv4 => (TYPE_IFNAME << 6 | TYPE_IPV4, libc::IFNAMSIZ + 4, 0),
        };
        self.push("add a set", libc::NFT_MSG_NEWSET, ADD, |a| {
            a.text(NFTA_SET_TABLE, table);
            a.text(NFTA_SET_NAME, name);
            a.number(NFTA_SET_FLAGS, flags as u32);
            a.number(NFTA_SET_KEY_TYPE, kind);
            a.number(NFTA_SET_KEY_LEN, length as u32);
            a.number(NFTA_SET_ID, id);
            if matches!(key, Key::Ifname) {
                // For `nft list` alone: the keys are text and not a number. A type, a length, and "host byte order".
                a.bytes(NFTA_SET_USERDATA, &[&[0, 4], &1u32.to_ne_bytes()[..]].concat());
            }
        });
    }

    /// Adds keys that are as long as those of the set; one that is there already is no error.
    pub(crate) fn add_elements<K: AsRef<[u8]>>(&mut self, set: &str, keys: &[K]) {
        // An attribute holds 64 KiB, and an element is far below 64 bytes.
        for keys in keys.chunks(1024) {
            self.elements("add to a set", libc::NFT_MSG_NEWSETELEM, ADD, set, keys.iter().map(|key| (key.as_ref(), 0)));
        }
    }

    /// Adds the addresses from `first` up to and without `end` to a set of ranges.
    pub(crate) fn add_range(&mut self, set: &str, first: Ipv4Addr, end: Ipv4Addr) {
        let keys = [(first.octets(), 0), (end.octets(), libc::NFT_SET_ELEM_INTERVAL_END)];
        let keys = keys.iter().map(|(key, flags)| (&key[..], *flags as u32));
        self.elements("add to a set", libc::NFT_MSG_NEWSETELEM, ADD, set, keys);
    }

    /// Deletes one key, which must be there.
    pub(crate) fn delete_element(&mut self, set: &str, key: &[u8]) {
        let keys = std::iter::once((key, 0));
        self.elements("delete from a set", libc::NFT_MSG_DELSETELEM, libc::NLM_F_ACK, set, keys);
    }

    fn elements<'k>(
        &mut self,
        label: &'static str,
        message: c_int,
        flags: c_int,
        set: &str,
        keys: impl Iterator<Item = (&'k [u8], u32)>,
    ) {
        let table = self.table;
        self.push(label, message, flags, |a| {
            a.text(NFTA_SET_ELEM_LIST_TABLE, table);
            a.text(NFTA_SET_ELEM_LIST_SET, set);
            a.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |a| {
                for (key, flags) in keys {
                    a.nest(NFTA_LIST_ELEM, |a| {
                        a.nest(NFTA_SET_ELEM_KEY, |a| a.bytes(NFTA_DATA_VALUE, key));
                        if flags != 0 {
                            a.number(NFTA_SET_ELEM_FLAGS, flags);
                        }
                    });
                }
            });
        });
    }

    fn push(&mut self, label: &'static str, message: c_int, flags: c_int, write: impl FnOnce(&mut Attributes<'_>)) {
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | message) as u16;
        let family = self.family;
        self.requests.push(label, kind, flags, |bytes| {
            // `struct nfgenmsg`: family, version, resource.
            bytes.extend([family, 0, 0, 0]);
            write(&mut Attributes(bytes));
        });
    }
}

fn batch_header(bytes: &mut Vec<u8>) {
    bytes.extend([0, 0]);
    bytes.extend((libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes());
}

impl Expr<'_> {
    fn write(&self, a: &mut Attributes<'_>) {
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
            Self::Established => a.established(),
            Self::Accept => a.verdict(libc::NF_ACCEPT),
            Self::Drop => a.verdict(libc::NF_DROP),
            Self::Masquerade => a.expression("masq", |_| {}),
            Self::Snat(address) => a.nat(libc::NFT_NAT_SNAT, *address),
            Self::Dnat(address) => a.nat(libc::NFT_NAT_DNAT, *address),
        }
    }
}

/// Where attributes are appended.
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

    fn attribute(&mut self, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        write(self.0);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn expression(&mut self, name: &str, write: impl FnOnce(&mut Attributes<'_>)) {
        self.nest(NFTA_LIST_ELEM, |a| {
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
        self.expression("payload", |a| {
            a.number(NFTA_PAYLOAD_DREG, register);
            a.number(NFTA_PAYLOAD_BASE, libc::NFT_PAYLOAD_NETWORK_HEADER as u32);
            a.number(NFTA_PAYLOAD_OFFSET, offset);
            a.number(NFTA_PAYLOAD_LEN, 4);
        });
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

    fn established(&mut self) {
        // A bit for each state, for both directions: bit 0 is invalid, bit 1 established, bit 2 related.
        const ESTABLISHED_OR_RELATED: u32 = 1 << 1 | 1 << 2;
        self.expression("ct", |a| {
            a.number(NFTA_CT_KEY, libc::NFT_CT_STATE as u32);
            a.number(NFTA_CT_DREG, REGISTER);
        });
        self.expression("bitwise", |a| {
            a.number(NFTA_BITWISE_SREG, REGISTER);
            a.number(NFTA_BITWISE_DREG, REGISTER);
            a.number(NFTA_BITWISE_LEN, 4);
            a.nest(NFTA_BITWISE_MASK, |a| a.bytes(NFTA_DATA_VALUE, &ESTABLISHED_OR_RELATED.to_ne_bytes()));
            a.nest(NFTA_BITWISE_XOR, |a| a.bytes(NFTA_DATA_VALUE, &[0; 4]));
        });
        self.compare(libc::NFT_CMP_NEQ, &[0; 4]);
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

    fn nat(&mut self, kind: c_int, address: Ipv4Addr) {
        self.immediate(REGISTER, |a| a.bytes(NFTA_DATA_VALUE, &address.octets()));
        self.expression("nat", |a| {
            a.number(NFTA_NAT_TYPE, kind as u32);
            a.number(NFTA_NAT_FAMILY, libc::NFPROTO_IPV4 as u32);
            a.number(NFTA_NAT_REG_ADDR_MIN, REGISTER);
        });
    }
}

// Attribute numbers of linux/netfilter/nf_tables.h; libc has the values but not these.
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_USERDATA: u16 = 13;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;
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
