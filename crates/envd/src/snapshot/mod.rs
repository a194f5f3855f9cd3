//! What happens in the guest around a snapshot: [`prepare`] before, [`restore`] after. The contract is
//! [`guest_api::Init`]'s.
//!
//! A restored guest is a copy of its own past, or of another's: its clock is late, its random generator is known to its
//! twins, its connections lead to nobody. It refuses to call any of that done when it is not: the first step that fails is
//! the answer, and a repeated call does all of them again.

mod connections;
mod identity;
mod warm;

pub use identity::ensure_machine_id;
pub use warm::first_command;

use crate::reaper::{Exit, Reaper};
use crate::sys::spawn::Spawn;
use crate::{clock, sys};
use base64::Engine;
use guest_api::{Restore, RestoreKind, Restored};
use rustix::fd::AsFd;
use rustix::process::Pid;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

const ENTROPY_BYTES: std::ops::RangeInclusive<usize> = 32..=512;

/// Why a restored guest is not ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("restore.entropy must be {} to {} bytes in base64", ENTROPY_BYTES.start(), ENTROPY_BYTES.end())]
    Entropy,
    #[error("restore.hostname '{0}' must be 1 to 64 letters, digits, '-' and '.'")]
    Hostname(String),
    #[error("restore.machineId '{0}' must be 32 hexadecimal digits")]
    MachineId(String),
    #[error("letting the file system be written")]
    Thaw(#[source] io::Error),
    #[error("reseeding the random generator")]
    Reseed(#[source] io::Error),
    #[error("stepping the clock")]
    Clock(#[source] io::Error),
    #[error("ending the connections of before")]
    Connections(#[source] io::Error),
    #[error("renewing the machine's identity")]
    Identity(#[source] io::Error),
}

impl Error {
    /// The caller asked for what cannot be, rather than the guest being unable to do it.
    pub fn is_callers(&self) -> bool {
        match self {
            Error::Entropy | Error::Hostname(_) | Error::MachineId(_) => true,
            Error::Thaw(_) | Error::Reseed(_) | Error::Clock(_) | Error::Connections(_) | Error::Identity(_) => false,
        }
    }
}

/// A checked [`Restore`].
pub struct Plan {
    entropy: Vec<u8>,
    fork: Option<identity::New>,
}

/// Writes every file system to its disk, and has in memory what [`restore`](Plan::carry_out) needs: it would come from the
/// disk in each guest that begins there, before anything else. Blocks.
pub fn prepare() {
    warm::program();
    identity::read();
    rustix::fs::sync();
}

impl Plan {
    pub fn new(restore: Restore) -> Result<Plan, Error> {
        let entropy = base64::engine::general_purpose::STANDARD.decode(&restore.entropy).unwrap_or_default();
        if !ENTROPY_BYTES.contains(&entropy.len()) {
            return Err(Error::Entropy);
        }
        let fork = match restore.kind {
            RestoreKind::Resume => None,
            RestoreKind::Fork => Some(identity::New::checked(restore.hostname, restore.machine_id)?),
        };
        Ok(Plan { entropy, fork })
    }

    /// Makes the guest a machine of its own. `host_time` is the host's clock in seconds since the epoch; the connection from
    /// `caller` stays. Blocks. Only for an envd that is init: everything here is the machine's.
    pub fn carry_out(&self, host_time: f64, caller: SocketAddr, reaper: &Arc<Reaper>) -> Result<Restored, Error> {
        // First, for what follows draws from it.
        sys::random::reseed(&self.entropy).map_err(Error::Reseed)?;
        let clock_offset = clock::step(host_time).map_err(Error::Clock)?;
        let connections_closed = connections::close_all_but(caller).map_err(Error::Connections)?;
        let mut restored = Restored {
            clock_offset,
            rng_reseeded: true,
            connections_closed,
            machine_id: None,
            hostname: None,
            ssh_host_keys_removed: false,
        };
        if let Some(fork) = &self.fork {
            restored.machine_id = Some(fork.write_machine_id().map_err(Error::Identity)?);
            restored.hostname = fork.rename().map_err(Error::Identity)?;
            restored.ssh_host_keys_removed = identity::renew_ssh_keys(reaper).map_err(Error::Identity)?;
        }
        Ok(restored)
    }
}

/// Starts a program of the machine's own, as root, that nobody hears.
fn start_quietly(reaper: &Reaper, candidates: &[CString], argv: &[CString]) -> io::Result<(Pid, Exit)> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let spawned = reaper.spawn(&Spawn {
        candidates,
        argv,
        env: &[c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(), c"HOME=/root".to_owned()],
        cwd: c"/",
        stdin: null.as_fd(),
        stdout: null.as_fd(),
        stderr: null.as_fd(),
        terminal: false,
        identity: None,
        cgroup: None,
        oom_score_adj: c"100",
        open_files: 1024,
    });
    spawned.map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_before_anything_is_done() {
        let restore = Restore {
            kind: RestoreKind::Fork,
            entropy: base64::engine::general_purpose::STANDARD.encode([7; 32]),
            hostname: Some("a-1.b".to_owned()),
            machine_id: Some("0123456789abcdef0123456789ABCDEF".to_owned()),
            metadata: None,
        };
        assert!(Plan::new(restore.clone()).is_ok());
        let short = base64::engine::general_purpose::STANDARD.encode([7; 31]);
        for entropy in ["", "nonsense!", &short, &"AAAA".repeat(200)] {
            let bad = Restore { entropy: entropy.to_owned(), ..restore.clone() };
            assert!(matches!(Plan::new(bad), Err(Error::Entropy)), "{entropy}");
        }
        for name in ["", "a b", "a/b", "a\n", &"x".repeat(65)] {
            let bad = Restore { hostname: Some(name.to_owned()), ..restore.clone() };
            assert!(matches!(Plan::new(bad), Err(Error::Hostname(_))), "{name}");
        }
        for id in ["", "0123", &"g".repeat(32), &"0".repeat(33)] {
            let bad = Restore { machine_id: Some(id.to_owned()), ..restore.clone() };
            assert!(matches!(Plan::new(bad), Err(Error::MachineId(_))), "{id}");
        }
    }
}
