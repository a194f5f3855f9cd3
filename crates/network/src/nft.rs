//! A writer for nftables batches, with the few messages and expressions that our two tables need, and a reader for what
//! is asked back.
//!
//! A batch is one transaction: the kernel does all of it or nothing. Numbers in attributes are big-endian; what is
//! loaded into a register has the byte order of its source. `nft list` shows what was understood.

mod expr;

use std::ffi::c_int;
use std::net::Ipv4Addr;

use crate::attributes::{Attributes, Reader};
use crate::netlink::{Error, Requests, Socket};
use crate::ranges::Range;
use crate::traffic::Count;
pub(crate) use expr::{Expr, Memory};
use expr::{NFTA_DATA_VALUE, NFTA_LIST_ELEM};

/// An interface name as registers and set keys hold it: padded with zeros.
pub(crate) fn ifname(name: &str) -> [u8; libc::IFNAMSIZ] {
    let mut padded = [0; libc::IFNAMSIZ];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    padded
}

/// What a set holds, with nft's number for the type, which `nft list` needs.
pub(crate) enum Key {
    Ifname,
    Ipv4,
    /// Ranges, each an element that begins it and one that is its first address no longer in it.
    Ipv4Range,
    IfnameIpv4,
    /// Elements come with packets, by [`Expr::RememberedByIifname`], and go when they remember nothing. At most that many.
    IfnameDynamic(u32),
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
    rules: usize,
}

const ADD: c_int = libc::NLM_F_CREATE;
/// `struct nfgenmsg`: family, version, resource.
const GENMSG: usize = 4;

impl<'a> Batch<'a> {
    /// `family` is one of `NFPROTO_*`.
    pub(crate) fn new(family: c_int, table: &'a str) -> Self {
        let mut requests = Requests::default();
        requests.push_around("begin a transaction", libc::NFNL_MSG_BATCH_BEGIN as u16, batch_header);
        Self { requests, family: family as u8, table, sets: 0, rules: 0 }
    }

    pub(crate) fn finish(mut self) -> Requests {
        self.requests.push_around("commit a transaction", libc::NFNL_MSG_BATCH_END as u16, batch_header);
        self.requests
    }

    /// How many rules were added so far.
    pub(crate) fn rules(&self) -> usize {
        self.rules
    }

