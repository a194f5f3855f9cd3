//! A guest that may reach names, with the real filter between it and the internet.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use api::egress::Policy as Names;
use egress::{DNS_PORT, Filter, Resolver, TCP_PORT};

use super::guest::{Guest, inside, internet, udp};
use super::machine::{network, on_own_machine, sh};
use crate::policy::{self, Policy};
use crate::slot::TAP_ADDRESS;
use crate::{Network, Slot};

const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const PATIENCE: Duration = Duration::from_secs(30);

struct World {
    network: Network,
    slot: Slot,
    guest: Guest,
    internet: PathBuf,
    filter: Filter,
    runtime: tokio::runtime::Runtime,
    /// The names that the host's resolver was asked for.
    asked: Arc<Mutex<Vec<String>>>,
    resolver: UdpSocket,
}

/// `*.example` with what is told of it; everything else is not to be known.
fn names() -> Names {
    let domains = ["allowed.example", "*.wide.example", "rebind.example", "host.example"];
    Names {
        allow: Vec::new(),
        deny: vec!["0.0.0.0/0".parse().unwrap()],
        domains: domains.map(|name| name.parse().unwrap()).into(),
    }
}

impl World {
    fn new() -> Self {
        let internet = internet();
        sh(&format!("ip -n internet addr add {OTHER}/32 dev lo"));
        let network = network();
        let slot = network.claim().unwrap().slot();
        network.create(slot).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let resolver = UdpSocket::bind("127.0.0.1:5353").unwrap();
        let (socket, log) = (resolver.try_clone().unwrap(), asked.clone());
        thread::spawn(move || resolve(&socket, &log));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let filter = {
            let _inside = runtime.enter();
            let resolver = Resolver::of(vec!["127.0.0.1:5353".parse().unwrap()]);
            Filter::start(&slot.netns_path(), TAP_ADDRESS, names(), resolver).unwrap()
        };
        let everything = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST);
        let ports = policy::Filter { tcp: TCP_PORT, dns: DNS_PORT };
        let rules = Policy { allow: Vec::new(), deny: vec![everything], filter: Some(ports) };
        network.set_policy(slot, &rules).unwrap();
        let guest = Guest::start(slot);
        Self { network, slot, guest, internet, filter, runtime, asked, resolver }
    }

    /// The addresses that the guest is told for a name, or the code with which it is told none.
    fn asks(&self, name: &str) -> Result<Vec<Ipv4Addr>, u8> {
        let socket = udp(&self.guest.netns, "169.254.0.21:0");
        let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            question.push(label.len() as u8);
            question.extend(label.as_bytes());
        }
        question.extend([0, 0, 1, 0, 1]);
        let mut answer = [0; 1500];
        let length = loop {
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            // As every resolver does, whose first datagram came before the link was there.
            socket.send_to(&question, "8.8.8.8:53").unwrap();
            if let Ok(length) = socket.recv(&mut answer) {
                break length;
            }
        };
        let answer = &answer[..length];
        assert_eq!(answer[..2], question[..2]);
        let (code, count) = (answer[3] & 15, usize::from(answer[7]));
        if code != 0 {
            return Err(code);
        }
        // Every record that is answered is an address.
        let records = answer[question.len()..].chunks(16).take(count);
        Ok(records.map(|record| <[u8; 4]>::try_from(&record[12..16]).unwrap().into()).collect())
    }

    fn connects(&self, to: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
        let stream = inside(&self.guest.netns, || TcpStream::connect((to, port)))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// What comes back for these bytes; nothing from a connection that is refused.
    fn gets(&self, to: Ipv4Addr, port: u16, said: &[u8]) -> Option<String> {
        // It may be refused before it has said anything, or knows that it is connected.
        let mut stream = match self.connects(to, port) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
            connected => connected.unwrap(),
        };
        stream.write_all(said).ok()?;
        // It is the guest that has ended: the answer still comes.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut heard = String::new();
        stream.read_to_string(&mut heard).ok().map(|_| heard)
    }

    fn end(self) {
        let Self { network, guest, filter, runtime, resolver, .. } = self;
        drop(guest);
        drop(filter);
        drop(runtime);
        let end = UdpSocket::bind("127.0.0.1:0").unwrap();
        end.send_to(b"", resolver.local_addr().unwrap()).unwrap();
        network.sweep(&HashSet::new()).unwrap();
        network.close().unwrap();
    }
}

