//! A slot's network namespace: made, furnished and named by a thread that ends in it.
//!
//! A thread that has entered another namespace must not run anything else afterwards, least of all a task of an async
//! runtime. So each namespace has a thread of its own, and no thread ever comes back from one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use netlink_packet_route::link::LinkAttribute;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::ioctl::{self, IntegerSetter, Setter, Updater};
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::netlink::{NETFILTER, ROUTE, Requests, Socket};
use crate::policy::{HTTP, METADATA};
use crate::route::{self, VethEnd};
use crate::slot::{
    GUEST_ADDRESS, GUEST_MAC, NETNS_DIR, Slot, TAP, TAP_ADDRESS, TAP_INDEX, TAP_MAC, TAP_PREFIX, UPLINK_IN_NETNS,
    UPLINK_INDEX, VETH_PREFIX,
};
use crate::step::{Failed, Step, Steps};
use crate::{conntrack, firewall};

const TUNSETIFF: ioctl::Opcode = 0x4004_54CA;
const TUNSETPERSIST: ioctl::Opcode = 0x4004_54CB;
const TUNSETOWNER: ioctl::Opcode = 0x4004_54CC;
const TUNSETIFINDEX: ioctl::Opcode = 0x4004_54DA;
/// Every namespace's first link.
const LOOPBACK_INDEX: u32 = 1;
/// Prefix length of an address that has no network.
const ALONE: u8 = 32;
/// Packets that may wait for the VMM.
const TAP_QUEUE: u32 = 5000;

/// Makes `/run/netns` as `ip netns` would: a shared mount, so that namespaces named later are seen, and unmounted,
/// everywhere. Were it not one, the first `ip netns add` would mount it over itself and hide what we put there.
pub(crate) fn prepare() -> io::Result<()> {
    fs::create_dir_all(NETNS_DIR)?;
    let share = || mount::mount_change(NETNS_DIR, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    match share() {
        Err(Errno::INVAL) => {
            mount::mount_bind_recursive(NETNS_DIR, NETNS_DIR)?;
            Ok(share()?)
        }
        result => Ok(result?),
    }
}

/// What every namespace of an agent is made with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fittings {
    /// What fits through the uplinks, and so through every link of a slot.
    pub(crate) mtu: u32,
    /// See [`crate::Config::users`].
    pub(crate) users: u32,
}

impl Fittings {
    /// Who attaches to the tap of a slot.
    pub(crate) fn user(&self, slot: Slot) -> u32 {
        self.users + u32::from(slot.get())
    }
}

/// Makes the namespace of `slot` with everything in it. The host's end of its veth pair is left down.
pub(crate) fn create(slot: Slot, fittings: Fittings, steps: &Steps) -> Result<(), Failed> {
    on_own_thread(slot, || build(slot, fittings, steps))
}

/// Makes the namespace of `slot`, which somebody had, as good as new. Refuses one that has more in it than `new`.
pub(crate) fn clean(slot: Slot, fittings: Fittings, new: &Census, steps: &Steps) -> Result<(), Failed> {
    on_own_thread(slot, || rebuild(slot, fittings, new, steps))
}

/// Has the kernel see now whether anybody is attached to the tap: it is told the state of a link only after it was looked at.
pub(crate) fn look_at_tap(slot: Slot) -> Result<(), Failed> {
    on_own_thread(slot, || {
        enter(slot).map_err(Step::Namespace.failed())?;
        let looked = Socket::open(ROUTE).and_then(|socket| route::mtu(&socket, TAP));
        looked.map(drop).map_err(Step::Tap.failed())
    })
}

