use serde_json::{Value, json};
use tokio::net::UnixListener;

use super::*;

fn load<'a>() -> Load<'a> {
    Load {
        state: Path::new("/run/wrenn/vm/state"),
        memory: Memory::Uffd(Path::new("/run/wrenn/vm/uffd.sock")),
        resume: false,
        track_dirty_pages: true,
        tap: None,
        vsock: None,
        clock_realtime: false,
    }
}

fn json_of(load: &Load<'_>, version: &str) -> Value {
    serde_json::to_value(load.request(version.parse().unwrap()).unwrap()).unwrap()
}

#[test]
fn a_boot_is_configured_by_exactly_these_requests() {
    let boot = Boot {
        kernel: Path::new("/images/vmlinux"),
        boot_args: "console=ttyS0",
        rootfs: Path::new("/run/wrenn/vm/rootfs.ext4"),
        vcpus: 2,
        memory_mib: 512,
        tap: "tap0",
        mac: "02:FC:00:00:00:05",
        mtu: None,
    };
    let new: Version = "1.16.1".parse().unwrap();
    let sent = boot.requests(new).map(|(path, body)| (path, serde_json::to_value(body).unwrap()));
    let expected = [
        ("/boot-source", json!({"kernel_image_path": "/images/vmlinux", "boot_args": "console=ttyS0"})),
        (
            "/drives/rootfs",
            json!({"drive_id": "rootfs", "path_on_host": "/run/wrenn/vm/rootfs.ext4", "is_root_device": true, "is_read_only": false}),
        ),
        (
            "/network-interfaces/eth0",
            json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:FC:00:00:00:05",
                "tx_rate_limiter": {"bandwidth": {"size": 209715200, "refill_time": 1000, "one_time_burst": 104857600}}}),
        ),
        ("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 512, "smt": false, "track_dirty_pages": true})),
        ("/mmds/config", json!({"version": "V2", "network_interfaces": ["eth0"]})),
        ("/entropy", json!({})),
    ];
    assert_eq!(sent, expected);

    // Only where it is known.
    for (version, mtu) in [("1.16.0", json!(1420)), ("1.15.1", json!(null))] {
        let boot = Boot { mtu: Some(1420), ..boot };
        let (_, interface) = &boot.requests(version.parse().unwrap())[2];
        assert_eq!(serde_json::to_value(interface).unwrap()["mtu"], mtu, "{version}");
    }
}

#[test]
fn a_load_uses_the_words_of_the_version() {
    let old = json!({
        "snapshot_path": "/run/wrenn/vm/state",
        "mem_backend": {"backend_type": "Uffd", "backend_path": "/run/wrenn/vm/uffd.sock"},
        "resume_vm": false,
        "enable_diff_snapshots": true,
    });
    let new = json!({
        "snapshot_path": "/run/wrenn/vm/state",
        "mem_backend": {"backend_type": "Uffd", "backend_path": "/run/wrenn/vm/uffd.sock"},
        "resume_vm": false,
        "track_dirty_pages": true,
    });
    assert_eq!(json_of(&load(), "1.12.0"), old);
    assert_eq!(json_of(&load(), "1.12.9"), old);
    assert_eq!(json_of(&load(), "1.13.0"), new);
    assert_eq!(json_of(&load(), "1.17.0-dev"), new);
}

#[test]
fn overrides_are_sent_where_known_and_refused_where_not() {
    let all = Load {
        memory: Memory::File(Path::new("/run/wrenn/vm/memory")),
        resume: true,
        tap: Some("tap7"),
        vsock: Some(Path::new("/run/wrenn/vm/v.sock")),
        clock_realtime: true,
        ..load()
    };
    let expected = json!({
        "snapshot_path": "/run/wrenn/vm/state",
        "mem_backend": {"backend_type": "File", "backend_path": "/run/wrenn/vm/memory"},
        "resume_vm": true,
        "track_dirty_pages": true,
        "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap7"}],
        "vsock_override": {"uds_path": "/run/wrenn/vm/v.sock"},
        "clock_realtime": true,
    });
    assert_eq!(json_of(&all, "1.16.0"), expected);

    let before: Version = "1.15.3".parse().unwrap();
    let vsock = all.request(before).unwrap_err().to_string();
    assert_eq!(vsock, "`vsock_override` needs version 1.16.0 of the VMM; this is 1.15.3");
    let clock = Load { vsock: None, ..all }.request(before).unwrap_err().to_string();
    assert_eq!(clock, "`clock_realtime` needs version 1.16.0 of the VMM; this is 1.15.3");
    // A tap can be replaced since the oldest version there is for us.
    assert!(Load { vsock: None, clock_realtime: false, ..all }.request(Version::OLDEST).is_ok());
}

