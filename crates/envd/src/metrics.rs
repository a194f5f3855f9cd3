//! `GET /metrics`: what the guest uses, read when asked; nothing runs in between.

use serde::Serialize;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

const MIB: u64 = 1024 * 1024;

/// Remembers the last reading, against which CPU use is measured.
#[derive(Default)]
pub struct Metrics {
    last: Mutex<Ticks>,
}

/// The answer. Bytes unless the name says MiB.
#[derive(Clone, Debug, Serialize)]
pub struct Values {
    /// Seconds since the epoch.
    pub ts: u64,
    pub cpu_count: usize,
    /// Of all CPUs together, 0 to 100, since the call before (the first time: since boot).
    pub cpu_used_pct: f64,
    pub mem_total: u64,
    pub mem_used: u64,
    pub mem_cache: u64,
    pub mem_total_mib: u64,
    pub mem_used_mib: u64,
    pub disk_total: u64,
    pub disk_used: u64,
}

/// CPU time since boot, in the kernel's units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    total: u64,
}

impl Metrics {
    pub fn read(&self) -> io::Result<Values> {
        let ticks = ticks(&std::fs::read_to_string("/proc/stat")?);
        let last = std::mem::replace(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner), ticks);
        let memory = std::fs::read_to_string("/proc/meminfo")?;
        let kib = |name: &str| field(&memory, name) * 1024;
        let (mem_total, mem_available) = (kib("MemTotal:"), kib("MemAvailable:"));
        let mem_used = mem_total.saturating_sub(mem_available);
        let disk = rustix::fs::statvfs("/")?;
        Ok(Values {
            ts: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            cpu_count: std::thread::available_parallelism()?.get(),
            cpu_used_pct: used(last, ticks),
            mem_total,
            mem_used,
            mem_cache: kib("Cached:") + kib("Buffers:"),
            mem_total_mib: mem_total / MIB,
            mem_used_mib: mem_used / MIB,
            disk_total: disk.f_blocks * disk.f_frsize,
            disk_used: disk.f_blocks.saturating_sub(disk.f_bfree) * disk.f_frsize,
        })
    }
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The first line of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal.
fn ticks(stat: &str) -> Ticks {
    let line = stat.lines().next().unwrap_or_default();
    let times: Vec<u64> = line.split_whitespace().skip(1).take(8).filter_map(|time| time.parse().ok()).collect();
    let total = times.iter().sum();
    let idle = times.iter().skip(3).take(2).sum::<u64>();
    Ticks { busy: total - idle, total }
}

fn used(before: Ticks, now: Ticks) -> f64 {
    let total = now.total.saturating_sub(before.total);
    if total == 0 {
        return 0.0;
    }
    let percent = 100.0 * now.busy.saturating_sub(before.busy) as f64 / total as f64;
    (percent * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_use_is_the_share_between_two_readings() {
        let first = ticks("cpu  10 0 10 70 10 0 0 0 5 5\ncpu0 1 1 1 1\n");
        assert_eq!(first, Ticks { busy: 20, total: 100 });
        let second = Ticks { busy: 120, total: 300 };
        assert_eq!(used(first, second), 50.0);
        assert_eq!(used(second, second), 0.0);
        assert_eq!(used(Ticks::default(), first), 20.0);
    }

    #[test]
    fn this_machine_has_memory_and_disk() {
        let values = Metrics::default().read().unwrap();
        assert!(values.mem_total > values.mem_used && values.disk_total > values.disk_used && values.cpu_count > 0);
    }
}