/// A resolver that knows an address for every name.
fn resolve(socket: &UdpSocket, log: &Mutex<Vec<String>>) {
    let mut buffer = [0; 1500];
    while let Ok((length @ 12.., from)) = socket.recv_from(&mut buffer) {
        let mut labels = Vec::new();
        let mut at = 12;
        while buffer[at] > 0 {
            let length = usize::from(buffer[at]);
            labels.push(String::from_utf8_lossy(&buffer[at + 1..at + 1 + length]).into_owned());
            at += 1 + length;
        }
        assert!(at + 5 <= length);
        let name = labels.join(".");
        let address = match name.as_str() {
            "rebind.example" => Ipv4Addr::LOCALHOST,
            "host.example" => Ipv4Addr::new(192, 0, 2, 1),
            "other.wide.example" => OTHER,
            _ => SERVER,
        };
        log.lock().unwrap().push(name);
        let mut answer = buffer[..at + 5].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4]);
        answer.extend(address.octets());
        socket.send_to(&answer, from).unwrap();
    }
}

/// Answers each connection, once its client has said everything, with how much that was.
fn serve(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut said = Vec::new();
                if stream.read_to_end(&mut said).is_ok() {
                    let _ =
                        stream.write_all(format!("{} of {}", said.len(), stream.local_addr().unwrap().ip()).as_bytes());
                }
            });
        }
    });
}

