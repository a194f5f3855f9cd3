//! A slot's network namespace: made, furnished and named by a thread that ends in it.
//!
//! A thread that has entered another namespace must not run anything else afterwards, least of all a task of an async
//! runtime. So each namespace has a thread of its own, and no thread ever comes back from one.

use netlink_packet_route::link::LinkAttribute;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::thread;

use rustix::io::Errno;
use rustix::ioctl::{self, IntegerSetter, Updater};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::net::netdevice::name_to_index;
use rustix::thread::UnshareFlags;

use crate::firewall;
use crate::netlink::{NETFILTER, ROUTE, Requests, Socket};
use crate::slot::{
    GUEST_ADDRESS, GUEST_MAC, NETNS_DIR, Slot, TAP, TAP_ADDRESS, TAP_MAC, TAP_PREFIX, UPLINK_IN_NETNS, VETH_PREFIX,
};
use crate::step::{Failed, Step, Steps};

const TUNSETIFF: ioctl::Opcode = 0x4004_54CA;
const TUNSETPERSIST: ioctl::Opcode = 0x4004_54CB;
/// Packets that may wait for the VMM.
const TAP_QUEUE: u32 = 5000;

/// Makes `/run/netns` as `ip netns` would: a shared mount, so that namespaces named later are seen, and unmounted,
/// everywhere. Were it not one, the first `ip netns add` would mount it over itself and hide what we put there.
pub(crate) fn prepare() -> io::Result<()> {
    fs::create_dir_all(NETNS_DIR)?;
    let share = || rustix::mount::mount_change(NETNS_DIR, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    match share() {
        Err(Errno::INVAL) => {
            rustix::mount::mount_bind_recursive(NETNS_DIR, NETNS_DIR)?;
            Ok(share()?)
        }
        result => Ok(result?),
    }
}

/// Makes the namespace of `slot` with everything in it. The host's end of its veth pair is left down.
pub(crate) fn create(slot: Slot, steps: &Steps) -> Result<(), Failed> {
    thread::scope(|scope| {
        let built = thread::Builder::new().name(slot.netns()).spawn_scoped(scope, || build(slot, steps));
        built.map_err(Step::Namespace.failed())?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs on a thread of its own, which is in another namespace afterwards.
fn build(slot: Slot, steps: &Steps) -> Result<(), Failed> {
    let host = File::open("/proc/thread-self/ns/net").map_err(Step::Namespace.failed())?;
    enter_new(slot).map_err(Step::Namespace.failed())?;
    steps.done(Step::Namespace)?;

    configure().map_err(Step::Sysctl.failed())?;
    steps.done(Step::Sysctl)?;

    let socket = Socket::open(ROUTE).map_err(Step::Veth.failed())?;
    let mut requests = Requests::default();
    requests.add_veth(UPLINK_IN_NETNS, &slot.veth(), host.as_fd());
    socket.transact(&requests).map_err(Step::Veth.failed())?;
    steps.done(Step::Veth)?;

    add_tap().map_err(Step::Tap.failed())?;
    steps.done(Step::Tap)?;

    address(slot, &socket).map_err(Step::Addresses.failed())?;
    steps.done(Step::Addresses)?;

    let socket = Socket::open(NETFILTER).map_err(Step::Translation.failed())?;
    firewall::translate_in_netns(slot, &socket).map_err(Step::Translation.failed())?;
    steps.done(Step::Translation)
}

/// Moves this thread into a new network namespace and gives that its name.
fn enter_new(slot: Slot) -> io::Result<()> {
    let path = slot.netns_path();
    File::create_new(&path)?;
    // SAFETY: only CLONE_FILES could take descriptors away from other threads, and it is not asked for.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(rustix::mount::mount_bind("/proc/thread-self/ns/net", &path)?)
}

/// Before there are links, so that they begin with these settings.
fn configure() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    disable_ipv6("all")
}

/// Takes IPv6 from one link of this thread's namespace, or from all that are and will be.
pub(crate) fn disable_ipv6(link: &str) -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6"), "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Makes the tap, which stays when our descriptor is closed; the VMM attaches to it by name.
fn add_tap() -> io::Result<()> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: TUNSETIFF reads one `ifreq` and writes it back, and `request` is one.
    unsafe { ioctl::ioctl(&tun, Updater::<TUNSETIFF, libc::ifreq>::new(&mut request)) }?;
    // SAFETY: TUNSETPERSIST takes a plain integer, zero or not.
    unsafe { ioctl::ioctl(&tun, IntegerSetter::<TUNSETPERSIST>::new_usize(1)) }?;
    Ok(())
}

fn address(slot: Slot, socket: &Socket) -> io::Result<()> {
    let uplink = name_to_index(socket, UPLINK_IN_NETNS)?;
    let tap = name_to_index(socket, TAP)?;
    let mut requests = Requests::default();
    requests.set_up(name_to_index(socket, "lo")?, Vec::new());
    requests.add_address(uplink, slot.veth_netns_ip(), VETH_PREFIX);
    requests.set_up(uplink, Vec::new());
    requests.add_address(tap, TAP_ADDRESS, TAP_PREFIX);
    requests.set_up(tap, vec![LinkAttribute::TxQueueLen(TAP_QUEUE), LinkAttribute::Address(TAP_MAC.to_vec())]);
    requests.add_neighbour(tap, GUEST_ADDRESS, GUEST_MAC);
    requests.add_route(None, slot.veth_host_ip(), uplink);
    Ok(socket.transact(&requests)?)
}

/// Removes the name. The namespace itself goes when no process is in it any more.
pub(crate) fn unname(slot: Slot) -> io::Result<()> {
    let path = slot.netns_path();
    match rustix::mount::unmount(&path, UnmountFlags::DETACH) {
        // There is no such file, or nothing is mounted on it.
        Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
