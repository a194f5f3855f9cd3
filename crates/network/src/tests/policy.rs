//! What a policy takes away, at once, and what it leaves.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::guest::{Guest, inside, internet, next, udp};
use super::machine::{network, on_own_machine, pooled, sh};
use crate::policy::{Filter, Policy};
use crate::{Network, Range, Slot};

const SERVER: &str = "198.51.100.7";
const OTHER: &str = "203.0.113.9";
const EVERYTHING: Range = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST);

fn one(address: &str) -> Range {
    let address = address.parse().unwrap();
    (address, address)
}

pub(super) fn off() -> Policy {
    Policy { deny: vec![EVERYTHING], ..Policy::default() }
}

fn world() -> (PathBuf, Network, Slot, Guest) {
    let internet = internet();
    sh(&format!("ip -n internet addr add {OTHER}/32 dev lo"));
    let network = network();
    let slot = network.claim().unwrap().slot();
    network.create(slot).unwrap();
    (internet, network, slot, Guest::start(slot))
}

fn end(network: Network, guest: Guest) {
    drop(guest);
    network.sweep(&HashSet::new()).unwrap();
    network.close().unwrap();
}

fn listen(netns: &Path, address: &str, port: u16) -> TcpListener {
    inside(netns, || TcpListener::bind((address, port))).unwrap()
}

/// What becomes of a connection from the guest.
fn connect(guest: &Guest, to: &str, port: u16) -> Result<TcpStream, ErrorKind> {
    let stream = inside(&guest.netns, || {
        TcpStream::connect_timeout(&(to.parse::<Ipv4Addr>().unwrap(), port).into(), Duration::from_secs(20))
    });
    stream.map_err(|error| error.kind())
}

