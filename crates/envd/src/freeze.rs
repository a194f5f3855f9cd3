//! Holding the guest still around a snapshot: users' processes ([`processes`]) and the root file system ([`file_system`]).
//!
//! Whatever was frozen is thawed by [`thaw_all`], which every `/init` calls, so nothing stays frozen by accident.

use crate::cgroup::Cgroups;
use crate::maps::{Mapping, mappings};
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

/// Undoes both.
pub fn thaw_all(cgroups: &Cgroups) -> io::Result<()> {
    thaw_file_system()?;
    cgroups.freeze(false)
}

/// Lets changes pass again, if they did not. A file system that cannot be frozen is not. Blocks.
pub fn thaw_file_system() -> io::Result<()> {
    match file_system(false) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => Ok(()),
        other => other,
    }
}

/// Puts envd's own memory into large pages, so that a restore faults it in with few. Advice, and taken where it can be.
pub fn collapse() -> io::Result<()> {
    const LARGE_PAGE: usize = 2 << 20;
    for Mapping { start, end, .. } in mappings()?.into_iter().filter(|mapping| mapping.is_own) {
        if end - start >= LARGE_PAGE
            && let Err(error) = sys::freeze::collapse(start, end)
        {
            tracing::debug!(%error, "a mapping stays in small pages");
        }
    }
    Ok(())
}
