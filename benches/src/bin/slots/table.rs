//! From what was measured to what is printed.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

/// What a slot may take that was not made ahead.
const TARGET_MADE: Duration = Duration::from_millis(3);
/// What one may take that was.
const TARGET_POOLED: Duration = Duration::from_micros(100);
/// How many times as long the peer must take.
const TARGET_RATIO: f64 = 20.0;
/// How much more a slot may cost with the most of them than with the fewest.
const TARGET_FLAT: f64 = 1.5;

/// One round.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    pub made: Duration,
    pub removed: Duration,
}

/// Every round with that many slots there.
#[derive(Default)]
pub struct Figures {
    pub there: usize,
    pub ours: Vec<Took>,
    pub pooled: Vec<Took>,
    pub peer: Vec<Took>,
}

impl Figures {
    fn rows(&self) -> [(&'static str, &[Took]); 3] {
        [("ours, made", &self.ours), ("ours, from the pool", &self.pooled), ("`ip` and `iptables`", &self.peer)]
    }

    /// How many times as long the peer takes to make one, or to make and remove it: the median of the ratio in each round.
    fn ratio(&self, of: impl Fn(&Took) -> Duration) -> f64 {
        let rounds = self.ours.iter().zip(&self.peer);
        median(rounds.map(|(ours, peer)| of(peer).as_secs_f64() / of(ours).as_secs_f64()))
    }
}

/// A table that can be pasted into `docs/benchmarks.md`.
pub fn markdown(all: &[Figures]) -> String {
    let rounds = all.first().map_or(0, |figures| figures.ours.len());
    let mut text = format!(
        "`slots`, {rounds} rounds; ms:\n\n| slots there | | made: median | min | p99 | removed: median |\n|---|---|---|---|---|---|\n"
    );
    for figures in all {
        for (name, took) in figures.rows() {
            let made = || took.iter().map(|took| took.made);
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {} | {name} | {:.3} | {:.3} | {:.3} | {:.3} |",
                figures.there,
                median(made().map(millis)),
                quantile(made().map(millis), 0.0),
                quantile(made().map(millis), 0.99),
                median(took.iter().map(|took| millis(took.removed))),
            );
        }
    }
    let _ = writeln!(text, "\n| | measured | target | |\n|---|---|---|---|");
    for (name, measured, target, is_met) in verdicts(all) {
        let _ = writeln!(text, "| {name} | {measured} | {target} | {} |", if is_met { "met" } else { "missed" });
    }
    text
}

fn verdicts(all: &[Figures]) -> Vec<(&'static str, String, String, bool)> {
    let made = |figures: &Figures| median(figures.ours.iter().map(|took| millis(took.made)));
    let worst = all.iter().map(made).fold(0.0, f64::max);
    let pooled = |figures: &Figures| median(figures.pooled.iter().map(|took| millis(took.made)));
    let worst_pooled = all.iter().map(pooled).fold(0.0, f64::max);
    let flat = match all {
        [first, .., last] => made(last) / made(first),
        _ => 1.0,
    };
    let least = |of: fn(&Took) -> Duration| all.iter().map(|figures| figures.ratio(of)).fold(f64::INFINITY, f64::min);
    let (ratio, ratio_of_both) = (least(|took| took.made), least(|took| took.made + took.removed));
    vec![
        (
            "a slot that is made",
            format!("{worst:.2} ms"),
            format!("≤ {} ms", millis(TARGET_MADE)),
            worst <= millis(TARGET_MADE),
        ),
        (
            "a slot from the pool",
            format!("{:.1} µs", worst_pooled * 1e3),
            format!("≤ {} µs", millis(TARGET_POOLED) * 1e3),
            worst_pooled <= millis(TARGET_POOLED),
        ),
        (
            "with the most slots, over the fewest",
            format!("{flat:.2}x"),
            format!("≤ {TARGET_FLAT}x"),
            flat <= TARGET_FLAT,
        ),
        (
            "the peer's time to make one, over ours",
            format!("{ratio:.0}x"),
            format!("≥ {TARGET_RATIO}x"),
            ratio >= TARGET_RATIO,
        ),
        ("to make and remove one", format!("{ratio_of_both:.1}x"), "none".into(), true),
    ]
}

pub fn json(all: &[Figures]) -> Value {
    let took = |took: &[Took]| -> Vec<[f64; 2]> {
        took.iter().map(|took| [millis(took.made), millis(took.removed)]).collect()
    };
    all.iter()
        .map(|figures| {
            json!({ "there": figures.there, "ours": took(&figures.ours), "pooled": took(&figures.pooled), "peer": took(&figures.peer) })
        })
        .collect()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

fn quantile(values: impl Iterator<Item = f64>, at: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let index = ((values.len() as f64 - 1.0) * at).round() as usize;
    values.get(index).copied().unwrap_or_default()
}
