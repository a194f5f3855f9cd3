//! What was seen of one capsule: the nearer, the finer. Knows no clock.

use std::collections::VecDeque;

use agent_api::MetricsPoint;

use super::read::Reading;

const MINUTE: i64 = 60_000;
/// How far back each tier goes, and how far its readings are apart at least, in milliseconds.
const TIERS: [(i64, i64); 3] = [(10 * MINUTE, 0), (120 * MINUTE, MINUTE / 2), (24 * 60 * MINUTE, 5 * MINUTE)];

/// The readings of one capsule.
#[derive(Debug, Default)]
pub struct History {
    tiers: [VecDeque<Reading>; TIERS.len()],
}

impl History {
    /// Adds a reading, unless there is one that is as new.
    pub fn push(&mut self, reading: Reading) {
        if self.latest().is_some_and(|latest| latest.unix_ms >= reading.unix_ms) {
            return;
        }
        for (tier, (span, apart)) in self.tiers.iter_mut().zip(TIERS) {
            if tier.back().is_none_or(|last| reading.unix_ms - last.unix_ms >= apart) {
                tier.push_back(reading);
            }
            while tier.front().is_some_and(|first| reading.unix_ms - first.unix_ms > span) {
                tier.pop_front();
            }
        }
    }

    /// The last reading.
    pub fn latest(&self) -> Option<Reading> {
        self.tiers[0].back().copied()
    }

    /// What was seen of a capsule of so many processors in the `seconds` before `now`, oldest first: from the finest tier that
    /// goes back so far, and the last reading.
    pub fn points(&self, now: i64, seconds: u32, vcpus: u32) -> Vec<MetricsPoint> {
        let span = i64::from(seconds) * 1000;
        let tier = TIERS.iter().position(|(of, _)| span <= *of).unwrap_or(TIERS.len() - 1);
        let latest = self.latest().filter(|latest| self.tiers[tier].back().is_none_or(|last| last != latest));
        let mut before: Option<Reading> = None;
        let mut points = Vec::new();
        for reading in self.tiers[tier].iter().copied().chain(latest) {
            if now - reading.unix_ms <= span {
                points.push(point(before, reading, vcpus));
            }
            before = Some(reading);
        }
        points
    }
}

fn point(before: Option<Reading>, reading: Reading, vcpus: u32) -> MetricsPoint {
    MetricsPoint {
        unix_ms: reading.unix_ms,
        cpu_percent: before.map_or(0.0, |before| percent(before, reading, vcpus)),
        memory_bytes: reading.memory,
        disk_bytes: reading.disk,
        sent_bytes: reading.sent,
        received_bytes: reading.received,
        cpu_usec: reading.cpu_usec,
        ..Default::default()
    }
}

/// How much of so many processors was used between two readings.
fn percent(before: Reading, now: Reading, vcpus: u32) -> f64 {
    // After a resume it counts anew.
    let used = now.cpu_usec.checked_sub(before.cpu_usec).unwrap_or(now.cpu_usec);
    let there = (now.unix_ms - before.unix_ms) as f64 * 1000.0 * f64::from(vcpus);
    // What the VMM does beside its guest may be more than all the guest's processors can.
    if there > 0.0 { (used as f64 / there * 100.0).min(100.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(unix_ms: i64, cpu_usec: u64) -> Reading {
        Reading { unix_ms, cpu_usec, memory: 7, ..Reading::default() }
    }

    #[test]
    fn processors_are_used_in_hundredths_of_all_of_them() {
        let mut history = History::default();
        assert_eq!(history.points(0, 600, 2), []);
        for reading in [at(1000, 500_000), at(2000, 1_500_000), at(3000, 9_500_000), at(4000, 1_000_000)] {
            history.push(reading);
        }
        let points = history.points(4000, 600, 2);
        let percents: Vec<f64> = points.iter().map(|point| point.cpu_percent).collect();
        // Nothing before it; one of two; more than there is; and a new count.
        assert_eq!(percents, [0.0, 50.0, 100.0, 50.0]);
        assert_eq!(history.points(4000, 1, 2).len(), 2);
        assert_eq!(history.points(1_000_000, 600, 2), []);
    }

    proptest! {
        #[test]
        fn what_is_far_back_is_coarse_and_what_is_kept_is_bounded(steps in prop::collection::vec(1_000..20_000_i64, 1..4000)) {
            let mut history = History::default();
            let mut now = 0;
            for step in steps {
                now += step;
                history.push(at(now, now as u64 * 100));
            }
            for (seconds, apart, most) in [(600, 1_000, 601), (7200, 30_000, 242), (86_400, 300_000, 290)] {
                let points = history.points(now, seconds, 1);
                prop_assert!(!points.is_empty() && points.len() <= most, "{} points of {seconds} s", points.len());
                prop_assert_eq!(points.last().unwrap().unix_ms, now);
                let (_, but_last) = points.split_last().unwrap();
                for pair in but_last.windows(2) {
                    prop_assert!(pair[1].unix_ms - pair[0].unix_ms >= apart);
                    prop_assert!((pair[1].cpu_percent - 10.0).abs() < 0.01);
                }
            }
        }
    }
}
