//! `wrenn capsule stats`.

use std::process::ExitCode;

use anyhow::Result;
use api::{CapsuleId, CapsuleMetrics, MetricsRange, Point, Status};
use clap::Args;

use crate::rest::Client;
use crate::terminal::{self, Paint, Style};

/// Shows what capsules use of their host: processor, memory, disk and network.
#[derive(Debug, Args)]
#[command(visible_alias = "metrics")]
pub(super) struct Stats {
    /// The capsules; all that run, if none is named.
    ids: Vec<CapsuleId>,
    /// Show how it came to that: 5m, 10m, 1h, 2h, 6h, 12h or 24h.
    #[arg(long)]
    range: Option<MetricsRange>,
}

impl Stats {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let ids = match self.ids.is_empty() {
            false => self.ids,
            true => {
                let running = client.list().await?.into_iter().filter(|capsule| capsule.status == Status::Running);
                running.map(|capsule| capsule.id).collect()
            }
        };
        let mut all = Vec::new();
        for id in ids {
            let mut metrics = client.metrics(id, self.range.unwrap_or_default()).await?;
            if self.range.is_none() {
                metrics.points = metrics.points.pop().into_iter().collect();
            }
            all.push(metrics);
        }
        if json {
            terminal::print_json(&all)?;
        } else {
            print_table(&all, self.range.is_some())?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_table(all: &[CapsuleMetrics], with_time: bool) -> std::io::Result<()> {
    let time = if with_time { format!("{:<20}  ", "TIME") } else { String::new() };
    let header = format!(
        "{:<28}  {time}{:>6}  {:>10}  {:>10}  {:>10}  {:>10}",
        "ID", "CPU", "MEMORY", "DISK", "SENT", "RECEIVED"
    );
    terminal::print(&Paint::stdout().paint(Style::Bold, &header))?;
    for metrics in all {
        for point in &metrics.points {
            let time = if with_time { format!("{:<20}  ", time_of(point)) } else { String::new() };
            terminal::print(&format!(
                "{}  {time}{:>5.1}%  {:>10}  {:>10}  {:>10}  {:>10}",
                metrics.sandbox_id,
                point.cpu_pct,
                size(point.mem_bytes),
                size(point.disk_bytes),
                size(point.net_sent_bytes),
                size(point.net_received_bytes),
            ))?;
        }
    }
    Ok(())
}

fn time_of(point: &Point) -> String {
    let time = chrono::DateTime::from_timestamp(point.timestamp_unix, 0);
    time.map_or_else(String::new, |time| time.format("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// With a unit in which it is short.
fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match [("GiB", 30), ("MiB", 20), ("KiB", 10)].into_iter().find(|(_, bits)| bytes >= f64::from(1 << bits)) {
        Some((unit, bits)) => format!("{:.1} {unit}", bytes / f64::from(1 << bits)),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (64 << 20, "64.0 MiB"), (3 << 29, "1.5 GiB")]
        {
            assert_eq!(size(bytes), text);
        }
    }
}
