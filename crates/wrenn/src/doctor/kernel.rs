//! What the kernel offers, and what this process may use of it.

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, netlink, recv, send, socket};
use rustix::thread::CapabilitySet;
use std::fs::{self, File};

use super::Check;

/// The oldest that Firecracker supports as a host.
const OLDEST_KERNEL: (u32, u32) = (5, 10);
/// The first with `cgroup.kill`, without which a capsule is killed process by process.
const GOOD_KERNEL: (u32, u32) = (5, 14);

/// What an agent does with them: mounts and namespaces, networks, files that are a VMM's user's, becoming that user and
/// giving everything up, devices in its jail, and looking into that and ending it.
pub(crate) const NEEDED: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::KILL);

pub(super) fn checks() -> Vec<Check> {
    vec![privileges(), kernel(), cgroup(), scheduler(), nf_tables(), tun(), loop_devices(), userfaultfd(), memory()]
}

fn privileges() -> Check {
    let remedy =
        "run it as root, or as deploy/wrenn-agent.service does; outside of a container, or in a privileged one";
    match rustix::thread::capabilities(None) {
        Ok(has) if has.effective.contains(NEEDED) => Check::ok("privileges", "all capabilities that are needed"),
        Ok(has) => {
            let missing: Vec<_> = NEEDED.difference(has.effective).iter_names().map(|(name, _)| name).collect();
            Check::fail("privileges", format!("without {}", missing.join(", ")), remedy)
        }
        Err(error) => Check::warn("privileges", format!("unknown: {error}"), remedy),
    }
}

fn kernel() -> Check {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let (old, good) = (OLDEST_KERNEL, GOOD_KERNEL);
    match version(&release) {
        Some(found) if found >= good => Check::ok("kernel", release),
        Some(found) if found >= old => {
            Check::warn("kernel", release, format!("{}.{} or newer is better", good.0, good.1))
        }
        Some(_) => Check::fail("kernel", release, format!("install Linux {}.{} or newer", old.0, old.1)),
        None => Check::warn("kernel", release, "its version cannot be read; see whether capsules start"),
    }
}

/// The first two numbers of a release such as `6.1.0-18-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn cgroup() -> Check {
    let mount = match vmm::cgroup::mount_point() {
        Ok(mount) => mount,
        Err(error) => return Check::fail("cgroup", error.to_string(), "mount -t cgroup2 none /sys/fs/cgroup"),
    };
    let controllers = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    let missing: Vec<_> = vmm::cgroup::CONTROLLERS
        .into_iter()
        .filter(|name| !controllers.split_whitespace().any(|has| has == *name))
        .collect();
    let place = mount.display();
    if missing.is_empty() {
        return Check::ok("cgroup", format!("version 2 at {place}, with all controllers that are needed"));
    }
    Check::warn(
        "cgroup",
        format!("version 2 at {place}, without {}: capsules run, but have no limit there", missing.join(", ")),
        "boot with systemd.unified_cgroup_hierarchy=1 (or cgroup_no_v1=all), so that version 1 does not hold them",
    )
}

/// With autogroup, sessions share the processors, and each capsule outside of a `cpu` cgroup is one: with its virtual
/// processors on one of them, its other threads wait a tenth of a second on the next while that is busy.
fn scheduler() -> Check {
    let mount = vmm::cgroup::mount_point().ok();
    let controllers = mount.and_then(|mount| fs::read_to_string(mount.join("cgroup.controllers")).ok());
    let has_groups = controllers.is_some_and(|names| names.split_whitespace().any(|name| name == "cpu"));
    let autogroup = fs::read_to_string("/proc/sys/kernel/sched_autogroup_enabled").unwrap_or_default();
    match autogroup.trim() {
        "1" if !has_groups => Check::warn(
            "scheduler",
            "autogroup is on, and capsules have no cgroup for `cpu`: terminals are slow while ports keep all processors busy",
            "`sysctl -w kernel.sched_autogroup_enabled=0`, or what is said of cgroup",
        ),
        _ => Check::ok("scheduler", "no sessions that share the processors unevenly"),
    }
}

