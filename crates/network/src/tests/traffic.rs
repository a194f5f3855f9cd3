//! What gets through and what does not.
//!
//! That a datagram does not arrive is seen without waiting: another one that may pass is sent after it along the same
//! way, and it is the first to arrive. Each refusal is also tried with the table gone, where the datagram does arrive.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;

use super::guest::{Guest, SERVER_IP, UPLINK_IP, inside, internet, next, udp};
use super::machine::{assert_same, inventory, network, on_own_machine, sh};
use crate::{Network, Slot};

/// Two guests and an internet.
struct World {
    network: Network,
    a: (Slot, Guest),
    b: (Slot, Guest),
    /// Answers every datagram with the address from which it came.
    echo: UdpSocket,
}

impl World {
    fn new() -> Self {
        let netns = internet();
        let network = network();
        let guest = || {
            let slot = network.claim().unwrap().slot();
            network.create(slot).unwrap();
            (slot, Guest::start(slot))
        };
        let (a, b) = (guest(), guest());
        let echo = udp(&netns, &format!("{SERVER_IP}:7"));
        let answers = echo.try_clone().unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((1.., from)) = answers.recv_from(&mut buffer) {
                let _ = answers.send_to(from.ip().to_string().as_bytes(), from);
            }
        });
        Self { network, a, b, echo }
    }

    /// Sends a datagram from guest A and waits until everything that A sent before has been through the machine.
    fn a_sends(&self, from: &str, to: &str) {
        let socket = udp(&self.a.1.netns, &format!("{from}:0"));
        socket.send_to(b"from A", to).unwrap();
        self.a_has_sent();
    }

    /// A's round trip to the internet, which tells what address A has there.
    fn a_has_sent(&self) -> String {
        let socket = udp(&self.a.1.netns, "169.254.0.21:0");
        socket.send_to(b"where am I", (SERVER_IP, 7)).unwrap();
        next(&socket)
    }

    fn without_table(&self) {
        sh("nft delete table inet wrenn_0123abcd; ip netns exec wrenn-ns-1 nft delete table netdev guard");
        // What the careless provider needs to answer A by its undisguised address.
        assert_eq!(self.a_has_sent(), self.a.0.veth_netns_ip().to_string());
    }

    fn end(self) {
        let Self { network, a, b, echo } = self;
        drop((a, b));
        // An empty datagram ends the echo.
        echo.send_to(b"", (SERVER_IP, 7)).unwrap();
        drop(echo);
        network.sweep(&HashSet::new()).unwrap();
        network.close().unwrap();
    }
}

fn echo_once(listener: TcpListener) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 65536];
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            stream.write_all(&buffer[..length]).unwrap();
        }
    })
}

fn said_back(stream: &mut TcpStream, said: &[u8]) -> bool {
    let mut sender = stream.try_clone().unwrap();
    let mut heard = vec![0; said.len()];
    thread::scope(|scope| {
        scope.spawn(|| sender.write_all(said).unwrap());
        stream.read_exact(&mut heard).unwrap();
    });
    heard == said
}

#[test]
fn the_host_reaches_the_guest_and_the_guest_the_internet() {
    on_own_machine(|| {
        let world = World::new();
        let listeners: Vec<_> = [world.a.0, world.b.0]
            .iter()
            .zip([&world.a.1, &world.b.1])
            .map(|(slot, guest)| {
                (slot.host_ip(), inside(&guest.netns, || TcpListener::bind("169.254.0.21:8080")).unwrap())
            })
            .collect();
        let said: Vec<u8> = (0..3_000_000u32).map(|i| (i / 7) as u8).collect();
        let mut streams = Vec::new();
        for (address, listener) in listeners {
            let echo = echo_once(listener);
            let mut stream = TcpStream::connect((address, 8080)).unwrap();
            assert!(said_back(&mut stream, &said));
            streams.push((stream, echo));
        }
        assert_eq!(world.a_has_sent(), UPLINK_IP, "guests leave in disguise");

        // Outwards by TCP, and both connections go on when the agent starts again and makes its table anew.
        let listener = inside(Path::new("/run/netns/internet"), || TcpListener::bind((SERVER_IP, 80))).unwrap();
        let echo = echo_once(listener);
        let mut outward = inside(&world.a.1.netns, || TcpStream::connect((SERVER_IP, 80))).unwrap();
        assert!(said_back(&mut outward, &said));
        streams.push((outward, echo));
        let again = network();
        for (mut stream, echo) in streams {
            assert!(said_back(&mut stream, &said));
            drop(stream);
            echo.join().unwrap();
        }
        drop(again);
        world.end();
    });
}

