//! Figures of many rounds, and the table they make.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Args, Measured};

/// All rounds of every proxy, in the order in which they were first measured.
#[derive(Default)]
pub struct Figures(Vec<(&'static str, Vec<Measured>)>);

/// One proxy's medians.
struct Line {
    requests: f64,
    requests_cpu: f64,
    p50: f64,
    p99: f64,
    large: f64,
    large_cpu: f64,
    echo50: f64,
    echo99: f64,
}

impl Figures {
    pub fn add(&mut self, name: &'static str, measured: Measured) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, rounds)) => rounds.push(measured),
            None => self.0.push((name, vec![measured])),
        }
    }

    fn lines(&self) -> Vec<(&'static str, Line)> {
        let line = |rounds: &[Measured]| {
            let latencies = sorted(rounds, |round| &round.latencies);
            let echoes = sorted(rounds, |round| &round.echoes);
            Line {
                requests: median(rounds, |round| round.requests),
                requests_cpu: median(rounds, |round| round.requests_cpu),
                p50: at(&latencies, 0.5),
                p99: at(&latencies, 0.99),
                large: median(rounds, |round| round.large),
                large_cpu: median(rounds, |round| round.large_cpu),
                echo50: at(&echoes, 0.5),
                echo99: at(&echoes, 0.99),
            }
        };
        self.0.iter().map(|(name, rounds)| (*name, line(rounds))).collect()
    }

    /// Tables that can be pasted into `docs/benchmarks.md`.
    pub fn markdown(&self, args: &Args) -> String {
        let lines = self.lines();
        let mut text = format!(
            "`proxy`, {} rounds, {} connections, {} build:\n\n\
             | | 1 KiB: requests/s | per processor second | p50 | p99 | 64 MiB: MiB/s | per processor second | socket: p50 | p99 |\n\
             |---|---|---|---|---|---|---|---|---|\n",
            args.rounds,
            args.connections,
            if cfg!(debug_assertions) { "debug" } else { "release" }
        );
        let own = |value: f64| if value.is_finite() { format!("{value:.0}") } else { String::new() };
        for (name, line) in &lines {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {name} | {:.0} | {} | {:.0} µs | {:.0} µs | {:.0} | {} | {:.0} µs | {:.0} µs |",
                line.requests,
                own(line.requests_cpu),
                line.p50,
                line.p99,
                line.large,
                own(line.large_cpu),
                line.echo50,
                line.echo99
            );
        }
        let Some((_, ours)) = lines.first() else { return text };
        text += "\n| ours over | requests/s | per processor second | p99 | MiB/s | per processor second | socket p50 |\n\
                 |---|---|---|---|---|---|---|\n";
        for (name, peer) in lines.iter().skip(1).filter(|(_, peer)| peer.requests_cpu.is_finite()) {
            let _ = writeln!(
                text,
                "| {name} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
                ours.requests / peer.requests,
                ours.requests_cpu / peer.requests_cpu,
                ours.p99 / peer.p99,
                ours.large / peer.large,
                ours.large_cpu / peer.large_cpu,
                ours.echo50 / peer.echo50
            );
        }
        text
    }

    pub fn json(&self) -> Value {
        let lines = self.lines().into_iter().map(|(name, line)| {
            let own = |value: f64| if value.is_finite() { json!(value) } else { Value::Null };
            json!({
                "name": name, "requests_s": line.requests, "requests_cpu_s": own(line.requests_cpu), "p50_us": line.p50,
                "p99_us": line.p99, "large_mib_s": line.large, "large_mib_cpu_s": own(line.large_cpu),
                "echo_p50_us": line.echo50, "echo_p99_us": line.echo99,
            })
        });
        lines.collect()
    }
}

fn median(rounds: &[Measured], of: impl Fn(&Measured) -> f64) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn sorted(rounds: &[Measured], of: impl Fn(&Measured) -> &Vec<Duration>) -> Vec<Duration> {
    let mut all: Vec<Duration> = rounds.iter().flat_map(|round| of(round).iter().copied()).collect();
    all.sort_unstable();
    all
}

/// Microseconds.
fn at(sorted: &[Duration], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1e6
}
