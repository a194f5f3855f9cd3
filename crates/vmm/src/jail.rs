//! The jail of one VMM: what it sees, who it is, and how much it may take. One for all VMMs.
//!
//! A VMM that its guest has taken over is a process of a user that nobody else is, without capabilities and unable to get
//! any, the first of its own process namespace, in a root that has nothing but what this module puts there:
//!
//! ```text
//! /vmm/NAME               the program, and the shared libraries that lie beside it            read only
//! /usr /lib /lib64 /bin   the system's programs and libraries, if the program needs any       read only
//! /dev                    null, zero, random, urandom; kvm, net/tun and userfaultfd, where the host has them
//! /proc                   of its own processes, and nothing else of the kernel's              read only
//! /run/wrenn/vmlinux      the guest kernel                                                    read only
//! /run/wrenn/vm           what the agent put there for it: it may write to files that are its user's, and make none
//! /run/wrenn/vm/scratch   a tmpfs of its own: its socket, and what it writes of its guest's memory
//! ```
//!
//! Everything is thought out before the fork ([`Jail::plan`]); after it there are system calls only ([`Jail::enter`]). It
//! refuses to make what a jail is entered with (network namespace, cgroup, user's files): its owner has that.

mod filter;

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dev, FileType, Mode, OFlags, makedev};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets, LinkNameSpaceType};

use crate::process::{Error, Step};
use crate::{CAPSULE_DIR, KERNEL, SCRATCH_DIR};

/// Where the program is. No name that it chooses for itself can be in its way.
const PROGRAM_DIR: &str = "/vmm";
/// What a dynamically linked program, or a script, does not run without. Where the host has links, the jail has the same.
const SYSTEM: [&str; 4] = ["/usr", "/lib", "/lib64", "/bin"];
/// Devices that are the same everywhere, by name and number, and harm nobody.
const PLAIN_DEVICES: [(&str, u32, u32); 4] = [("null", 1, 3), ("zero", 1, 5), ("random", 1, 8), ("urandom", 1, 9)];
/// Devices that are the VMM's own, where the host has them.
const DEVICES: [&str; 3] = ["kvm", "net/tun", "userfaultfd"];
/// The host's name is nobody's business.
const HOSTNAME: &[u8] = b"capsule";

/// Room in the scratch directory beside the guest's memory, in MiB: the VMM's state.
const SCRATCH_SLACK: u64 = 64;
/// More open files than any VMM has.
const FILES: u64 = 2048;
/// Beyond the largest of disk and memory, in MiB: a file of both, or a log.
const FILE_SLACK: u64 = 64;

const READ_ONLY: MountFlags = MountFlags::RDONLY.union(MountFlags::NOSUID).union(MountFlags::NODEV);
const DATA: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// The sizes of a capsule, from which follows what its VMM may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Size of the root disk in MiB.
    pub disk_mib: u32,
}

impl Size {
    /// Processes and threads of a VMM, in all: a virtual processor's thread, and those for disks and requests.
    pub(crate) fn tasks(&self) -> u64 {
        192 + 2 * u64::from(self.vcpus)
    }
}

/// What a jail is made of.
pub(crate) struct Plan<'a> {
    pub program: &'a Path,
    pub dir: &'a Path,
    pub kernel: &'a Path,
    pub netns: &'a Path,
    pub user: u32,
    pub size: Size,
}

/// A jail that can be entered.
pub(crate) struct Jail {
    netns: File,
    user: u32,
    parts: Vec<Part>,
    limits: [(Resource, u64); 4],
    filter: Vec<libc::sock_filter>,
}

/// One thing to put into the new root; paths are relative to that.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    Directory(CString),
    Link {
        at: CString,
        to: CString,
    },
    /// A file or directory of the host.
    Bind {
        from: CString,
        at: CString,
        is_dir: bool,
        flags: MountFlags,
    },
    Mount {
        kind: &'static CStr,
        at: CString,
        flags: MountFlags,
        options: CString,
    },
    Device {
        at: CString,
        number: Dev,
        user: u32,
    },
    /// Lets nothing be written to a mount any more.
    Seal {
        at: CString,
        flags: MountFlags,
    },
}

