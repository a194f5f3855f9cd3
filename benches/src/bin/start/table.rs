//! From what was measured to what is printed.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::{COMMAND, Steps};

/// The step at which both sides are compared.
const COMPARED: &str = "guest answered";
/// What a start may cost beyond the bare VMM's: this part of it, or this long, whichever is more.
const TARGET_RATIO: f64 = 0.10;
const TARGET_MS: f64 = 10.0;
/// What a resume may take of what a cold boot does.
const TARGET_RESUME: f64 = 0.25;

/// The counted rounds.
#[derive(Default)]
pub struct Figures {
    pub ours: Vec<Steps>,
    pub bare: Vec<Duration>,
    /// From requests to the answer of a command in the guest: a cold boot, a resume, a create from a snapshot.
    pub boot: Vec<Steps>,
    pub resume: Vec<Steps>,
    pub from_snapshot: Vec<Steps>,
}

/// Milliseconds.
struct Summary {
    median: f64,
    min: f64,
    max: f64,
}

impl Figures {
    /// Whether the medians differ by no more than the target allows.
    pub fn meets_target(&self) -> bool {
        let (ours, bare) = (self.ours_at(COMPARED), self.bare());
        ours.median - bare.median <= (bare.median * TARGET_RATIO).max(TARGET_MS)
    }

    /// Tables that can be pasted into `docs/benchmarks.md`.
    pub fn markdown(&self, vmm: &Path) -> String {
        let (ours, bare) = (self.ours_at(COMPARED), self.bare());
        let (total, rounds) = (self.ours_at("answered"), self.bare.len());
        let mut text = format!("`start`, {rounds} rounds, {}, ms:\n\n", name(vmm));
        text.push_str("| | median | min | max |\n|---|---|---|---|\n");
        for (what, figures) in [
            ("bare VMM: exec to envd's first answer", &bare),
            ("ours: request to envd's first answer", &ours),
            ("ours: request to the RPC's answer", &total),
        ] {
            let Summary { median, min, max } = figures;
            // Writing to a string cannot fail.
            let _ = writeln!(text, "| {what} | {median:.0} | {min:.0} | {max:.0} |");
        }
        let _ = write!(
            text,
            "\nOurs over bare, to envd's first answer: {:+.0} ms, ratio {:.3} (of the minima {:+.0} ms, {:.3}). \
             Target: at most 10 % or 10 ms over, whichever is larger: {}.\n\n",
            ours.median - bare.median,
            ours.median / bare.median,
            ours.min - bare.min,
            ours.min / bare.min,
            if self.meets_target() { "met" } else { "MISSED" },
        );
        text.push_str("| to a command's answer | median | min | max | of a cold boot |\n|---|---|---|---|---|\n");
        for (what, figures) in self.answers() {
            let Summary { median, min, max } = figures;
            let ratio = self.of_boot(&figures);
            let _ = writeln!(text, "| {what} | {median:.0} | {min:.0} | {max:.0} | {ratio:.2} |");
        }
        let _ =
            writeln!(text, "\nTarget: a resume at most {TARGET_RESUME} of a cold boot: {}.\n", self.resume_verdict());
        for (what, rounds) in self.ways() {
            let _ = write!(text, "| step of a {what} | median of its own time |\n|---|---|\n");
            for (step, ms) in steps(rounds) {
                let _ = writeln!(text, "| {step} | {ms:.1} |");
            }
            text.push('\n');
        }
        text
    }

    /// The same for programs; times in milliseconds.
    pub fn json(&self, vmm: &Path) -> Value {
        let (ours, bare, total) = (self.ours_at(COMPARED), self.bare(), self.ours_at("answered"));
        let object = |figures: &Summary| json!({"median": figures.median, "min": figures.min, "max": figures.max});
        json!({
            "benchmark": "start",
            "vmm": name(vmm),
            "rounds": self.bare.len(),
            "bare_ms": object(&bare),
            "ours_ms": object(&ours),
            "ours_rpc_ms": object(&total),
            "ratio": ours.median / bare.median,
            "over_ms": ours.median - bare.median,
            "meets_target": self.meets_target(),
            "answers": self.answers().map(|(what, figures)| json!({"what": what, "ms": object(&figures), "of_boot": self.of_boot(&figures)})),
            "steps_ms": self.ways().map(|(what, rounds)| json!({
                "what": what,
                "steps": steps(rounds).into_iter().map(|(step, ms)| json!({"step": step, "median": ms})).collect::<Value>(),
            })),
        })
    }

    /// Each way to a capsule that runs.
    fn ways(&self) -> [(&'static str, &[Steps]); 3] {
        [("cold boot", &self.boot), ("create from a snapshot", &self.from_snapshot), ("resume", &self.resume)]
    }

    fn answers(&self) -> [(&'static str, Summary); 3] {
        self.ways().map(|(what, rounds)| (what, all_at(rounds, COMMAND)))
    }

    fn of_boot(&self, figures: &Summary) -> f64 {
        figures.median / all_at(&self.boot, COMMAND).median
    }

    fn resume_verdict(&self) -> &'static str {
        let [_, created, resumed] = self.answers().map(|(_, figures)| self.of_boot(&figures) <= TARGET_RESUME);
        if created && resumed { "met" } else { "MISSED" }
    }

    fn bare(&self) -> Summary {
        summary(self.bare.iter().copied())
    }

    fn ours_at(&self, step: &str) -> Summary {
        all_at(&self.ours, step)
    }
}

/// Each step's own time: from the step before it. What is done at once counts from where it began.
fn steps(rounds: &[Steps]) -> Vec<(String, f64)> {
    let Some(first) = rounds.first() else { return Vec::new() };
    let own = |steps: &Steps, step: &str| {
        let index = steps.iter().position(|(name, _)| name == step)?;
        let before = match step {
            "network made" | "disk made" | "snapshot placed" => at(steps, "slot claimed"),
            "VMM executed" => at(steps, "network made"),
            "pager is ready" => at(steps, "snapshot placed"),
            "VMM listens" => at(steps, "VMM executed").max(at(steps, "disk made")).max(at(steps, "pager is ready")),
            _ => index.checked_sub(1).map(|before| steps[before].1),
        };
        Some(steps[index].1 - before.unwrap_or_default())
    };
    let median = |step: &str| summary(rounds.iter().filter_map(|steps| own(steps, step))).median;
    first.iter().map(|(step, _)| (step.clone(), median(step))).collect()
}

fn all_at(rounds: &[Steps], step: &str) -> Summary {
    summary(rounds.iter().filter_map(|steps| at(steps, step)))
}

fn at(steps: &Steps, step: &str) -> Option<Duration> {
    steps.iter().find(|(name, _)| name == step).map(|(_, at)| *at)
}

fn summary(times: impl Iterator<Item = Duration>) -> Summary {
    let mut ms: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
    ms.sort_by(f64::total_cmp);
    let middle = ms.len() / 2;
    let median = match ms.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => ms[middle],
        _ => (ms[middle - 1] + ms[middle]) / 2.0,
    };
    Summary { median, min: ms.first().copied().unwrap_or(f64::NAN), max: ms.last().copied().unwrap_or(f64::NAN) }
}

fn name(vmm: &Path) -> String {
    let name = vmm.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let needs = if name == "firecracker" { "KVM" } else { "no KVM: guests under QEMU's emulation" };
    format!("`{name}` ({needs})")
}
