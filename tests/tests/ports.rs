//! What listens in a capsule is reached from its host, on whatever address it listens, as soon as and as long as it does.

use std::io::Read;
use std::net::{Ipv4Addr, TcpStream};

use end_to_end::Up;
use serde_json::Value;

/// Answers the port with the address its listener was given, until it is killed.
const SERVER: &str = "import socket, sys
kind = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), family=kind)
print('listening', flush=True)
while True:
    peer = listener.accept()[0]
    peer.sendall(sys.argv[1].encode())
    peer.close()";

/// The address under which the host has the only capsule of `up`.
fn host_address(up: &Up) -> Ipv4Addr {
    let directory = std::fs::read_dir(up.capsules()).unwrap().next().unwrap().unwrap().path();
    let record: Value = serde_json::from_slice(&std::fs::read(directory.join("record.json")).unwrap()).unwrap();
    let [high, low] = u16::try_from(record["slot"].as_u64().unwrap()).unwrap().to_be_bytes();
    Ipv4Addr::new(10, 11, high, low)
}

fn hear(address: Ipv4Addr, port: u16) -> std::io::Result<String> {
    let mut text = String::new();
    TcpStream::connect((address, port))?.read_to_string(&mut text)?;
    Ok(text)
}

#[tokio::test]
async fn listeners_are_reached_wherever_they_listen_and_as_long_as_they_do() {
    let up = Up::start();
    let id = up.create().await;
    let host = host_address(&up);
    assert_eq!(up.output(&id, &format!("printf %s \"{SERVER}\" >/tmp/server.py && echo ok")).await, "ok");
    for (port, address) in (8001..).zip(["127.0.0.1", "::1", "0.0.0.0", "::", "169.254.0.21"]) {
        assert!(hear(host, port).is_err(), "nobody listens yet");
        let start = format!(
            "python3 /tmp/server.py {address} {port} >/tmp/log{port} 2>&1 & echo $! >/tmp/pid; \
             while ! grep -qs listening /tmp/log{port}; do sleep 0.01; done"
        );
        up.output(&id, &start).await;
        // At once, and again.
        for _ in 0..2 {
            assert_eq!(hear(host, port).unwrap(), address);
        }
        up.output(&id, "kill $(cat /tmp/pid); while kill -0 $(cat /tmp/pid) 2>/dev/null; do sleep 0.01; done").await;
        assert!(hear(host, port).is_err(), "{address} is gone");
    }
    // A service that many call at once, on the loopback, without a process for any of them.
    let before = up.processes(&id).await;
    let start = "python3 /tmp/server.py 127.0.0.1 9000 >/tmp/log9000 2>&1 & \
        while ! grep -qs listening /tmp/log9000; do sleep 0.01; done; echo $!";
    let server = up.output(&id, start).await;
    let calls: Vec<_> = (0..50).map(|_| std::thread::spawn(move || hear(host, 9000))).collect();
    assert!(calls.into_iter().all(|call| call.join().unwrap().unwrap() == "127.0.0.1"));
    up.output(&id, &format!("kill {server}; while kill -0 {server} 2>/dev/null; do sleep 0.01; done")).await;
    assert_eq!(up.processes(&id).await, before);
}
