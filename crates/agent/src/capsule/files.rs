//! What lies in a capsule's directory, and in a point's: one place for the names.
//!
//! ```text
//! record.json  rootfs.ext4  vmm.log  pager.log                                of the capsule
//! vm/rootfs.ext4  vm/state  vm/pager.sock  vm/scratch/                        what its VMM is given, while there is one
//! working-set                                                                 what its last resume needed first
//! memory-N  state-N                                                           its snapshot N: header, VMM's state
//! disk-N                                                                      snapshot N's disk, while a resume from
//!                                                                             it has not succeeded
//! remote/memory  remote/files  remote/ID                                      header, missing files and generations of a
//!                                                                             memory that has not all come yet
//! point.json  memory  state  rootfs.ext4                                      of a point
//! working-set                                                                 what the last start from it needed first
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use sha2::{Digest, Sha256};
use snapshot::{Store, TEMPORARY};
use tracing::warn;

/// The root disk of a capsule or point.
pub const DISK: &str = "rootfs.ext4";
/// What the VMM prints.
pub const VMM_LOG: &str = "vmm.log";
/// What a pager prints.
pub const PAGER_LOG: &str = "pager.log";
/// The directory of what a capsule's VMM is given. Only the agent makes anything in it, and a VMM writes only to its disk.
pub const VM: &str = "vm";
/// The socket of a capsule's pager, in that.
pub const PAGER_SOCKET: &str = "pager.sock";
/// What of the memory was needed first the last time, so that the pager fetches it ahead. Written by pagers alone, and read only
/// where its checksum holds: one that is damaged, or not there, makes a resume slower and not wrong.
pub const WORKING_SET: &str = "working-set";
/// A point's header.
pub const MEMORY: &str = "memory";
/// A point's VMM state.
pub const STATE: &str = "state";

/// The directory of a memory that has not all come yet.
pub const REMOTE: &str = "remote";
/// What in it has to come, as a manifest.
pub const REMOTE_FILES: &str = "files";

/// The name of a snapshot's header.
pub fn memory(number: u32) -> String {
    format!("{MEMORY}-{number}")
}

/// The name of a snapshot's VMM state.
pub fn state(number: u32) -> String {
    format!("{STATE}-{number}")
}

/// The name of a snapshot's own disk.
pub fn disk(number: u32) -> String {
    format!("disk-{number}")
}

/// Makes the directory of what the VMM of the capsule in `dir` is given, with nothing in it.
pub fn make_vm(dir: &Path) -> io::Result<()> {
    remove_vm(dir)?;
    let vm = dir.join(VM);
    fs::create_dir(&vm)?;
    // Who may come here is decided by the directories above it, and in a jail there are none.
    fs::set_permissions(&vm, Permissions::from_mode(0o755))
}

/// Removes that directory. No VMM may be left.
pub fn remove_vm(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir.join(VM)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Gives the VMM of the capsule in `dir` its disk, which from now on is the file of `user`.
pub fn give_disk(dir: &Path, user: u32) -> io::Result<()> {
    let disk = dir.join(DISK);
    fs::set_permissions(&disk, Permissions::from_mode(0o600))?;
    chown(&disk, Some(user), Some(user))?;
    fs::hard_link(&disk, dir.join(VM).join(DISK))
}

/// Gives the VMM of the capsule in `dir` the block device over its disk, as a node that is `user`'s.
pub fn give_device(dir: &Path, user: u32, device: &Path) -> io::Result<()> {
    let node = dir.join(VM).join(DISK);
    let number = fs::metadata(device)?.rdev();
    rustix::fs::mknodat(CWD, &node, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number)?;
    chown(&node, Some(user), Some(user))
}

/// Lets the VMM of the capsule in `dir` read the state of snapshot `number`.
pub fn give_state(dir: &Path, number: u32) -> io::Result<()> {
    let state = dir.join(state(number));
    fs::set_permissions(&state, Permissions::from_mode(0o644))?;
    fs::hard_link(&state, dir.join(VM).join(STATE))
}

/// Every header in `dir`, a capsule's directory or a point's. Also one that is not there because its first write was not
/// finished: who tells the store of it has what that left removed.
pub fn headers(dir: &Path) -> BTreeSet<PathBuf> {
    let is_header = |name: &str| {
        name == MEMORY
            || name.strip_prefix("memory-").is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let header_of = |file: &str| {
        let name = file.split_once(TEMPORARY).map_or(file, |(name, _)| name);
        is_header(name).then(|| dir.join(name))
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| header_of(entry.file_name().to_str()?)).collect()
}

/// SHA-256 of a file, in hex.
pub fn digest(path: &Path) -> io::Result<String> {
    Ok(hex::encode(Sha256::digest(fs::read(path)?)))
}

/// Makes a file durable that somebody else wrote.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes everything in `dir`, and `dir` itself, durable.
pub fn sync_all_in(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            sync(&entry.path())?;
        }
    }
    sync(dir)
}

/// Removes every snapshot of the capsule in `dir` but number `keep`. What cannot be removed stays for the next time.
pub fn tidy(memory: &Store, dir: &Path, keep: Option<u32>) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let Some((kind, number)) =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('-'))
        else {
            continue;
        };
        let Ok(number) = number.parse::<u32>() else { continue };
        if Some(number) == keep && kind != "disk" {
            continue;
        }
        let removed = match kind {
            "memory" => memory.remove(&path).map_err(|error| crate::chain(&error)),
            "state" | "disk" => fs::remove_file(&path).map_err(|error| error.to_string()),
            _ => continue,
        };
        if let Err(error) = removed {
            warn!(file = %path.display(), error, "an old snapshot stays for now");
        }
    }
}

/// Removes a directory with whatever headers it has.
pub fn remove_all(memory: &Store, dir: &Path) -> io::Result<()> {
    for header in headers(dir) {
        memory.remove(&header).map_err(io::Error::other)?;
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