impl Plan<'_> {
    /// Where the program is in the jail.
    pub(crate) fn program(&self) -> PathBuf {
        Path::new(PROGRAM_DIR).join(self.program.file_name().unwrap_or_default())
    }

    /// Looks at the host, and thinks out the jail. Makes the directory in which it is put together, and the one in `dir` over
    /// which the scratch directory is mounted.
    pub(crate) fn jail(&self) -> Result<Jail, Error> {
        let scratch = self.dir.join(SCRATCH_DIR);
        for made in [Path::new(CAPSULE_DIR), &scratch] {
            fs::create_dir_all(made).map_err(refused("create", made))?;
        }
        let largest = u64::from(self.size.memory_mib.max(self.size.disk_mib)) + FILE_SLACK;
        Ok(Jail {
            netns: File::open(self.netns).map_err(refused("open", self.netns))?,
            user: self.user,
            parts: self.parts()?,
            limits: [
                // A core would have the guest's memory.
                (Resource::Core, 0),
                (Resource::Nofile, FILES),
                (Resource::Nproc, self.size.tasks()),
                (Resource::Fsize, largest << 20),
            ],
            filter: filter::program(),
        })
    }

    fn parts(&self) -> Result<Vec<Part>, Error> {
        let mut parts = Vec::new();
        if needs_system(self.program).map_err(refused("read", self.program))? {
            for path in SYSTEM.map(Path::new) {
                match fs::symlink_metadata(path) {
                    Ok(found) if found.is_symlink() => {
                        let to = fs::read_link(path).map_err(refused("read", path))?;
                        parts.push(Part::Link { at: inside(path)?, to: text(&to)? });
                    }
                    Ok(found) if found.is_dir() => parts.push(bind(path, path, true, READ_ONLY)?),
                    _ => {}
                }
            }
        }
        parts.push(Part::Directory(inside(Path::new(PROGRAM_DIR))?));
        for library in libraries(self.program) {
            let at = Path::new(PROGRAM_DIR).join(library.file_name().unwrap_or_default());
            parts.push(bind(&library, &at, false, READ_ONLY)?);
        }
        parts.push(bind(self.program, &self.program(), false, READ_ONLY)?);
        self.devices(&mut parts)?;
        let proc = Part::Mount {
            kind: c"proc",
            at: directory(&mut parts, "/proc")?,
            flags: DATA | MountFlags::RDONLY,
            options: c"subset=pid,hidepid=invisible".into(),
        };
        parts.push(proc);
        directory(&mut parts, "/run")?;
        directory(&mut parts, "/run/wrenn")?;
        parts.push(bind(self.kernel, Path::new(KERNEL), false, READ_ONLY | MountFlags::NOEXEC)?);
        // Its disk may be a device.
        parts.push(bind(self.dir, Path::new(CAPSULE_DIR), true, MountFlags::NOSUID | MountFlags::NOEXEC)?);
        let (user, room) = (self.user, u64::from(self.size.memory_mib) + SCRATCH_SLACK);
        let options = format!("mode=0700,uid={user},gid={user},size={room}m,nr_inodes=256");
        parts.push(Part::Mount {
            kind: c"tmpfs",
            at: inside(&Path::new(CAPSULE_DIR).join(SCRATCH_DIR))?,
            flags: DATA,
            options: CString::new(options).expect("numbers have no NUL"),
        });
        parts.push(Part::Seal { at: c".".into(), flags: DATA });
        Ok(parts)
    }

    fn devices(&self, parts: &mut Vec<Part>) -> Result<(), Error> {
        let at = directory(parts, "/dev")?;
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        parts.push(Part::Mount { kind: c"tmpfs", at: at.clone(), flags, options: c"mode=0755,size=64k".into() });
        directory(parts, "/dev/net")?;
        for (name, major, minor) in PLAIN_DEVICES {
            let at = inside(&Path::new("/dev").join(name))?;
            parts.push(Part::Device { at, number: makedev(major, minor), user: self.user });
        }
        for name in DEVICES {
            let path = Path::new("/dev").join(name);
            // What the host does not have the VMM will miss by itself, if it needs it.
            if let Ok(device) = fs::metadata(&path)
                && device.file_type().is_char_device()
            {
                parts.push(Part::Device { at: inside(&path)?, number: device.rdev(), user: self.user });
            }
        }
        parts.push(Part::Seal { at, flags });
        Ok(())
    }
}

impl Jail {
    /// Shuts this process in, for ever. It is alone in new namespaces of mounts, processes, names and messages. Runs after
    /// `fork`: system calls only.
    pub(crate) fn enter(&self, reached: &mut Step) -> io::Result<()> {
        *reached = Step::Root;
        rustix::process::umask(Mode::empty());
        rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        let root = c"/run/wrenn/vm";
        rustix::mount::mount(c"tmpfs", root, c"tmpfs", DATA, Some(c"mode=0755,size=256k"))?;
        rustix::process::chdir(root)?;
        self.parts.iter().try_for_each(Part::make)?;
        // The old root is then mounted over the new one, and taken off it.
        rustix::process::pivot_root(c".", c".")?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
        rustix::process::chdir(c"/")?;
        rustix::system::sethostname(HOSTNAME)?;
        *reached = Step::NetworkNamespace;
        rustix::thread::move_into_link_name_space(self.netns.as_fd(), Some(LinkNameSpaceType::Network))?;
        *reached = Step::Privileges;
        for (resource, most) in self.limits {
            rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
        }
        self.become_nobody()?;
        *reached = Step::Filter;
        filter::install(&self.filter)
    }