#[test]
fn a_guest_does_not_reach_another() {
    on_own_machine(|| {
        let world = World::new();
        let b = udp(&world.b.1.netns, "0.0.0.0:5000");
        let host = UdpSocket::bind("0.0.0.0:0").unwrap();
        let at_host_ip = format!("{}:5000", world.b.0.host_ip());
        world.a_sends("169.254.0.21", &at_host_ip);
        world.a_sends("169.254.0.21", &format!("{}:5000", world.b.0.veth_netns_ip()));
        host.send_to(b"from the host", &at_host_ip).unwrap();
        assert_eq!(next(&b), "from the host");

        world.without_table();
        world.a_sends("169.254.0.21", &at_host_ip);
        assert_eq!(next(&b), "from A");
        world.end();
    });
}

#[test]
fn a_guest_does_not_reach_the_host() {
    on_own_machine(|| {
        let world = World::new();
        let host = UdpSocket::bind("0.0.0.0:5000").unwrap();
        let addresses =
            [world.a.0.veth_host_ip().to_string(), world.b.0.veth_host_ip().to_string(), UPLINK_IP.to_owned()];
        for address in &addresses {
            world.a_sends("169.254.0.21", &format!("{address}:5000"));
        }
        host.send_to(b"from the host", "127.0.0.1:5000").unwrap();
        assert_eq!(next(&host), "from the host");

        world.without_table();
        for address in &addresses {
            world.a_sends("169.254.0.21", &format!("{address}:5000"));
            assert_eq!(next(&host), "from A", "{address}");
        }
        world.end();
    });
}

#[test]
fn a_guest_does_not_reach_metadata_nor_speak_for_another() {
    on_own_machine(|| {
        let world = World::new();
        let server = udp(Path::new("/run/netns/internet"), "0.0.0.0:5000");
        let b_ip = world.b.0.veth_netns_ip().to_string();
        sh(&format!("ip -n guest1 addr add {b_ip}/32 dev eth0; ip -n guest1 addr add 203.0.113.9/32 dev eth0"));
        let at_server = format!("{SERVER_IP}:5000");
        let attempts = [("169.254.0.21", "169.254.169.254:5000"), (&b_ip, &at_server), ("203.0.113.9", &at_server)];
        for (from, to) in attempts {
            world.a_sends(from, to);
        }
        udp(&world.a.1.netns, "169.254.0.21:0").send_to(b"allowed", &at_server).unwrap();
        assert_eq!(next(&server), "allowed");

        world.without_table();
        // What goes there stays in the namespace even so.
        sh(&format!("ip -n {} addr del 169.254.169.254/32 dev tap0", world.a.0.netns()));
        for (from, to) in attempts {
            world.a_sends(from, to);
            assert_eq!(next(&server), "from A", "from {from} to {to}");
        }
        world.end();
    });
}

#[test]
fn nobody_outside_reaches_a_guest_through_the_host() {
    on_own_machine(|| {
        let world = World::new();
        let b = udp(&world.b.1.netns, "0.0.0.0:5000");
        sh("ip -n internet route add 10.11.0.0/16 via 192.0.2.1");
        let outside = udp(Path::new("/run/netns/internet"), "192.0.2.2:0");
        let host = UdpSocket::bind("0.0.0.0:0").unwrap();
        let at_host_ip = format!("{}:5000", world.b.0.host_ip());
        // The echo's answer follows the datagram along the uplink.
        outside.send_to(b"from outside", &at_host_ip).unwrap();
        world.a_has_sent();
        host.send_to(b"from the host", &at_host_ip).unwrap();
        assert_eq!(next(&b), "from the host");

        world.without_table();
        outside.send_to(b"from outside", &at_host_ip).unwrap();
        assert_eq!(next(&b), "from outside");
        world.end();
    });
}

#[test]
fn a_machine_without_a_way_out_has_guests_that_the_host_reaches() {
    on_own_machine(|| {
        let network = network();
        let before = inventory();
        let slot = network.claim().unwrap().slot();
        network.create(slot).unwrap();
        let guest = Guest::start(slot);
        let listener = inside(&guest.netns, || TcpListener::bind("169.254.0.21:8080")).unwrap();
        let echo = echo_once(listener);
        let mut stream = TcpStream::connect((slot.host_ip(), 8080)).unwrap();
        assert!(said_back(&mut stream, b"hello"));
        drop(stream);
        echo.join().unwrap();
        drop(guest);
        network.pool.slots.destroy(slot).unwrap();
        assert_same(&before, "at the end");
    });
}