fn pair(guest: &Guest, listener: &TcpListener, to: &str) -> (TcpStream, TcpStream) {
    let stream = connect(guest, to, listener.local_addr().unwrap().port()).unwrap();
    let accepted = listener.accept().unwrap().0;
    for stream in [&stream, &accepted] {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    (stream, accepted)
}

fn say(from: &mut TcpStream, to: &mut TcpStream) {
    let mut heard = [0; 4];
    from.write_all(b"said").unwrap();
    to.read_exact(&mut heard).unwrap();
}

#[test]
fn a_guest_that_is_off_is_told_so_and_still_answers_its_host() {
    on_own_machine(|| {
        let (internet, network, slot, guest) = world();
        let server = listen(&internet, SERVER, 80);
        let inside_guest = listen(&guest.netns, "169.254.0.21", 8080);
        network.set_policy(slot, &off()).unwrap();
        // At once, and not after minutes of waiting.
        assert_eq!(connect(&guest, SERVER, 80).unwrap_err(), ErrorKind::ConnectionRefused);
        let datagrams = udp(&guest.netns, "169.254.0.21:0");
        datagrams.connect((SERVER, 53)).unwrap();
        datagrams.send(b"question").unwrap();
        assert!(matches!(
            datagrams.recv(&mut [0; 9]).unwrap_err().kind(),
            ErrorKind::HostUnreachable | ErrorKind::PermissionDenied | ErrorKind::NetworkUnreachable
        ));
        let mut host = TcpStream::connect((slot.host_ip(), 8080)).unwrap();
        let (mut accepted, _) = inside_guest.accept().unwrap();
        say(&mut host, &mut accepted);
        say(&mut accepted, &mut host);
        network.set_policy(slot, &Policy::default()).unwrap();
        pair(&guest, &server, SERVER);
        say(&mut accepted, &mut host);
        drop((host, accepted, inside_guest));
        end(network, guest);
    });
}

#[test]
fn allowed_ranges_win_over_denied_ones_to_their_ends() {
    on_own_machine(|| {
        let (internet, network, slot, guest) = world();
        let servers = [SERVER, OTHER].map(|address| listen(&internet, address, 80));
        let reaches = |policy: Policy| {
            network.set_policy(slot, &policy).unwrap();
            [SERVER, OTHER].map(|to| connect(&guest, to, 80).is_ok())
        };
        let deny = |deny: Vec<Range>| Policy { deny, ..Policy::default() };
        assert_eq!(reaches(deny(vec![one(OTHER)])), [true, false]);
        assert_eq!(reaches(Policy { allow: vec![one(SERVER)], ..off() }), [true, false]);
        assert_eq!(
            reaches(Policy { allow: vec![one(SERVER), one(OTHER)], deny: vec![one(SERVER)], filter: None }),
            [true, true]
        );
        // The ends of ranges belong to them, ranges may overlap and touch, and the last address has none after it.
        let to = |first: &str, last: &str| (first.parse().unwrap(), last.parse().unwrap());
        assert_eq!(reaches(deny(vec![to("198.51.100.0", SERVER), to(OTHER, "255.255.255.255")])), [false, false]);
        assert_eq!(reaches(deny(vec![to("0.0.0.0", "198.51.100.6"), to("198.51.100.8", "203.0.113.8")])), [true, true]);
        assert_eq!(
            reaches(deny(vec![to("0.0.0.0", "198.51.100.6"), to("198.51.100.3", SERVER), EVERYTHING])),
            [false, false]
        );
        // What the floor has no policy can give.
        network.set_policy(slot, &Policy { allow: vec![EVERYTHING], ..Policy::default() }).unwrap();
        let metadata = udp(Path::new("/run/netns/internet"), "0.0.0.0:5000");
        let socket = udp(&guest.netns, "169.254.0.21:0");
        for (said, to) in [("evil", "169.254.169.254:5000"), ("evil", "10.11.0.9:5000"), ("good", "198.51.100.7:5000")]
        {
            socket.send_to(said.as_bytes(), to).unwrap();
        }
        assert_eq!(next(&metadata), "good");
        drop(servers);
        end(network, guest);
    });
}

#[test]
fn a_change_cuts_what_is_open_and_nothing_else() {
    on_own_machine(|| {
        let (internet, network, slot, guest) = world();
        let servers = [SERVER, OTHER].map(|address| listen(&internet, address, 80));
        let mut kept = pair(&guest, &servers[0], SERVER);
        let mut cut = pair(&guest, &servers[1], OTHER);
        // One that only hears.
        let ear = udp(&guest.netns, "169.254.0.21:0");
        let mouth = inside(&internet, || UdpSocket::bind((OTHER, 7))).unwrap();
        ear.send_to(b"speak", (OTHER, 7)).unwrap();
        let mut buffer = [0; 9];
        let (_, guest_outside) = mouth.recv_from(&mut buffer).unwrap();
        mouth.send_to(b"before", guest_outside).unwrap();
        assert_eq!(next(&ear), "before");
        for _ in 0..2 {
            network.set_policy(slot, &Policy { allow: vec![one(SERVER)], ..off() }).unwrap();
            say(&mut kept.0, &mut kept.1);
            say(&mut kept.1, &mut kept.0);
        }
        let _ = cut.0.write_all(b"more");
        assert_eq!(cut.0.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        mouth.send_to(b"after", guest_outside).unwrap();
        // The kept connection goes the same way, after it.
        say(&mut kept.1, &mut kept.0);
        ear.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        assert!(ear.recv(&mut buffer).is_err(), "what is denied is heard");
        assert!(connect(&guest, OTHER, 80).is_err());
        drop((kept, cut, servers));
        end(network, guest);
    });
}

#[test]
fn where_names_count_connections_and_questions_go_to_the_filter() {
    on_own_machine(|| {
        let (internet, network, slot, guest) = world();
        let servers = [SERVER, OTHER].map(|address| listen(&internet, address, 53));
        let open = pair(&guest, &servers[0], SERVER);
        let netns = slot.netns_path();
        let filter = listen(&netns, "169.254.0.22", 15001);
        let questions = listen(&netns, "169.254.0.22", 15053);
        let datagrams = udp(&netns, "169.254.0.22:15053");
        let policy = Policy { allow: vec![one(SERVER)], filter: Some(Filter { tcp: 15001, dns: 15053 }), ..off() };
        network.set_policy(slot, &policy).unwrap();
        let original = |stream: &TcpStream| rustix::net::sockopt::ip_original_dst(stream).unwrap().to_string();

        let (mut guest_end, mut at_filter) = (connect(&guest, OTHER, 443).unwrap(), filter.accept().unwrap().0);
        assert_eq!(original(&at_filter), format!("{OTHER}:443"));
        say(&mut guest_end, &mut at_filter);
        say(&mut at_filter, &mut guest_end);
        // Questions too, whomever they are for.
        for to in [OTHER, SERVER, "169.254.0.22"] {
            let _stream = connect(&guest, to, 53).unwrap();
            assert_eq!(original(&questions.accept().unwrap().0), format!("{to}:53"));
            udp(&guest.netns, "169.254.0.21:0").send_to(to.as_bytes(), (to, 53)).unwrap();
            assert_eq!(next(&datagrams), to);
        }
        // A connection to a resolver that was there before is no way around.
        let mut open = open;
        let _ = open.0.write_all(b"exfiltrate");
        open.1.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(open.1.read(&mut [0; 1]).is_err());
        // Other ports of an allowed address need no filter, other protocols of others get nowhere, and the filter's own ports
        // are nobody's to speak to.
        let web = listen(&internet, SERVER, 80);
        pair(&guest, &web, SERVER);
        let quic = udp(&guest.netns, "169.254.0.21:0");
        quic.connect((OTHER, 443)).unwrap();
        quic.send(b"quic").unwrap();
        assert!(quic.recv(&mut [0; 1]).is_err());
        let direct = udp(&guest.netns, "169.254.0.21:0");
        direct.send_to(b"direct", "169.254.0.22:15053").unwrap();
        direct.send_to(b"asked", (OTHER, 53)).unwrap();
        assert_eq!(next(&datagrams), "asked");
        // Without it, they get nowhere.
        drop((filter, at_filter, guest_end));
        assert_eq!(connect(&guest, OTHER, 443).unwrap_err(), ErrorKind::ConnectionRefused);
        drop((questions, datagrams, servers, open));
        end(network, guest);
    });
}

#[test]
fn what_one_guest_may_not_another_may_and_the_next_begins_anew() {
    on_own_machine(|| {
        let internet = internet();
        let network = pooled(1);
        network.sweep(&HashSet::new()).unwrap();
        let server = listen(&internet, SERVER, 80);
        network.pool.settle();
        let claim = network.claim().unwrap();
        let slot = claim.slot();
        network.create(slot).unwrap();
        let rules = || sh(&format!("ip netns exec {} nft list ruleset", slot.netns()));
        let new = rules();
        network.set_policy(slot, &off()).unwrap();
        assert_ne!(rules(), new);
        let guest = Guest::start(slot);
        let other = network.claim().unwrap().slot();
        network.create(other).unwrap();
        let another = Guest::start(other);
        assert!(connect(&guest, SERVER, 80).is_err());
        pair(&another, &server, SERVER);
        drop((guest, another));
        network.pool.slots.destroy(other).unwrap();
        network.give_back(claim).unwrap();
        network.pool.settle();
        assert_eq!(rules(), new);
        let again = loop {
            let claimed = network.claim().unwrap().slot();
            network.create(claimed).unwrap();
            if claimed == slot {
                break claimed;
            }
        };
        let guest = Guest::start(again);
        pair(&guest, &server, SERVER);
        drop(guest);
        network.sweep(&HashSet::new()).unwrap();
        network.pool.settle();
        network.close().unwrap();
    });
}