/// Asks nf_tables for its generation, which changes nothing, loads its module, and needs the right to use it.
fn nf_tables() -> Check {
    match ask_nf_tables() {
        Ok(()) => Check::ok("nf_tables", "answers"),
        Err(Errno::PERM) => Check::warn("nf_tables", "may not be asked without root", "run `wrenn doctor` as root"),
        Err(error) => Check::fail("nf_tables", format!("does not answer: {error}"), "modprobe nf_tables"),
    }
}

fn ask_nf_tables() -> Result<(), Errno> {
    // A netlink header (length, type, flags, sequence, port) and an nfgenmsg (family, version, resource), all zero but these.
    const LENGTH: u8 = 20;
    const GET_GENERATION: u8 = 16;
    const NFTABLES: u8 = 10;
    const REQUEST: u8 = 1;
    let mut message = [0u8; LENGTH as usize];
    message[0] = LENGTH;
    (message[4], message[5], message[6]) = (GET_GENERATION, NFTABLES, REQUEST);
    let socket = socket(AddressFamily::NETLINK, SocketType::RAW, Some(netlink::NETFILTER))?;
    send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0u8; 256];
    // The kernel has put its answer there before the call above returned.
    let (length, _) = recv(&socket, &mut answer, RecvFlags::DONTWAIT)?;
    // An answer of type 2 is an error, with its negated number right behind the header.
    match answer.get(..length).unwrap_or_default() {
        [_, _, _, _, 2, 0, _, _, _, _, _, _, _, _, _, _, a, b, c, d, ..] => {
            Err(Errno::from_raw_os_error(i32::from_ne_bytes([*a, *b, *c, *d]).wrapping_neg()))
        }
        [_, _, _, _, _, NFTABLES, ..] => Ok(()),
        _ => Err(Errno::PROTO),
    }
}

fn tun() -> Check {
    match open("/dev/net/tun") {
        Ok(_) => Check::ok("tun", "/dev/net/tun opens"),
        Err(error) => Check::fail("tun", format!("/dev/net/tun: {error}"), "modprobe tun, and run as root"),
    }
}

fn loop_devices() -> Check {
    match open("/dev/loop-control") {
        Ok(_) => Check::ok("loop", "/dev/loop-control opens"),
        Err(error) => Check::warn(
            "loop",
            format!("/dev/loop-control: {error}"),
            "modprobe loop; needed where the data directory cannot share blocks between files (see `reflink`)",
        ),
    }
}

fn userfaultfd() -> Check {
    if open("/dev/userfaultfd").is_ok() {
        return Check::ok("userfaultfd", "/dev/userfaultfd opens");
    }
    // This file is there if and only if the kernel has the system call; a VMM may use it where everybody may.
    match fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd") {
        Ok(text) if text.trim() == "1" => Check::ok("userfaultfd", "by system call, for everybody"),
        Ok(_) => Check::warn(
            "userfaultfd",
            "there is no /dev/userfaultfd that opens, and VMMs may not use the system call",
            "use Linux 6.1 or newer, or `sysctl -w vm.unprivileged_userfaultfd=1`; without it nothing can be resumed",
        ),
        Err(_) => Check::warn(
            "userfaultfd",
            "not in this kernel",
            "use a kernel with CONFIG_USERFAULTFD; without it nothing can be resumed",
        ),
    }
}

fn memory() -> Check {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = available_mib(&text) else {
        return Check::warn("memory", "unknown: /proc/meminfo does not say", "mount /proc");
    };
    let found = format!("{available} MiB available");
    match available {
        ..512 => Check::fail("memory", found, "free some: one capsule takes 512 MiB by default"),
        512..2048 => Check::warn("memory", found, "enough for a few capsules at most"),
        _ => Check::ok("memory", found),
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? / 1024)
}

fn open(path: &str) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_and_memory_are_read() {
        assert_eq!(version("6.1.0-18-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("5.10-rc1"), Some((5, 10)));
        assert_eq!(version("linux"), None);
        assert_eq!(available_mib("MemTotal:  16 kB\nMemAvailable:   2097152 kB\n"), Some(2048));
        assert_eq!(available_mib("MemTotal: 16 kB\n"), None);
    }
}