/// What is in a new namespace. How much the kernel puts there depends on how it was built, so one is made and looked at; it
/// is of no use to anybody, and gone when this returns.
pub(crate) fn census_of_new(fittings: Fittings) -> Result<Census, Failed> {
    let slot = Slot::MIN;
    on_own_thread(slot, || {
        let unshare = || {
            // SAFETY: only CLONE_FILES could take descriptors away from other threads, and it is not asked for.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        };
        let host = unshare().map_err(Step::Census.failed())?;
        let _namespace = unshare().map_err(Step::Census.failed())?;
        furnish(slot, fittings, host.as_fd(), &Steps::default())?;
        census(&Socket::open(ROUTE).map_err(Step::Census.failed())?).map_err(Step::Census.failed())
    })
}

/// Runs `work` on a thread that may end in another namespace.
fn on_own_thread<T: Send>(slot: Slot, work: impl FnOnce() -> Result<T, Failed> + Send) -> Result<T, Failed> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(slot.netns()).spawn_scoped(scope, work);
        thread.map_err(Step::Namespace.failed())?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn build(slot: Slot, fittings: Fittings, steps: &Steps) -> Result<(), Failed> {
    let host = File::open("/proc/thread-self/ns/net").map_err(Step::Namespace.failed())?;
    enter_new(slot).map_err(Step::Namespace.failed())?;
    steps.done(Step::Namespace)?;

    furnish(slot, fittings, host.as_fd(), steps)
}

/// Fills this thread's new namespace; the other end of its veth pair goes to `host`.
fn furnish(slot: Slot, fittings: Fittings, host: BorrowedFd<'_>, steps: &Steps) -> Result<(), Failed> {
    let user = fittings.user(slot);
    configure().map_err(Step::Sysctl.failed())?;
    steps.done(Step::Sysctl)?;

    add_tap(user).map_err(Step::Tap.failed())?;
    steps.done(Step::Tap)?;

    let socket = Socket::open(ROUTE).map_err(Step::Links.failed())?;
    let mut requests = Requests::default();
    let here = VethEnd { name: UPLINK_IN_NETNS, mac: slot.veth_netns_mac() };
    let there = VethEnd { name: &slot.veth(), mac: slot.veth_host_mac() };
    requests.add_veth(&here, UPLINK_INDEX, &there, host, fittings.mtu);
    requests.add_address(UPLINK_INDEX, slot.veth_netns_ip(), VETH_PREFIX);
    // Known beforehand, so that the kernel's table of what it has asked for does not fill with slots, and nobody is asked.
    requests.add_neighbour(UPLINK_INDEX, slot.veth_host_ip(), slot.veth_host_mac());
    requests.add_route(None, slot.veth_host_ip(), UPLINK_INDEX);
    requests.set_up(LOOPBACK_INDEX, Vec::new());
    add_tap_s_addresses(&mut requests, fittings.mtu);
    socket.transact(requests).map_err(Step::Links.failed())?;
    steps.done(Step::Links)?;

    let socket = Socket::open(NETFILTER).map_err(Step::Rules.failed())?;
    firewall::fill_netns(slot, user, &socket).map_err(Step::Rules.failed())?;
    steps.done(Step::Rules)
}

fn rebuild(slot: Slot, fittings: Fittings, new: &Census, steps: &Steps) -> Result<(), Failed> {
    let user = fittings.user(slot);
    enter(slot).map_err(Step::Namespace.failed())?;
    steps.done(Step::Namespace)?;

    configure().map_err(Step::Sysctl.failed())?;
    steps.done(Step::Sysctl)?;

    // With it goes all that was set on it: addresses, rates, offloads, queues, and what waits in them.
    let socket = Socket::open(ROUTE).map_err(Step::Tap.failed())?;
    let mut requests = Requests::default();
    requests.delete_link(TAP);
    socket.transact(requests).map_err(Step::Tap.failed())?;
    add_tap(user).map_err(Step::Tap.failed())?;
    steps.done(Step::Tap)?;

    let mut requests = Requests::default();
    add_tap_s_addresses(&mut requests, fittings.mtu);
    socket.transact(requests).map_err(Step::Links.failed())?;
    steps.done(Step::Links)?;

    let netfilter = Socket::open(NETFILTER).map_err(Step::Rules.failed())?;
    firewall::fill_netns(slot, user, &netfilter).map_err(Step::Rules.failed())?;
    // After the tap is gone, by which new ones came.
    conntrack::forget_all(&netfilter).map_err(Step::Rules.failed())?;
    steps.done(Step::Rules)?;

    let found = census(&socket).map_err(Step::Census.failed())?;
    if found != *new {
        return Err(Step::Census.failed()(io::Error::other(format!("{found:?} in place of {new:?}"))));
    }
    steps.done(Step::Census)
}

/// How many of each there are in a namespace.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Census {
    links: usize,
    addresses: usize,
    routes: usize,
    rules: usize,
    /// Without those that the kernel keeps for its own multicast.
    neighbours: usize,
    qdiscs: usize,
}

fn census(socket: &Socket) -> io::Result<Census> {
    /// `ndm_state` in `struct ndmsg`, and the state of what needs no asking.
    const STATE: usize = 8;
    const NOARP: u16 = 0x40;
    let list = |kind: u16| {
        let mut request = Requests::default();
        // Of any family; every list's header fits in these.
        request.push("list what is in a namespace", kind, libc::NLM_F_DUMP, |bytes| bytes.extend([0; 20]));
        socket.ask(&request)
    };
    let is_neighbour = |entry: &Vec<u8>| {
        let state = entry.get(STATE..STATE + 2).and_then(|state| state.try_into().ok());
        state.map(u16::from_ne_bytes) != Some(NOARP)
    };
    Ok(Census {
        links: list(libc::RTM_GETLINK)?.len(),
        addresses: list(libc::RTM_GETADDR)?.len(),
        routes: list(libc::RTM_GETROUTE)?.len(),
        rules: list(libc::RTM_GETRULE)?.len(),
        neighbours: list(libc::RTM_GETNEIGH)?.iter().filter(|entry| is_neighbour(entry)).count(),
        qdiscs: list(libc::RTM_GETQDISC)?.len(),
    })
}

