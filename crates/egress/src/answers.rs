//! What a capsule was told: which addresses are whose, and for how long. Pure.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Programs use an address for a while after it was told, whatever its time to live says.
const FLOOR: Duration = Duration::from_secs(60);
/// No address stays a name's longer than this without being asked for again.
const CEILING: Duration = Duration::from_secs(24 * 60 * 60);
/// Pairs of name and address that are remembered; the ones that end first go first.
const PAIRS: usize = 8192;

/// Names with the addresses that were answered for them.
#[derive(Debug, Default)]
pub struct Answers {
    until: HashMap<(String, Ipv4Addr), Instant>,
}

impl Answers {
    /// Remembers that the name was answered with the address, to be used for that many seconds.
    pub fn tell(&mut self, name: &str, address: Ipv4Addr, ttl: u32, now: Instant) {
        let end = now + Duration::from_secs(ttl.into()).clamp(FLOOR, CEILING);
        if self.until.len() >= PAIRS {
            self.until.retain(|_, until| *until > now);
        }
        if self.until.len() >= PAIRS
            && let Some(first) = self.until.iter().min_by_key(|(_, until)| **until).map(|(pair, _)| pair.clone())
        {
            self.until.remove(&first);
        }
        let until = self.until.entry((name.to_owned(), address)).or_insert(end);
        *until = end.max(*until);
    }

    /// Whether the address is one that was answered for the name, and still counts.
    pub fn knows(&self, name: &str, address: Ipv4Addr, now: Instant) -> bool {
        self.until.get(&(name.to_owned(), address)).is_some_and(|until| *until > now)
    }

    /// Forgets the names of which `keep` says so.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.until.retain(|(name, _), _| keep(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

    #[test]
    fn an_address_is_the_names_that_was_asked_for_and_for_its_time() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.tell("a.example", ADDRESS, 300, now);
        let at = |seconds| now + Duration::from_secs(seconds);
        assert!(answers.knows("a.example", ADDRESS, at(299)));
        assert!(!answers.knows("a.example", ADDRESS, at(300)));
        assert!(!answers.knows("b.example", ADDRESS, now));
        assert!(!answers.knows("a.example", Ipv4Addr::new(192, 0, 2, 2), now));
        // A shorter answer does not shorten what was promised; none is shorter than the floor nor longer than the ceiling.
        answers.tell("a.example", ADDRESS, 0, at(1));
        assert!(answers.knows("a.example", ADDRESS, at(299)));
        answers.tell("b.example", ADDRESS, 0, now);
        assert!(answers.knows("b.example", ADDRESS, at(59)) && !answers.knows("b.example", ADDRESS, at(60)));
        answers.tell("c.example", ADDRESS, u32::MAX, now);
        assert!(!answers.knows("c.example", ADDRESS, now + CEILING));
        answers.retain(|name| name != "a.example");
        assert!(!answers.knows("a.example", ADDRESS, now) && answers.knows("b.example", ADDRESS, now));
    }

    #[test]
    fn a_guest_that_asks_for_everything_fills_no_memory() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        let name = |number: usize| format!("{number}.example");
        for number in 0..PAIRS + 10 {
            answers.tell(&name(number), ADDRESS, 60 + number as u32, now);
        }
        assert_eq!(answers.until.len(), PAIRS);
        assert!(!answers.knows(&name(9), ADDRESS, now) && answers.knows(&name(10), ADDRESS, now));
        answers.tell("late.example", ADDRESS, 60, now + CEILING);
        assert_eq!(answers.until.len(), 1, "what is over makes room first");
    }
}
