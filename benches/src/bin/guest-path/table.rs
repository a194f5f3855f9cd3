//! From what was measured to what is printed.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::Args;

/// What is compared, in the order in which it is printed, with how many times ssh's time ours may take at most.
const ROWS: [(&str, Option<f64>); 7] = [
    ("command", Some(0.3)),
    ("command, cold", Some(0.3)),
    ("key echo", None),
    ("small files up", Some(1.0 / 1.5)),
    ("large file up", Some(1.0 / 1.5)),
    ("large file down", Some(1.0 / 1.5)),
    ("watch event", None),
];

/// Durations by row and side.
#[derive(Default)]
pub struct Figures(BTreeMap<(&'static str, &'static str), Vec<Duration>>);

impl Figures {
    pub fn add(&mut self, row: &'static str, side: &'static str, figures: Vec<Duration>) {
        self.0.entry((row, side)).or_default().extend(figures);
    }

    pub fn extend(&mut self, other: Figures) {
        for ((row, side), figures) in other.0 {
            self.add(row, side, figures);
        }
    }

    /// Median and 99th percentile, milliseconds.
    fn of(&self, row: &'static str, side: &'static str) -> Option<(f64, f64)> {
        let mut sorted: Vec<f64> = self.0.get(&(row, side))?.iter().map(|d| d.as_secs_f64() * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |part: usize| sorted[(sorted.len() * part / 100).min(sorted.len() - 1)];
        Some((at(50), at(99)))
    }

    /// A table that can be pasted into `docs/benchmarks.md`.
    pub fn markdown(&self, args: &Args) -> String {
        let mut text = format!(
            "`guest-path`, {} rounds of {} commands and keys, {} files of 1 KiB, {} MiB; ms:\n\n\
             | | ours, median | p99 | OpenSSH, median | p99 | ratio | target |\n|---|---|---|---|---|---|---|\n",
            args.rounds, args.repeats, args.files, args.large_mib
        );
        for (row, target) in ROWS {
            let Some((median, p99)) = self.of(row, "ours") else { continue };
            // Writing to a string cannot fail.
            let _ = match self.of(row, "ssh") {
                Some((peer, peer_p99)) => {
                    let ratio = median / peer;
                    let verdict = target.map_or("".to_owned(), |target| {
                        format!("≤ {target:.2}: {}", if ratio <= target { "met" } else { "missed" })
                    });
                    writeln!(
                        text,
                        "| {row} | {median:.2} | {p99:.2} | {peer:.2} | {peer_p99:.2} | {ratio:.2} | {verdict} |"
                    )
                }
                None => writeln!(text, "| {row} | {median:.2} | {p99:.2} | | | | |"),
            };
        }
        text
    }

    pub fn json(&self) -> Value {
        let rows = ROWS.iter().map(|(row, target)| {
            let side = |side| self.of(row, side).map(|(median, p99)| json!({"median_ms": median, "p99_ms": p99}));
            ((*row).to_owned(), json!({"ours": side("ours"), "ssh": side("ssh"), "target_ratio": target}))
        });
        Value::Object(rows.collect())
    }
}
