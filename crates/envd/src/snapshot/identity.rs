//! What makes a fork a machine of its own: machine id, host name, SSH host keys.

use super::{Error, start_quietly};
use crate::init;
use crate::reaper::{Exit, Reaper};
use crate::rewrite::rewrite;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

const MACHINE_ID: &str = "/etc/machine-id";
/// D-Bus has a copy where it is no link.
const DBUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";
const HOSTNAME: &str = "/etc/hostname";
const SSH: &str = "/etc/ssh";
const KEY: &str = "/etc/ssh/ssh_host_ed25519_key";
const PUBLIC_KEY: &str = "/etc/ssh/ssh_host_ed25519_key.pub";
/// Where it is made.
const MADE_KEY: &str = "/etc/ssh/envd_host_key";
const MADE_PUBLIC_KEY: &str = "/etc/ssh/envd_host_key.pub";
const SSH_KEYGEN: &str = "/usr/bin/ssh-keygen";

/// The ssh-keygen that makes the slow keys, and what follows it. In a fork of that time it goes on, as in its twins, and
/// would make the same keys there.
static OTHERS: Mutex<Option<(Pid, JoinHandle<()>)>> = Mutex::new(None);

/// A fork's identity.
pub(super) struct New {
    hostname: Option<String>,
    machine_id: Option<String>,
}

impl New {
    pub(super) fn checked(hostname: Option<String>, machine_id: Option<String>) -> Result<New, Error> {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
        if let Some(name) =
            hostname.as_ref().filter(|name| !(1..=64).contains(&name.len()) || !name.bytes().all(letter))
        {
            return Err(Error::Hostname(name.clone()));
        }
        let digit = |byte: u8| byte.is_ascii_hexdigit();
        if let Some(id) = machine_id.as_ref().filter(|id| id.len() != 32 || !id.bytes().all(digit)) {
            return Err(Error::MachineId(id.clone()));
        }
        Ok(New { hostname, machine_id: machine_id.map(|id| id.to_ascii_lowercase()) })
    }

    /// Writes the machine id, a random one unless one was given, and returns it. Over the old one: a new file takes a cold
    /// guest a third of all that makes it a machine of its own, and those who could see half of an id are frozen.
    pub(super) fn write_machine_id(&self) -> io::Result<String> {
        let id = match &self.machine_id {
            Some(id) => id.clone(),
            None => random_id()?,
        };
        rewrite(Path::new(MACHINE_ID), &format!("{id}\n"))?;
        if fs::symlink_metadata(DBUS_MACHINE_ID).is_ok_and(|metadata| metadata.is_file()) {
            rewrite(Path::new(DBUS_MACHINE_ID), &format!("{id}\n"))?;
        }
        Ok(id)
    }

    /// Takes the new name, if there is one.
    pub(super) fn rename(&self) -> io::Result<Option<String>> {
        if let Some(name) = &self.hostname {
            init::rename(name)?;
            rewrite(Path::new(HOSTNAME), &format!("{name}\n"))?;
        }
        Ok(self.hostname.clone())
    }
}

/// A random UUID (version 4), as machine ids are.
fn random_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    bytes[6] = bytes[6] & 0x0F | 0x40;
    bytes[8] = bytes[8] & 0x3F | 0x80;
    Ok(hex::encode(bytes))
}

/// Reads what a fork reads first. What cannot be read is missed by nobody yet.
pub(super) fn read() {
    let _ = fs::read(MACHINE_ID);
    let _ = fs::symlink_metadata(DBUS_MACHINE_ID);
    let _ = host_keys();
}

/// Gives a machine an id that has none yet, as an image has.
pub fn ensure_machine_id() -> io::Result<()> {
    match fs::read_to_string(MACHINE_ID) {
        Ok(id) if !id.trim().is_empty() => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => New { hostname: None, machine_id: None }.write_machine_id().map(drop),
    }
}

/// The files of all SSH host keys.
fn host_keys() -> io::Result<Vec<PathBuf>> {
    let mut keys = Vec::new();
    let entries = match fs::read_dir(SSH) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b"ssh_host_") {
            keys.push(entry.path());
        }
    }
    Ok(keys)
}

/// Replaces the SSH host keys, which a twin has as well; false where there were none. One is made here and now, and of the
/// kind that takes no time; those of the other kinds take seconds and follow, so that until then nobody gets to see them. An
/// sshd that runs takes up what there is. Blocks.
pub(super) fn renew_ssh_keys(reaper: &Arc<Reaper>) -> io::Result<bool> {
    if let Some((process, ended)) = OTHERS.lock().unwrap_or_else(PoisonError::into_inner).take() {
        reaper.signal_group(process, Signal::KILL);
        // Only then does it write no more.
        let _ = Handle::current().block_on(ended);
    }
    let mut old = host_keys()?;
    if old.is_empty() {
        return Ok(false);
    }
    let can_make = Path::new(SSH_KEYGEN).exists();
    if can_make {
        // What an earlier attempt left, which ssh-keygen would rather keep.
        for left in [MADE_KEY, MADE_PUBLIC_KEY] {
            match fs::remove_file(left) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let (_, made) = keygen(reaper, &[c"-q", c"-t", c"ed25519", c"-N", c"", c"-f", c"/etc/ssh/envd_host_key"])?;
        match made.blocking_recv() {
            Ok(status) if status.exit_status() == Some(0) => {}
            ended => return Err(io::Error::other(format!("ssh-keygen made no key: {ended:?}"))),
        }
        fs::rename(MADE_KEY, KEY)?;
        fs::rename(MADE_PUBLIC_KEY, PUBLIC_KEY)?;
        old.retain(|path| path != Path::new(KEY) && path != Path::new(PUBLIC_KEY));
    }
    for path in old {
        fs::remove_file(path)?;
    }
    if can_make {
        reload_sshd();
        let (process, ended) = keygen(reaper, &[c"-A"])?;
        let ended = tokio::spawn(async {
            match ended.await {
                Ok(status) if status.exit_status() == Some(0) => reload_sshd(),
                ended => tracing::warn!(?ended, "ssh-keygen made but one host key"),
            }
        });
        *OTHERS.lock().unwrap_or_else(PoisonError::into_inner) = Some((process, ended));
    }
    Ok(true)
}

/// Starts ssh-keygen.
fn keygen(reaper: &Reaper, arguments: &[&CStr]) -> io::Result<(Pid, Exit)> {
    let argv: Vec<_> = std::iter::once(&c"ssh-keygen").chain(arguments).map(|&argument| argument.to_owned()).collect();
    start_quietly(reaper, &[c"/usr/bin/ssh-keygen".to_owned()], &argv)
}

/// Has sshd, if it runs, forget the keys it has read: it may keep them in memory.
fn reload_sshd() {
    let pid = fs::read_to_string("/run/sshd.pid").ok().and_then(|pid| Pid::from_raw(pid.trim().parse().ok()?));
    let Some(pid) = pid else { return };
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
    if name.is_ok_and(|name| name.trim_end() == "sshd") {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::HUP);
    }
}
