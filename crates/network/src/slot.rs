//! Slot arithmetic: every name and address of a capsule's network follows from one number. Pure.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The tap device inside every namespace; the VMM attaches to it.
pub const TAP: &str = "tap0";
/// The tap's own address, which is the guest's gateway.
pub const TAP_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// The tap's MAC address, the same in every slot: a guest that is restored in another slot still has its gateway's.
pub const TAP_MAC: [u8; 6] = [0x02, 0xFC, 0x00, 0x00, 0x00, 0x06];
/// Prefix length of the network between tap and guest.
pub const TAP_PREFIX: u8 = 30;
/// The guest's address, the same in every capsule, so that a snapshot resumes in any slot.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The guest's MAC address, the same in every capsule.
pub const GUEST_MAC: [u8; 6] = [0x02, 0xFC, 0x00, 0x00, 0x00, 0x05];
/// The end of the veth pair inside the namespace.
pub(crate) const UPLINK_IN_NETNS: &str = "eth0";
/// Prefix length of the network between the ends of a veth pair.
pub(crate) const VETH_PREFIX: u8 = 31;
/// What the names of the host's ends begin with. No dash before the number: five digits must fit in 15 characters.
pub(crate) const VETH: &str = "wrenn-veth";
/// The index of the namespace's end.
pub(crate) const UPLINK_INDEX: u32 = 2;
/// The tap's index.
pub(crate) const TAP_INDEX: u32 = 3;
/// Where named namespaces are mounted; `ip netns` looks here too.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// The number of a capsule's network on this machine, from [`Slot::MIN`] to [`Slot::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Slot(u16);

impl Slot {
    /// The lowest slot.
    pub const MIN: Self = Self(1);
    /// The highest slot: the last pair of addresses in 10.12.0.0/16.
    pub const MAX: Self = Self(32767);

    /// The slot with this number, if there is one.
    pub fn new(number: u16) -> Option<Self> {
        (Self::MIN.0..=Self::MAX.0).contains(&number).then_some(Self(number))
    }

    /// Its number.
    pub fn get(self) -> u16 {
        self.0
    }

    /// The name of its network namespace.
    pub fn netns(self) -> String {
        format!("wrenn-ns-{}", self.0)
    }

    /// Where its network namespace is mounted, for `setns` or `ip netns exec`.
    pub fn netns_path(self) -> PathBuf {
        [NETNS_DIR, &self.netns()].iter().collect()
    }

    /// The name of the host's end of its veth pair.
    pub fn veth(self) -> String {
        format!("{VETH}{}", self.0)
    }

    /// The address at which the host reaches the guest: each port of it is that port of the guest.
    pub fn host_ip(self) -> Ipv4Addr {
        let [high, low] = self.0.to_be_bytes();
        Ipv4Addr::new(10, 11, high, low)
    }

    /// The MAC address of the host's end of its veth pair.
    pub(crate) fn veth_host_mac(self) -> [u8; 6] {
        let [high, low] = self.0.to_be_bytes();
        [0x02, 0xFC, 0x00, 0x01, high, low]
    }

    /// The MAC address of the namespace's end.
    pub(crate) fn veth_netns_mac(self) -> [u8; 6] {
        let [high, low] = self.0.to_be_bytes();
        [0x02, 0xFC, 0x00, 0x02, high, low]
    }

    /// The address of the host's end of the veth pair.
    pub fn veth_host_ip(self) -> Ipv4Addr {
        let [high, low] = (2 * self.0).to_be_bytes();
        Ipv4Addr::new(10, 12, high, low)
    }

    /// The address of the namespace's end of the veth pair, from which the guest's traffic reaches the host.
    pub fn veth_netns_ip(self) -> Ipv4Addr {
        let [high, low] = (2 * self.0 + 1).to_be_bytes();
        Ipv4Addr::new(10, 12, high, low)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<Slot> for u16 {
    fn from(slot: Slot) -> Self {
        slot.0
    }
}

/// Why a number is not a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a slot; slots go from 1 to 32767")]
pub struct OutOfRange(pub u16);

impl TryFrom<u16> for Slot {
    type Error = OutOfRange;

    fn try_from(number: u16) -> Result<Self, OutOfRange> {
        Self::new(number).ok_or(OutOfRange(number))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn all() -> impl Iterator<Item = Slot> {
        (0..=u16::MAX).filter_map(Slot::new)
    }

    #[test]
    fn no_two_slots_share_a_name_or_an_address() {
        assert_eq!(all().count(), 32767);
        let names: HashSet<_> = all().flat_map(|slot| [slot.netns(), slot.veth()]).collect();
        assert_eq!(names.len(), 2 * 32767);
        let addresses: HashSet<_> =
            all().flat_map(|slot| [slot.host_ip(), slot.veth_host_ip(), slot.veth_netns_ip()]).collect();
        assert_eq!(addresses.len(), 3 * 32767);
    }

    #[test]
    fn the_numbers_are_those_of_the_original() {
        let slot = Slot::new(258).unwrap();
        assert_eq!(slot.netns_path().to_str().unwrap(), "/run/netns/wrenn-ns-258");
        assert_eq!(slot.veth(), "wrenn-veth258");
        assert_eq!(slot.host_ip(), Ipv4Addr::new(10, 11, 1, 2));
        assert_eq!(slot.veth_host_ip(), Ipv4Addr::new(10, 12, 2, 4));
        assert_eq!(slot.veth_netns_ip(), Ipv4Addr::new(10, 12, 2, 5));
        assert_eq!((Slot::new(0), Slot::new(32768)), (None, None));
    }

    proptest! {
        #[test]
        fn a_slot_stays_within_its_bounds(number in Slot::MIN.get()..=Slot::MAX.get()) {
            let slot = Slot::new(number).unwrap();
            // IFNAMSIZ is 16 with the terminating zero.
            prop_assert!(slot.veth().len() <= 15);
            prop_assert_eq!(slot.host_ip().octets()[..2].to_vec(), vec![10, 11]);
            // The two ends are the two addresses of one /31 inside 10.12.0.0/16.
            let (host, netns) = (u32::from(slot.veth_host_ip()), u32::from(slot.veth_netns_ip()));
            prop_assert_eq!((host & 1, host + 1), (0, netns));
            prop_assert_eq!(host >> 16, 10 << 8 | 12);
        }

        #[test]
        fn a_slot_survives_its_json(number: u16) {
            let json = number.to_string();
            match Slot::new(number) {
                Some(slot) => {
                    prop_assert_eq!(serde_json::to_string(&slot).unwrap(), json.clone());
                    prop_assert_eq!(serde_json::from_str::<Slot>(&json).unwrap(), slot);
                }
                None => prop_assert!(serde_json::from_str::<Slot>(&json).is_err()),
            }
        }
    }
}
