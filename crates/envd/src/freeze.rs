//! Holding the guest still around a snapshot: users' processes ([`processes`]) and the root file system ([`file_system`]).
//!
//! Whatever was frozen is thawed by [`thaw_all`], which every `/init` calls, so nothing stays frozen by accident.

use crate::cgroup::Cgroups;
use crate::sys;
use std::fs::File;
use std::io;
use std::time::Duration;
use tokio::time::Instant;

/// Between two looks at whether everybody holds still, which takes well under that.
const LOOK: Duration = Duration::from_millis(1);

/// Freezes users' processes; false if one did not hold still in time, and then all go on.
pub async fn processes(cgroups: &Cgroups, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    cgroups.freeze(true)?;
    while !cgroups.is_frozen()? {
        if Instant::now() >= deadline {
            cgroups.freeze(false)?;
            return Ok(false);
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(true)
}

/// Writes the root file system and blocks changes to it, or lets them pass again. Blocks.
pub fn file_system(frozen: bool) -> io::Result<()> {
    let root = File::open("/")?;
    if frozen { sys::freeze::freeze(root) } else { sys::freeze::thaw(root) }
}

/// Undoes both. A file system that cannot be frozen is not.
pub fn thaw_all(cgroups: &Cgroups) -> io::Result<()> {
    match file_system(false) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {}
        other => other?,
    }
    cgroups.freeze(false)
}

/// Puts envd's own memory into large pages, so that a restore faults it in with few. Advice, and taken where it can be.
pub fn collapse() -> io::Result<()> {
    const LARGE_PAGE: usize = 2 << 20;
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let Some((start, end)) = private_memory(line) else { continue };
        if end - start >= LARGE_PAGE
            && let Err(error) = sys::freeze::collapse(start, end)
        {
            tracing::debug!(%error, "a mapping stays in small pages");
        }
    }
    Ok(())
}

/// The bounds of a writable mapping of no file.
fn private_memory(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let writable = fields.next()?.starts_with("rw-p");
    let name = fields.nth(3);
    let ours = writable && name.is_none_or(|name| name == "[heap]");
    let number = |text| usize::from_str_radix(text, 16).ok();
    ours.then_some((number(start)?, number(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_memory_of_our_own_is_collapsed() {
        assert_eq!(private_memory("1000-2000 rw-p 00000000 00:00 0 "), Some((0x1000, 0x2000)));
        assert_eq!(private_memory("1000-2000 rw-p 00000000 00:00 0    [heap]"), Some((0x1000, 0x2000)));
        for other in [
            "1000-2000 r--p 00000000 00:00 0",
            "1000-2000 rw-p 00000000 00:00 0 [stack]",
            "1-2 rw-p 0 08:01 9 /x",
            "",
            "x",
        ] {
            assert_eq!(private_memory(other), None, "{other}");
        }
        collapse().unwrap();
    }
}