    /// Gives up everything that was the agent's to have.
    fn become_nobody(&self) -> io::Result<()> {
        for capability in 0..=libc::c_ulong::from(u8::MAX) {
            // SAFETY: the call takes numbers and touches no memory.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    // There is none of that number, nor of a higher one.
                    Some(libc::EINVAL) => break,
                    _ => return Err(error),
                }
            }
        }
        rustix::thread::set_thread_groups(&[])?;
        let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.user));
        rustix::thread::set_thread_res_gid(group, group, group)?;
        rustix::thread::set_thread_res_uid(user, user, user)?;
        // Where the agent was not root, changing the user has not taken these.
        rustix::thread::clear_ambient_capability_set()?;
        let none = CapabilitySet::empty();
        rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
        rustix::thread::set_no_new_privs(true)?;
        Ok(())
    }
}

impl Part {
    /// Runs after `fork`: system calls only.
    fn make(&self) -> io::Result<()> {
        let readable = Mode::RUSR | Mode::RGRP | Mode::ROTH;
        match self {
            Self::Directory(at) => rustix::fs::mkdirat(CWD, at, Mode::from_raw_mode(0o755))?,
            Self::Link { at, to } => rustix::fs::symlinkat(to, CWD, at)?,
            Self::Bind { from, at, is_dir, flags } => {
                match is_dir {
                    true => rustix::fs::mkdirat(CWD, at, Mode::from_raw_mode(0o755))?,
                    false => {
                        drop(rustix::fs::open(at, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY, readable)?);
                    }
                }
                rustix::mount::mount_bind(from, at)?;
                // A bind mount has the flags of what it is of, until it is told otherwise.
                rustix::mount::mount_remount(at, MountFlags::BIND | *flags, c"")?;
            }
            Self::Mount { kind, at, flags, options } => {
                rustix::mount::mount(*kind, at, *kind, *flags, Some(options.as_c_str()))?;
            }
            Self::Device { at, number, user } => {
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mknodat(CWD, at, FileType::CharacterDevice, mode, *number)?;
                rustix::fs::chown(at, Some(Uid::from_raw(*user)), Some(Gid::from_raw(*user)))?;
            }
            Self::Seal { at, flags } => {
                rustix::mount::mount_remount(at, MountFlags::BIND | MountFlags::RDONLY | *flags, c"")?;
            }
        }
        Ok(())
    }
}

fn directory(parts: &mut Vec<Part>, path: &str) -> Result<CString, Error> {
    let at = inside(Path::new(path))?;
    parts.push(Part::Directory(at.clone()));
    Ok(at)
}

fn bind(from: &Path, at: &Path, is_dir: bool, flags: MountFlags) -> Result<Part, Error> {
    Ok(Part::Bind { from: text(from)?, at: inside(at)?, is_dir, flags })
}

/// A path in the jail, from its root.
fn inside(path: &Path) -> Result<CString, Error> {
    text(path.strip_prefix("/").unwrap_or(path))
}

pub(crate) fn text(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::Nul(path.display().to_string()))
}

fn refused<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::File { doing, path: path.to_owned(), source }
}

/// The shared libraries that lie beside a program, where a program that loads some looks first. Cargo has those of tests one
/// further down.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let beside = program.parent().unwrap_or(Path::new("/"));
    let is_library = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("lib") && name.ends_with(".so") && path.is_file()
    };
    let mut found: Vec<PathBuf> = Vec::new();
    for directory in [beside.to_owned(), beside.join("deps")] {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        for library in entries.filter(is_library) {
            if found.iter().all(|other| other.file_name() != library.file_name()) {
                found.push(library);
            }
        }
    }
    found
}

/// Whether a program is more than itself: all are but statically linked ones.
fn needs_system(program: &Path) -> io::Result<bool> {
    /// The program header that names a loader.
    const INTERPRETER: u64 = 3;
    let mut head = Vec::new();
    File::open(program)?.take(4096).read_to_end(&mut head)?;
    let word = |at: usize, bytes: usize| {
        let bytes = head.get(at..at + bytes)?;
        Some(bytes.iter().rev().fold(0_u64, |word, byte| word << 8 | u64::from(*byte)))
    };
    // Class 64 bits, little endian.
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return Ok(true);
    }
    let (Some(table), Some(size), Some(count)) = (word(32, 8), word(54, 2), word(56, 2)) else { return Ok(true) };
    let kinds = (0..count).map(|index| word((table + index * size) as usize, 4));
    Ok(kinds.map(|kind| kind.unwrap_or(INTERPRETER)).any(|kind| kind == INTERPRETER))
}

#[cfg(test)]
mod tests;