/// A socket for the rules of the namespace of `slot`, for use by any thread.
pub(crate) fn netfilter(slot: Slot) -> Result<Socket, Failed> {
    on_own_thread(slot, || {
        enter(slot).map_err(Step::Namespace.failed())?;
        Socket::open(NETFILTER).map_err(Step::Rules.failed())
    })
}

/// Moves this thread into the namespace of that name.
fn enter(slot: Slot) -> io::Result<()> {
    let netns = File::open(slot.netns_path())?;
    Ok(rustix::thread::move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Moves this thread into a new network namespace and gives that its name.
fn enter_new(slot: Slot) -> io::Result<()> {
    let path = slot.netns_path();
    File::create_new(&path)?;
    // SAFETY: only CLONE_FILES could take descriptors away from other threads, and it is not asked for.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(mount::mount_bind("/proc/thread-self/ns/net", &path)?)
}

/// Before there are links, so that they begin with these settings.
///
/// In a `/proc` of their own: in a shared one the kernel looks for a namespace's `net/ipv4` among those of all namespaces,
/// one after the other, which at 500 of them takes a millisecond.
fn configure() -> io::Result<()> {
    let proc = mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    mount::fsconfig_create(proc.as_fd())?;
    let proc = mount::fsmount(proc.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let set = |name: &str, value: &str| {
        let file = openat(&proc, format!("sys/net/{name}"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        File::from(file).write_all(value.as_bytes())
    };
    set("ipv4/ip_forward", "1")?;
    // A VMM that serves metadata by a socket does so without privileges.
    set("ipv4/ip_unprivileged_port_start", &HTTP.to_string())?;
    unless_absent(set("ipv6/conf/all/disable_ipv6", "1"))
}

/// Takes IPv6 from one link of this thread's namespace.
pub(crate) fn disable_ipv6(link: &str) -> io::Result<()> {
    unless_absent(fs::write(format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6"), "1"))
}

/// What was done, or could not be because there is no such file: of a kernel without IPv6, say.
fn unless_absent(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Makes the tap, which stays when our descriptor is closed; the VMM attaches to it by name, as `user` and without privileges.
fn add_tap(user: u32) -> io::Result<()> {
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
    // SAFETY: TUNSETIFINDEX reads one `unsigned int`, and is given one.
    unsafe { ioctl::ioctl(&tun, Setter::<TUNSETIFINDEX, u32>::new(TAP_INDEX)) }?;
    // SAFETY: TUNSETIFF reads one `ifreq` and writes it back, and `request` is one.
    unsafe { ioctl::ioctl(&tun, Updater::<TUNSETIFF, libc::ifreq>::new(&mut request)) }?;
    // SAFETY: TUNSETPERSIST takes a plain integer, zero or not.
    unsafe { ioctl::ioctl(&tun, IntegerSetter::<TUNSETPERSIST>::new_usize(1)) }?;
    // SAFETY: TUNSETOWNER takes a plain integer, a user id.
    unsafe { ioctl::ioctl(&tun, IntegerSetter::<TUNSETOWNER>::new_usize(user as usize)) }?;
    Ok(())
}

fn add_tap_s_addresses(requests: &mut Requests, mtu: u32) {
    requests.add_address(TAP_INDEX, TAP_ADDRESS, TAP_PREFIX);
    // Firecracker answers for it before a packet comes here; other VMMs listen on it.
    requests.add_address(TAP_INDEX, METADATA, ALONE);
    let queue = LinkAttribute::TxQueueLen(TAP_QUEUE);
    requests.set_up(TAP_INDEX, vec![queue, LinkAttribute::Address(TAP_MAC.to_vec()), LinkAttribute::Mtu(mtu)]);
    requests.add_neighbour(TAP_INDEX, GUEST_ADDRESS, GUEST_MAC);
}

/// Removes the name. The namespace itself goes when no process is in it any more.
pub(crate) fn unname(slot: Slot) -> io::Result<()> {
    let path = slot.netns_path();
    match mount::unmount(&path, UnmountFlags::DETACH) {
        // There is no such file, or nothing is mounted on it.
        Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    unless_absent(fs::remove_file(&path))
}
