//! What a capsule's network is between, played by namespaces: a guest with the kernel's own network stack behind a
//! slot's tap, and an internet behind the machine's default route.

use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::ioctl::{self, Updater};
use rustix::thread::LinkNameSpaceType;

use super::machine::sh;
use crate::Slot;
use crate::slot::TAP;

/// The machine's address on its uplink.
pub(super) const UPLINK_IP: &str = "192.0.2.1";
/// A server on the internet.
pub(super) const SERVER_IP: &str = "198.51.100.7";

/// Gives the machine an uplink, a default route and something behind it. Call before `Network::open`.
pub(super) fn internet() -> PathBuf {
    sh("ip netns add internet
        ip link add up0 type veth peer name eth0 netns internet
        ip addr add 192.0.2.1/24 dev up0; ip link set up0 up
        ip -n internet addr add 192.0.2.2/24 dev eth0; ip -n internet link set eth0 up; ip -n internet link set lo up
        ip -n internet addr add 198.51.100.7/32 dev lo; ip -n internet addr add 169.254.169.254/32 dev lo
        ip route add default via 192.0.2.2
        # A careless provider: it would answer to addresses that should never have left the machine.
        ip -n internet route add 10.12.0.0/16 via 192.0.2.1");
    "/run/netns/internet".into()
}

/// Runs `work` on a thread inside a network namespace.
pub(super) fn inside<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let work = || {
            let netns = File::open(netns).unwrap();
            rustix::thread::move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        };
        scope.spawn(work).join().unwrap()
    })
}

/// A socket of a network namespace, that gives up rather than wait for ever in a failing test.
pub(super) fn udp(netns: &Path, address: &str) -> UdpSocket {
    let socket = inside(netns, || UdpSocket::bind(address)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

/// The text of the next datagram.
pub(super) fn next(socket: &UdpSocket) -> String {
    let mut buffer = [0; 100];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// A guest in a slot: its namespace has the guest's addresses, and a thread carries its frames to and from the tap.
pub(super) struct Guest {
    pub(super) netns: PathBuf,
    stop: Option<OwnedFd>,
    wire: Option<thread::JoinHandle<()>>,
}

impl Guest {
    pub(super) fn start(slot: Slot) -> Self {
        let name = format!("guest{slot}");
        sh(&format!("ip netns add {name}"));
        let netns = Path::new("/run/netns").join(&name);
        let (near, far) = (tap(&slot.netns_path(), TAP), tap(&netns, "eth0"));
        sh(&format!(
            "ip -n {name} link set eth0 address 02:fc:00:00:00:05 up; ip -n {name} link set lo up
             ip -n {name} addr add 169.254.0.21/30 dev eth0; ip -n {name} route add default via 169.254.0.22"
        ));
        let (stopped, stop) = rustix::pipe::pipe().unwrap();
        let wire = thread::spawn(move || carry(near, far, &stopped));
        Self { netns, stop: Some(stop), wire: Some(wire) }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.wire.take().unwrap().join().unwrap();
        sh(&format!("ip netns del {}", self.netns.file_name().unwrap().to_str().unwrap()));
    }
}

pub(super) fn tap(netns: &Path, name: &str) -> File {
    inside(netns, || {
        let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        let mut request = libc::ifreq {
            ifr_name: [0; libc::IFNAMSIZ],
            ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short },
        };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        // SAFETY: TUNSETIFF reads one `ifreq` and writes it back, and `request` is one.
        unsafe { ioctl::ioctl(&tun, Updater::<0x4004_54CA, libc::ifreq>::new(&mut request)) }.unwrap();
        tun
    })
}

/// Carries frames between two taps until the other end of `stopped` is closed.
fn carry(mut near: File, mut far: File, stopped: &OwnedFd) {
    let mut frame = [0; 65536];
    loop {
        let mut ready =
            [PollFd::new(&near, PollFlags::IN), PollFd::new(&far, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        poll(&mut ready, None).unwrap();
        let [from_near, from_far, stop] = ready.map(|fd| !fd.revents().is_empty());
        if stop {
            return;
        }
        // A write fails while the link on the other side is not up yet; then the frame is lost, as on a wire.
        if from_near && let Ok(length) = near.read(&mut frame) {
            let _ = far.write(&frame[..length]);
        }
        if from_far && let Ok(length) = far.read(&mut frame) {
            let _ = near.write(&frame[..length]);
        }
    }
}
