//! The forwarder in a network namespace of its own, called from another one through a veth pair. Needs root.

use super::*;
use crate::sys::net::enter_new_network;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);

fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs `inside` on a thread in a guest's namespace with the forwarder at work, given what calls a port from outside.
fn in_guest(inside: impl AsyncFnOnce(Caller) + Send) {
    let on_its_own = |work: Box<dyn FnOnce() + Send + '_>| {
        thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    };
    on_its_own(Box::new(|| {
        enter_new_network();
        let outside = File::open("/proc/thread-self/ns/net").unwrap();
        on_its_own(Box::new(|| {
            enter_new_network();
            let tid = rustix::thread::gettid().as_raw_nonzero();
            sh("ip link set lo up");
            let make = format!(
                "ip link add wire type veth peer name eth0 netns /proc/{0}/task/{tid}/ns/net
                 ip addr add 169.254.0.22/30 dev wire; ip link set wire up",
                std::process::id()
            );
            let far = outside.try_clone().unwrap();
            on_its_own(Box::new(move || {
                move_into_link_name_space(far.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                sh(&make);
            }));
            sh("ip addr add 169.254.0.21/30 dev eth0; ip link set eth0 up");
            runtime().block_on(async {
                let forwarder = open().unwrap();
                let forwarder = tokio::spawn(serve(forwarder));
                inside(Caller(outside)).await;
                forwarder.abort();
            });
        }));
    }));
}

/// Stands outside.
struct Caller(File);

impl Caller {
    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let outside = self.0.try_clone().unwrap();
        let connected = tokio::task::spawn_blocking(move || {
            thread::scope(|scope| {
                let dial = scope.spawn(|| {
                    move_into_link_name_space(outside.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                    let stream = std::net::TcpStream::connect((GUEST, port))?;
                    stream.set_nonblocking(true)?;
                    io::Result::Ok(stream)
                });
                dial.join().unwrap()
            })
        });
        TcpStream::from_std(connected.await.unwrap()?)
    }

    /// Everything a port says.
    async fn hear(&self, port: u16) -> io::Result<String> {
        let mut text = String::new();
        self.connect(port).await?.read_to_string(&mut text).await?;
        Ok(text)
    }
}

/// Greets each caller with its own name and the caller's address as it sees it.
async fn greeter(address: &str) -> (u16, tokio::task::JoinHandle<()>) {
    let name = address.to_owned();
    let listener = TcpListener::bind(address).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        loop {
            let (mut stream, peer) = listener.accept().await.unwrap();
            stream.write_all(format!("{name} {}", peer.ip()).as_bytes()).await.unwrap();
        }
    });
    (port, task)
}

#[test]
fn loopback_listeners_are_reached_and_others_are_left_alone() {
    in_guest(async |outside| {
        for (address, greeting) in [
            ("127.0.0.1:0", "127.0.0.1:0 127.0.0.1"),
            ("[::1]:0", "[::1]:0 ::1"),
            // These see who really calls: nothing of ours is in between.
            ("0.0.0.0:0", "0.0.0.0:0 169.254.0.22"),
            ("169.254.0.21:0", "169.254.0.21:0 169.254.0.22"),
            ("[::]:0", "[::]:0 ::ffff:169.254.0.22"),
        ] {
            let (port, task) = greeter(address).await;
            assert_eq!(outside.hear(port).await.unwrap(), greeting);
            assert_eq!(outside.hear(port).await.unwrap(), greeting, "the second time too");
            task.abort();
            let _ = task.await;
            let gone = outside.hear(port).await;
            assert!(gone.is_err(), "{address} is gone, and yet {gone:?}");
        }
    });
}

#[test]
fn of_two_listeners_on_one_port_the_outer_one_is_reached() {
    in_guest(async |outside| {
        let (port, _inner) = greeter("127.0.0.1:0").await;
        assert_eq!(outside.hear(port).await.unwrap(), "127.0.0.1:0 127.0.0.1");
        let (_, outer) = greeter(&format!("169.254.0.21:{port}")).await;
        assert_eq!(outside.hear(port).await.unwrap(), format!("169.254.0.21:{port} 169.254.0.22"));
        outer.abort();
        let _ = outer.await;
        assert_eq!(outside.hear(port).await.unwrap(), "127.0.0.1:0 127.0.0.1");
    });
}

#[test]
fn each_direction_ends_by_itself() {
    in_guest(async |outside| {
        const BYTES: usize = 8 << 20;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let service = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut all = Vec::new();
            // Only the end of what the client sends makes the service answer.
            stream.read_to_end(&mut all).await.unwrap();
            stream.write_all(&all).await.unwrap();
        });
        let mut client = outside.connect(port).await.unwrap();
        let sent: Vec<u8> = (0..BYTES).map(|at| (at / 7) as u8).collect();
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).await.unwrap();
        service.await.unwrap();
        assert!(back == sent);
    });
}

#[test]
fn a_service_that_is_starting_is_waited_for_and_our_own_port_is_nobodys() {
    in_guest(async |outside| {
        let reserved = TcpSocket::new_v4().unwrap();
        reserved.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let port = reserved.local_addr().unwrap().port();
        let call = outside.connect(port).await.unwrap();
        let listener = reserved.listen(1).unwrap();
        let (mut service, _) = listener.accept().await.unwrap();
        service.write_all(b"late").await.unwrap();
        drop(service);
        let mut text = String::new();
        let mut call = call;
        call.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "late");

        let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        let ours = table.lines().filter(|line| line.contains(" 0100007F:") && line.contains(" 0A "));
        let mut ports =
            ours.map(|line| u16::from_str_radix(line.split(':').nth(2).unwrap().get(..4).unwrap(), 16).unwrap());
        let forwarder = ports.find(|found| *found != port).unwrap();
        assert!(outside.hear(forwarder).await.is_err());
    });
}

#[test]
fn the_rule_is_what_nft_reads() {
    in_guest(async |_| {
        let ruleset = sh("nft list ruleset");
        assert_eq!(ruleset.matches("table ").count(), 1, "{ruleset}");
        assert!(ruleset.contains("hook prerouting priority mangle; policy accept;"), "{ruleset}");
        let again = open().unwrap();
        let port = again.local_addr().unwrap().port();
        let ruleset = sh("nft list ruleset");
        assert_eq!((ruleset.matches("table ").count(), ruleset.matches("tproxy").count()), (1, 1), "{ruleset}");
        assert!(ruleset.contains(&format!("tproxy to 127.0.0.1:{port}")), "{ruleset}");
    });
}
