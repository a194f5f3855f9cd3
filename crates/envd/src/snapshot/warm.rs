//! Having in memory, before a snapshot is taken, what every guest that begins there would read from its disk first.

use super::start_quietly;
use crate::maps::{Mapping, mappings};
use crate::reaper::Reaper;
use crate::sys;
use rustix::process::Signal;
use std::io;
use std::path::Path;
use std::time::Duration;

/// How long a login shell may take to do nothing.
const SHELL: Duration = Duration::from_secs(5);

/// Maps all of envd's own program. Advice, and taken where it can be.
pub(super) fn program() {
    let mapped = || -> io::Result<()> {
        let program = std::fs::read_link("/proc/self/exe")?;
        for Mapping { start, end, .. } in mappings()?.into_iter().filter(|mapping| Path::new(&mapping.name) == program)
        {
            sys::memory::populate(start, end)?;
        }
        Ok(())
    };
    if let Err(error) = mapped() {
        tracing::debug!(%error, "envd is not mapped as a whole");
    }
}

/// Runs a command in the way in which users' first ones are, so that shell, linker and libraries are in memory. A guest
/// without a shell has no such command.
pub async fn first_command(reaper: &Reaper) {
    let argv = [c"sh", c"-l", c"-c", c"/bin/true"].map(|word| word.to_owned());
    let started = start_quietly(reaper, &[c"/bin/bash".to_owned(), c"/bin/sh".to_owned()], &argv);
    let (shell, exit) = match started {
        Ok(started) => started,
        Err(error) => return tracing::debug!(%error, "no shell was started"),
    };
    if tokio::time::timeout(SHELL, exit).await.is_err() {
        reaper.signal_group(shell, Signal::KILL);
    }
}