#[test]
fn versions_are_three_numbers_in_order() {
    let parse = |text: &str| text.parse::<Version>();
    assert_eq!(parse("1.12.1").unwrap().to_string(), "1.12.1");
    assert_eq!(parse("1.17.0-dev").unwrap().to_string(), "1.17.0");
    assert!(parse("1.9.0").unwrap() < parse("1.12.0").unwrap());
    assert!(parse("2.0.0").unwrap() > parse("1.99.99").unwrap());
    for text in ["", "1", "1.12", "1.12.x", "1.12.1.2", "v1.12.1", "-1.2.3"] {
        assert!(matches!(parse(text), Err(Error::Version(found)) if found == text), "{text}");
    }
}

#[test]
fn a_snapshot_gets_time_for_its_memory() {
    assert_eq!(snapshot_limit(0), SNAPSHOT_LIMIT);
    assert!(snapshot_limit(1 << 20) > Duration::from_secs(3600), "a terabyte is not written in an hour");
}

/// One answer, byte by byte as given, to one connection.
async fn answer(listener: &UnixListener, bytes: &[u8]) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut buffer).await.unwrap();
        request.extend_from_slice(&buffer[..count]);
        if count == 0 {
            break;
        }
    }
    // A client that has read enough is free to leave.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    String::from_utf8(request).unwrap()
}

/// Where a VMM would be listening.
fn listening() -> (tempfile::TempDir, UnixListener, Scratch) {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join(API_SOCKET)).unwrap();
    let scratch = Scratch::at(directory.path()).unwrap();
    (directory, listener, scratch)
}

async fn ask(bytes: &[u8]) -> Result<InstanceInfo, Error> {
    let (_directory, listener, scratch) = listening();
    let client = Client { scratch, version: Version::OLDEST };
    let (request, result) = futures::join!(answer(&listener, bytes), client.instance_info());
    assert!(request.starts_with("GET / HTTP/1.1\r\n"), "{request}");
    result
}

async fn meet(version: &str) -> Result<Client, Error> {
    let (_directory, listener, scratch) = listening();
    let body = json!({"firecracker_version": version}).to_string();
    let bytes = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let (request, result) =
        futures::join!(answer(&listener, bytes.as_bytes()), Client::listen(&scratch, Duration::from_secs(10)));
    assert!(request.starts_with("GET /version HTTP/1.1\r\n"), "{request}");
    result
}

#[tokio::test]
async fn a_vmm_too_old_is_refused_by_name() {
    assert_eq!(meet("1.12.0").await.unwrap().version(), Version::OLDEST);
    let error = meet("1.11.3").await.unwrap_err();
    assert_eq!(error.to_string(), "the VMM is version 1.11.3; the oldest usable is 1.12.0");
    assert!(matches!(meet("unknown").await, Err(Error::Version(_))));
}

#[tokio::test]
async fn answers_become_values_and_faults_keep_the_words() {
    let body = r#"{"id":"cl-1","state":"Not started","vmm_version":"1.16.1","app_name":"Firecracker"}"#;
    let good = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let info = ask(good.as_bytes()).await.unwrap();
    assert_eq!((info.state, info.id.as_str()), (VmState::NotStarted, "cl-1"));

    let fault = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 26\r\n\r\n{\"fault_message\":\"not so\"}";
    match ask(fault).await.unwrap_err() {
        Error::Fault { request, status, message } => {
            assert_eq!((request.as_str(), status.as_u16(), message.as_str()), ("GET /", 400, "not so"));
        }
        other => panic!("{other}"),
    }
    let bare = b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 7\r\n\r\ntoo big";
    assert!(matches!(ask(bare).await, Err(Error::Fault { message, .. }) if message == "too big"));
    let nonsense = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]";
    assert!(matches!(ask(nonsense).await, Err(Error::Malformed { .. })));
    assert!(matches!(ask(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{").await, Err(Error::Http { .. })));
    assert!(matches!(ask(b"").await, Err(Error::Http { .. })));
    let endless = [b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n".as_slice(), &[b' '; 2_000_000]].concat();
    assert!(matches!(ask(&endless[..MAX_ANSWER + 4096]).await, Err(Error::Http { .. })));
}
