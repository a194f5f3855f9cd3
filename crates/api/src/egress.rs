//! What a capsule may reach outside: addresses and names, in E2B's words.
//!
//! The floor under every policy (private ranges, the host, other capsules) is the host's and is not told here.

use core::net::Ipv4Addr;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::{EGRESS_ENTRIES, Invalid};

/// Bytes of a name, and of one of its labels; DNS has no longer ones.
const NAME_BYTES: usize = 253;
const LABEL_BYTES: usize = 63;
/// Bytes of an entry as it is written, before a name becomes ASCII.
const ENTRY_BYTES: usize = 1024;

/// What a capsule may reach outside, as it is asked for. It replaces all that was; nothing in it means everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct SetEgress {
    /// `false` is short for `0.0.0.0/0` in `deny_out`.
    #[serde(alias = "allowInternetAccess", skip_serializing_if = "Option::is_none")]
    pub allow_internet_access: Option<bool>,
    /// Up to 256 IPv4 addresses, networks (`192.0.2.0/24`) and names (`example.com`, `*.example.com`) that may be reached
    /// although `deny_out` says otherwise. Names need `0.0.0.0/0` there: what they do not allow is denied.
    #[serde(alias = "allowOut", skip_serializing_if = "Option::is_none")]
    pub allow_out: Option<Vec<String>>,
    /// Up to 256 IPv4 addresses and networks that may not be reached.
    #[serde(alias = "denyOut", skip_serializing_if = "Option::is_none")]
    pub deny_out: Option<Vec<String>>,
}

/// What a capsule may reach outside, as it is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Egress {
    /// Networks and names that may be reached although `deny_out` says otherwise.
    pub allow_out: Vec<String>,
    /// Networks that may not be reached.
    pub deny_out: Vec<String>,
}

/// What a capsule may reach outside: everything within its bounds, in one spelling. The default is everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// May be reached whatever `deny` says.
    pub allow: Vec<Cidr>,
    /// May not be reached.
    pub deny: Vec<Cidr>,
    /// May be reached by name whatever `deny` says, which then denies everything.
    pub domains: Vec<Domain>,
}

impl SetEgress {
    /// Checks every bound. `parent` is what the fields are under, such as `network.`.
    pub fn validate(self, parent: &str) -> Result<Policy, Invalid> {
        let mut policy = Policy::default();
        for (field, entry) in entries(parent, "allow_out", self.allow_out)? {
            match entry.parse().map_err(|problem| Invalid::new(&field, problem))? {
                Entry::Cidr(cidr) => policy.allow.push(cidr),
                Entry::Domain(domain) => policy.domains.push(domain),
            }
        }
        for (field, entry) in entries(parent, "deny_out", self.deny_out)? {
            match entry.parse().map_err(|problem| Invalid::new(&field, problem))? {
                Entry::Cidr(cidr) => policy.deny.push(cidr),
                Entry::Domain(_) => {
                    let problem = "must be an IPv4 address or network: names can only be allowed";
                    return Err(Invalid::new(field, problem));
                }
            }
        }
        if self.allow_internet_access == Some(false) {
            policy.deny.push(Cidr::EVERYTHING);
        }
        for list in [&mut policy.allow, &mut policy.deny] {
            list.sort_unstable();
            list.dedup();
        }
        policy.domains.sort_unstable();
        policy.domains.dedup();
        if !policy.domains.is_empty() && !policy.deny.contains(&Cidr::EVERYTHING) {
            let problem = "has names, which need 0.0.0.0/0 in deny_out (or allow_internet_access: false)";
            return Err(Invalid::new(format!("{parent}allow_out"), problem));
        }
        Ok(policy)
    }
}

/// The entries of a list, each with what it is called.
fn entries(
    parent: &str,
    list: &str,
    entries: Option<Vec<String>>,
) -> Result<impl Iterator<Item = (String, String)>, Invalid> {
    let (field, entries) = (format!("{parent}{list}"), entries.unwrap_or_default());
    if entries.len() > EGRESS_ENTRIES {
        return Err(Invalid::new(field, format!("must have at most {EGRESS_ENTRIES} entries")));
    }
    Ok(entries.into_iter().enumerate().map(move |(index, entry)| (format!("{field}[{index}]"), entry)))
}

impl Policy {
    /// Whether it says nothing.
    pub fn is_open(&self) -> bool {
        *self == Self::default()
    }

