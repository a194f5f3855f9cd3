//! One look at one capsule: its control group, its processes, its files.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use network::Traffic;

use crate::capsule::files::VM;

/// What was seen. What counts up does so since the capsule's processes were started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// Milliseconds since 1970.
    pub unix_ms: i64,
    /// Microseconds that processors worked for it.
    pub cpu_usec: u64,
    /// Bytes of memory of its processes, shared ones in parts.
    pub memory: u64,
    /// Bytes that its files take and share with no others.
    pub disk: u64,
    /// Bytes that the guest sent.
    pub sent: u64,
    /// Bytes that were sent to it.
    pub received: u64,
}

/// Milliseconds since 1970.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// Looks at the capsule whose processes are in `cgroup` and whose files are in `dir`; `None` when it has no group.
pub fn read(cgroup: &Path, dir: &Path, traffic: Traffic) -> Option<Reading> {
    let unix_ms = now_ms();
    // Every group of cgroup 2 has this, whether or not it has the controller.
    let cpu_usec = usage(&fs::read_to_string(cgroup.join("cpu.stat")).ok()?)?;
    let (sent, received) = (traffic.sent.bytes, traffic.received.bytes);
    Some(Reading { unix_ms, cpu_usec, memory: memory(cgroup), disk: disk(dir), sent, received })
}

/// The memory of all processes in a group and in the groups inside it.
fn memory(cgroup: &Path) -> u64 {
    let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // One that has ended has none.
    let of = |pid: &str| pss(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?);
    let own: u64 = pids.lines().filter_map(of).sum();
    let groups = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let groups = groups.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    own + groups.map(|group| memory(&group.path())).sum::<u64>()
}

/// What the files of a directory and of those inside it take for themselves. What the VMM is given is links to them.
fn disk(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() && entry.file_name() != VM => disk(&entry.path()),
        Ok(kind) if kind.is_file() => disk::own_bytes(&entry.path()).unwrap_or_default(),
        // Sockets, and what is gone.
        _ => 0,
    });
    sizes.sum()
}

/// `usage_usec` of a `cpu.stat`.
fn usage(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.trim().parse().ok())
}

/// `Pss` of a `smaps_rollup`, in bytes.
fn pss(text: &str) -> Option<u64> {
    let kib = text.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.trim().parse().ok());
    kib.map(|kib: u64| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_texts_are_understood() {
        assert_eq!(usage("usage_usec 1234\nuser_usec 1000\nsystem_usec 234\n"), Some(1234));
        assert_eq!(usage("user_usec 1000\n"), None);
        let rollup =
            "55d0-7ffe ---p 00000000 00:00 0    [rollup]\nRss:  3492 kB\nPss:             1059 kB\nPss_Dirty: 120 kB\n";
        assert_eq!(pss(rollup), Some(1059 * 1024));
        assert_eq!(pss("Rss: 1 kB"), None);
    }

    #[test]
    fn this_process_has_memory_and_what_is_gone_has_nothing() {
        let own = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        assert!(pss(&own).unwrap() > 0);
        assert_eq!(read(Path::new("/no/group"), Path::new("/no/dir"), Traffic::default()), None);
    }
}