    /// The bytes so far.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.requests.bytes()
    }

    /// Removes every table of the network namespace, whoever made it.
    pub(crate) fn flush_namespace(&mut self) {
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | libc::NFT_MSG_DELTABLE) as u16;
        self.requests.push("delete all tables", kind, 0, |bytes| bytes.extend([libc::NFPROTO_UNSPEC as u8, 0, 0, 0]));
    }

    /// A table that carries a comment.
    pub(crate) fn add_table_with(&mut self, comment: &str) {
        let table = self.table;
        self.push("add a table", libc::NFT_MSG_NEWTABLE, ADD, |a| {
            a.text(NFTA_TABLE_NAME, table);
            a.bytes(NFTA_TABLE_USERDATA, &userdata(comment));
        });
    }

    pub(crate) fn add_table(&mut self) {
        let table = self.table;
        self.push("add a table", libc::NFT_MSG_NEWTABLE, ADD, |a| a.text(NFTA_TABLE_NAME, table));
    }

    pub(crate) fn delete_table(&mut self) {
        let table = self.table;
        self.push("delete a table", libc::NFT_MSG_DELTABLE, 0, |a| a.text(NFTA_TABLE_NAME, table));
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

    /// A base chain of a `netdev` table that sees every frame that comes in by a link, before anyone else does.
    pub(crate) fn add_device_chain(&mut self, name: &str, device: &str) {
        let table = self.table;
        self.push("add a chain", libc::NFT_MSG_NEWCHAIN, ADD, |a| {
            a.text(NFTA_CHAIN_TABLE, table);
            a.text(NFTA_CHAIN_NAME, name);
            a.nest(NFTA_CHAIN_HOOK, |a| {
                a.number(NFTA_HOOK_HOOKNUM, libc::NF_NETDEV_INGRESS as u32);
                a.number(NFTA_HOOK_PRIORITY, 0);
                a.text(NFTA_HOOK_DEV, device);
            });
            a.number(NFTA_CHAIN_POLICY, libc::NF_ACCEPT as u32);
            a.text(NFTA_CHAIN_TYPE, "filter");
        });
    }

    pub(crate) fn add_rule(&mut self, chain: &str, expressions: &[Expr<'_>]) {
        let table = self.table;
        self.rules += 1;
        self.push("add a rule", libc::NFT_MSG_NEWRULE, ADD | libc::NLM_F_APPEND, |a| {
            a.text(NFTA_RULE_TABLE, table);
            a.text(NFTA_RULE_CHAIN, chain);
            a.nest(NFTA_RULE_EXPRESSIONS, |a| expressions.iter().for_each(|expression| expression.write(a)));
        });
    }

    /// With `memory`, every element has one of its own, which begins when the element is added.
    pub(crate) fn add_set(&mut self, name: &str, key: &Key, memory: Option<Memory>) {
        let (table, id) = (self.table, self.sets);
        self.sets += 1;
        const TYPE_IPV4: u32 = 7;
        const TYPE_IFNAME: u32 = 41;
        let (kind, length, flags) = match key {
            Key::Ifname => (TYPE_IFNAME, libc::IFNAMSIZ, 0),
            Key::Ipv4 => (TYPE_IPV4, 4, 0),
            Key::Ipv4Range => (TYPE_IPV4, 4, libc::NFT_SET_INTERVAL),
            Key::IfnameIpv4 => (TYPE_IFNAME << 6 | TYPE_IPV4, libc::IFNAMSIZ + 4, 0),
            Key::IfnameDynamic(_) => (TYPE_IFNAME, libc::IFNAMSIZ, libc::NFT_SET_EVAL),
        };
        self.push("add a set", libc::NFT_MSG_NEWSET, ADD, |a| {
            a.text(NFTA_SET_TABLE, table);
            a.text(NFTA_SET_NAME, name);
            a.number(NFTA_SET_FLAGS, flags as u32);
            a.number(NFTA_SET_KEY_TYPE, kind);
            a.number(NFTA_SET_KEY_LEN, length as u32);
            a.number(NFTA_SET_ID, id);
            if let Key::IfnameDynamic(most) = key {
                a.nest(NFTA_SET_DESC, |a| a.number(NFTA_SET_DESC_SIZE, *most));
            }
            if matches!(key, Key::Ifname | Key::IfnameDynamic(_)) {
                // For `nft list` alone: the keys are text and not a number. A type, a length, and "host byte order".
                a.bytes(NFTA_SET_USERDATA, &[&[0, 4], &1u32.to_ne_bytes()[..]].concat());
            }
            if let Some(memory) = memory {
                memory.write(NFTA_SET_EXPR, a);
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

    /// Adds ranges that neither overlap nor touch to a set of such.
    pub(crate) fn add_ranges(&mut self, set: &str, ranges: &[Range]) {
        // The one that ends with the last address has no first that is not in it any more.
        let end = |last: Ipv4Addr| last.to_bits().checked_add(1).map(u32::to_be_bytes);
        let keys: Vec<_> = ranges
            .iter()
            .flat_map(|(first, last)| {
                let end = end(*last).map(|end| (end, libc::NFT_SET_ELEM_INTERVAL_END));
                std::iter::once((first.octets(), 0)).chain(end)
            })
            .collect();
        let keys = keys.iter().map(|(key, flags)| (&key[..], *flags as u32));
        self.elements("add to a set", libc::NFT_MSG_NEWSETELEM, ADD, set, keys);
    }

    /// Deletes one key, which must be there.
    pub(crate) fn delete_element(&mut self, set: &str, key: &[u8]) {
        let keys = std::iter::once((key, 0));
        self.elements("delete from a set", libc::NFT_MSG_DELSETELEM, 0, set, keys);
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
            bytes.extend([family, 0, 0, 0]);
            write(&mut Attributes(bytes));
        });
    }
}

/// What is asked of one table. Nothing, where there is no such table.
pub(crate) struct Query<'a> {
    socket: &'a Socket,
    family: u8,
    table: &'a str,
}

impl<'a> Query<'a> {
    /// `family` is one of `NFPROTO_*`.
    pub(crate) fn new(socket: &'a Socket, family: c_int, table: &'a str) -> Self {
        Self { socket, family: family as u8, table }
    }

    /// The table's comment, and how many rules it has.
    pub(crate) fn table(&self) -> Result<Option<(Vec<u8>, usize)>, Error> {
        let tables = self.dump("read the tables", libc::NFT_MSG_GETTABLE, |_| {})?;
        let name = [self.table.as_bytes(), b"\0"].concat();
        let ours = tables.iter().map(|table| body(table)).find(|table| table.get(NFTA_TABLE_NAME) == Some(&name));
        let Some(ours) = ours else { return Ok(None) };
        let rules = self.dump("read the rules", libc::NFT_MSG_GETRULE, |a| a.text(NFTA_RULE_TABLE, self.table))?;
        Ok(Some((ours.get(NFTA_TABLE_USERDATA).unwrap_or_default().to_owned(), rules.len())))
    }

    /// Every element of a set that counts: its key and what it counted.
    pub(crate) fn counters(&self, set: &str) -> Result<Vec<(Vec<u8>, Count)>, Error> {
        let parts = self.dump("read a set", libc::NFT_MSG_GETSETELEM, |a| {
            a.text(NFTA_SET_ELEM_LIST_TABLE, self.table);
            a.text(NFTA_SET_ELEM_LIST_SET, set);
        })?;
        let counter = |element: Reader<'_>| {
            let key = element.nested(NFTA_SET_ELEM_KEY)?.get(NFTA_DATA_VALUE)?;
            let data = element.nested(NFTA_SET_ELEM_EXPR)?.nested(NFTA_EXPR_DATA)?;
            let counted = Count { packets: data.long(NFTA_COUNTER_PACKETS)?, bytes: data.long(NFTA_COUNTER_BYTES)? };
            Some((key.to_owned(), counted))
        };
        let elements = parts.iter().filter_map(|part| body(part).nested(NFTA_SET_ELEM_LIST_ELEMENTS));
        Ok(elements.flat_map(Reader::all).filter_map(|(_, element)| counter(Reader(element))).collect())
    }

    fn dump(
        &self,
        label: &'static str,
        message: c_int,
        write: impl FnOnce(&mut Attributes<'_>),
    ) -> Result<Vec<Vec<u8>>, Error> {
        let mut request = Requests::default();
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | message) as u16;
        request.push(label, kind, libc::NLM_F_DUMP, |bytes| {
            bytes.extend([self.family, 0, 0, 0]);
            write(&mut Attributes(bytes));
        });
        self.socket.ask(&request)
    }
}

fn body(message: &[u8]) -> Reader<'_> {
    Reader(message.get(GENMSG..).unwrap_or_default())
}

/// A comment as `nft` keeps and shows it: its type, its length, and the text with its end.
pub(crate) fn userdata(comment: &str) -> Vec<u8> {
    [&[0, comment.len() as u8 + 1], comment.as_bytes(), b"\0"].concat()
}

fn batch_header(bytes: &mut Vec<u8>) {
    bytes.extend([0, 0]);
    bytes.extend((libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes());
}

// Attribute numbers of linux/netfilter/nf_tables.h; libc has the values but not these.
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_USERDATA: u16 = 6;
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
const NFTA_SET_DESC: u16 = 9;
const NFTA_SET_DESC_SIZE: u16 = 1;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_USERDATA: u16 = 13;
const NFTA_SET_EXPR: u16 = 17;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFTA_SET_ELEM_EXPR: u16 = 7;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
