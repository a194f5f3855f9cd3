//! Arithmetic of address ranges, each given by its first and its last address. Pure.

use std::net::Ipv4Addr;

/// From the first to the last address.
pub type Range = (Ipv4Addr, Ipv4Addr);

/// The same addresses in ranges that neither overlap nor touch, in their order.
pub(crate) fn merge(ranges: &[Range]) -> Vec<Range> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<Range> = Vec::new();
    for (first, last) in sorted {
        match merged.last_mut() {
            Some((_, end)) if u64::from(first.to_bits()) <= u64::from(end.to_bits()) + 1 => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// The addresses of `ranges` that are not in `without`.
pub(crate) fn subtract(ranges: &[Range], without: &[Range]) -> Vec<Range> {
    let mut left = Vec::new();
    let without = merge(without);
    for (first, last) in merge(ranges) {
        let mut next = Some(first);
        for &(hole, end) in without.iter().filter(|(hole, end)| *hole <= last && *end >= first) {
            let Some(from) = next else { break };
            if hole > from {
                left.push((from, Ipv4Addr::from_bits(hole.to_bits() - 1)));
            }
            next = end.to_bits().checked_add(1).map(Ipv4Addr::from_bits).filter(|after| *after <= last);
        }
        if let Some(from) = next {
            left.push((from, last));
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges(pairs: &[(u8, u8)]) -> Vec<Range> {
        // All at the end of the address space, where the last address has none after it.
        let address = |byte: u8| Ipv4Addr::new(255, 255, 255, byte);
        pairs.iter().map(|(a, b)| (address(*a.min(b)), address(*a.max(b)))).collect()
    }

    fn has(ranges: &[Range], byte: u8) -> bool {
        let address = Ipv4Addr::new(255, 255, 255, byte);
        ranges.iter().any(|(first, last)| (*first..=*last).contains(&address))
    }

    proptest! {
        #[test]
        fn merging_changes_no_membership(pairs: Vec<(u8, u8)>, byte: u8) {
            let before = ranges(&pairs);
            let merged = merge(&before);
            prop_assert_eq!(has(&merged, byte), has(&before, byte));
            prop_assert!(merged.windows(2).all(|pair| pair[0].1.to_bits() + 1 < pair[1].0.to_bits()));
        }

        #[test]
        fn what_is_subtracted_is_gone_and_nothing_else(pairs: Vec<(u8, u8)>, holes: Vec<(u8, u8)>, byte: u8) {
            let (before, holes) = (ranges(&pairs), ranges(&holes));
            prop_assert_eq!(has(&subtract(&before, &holes), byte), has(&before, byte) && !has(&holes, byte));
        }
    }
}
