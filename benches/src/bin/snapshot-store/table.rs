//! From what was measured to what is printed.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};
use snapshot::MERGE_AT;

/// What a pause may write for each dirty byte.
const TARGET_BYTES: f64 = 1.1;

/// One pause, or merge.
#[derive(Debug, Clone, Copy)]
pub struct Pause {
    pub time: Duration,
    /// What it wrote.
    pub bytes: u64,
}

/// Everything that was measured. Reads are the time of one page.
#[derive(Default)]
pub struct Figures {
    pub ours: Vec<Pause>,
    pub floor: Vec<Pause>,
    pub qcow2: Vec<Pause>,
    pub zstd: Vec<Pause>,
    pub merges: Vec<Pause>,
    pub read_one: Duration,
    /// Just before a merge.
    pub read_many: Duration,
    /// At the end.
    pub read_merged: Duration,
    pub qcow2_read_one: Duration,
    pub qcow2_read_many: Duration,
    /// Of the last pause.
    pub dirty_bytes: u64,
    /// All generations after the last pause.
    pub on_disk: u64,
}

impl Figures {
    /// Bytes written for each byte of dirty pages.
    fn amplification(&self, pauses: &[Pause]) -> f64 {
        let dirty: u64 = self.floor.iter().map(|pause| pause.bytes).sum();
        pauses.iter().map(|pause| pause.bytes).sum::<u64>() as f64 / dirty as f64
    }

    /// The median of the ratio in each round, which took both in turn.
    fn ratio(&self, peer: &[Pause]) -> f64 {
        let ratios = self.ours.iter().zip(peer).map(|(ours, peer)| ours.time.as_secs_f64() / peer.time.as_secs_f64());
        median(ratios)
    }

    fn rows(&self) -> [(&'static str, &[Pause]); 4] {
        [("ours", &self.ours), ("floor", &self.floor), ("qcow2 chain", &self.qcow2), ("zstd -1", &self.zstd)]
    }

    /// Tables that can be pasted into `docs/benchmarks.md`.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "`snapshot-store`, {} pauses with {:.1} MiB dirty:\n\n| | median, ms | min | max | written for each dirty byte | ours takes |\n|---|---|---|---|---|---|\n",
            self.ours.len(),
            mib(self.dirty_bytes)
        );
        for (name, pauses) in self.rows() {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {name} | {:.1} | {:.1} | {:.1} | {:.3} | {:.2}x |",
                median(times(pauses)),
                times(pauses).fold(f64::INFINITY, f64::min),
                times(pauses).fold(0.0, f64::max),
                self.amplification(pauses),
                self.ratio(pauses),
            );
        }
        let bytes = self.amplification(&self.ours);
        let _ = write!(
            text,
            "\nTarget: at most {TARGET_BYTES} written for each dirty byte: {}.\n\n\
             {} merges off the path of the pauses: median {:.0} ms, {:.1} MiB each. On disk at the end: {:.0} MiB.\n\n\
             | read of one page | µs |\n|---|---|\n\
             | ours, 1 generation | {:.2} |\n| ours, {MERGE_AT} generations | {:.2} |\n| ours, after merges | {:.2} |\n\
             | qcow2, 1 image | {:.2} |\n| qcow2, {} images | {:.2} |\n",
            if bytes <= TARGET_BYTES { "met" } else { "MISSED" },
            self.merges.len(),
            median(times(&self.merges)),
            mib(self.merges.iter().map(|merge| merge.bytes).sum::<u64>() / (self.merges.len() as u64).max(1)),
            mib(self.on_disk),
            us(self.read_one),
            us(self.read_many),
            us(self.read_merged),
            us(self.qcow2_read_one),
            self.qcow2.len() + 1,
            us(self.qcow2_read_many),
        );
        text
    }

    /// The same for programs; times in milliseconds, of reads in microseconds.
    pub fn json(&self) -> Value {
        let rows = self.rows().map(|(name, pauses)| {
            let figures = json!({
                "median_ms": median(times(pauses)),
                "bytes_per_dirty_byte": self.amplification(pauses),
                "ours_over_it": self.ratio(pauses),
            });
            (name.to_owned(), figures)
        });
        json!({
            "benchmark": "snapshot-store",
            "rounds": self.ours.len(),
            "dirty_bytes": self.dirty_bytes,
            "pauses": rows.into_iter().collect::<serde_json::Map<_, _>>(),
            "meets_target": self.amplification(&self.ours) <= TARGET_BYTES,
            "merges": self.merges.len(),
            "merge_median_ms": median(times(&self.merges)),
            "on_disk_bytes": self.on_disk,
            "read_us": {
                "one_generation": us(self.read_one),
                "many_generations": us(self.read_many),
                "after_merges": us(self.read_merged),
                "qcow2_one_image": us(self.qcow2_read_one),
                "qcow2_many_images": us(self.qcow2_read_many),
            },
        })
    }
}

/// Milliseconds.
fn times(pauses: &[Pause]) -> impl Iterator<Item = f64> {
    pauses.iter().map(|pause| pause.time.as_secs_f64() * 1e3)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => figures[middle],
        _ => (figures[middle - 1] + figures[middle]) / 2.0,
    }
}
