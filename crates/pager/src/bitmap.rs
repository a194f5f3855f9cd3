//! One bit per page, set by several threads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits that are set and never cleared.
///
/// The order of changes to different words does not matter to anyone: who must not miss a bit takes the lock under which
/// it is set.
#[derive(Debug)]
pub struct Bitmap(Box<[AtomicU64]>);

impl Bitmap {
    /// `bits` bits, none of them set.
    pub fn new(bits: u64) -> Self {
        Self((0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Sets bits. How many were not set before.
    pub fn set(&self, bits: Range<u64>) -> u64 {
        let words = Words(bits).map(|(word, mask)| {
            let before = self.0[word].fetch_or(mask, Ordering::Relaxed);
            u64::from((mask & !before).count_ones())
        });
        words.sum()
    }

    /// The first set bit among these.
    pub fn first_set(&self, bits: Range<u64>) -> Option<u64> {
        Words(bits).find_map(|(word, mask)| first(word, self.0[word].load(Ordering::Relaxed) & mask))
    }

    /// The first bit among these that is not set.
    pub fn first_clear(&self, bits: Range<u64>) -> Option<u64> {
        Words(bits).find_map(|(word, mask)| first(word, !self.0[word].load(Ordering::Relaxed) & mask))
    }
}

fn first(word: usize, bits: u64) -> Option<u64> {
    (bits != 0).then(|| word as u64 * 64 + u64::from(bits.trailing_zeros()))
}

/// The words that a range of bits is in, each with a mask of its bits.
struct Words(Range<u64>);

impl Iterator for Words {
    type Item = (usize, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let Range { start, end } = self.0;
        if start >= end {
            return None;
        }
        let (word, from) = (start / 64, start % 64);
        let count = (64 - from).min(end - start);
        self.0.start += count;
        let mask = (u64::MAX >> (64 - count)) << from;
        // A bitmap's words are in memory, so their number is a usize.
        Some((word as usize, mask))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_list_of_booleans(ranges in proptest::collection::vec((0..300_u64, 0..300_u64), 0..8), look in (0..300_u64, 0..300_u64)) {
            let bitmap = Bitmap::new(300);
            let mut model = [false; 300];
            for (start, end) in ranges {
                let mut new = 0;
                for bit in start..end {
                    new += u64::from(!std::mem::replace(&mut model[bit as usize], true));
                }
                prop_assert_eq!(bitmap.set(start..end), new);
            }
            let find = |wanted: bool| (look.0..look.1).find(|bit| model[*bit as usize] == wanted);
            prop_assert_eq!(bitmap.first_set(look.0..look.1), find(true));
            prop_assert_eq!(bitmap.first_clear(look.0..look.1), find(false));
        }
    }
}