    /// Whether what goes on depends on names.
    pub fn has_names(&self) -> bool {
        !self.domains.is_empty()
    }

    /// Whether that name may be reached, as [`name`] writes it.
    pub fn allows_name(&self, name: &str) -> bool {
        self.domains.iter().any(|domain| domain.matches(name))
    }
}

impl From<&Policy> for Egress {
    fn from(policy: &Policy) -> Self {
        let domains = policy.domains.iter().map(ToString::to_string);
        Self {
            allow_out: policy.allow.iter().map(ToString::to_string).chain(domains).collect(),
            deny_out: policy.deny.iter().map(ToString::to_string).collect(),
        }
    }
}

impl From<Egress> for SetEgress {
    fn from(shown: Egress) -> Self {
        Self { allow_internet_access: None, allow_out: Some(shown.allow_out), deny_out: Some(shown.deny_out) }
    }
}

/// An IPv4 network, without bits beyond its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: Ipv4Addr,
    prefix: u8,
}

impl Cidr {
    /// Every address.
    pub const EVERYTHING: Self = Self { address: Ipv4Addr::UNSPECIFIED, prefix: 0 };

    /// The network of that address with that prefix, if there is one: 0 to 32 bits.
    pub const fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        if prefix > 32 {
            return None;
        }
        let mask = if prefix == 0 { 0 } else { u32::MAX << (32 - prefix) };
        Some(Self { address: Ipv4Addr::from_bits(address.to_bits() & mask), prefix })
    }

    /// Its first and its last address.
    pub fn range(self) -> (Ipv4Addr, Ipv4Addr) {
        let ones = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
        (self.address, Ipv4Addr::from_bits(self.address.to_bits() | ones))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        if text.contains(':') {
            return Err("must be IPv4, without a port: capsules have no IPv6, and every port of an address is meant");
        }
        let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
        // `parse` would take a sign.
        let digits = (1..=2).contains(&prefix.len()) && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let address = address.parse().map_err(|_| "must be an IPv4 address, four numbers from 0 to 255")?;
        let prefix = digits.then(|| prefix.parse().ok()).flatten().ok_or("must have a prefix from 0 to 32")?;
        Self::new(address, prefix).ok_or("must have a prefix from 0 to 32")
    }
}

impl TryFrom<String> for Cidr {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

/// A name that may be reached, or every name below one: `example.com`, `*.example.com`. ASCII, in lower case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Domain {
    name: String,
    /// Names below it are meant, and not it.
    below: bool,
}

impl Domain {
    /// Whether the name is meant, as [`name`] writes it.
    pub fn matches(&self, name: &str) -> bool {
        if self.below {
            name.strip_suffix(&self.name).and_then(|rest| rest.strip_suffix('.')).is_some_and(|rest| !rest.is_empty())
        } else {
            name == self.name
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

impl FromStr for Domain {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const RULE: &str = "must be an IPv4 address, a network, or a name of at most 253 bytes with a dot in it, of letters, digits, '-' and \
            '_', which may begin with '*.'";
        if text.len() > ENTRY_BYTES {
            return Err(RULE);
        }
        let (below, text) = text.strip_prefix("*.").map_or((false, text), |text| (true, text));
        let ascii = idna::domain_to_ascii_cow(text.as_bytes(), idna::AsciiDenyList::URL).map_err(|_| RULE)?;
        let name = name(&ascii).filter(|name| name.contains('.')).ok_or(RULE)?;
        // A number there makes an address of it for some who read it, and no name that there is has one.
        if name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit())) {
            return Err(RULE);
        }
        Ok(Self { name, below })
    }
}

impl TryFrom<String> for Domain {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        text.parse()
    }
}

impl From<Domain> for String {
    fn from(domain: Domain) -> Self {
        domain.to_string()
    }
}

/// A name of the wire in the spelling in which names are compared: lower case, without the dot of the root. `None` for what
/// is none: bytes that a host name has not, labels or a whole that are too long or empty.
pub fn name(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=LABEL_BYTES).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    (text.len() <= NAME_BYTES && text.split('.').all(is_label)).then(|| text.to_ascii_lowercase())
}

/// What may stand in a list.
enum Entry {
    Cidr(Cidr),
    Domain(Domain),
}

impl FromStr for Entry {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        if is_number || text.contains(['/', ':']) {
            return Ok(Self::Cidr(text.parse()?));
        }
        Ok(Self::Domain(text.parse()?))
    }
}

#[cfg(test)]
mod tests;