fn request(host: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

/// A hello with, or without, a server name.
fn hello(name: Option<&str>) -> Vec<u8> {
    let vector = |content: &[u8]| [&(content.len() as u16).to_be_bytes()[..], content].concat();
    let extension = name.map_or(Vec::new(), |name| {
        [&[0, 0][..], &vector(&vector(&[&[0][..], &vector(name.as_bytes())].concat()))].concat()
    });
    let body = [&[3, 3][..], &[9; 32], &[0], &vector(&[0x13, 1]), &[1, 0], &vector(&extension)].concat();
    let message = [&[1, 0][..], &vector(&body)].concat();
    [&[22, 3, 1][..], &vector(&message)].concat()
}

#[test]
fn only_allowed_names_get_through_and_only_to_addresses_that_were_told_for_them() {
    on_own_machine(|| {
        let world = World::new();
        for (address, port) in [(SERVER, 80), (SERVER, 443), (OTHER, 80), (OTHER, 443)] {
            serve(inside(&world.internet, || TcpListener::bind((address, port))).unwrap());
        }
        // Before anything was asked, a name alone opens nothing.
        assert_eq!(world.gets(SERVER, 80, &request("allowed.example")), None);
        assert_eq!(world.asks("allowed.example"), Ok(vec![SERVER]));
        assert_eq!(world.asks("other.wide.example"), Ok(vec![OTHER]));
        const REFUSED: u8 = 5;
        for name in ["evil.example", "secret.allowed.example", "wide.example", "c2VjcmV0.evil.example"] {
            assert_eq!(world.asks(name), Err(REFUSED), "{name}");
        }
        assert_eq!(*world.asked.lock().unwrap(), ["allowed.example", "other.wide.example"], "nothing else left");

        let through = |said: &[u8], address: Ipv4Addr| Some(format!("{} of {address}", said.len()));
        let get = request("allowed.example");
        assert_eq!(world.gets(SERVER, 80, &get), through(&get, SERVER));
        let large = [get.clone(), vec![b'x'; 3_000_000]].concat();
        assert_eq!(world.gets(SERVER, 80, &large), through(&large, SERVER));
        let named = hello(Some("ALLOWED.example"));
        assert_eq!(world.gets(SERVER, 443, &named), through(&named, SERVER));
        // On any port: what it says counts.
        assert_eq!(world.gets(SERVER, 443, &get), through(&get, SERVER));
        let wide = hello(Some("other.wide.example"));
        assert_eq!(world.gets(OTHER, 443, &wide), through(&wide, OTHER));

        for (what, to, said) in [
            ("another name", SERVER, request("evil.example")),
            ("another name by TLS", SERVER, hello(Some("evil.example"))),
            ("an allowed name at another's address", OTHER, request("allowed.example")),
            ("an allowed name by TLS at another's address", OTHER, hello(Some("allowed.example"))),
            ("no name", SERVER, hello(None)),
            ("an address for a name", SERVER, request("198.51.100.7")),
            (
                "a host in the request line",
                SERVER,
                b"GET http://evil.example/ HTTP/1.1\r\nHost: allowed.example\r\n\r\n".to_vec(),
            ),
            ("two hosts", SERVER, b"GET / HTTP/1.1\r\nHost: allowed.example\r\nHost: evil.example\r\n\r\n".to_vec()),
            ("a NUL", SERVER, hello(Some("allowed.example\0.evil.example"))),
            ("another protocol", SERVER, b"SSH-2.0-evil\r\n\r\n\r\n".to_vec()),
            ("nothing", SERVER, Vec::new()),
        ] {
            for port in [80, 443] {
                assert_eq!(world.gets(to, port, &said), None, "{what} got through");
            }
        }
        world.end();
    });
}

#[test]
fn a_name_that_is_made_to_mean_the_inside_leads_nowhere() {
    on_own_machine(|| {
        let world = World::new();
        // Services of the host and in the capsule's namespace, which the filter could reach were it let.
        serve(TcpListener::bind("0.0.0.0:80").unwrap());
        serve(inside(&world.slot.netns_path(), || TcpListener::bind("127.0.0.1:80")).unwrap());
        for (name, address) in [("rebind.example", Ipv4Addr::LOCALHOST), ("host.example", Ipv4Addr::new(192, 0, 2, 1))]
        {
            assert_eq!(world.asks(name), Ok(vec![address]));
        }
        // A guest of its own mind sends it by its gateway all the same.
        sh("ip -n guest1 route add local 127.0.0.0/8 dev lo table 99 2>/dev/null || true");
        assert_eq!(world.gets(Ipv4Addr::new(192, 0, 2, 1), 80, &request("host.example")), None);
        let (gateway, own) = (world.slot.veth_host_ip(), world.slot.veth_netns_ip());
        for to in [gateway, own, TAP_ADDRESS] {
            assert_eq!(world.gets(to, 80, &request("rebind.example")), None);
        }
        world.end();
    });
}

#[test]
fn a_shorter_list_cuts_what_is_open_and_without_a_filter_nothing_opens() {
    on_own_machine(|| {
        let world = World::new();
        let listener = inside(&world.internet, || TcpListener::bind((SERVER, 80))).unwrap();
        let open = |name: &str| {
            world.asks(name).unwrap();
            let mut guest = world.connects(SERVER, 80).unwrap();
            guest.write_all(&request(name)).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let mut head = vec![0; request(name).len()];
            server.read_exact(&mut head).unwrap();
            assert_eq!(head, request(name));
            (guest, server)
        };
        let (mut kept, mut cut) = (open("a.wide.example"), open("allowed.example"));
        world.filter.set(Names { domains: vec!["*.wide.example".parse().unwrap()], ..names() });
        assert!(cut.0.read(&mut [0; 1]).is_err(), "it is reset");
        assert!(matches!(cut.1.read(&mut [0; 1]), Ok(0) | Err(_)));
        kept.1.write_all(b"ok").unwrap();
        kept.0.read_exact(&mut [0; 2]).unwrap();
        assert_eq!(world.gets(SERVER, 80, &request("allowed.example")), None);
        assert_eq!(world.asks("allowed.example"), Err(5));
        // What was told before does not count once it is allowed again.
        world.filter.set(names());
        assert_eq!(world.gets(SERVER, 80, &request("allowed.example")), None);
        // Each direction ends by itself.
        kept.0.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(kept.1.read(&mut [0; 1]).unwrap(), 0);
        kept.1.write_all(b"last words").unwrap();
        drop(kept.1);
        let mut words = String::new();
        kept.0.read_to_string(&mut words).unwrap();
        assert_eq!(words, "last words");

        let World { network, guest, filter, runtime, resolver, .. } = world;
        drop(filter);
        let refused = inside(&guest.netns, || TcpStream::connect((SERVER, 80)));
        assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        drop((guest, runtime));
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"", resolver.local_addr().unwrap()).unwrap();
        network.sweep(&HashSet::new()).unwrap();
        network.close().unwrap();
    });
}
