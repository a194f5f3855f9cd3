//! Packets of the size that fits, from end to end.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;

use super::guest::{Guest, SERVER_IP, inside, internet, udp};
use super::machine::{json, network, on_own_machine, sh};
use crate::Network;

/// Every link of a slot, by name, with its MTU.
fn mtus() -> [u64; 3] {
    ["ip -j link show wrenn-veth1", "ip -n wrenn-ns-1 -j link show eth0", "ip -n wrenn-ns-1 -j link show tap0"]
        .map(|line| json(line)[0]["mtu"].as_u64().unwrap())
}

fn with_uplink_of(mtu: u32) -> (Network, crate::Slot) {
    internet();
    sh(&format!("ip link set up0 mtu {mtu}; ip -n internet link set eth0 mtu {mtu}"));
    let network = network();
    let slot = network.claim().unwrap().slot();
    network.create(slot).unwrap();
    (network, slot)
}

fn end(network: Network) {
    network.sweep(&Default::default()).unwrap();
    network.close().unwrap();
}

#[test]
fn a_slot_has_the_uplink_s_mtu() {
    for mtu in [1280, 1420, 9000] {
        on_own_machine(|| {
            let (network, _) = with_uplink_of(mtu);
            assert_eq!((network.mtu(), mtus()), (mtu, [mtu.into(); 3]));
            end(network);
        });
    }
    on_own_machine(|| {
        let network = network();
        assert_eq!(network.mtu(), 1500, "without an uplink");
        // The smallest of several is what fits through all.
        sh("ip tuntap add up1 mode tap; ip link set up1 mtu 1400; ip link set up1 up; ip route add default dev up1 metric 7
            ip tuntap add up2 mode tap; ip link set up2 mtu 1300; ip link set up2 up; ip route add default dev up2 metric 9");
        let again = super::machine::network();
        assert_eq!(again.mtu(), 1300);
        sh("ip link del up1; ip link del up2");
        drop(network);
        end(again);
    });
}

fn option(socket: &impl AsRawFd, level: i32, name: i32) -> i32 {
    let (mut value, mut length) = (0i32, 4u32);
    // SAFETY: `value` is writable for `length` bytes, which is its size.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length) };
    assert_eq!(done, 0);
    value
}

/// A guest that was told of another MTU, as one that was saved on another machine.
#[test]
fn tcp_of_a_guest_with_a_larger_mtu_fits_through_the_uplink() {
    on_own_machine(|| {
        let (network, slot) = with_uplink_of(1420);
        let guest = Guest::start(slot);
        sh("ip -n guest1 link set eth0 mtu 1500");
        let listener = inside(Path::new("/run/netns/internet"), || TcpListener::bind((SERVER_IP, 80))).unwrap();
        // A server that would take and send more.
        sh("ip -n internet link set eth0 mtu 1500");
        let mut out = inside(&guest.netns, || TcpStream::connect((SERVER_IP, 80))).unwrap();
        let (server, _) = listener.accept().unwrap();
        let segments = [&out, &server].map(|stream| option(stream, libc::IPPROTO_TCP, libc::TCP_MAXSEG));
        // 40 bytes are headers, and 12 may be for time stamps.
        assert!(segments.iter().all(|size| (1300..=1380).contains(size)), "{segments:?}");
        let said = vec![7; 300_000];
        std::thread::scope(|scope| {
            scope.spawn(|| out.write_all(&said).unwrap());
            let mut heard = vec![0; said.len()];
            std::io::Read::read_exact(&mut &server, &mut heard).unwrap();
            assert!(heard == said);
        });
        drop((out, server, guest));
        end(network);
    });
}

#[test]
fn a_guest_learns_of_what_does_not_fit() {
    on_own_machine(|| {
        let (network, slot) = with_uplink_of(1420);
        // And narrower further out.
        sh("ip netns add far
            ip -n internet link add far0 mtu 1300 type veth peer name eth0 mtu 1300 netns far
            ip -n internet addr add 203.0.113.1/24 dev far0; ip -n internet link set far0 up
            ip -n far addr add 203.0.113.2/24 dev eth0; ip -n far link set eth0 up
            ip -n far route add default via 203.0.113.1; ip netns exec internet sysctl -q net.ipv4.ip_forward=1");
        let guest = Guest::start(slot);
        sh("ip -n guest1 link set eth0 mtu 1500");
        for (to, fits) in [(SERVER_IP, 1420), ("203.0.113.2", 1300)] {
            let socket = udp(&guest.netns, "169.254.0.21:0");
            let never_split = libc::IP_PMTUDISC_DO;
            // SAFETY: the option is an integer, and `never_split` is one.
            let set = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::IPPROTO_IP,
                    libc::IP_MTU_DISCOVER,
                    (&raw const never_split).cast(),
                    4,
                )
            };
            assert_eq!(set, 0);
            socket.connect((to, 5000)).unwrap();
            assert_eq!(option(&socket, libc::IPPROTO_IP, libc::IP_MTU), 1500);
            // The ICMP message comes after what is too long was sent; 28 bytes are headers.
            let mtu = || option(&socket, libc::IPPROTO_IP, libc::IP_MTU);
            while mtu() != fits {
                let _ = socket.send(&[0; 1472][..mtu() as usize - 28]);
                std::thread::yield_now();
            }
        }
        drop(guest);
        sh("ip netns del far");
        end(network);
    });
}
