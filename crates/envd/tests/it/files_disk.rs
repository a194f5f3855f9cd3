//! Uploads that do not go well, what others see of those that do, and what all of them cost.

use crate::files::{Answer, OCTETS, call, encoded, get, noise, put};
use crate::harness::{Envd, eventually};
use crate::wire::response;
use rustix::fs::inotify;
use rustix::mount::{MountFlags, UnmountFlags};
use sha2::{Digest, Sha256};
use std::ffi::CString;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// A file system of a few megabytes.
struct Small {
    directory: TempDir,
}

impl Small {
    fn memory(options: &str) -> Small {
        let directory = tempfile::tempdir().unwrap();
        let options = CString::new(options).unwrap();
        rustix::mount::mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
        Small { directory }
    }

    /// Blocks are only found when they are needed, and a loop device goes with its mount.
    fn ext4(image: &Path) -> Small {
        let directory = tempfile::tempdir().unwrap();
        std::fs::File::create(image).unwrap().set_len(8 << 20).unwrap();
        let run = |program: &str, arguments: &[&Path]| {
            let done = std::process::Command::new(program).args(arguments).output().unwrap();
            assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        };
        run("mkfs.ext4", &[Path::new("-q"), Path::new("-m0"), Path::new("-Onone,extent"), image]);
        run("mount", &[Path::new("-oloop"), image, directory.path()]);
        Small { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Free blocks and inodes.
    fn free(&self) -> (u64, u64) {
        let found = rustix::fs::statvfs(self.directory.path()).unwrap();
        (found.f_bfree, found.f_ffree)
    }

    fn names(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "lost+found");
        names.sort();
        names
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        rustix::mount::unmount(self.directory.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_is_said_and_nothing_is_lost() {
    let image = tempfile::tempdir().unwrap();
    for disk in [Small::memory("size=4m"), Small::ext4(&image.path().join("image"))] {
        let envd = Envd::start();
        let full = |answer: Answer| assert!(answer.refused(507).contains("No space left"), "{}", answer.head);
        std::fs::write(disk.path("kept"), noise(300_000)).unwrap();
        let free = disk.free();
        // Far more than there is, so that the client still sends when it fails.
        full(put(&envd, &disk.path("large"), &[], &noise(40_000_000)));
        full(put(&envd, &disk.path("kept"), &[], &noise(10_000_000)));
        eventually("the room is back", || disk.free() == free).await;
        assert_eq!(disk.names(), ["kept"]);

        // Now for the small ones: hardly any room.
        let room = |leave: u64| {
            let found = rustix::fs::statvfs(disk.path("")).unwrap();
            let length = (found.f_bavail * found.f_bsize).saturating_sub(leave);
            std::fs::write(disk.path("filler"), noise(length as usize)).unwrap();
        };
        room(200_000);
        std::fs::write(disk.path("sparse"), "").unwrap();
        std::fs::File::options().write(true).open(disk.path("sparse")).unwrap().set_len(1_000_000).unwrap();
        full(put(&envd, &disk.path("new"), &[], &noise(1_000_000)));
        full(put(&envd, &disk.path("kept"), &[], &noise(1_000_001)[1..]));
        full(put(&envd, &disk.path("sparse"), &[], &noise(1_000_001)[1..]));
        assert_eq!(disk.names(), ["filler", "kept", "sparse"]);
        assert!(std::fs::read(disk.path("kept")).unwrap() == noise(300_000));
        assert!(std::fs::read(disk.path("sparse")).unwrap() == vec![0; 1_000_000]);
        // What fits where something was goes there.
        put(&envd, &disk.path("kept"), &[], &noise(300_001)[1..]).written();
        assert!(std::fs::read(disk.path("kept")).unwrap() == noise(300_001)[1..]);

        let body = serde_json::json!({"source_paths": [disk.path("filler")], "destination": disk.path("sparse")});
        full(call(envd.address, "POST", "/files/compose", &[], body.to_string().as_bytes()));
        assert_eq!(disk.names(), ["filler", "kept", "sparse"]);
        assert!(std::fs::read(disk.path("sparse")).unwrap() == vec![0; 1_000_000]);
    }
}

#[test]
fn no_inode_left_is_a_full_disk() {
    let disk = Small::memory("size=8m,nr_inodes=3");
    let envd = Envd::start();
    put(&envd, &disk.path("one"), &[], b"1").written();
    put(&envd, &disk.path("two"), &[], b"2").written();
    for size in [5, 2_000_000] {
        put(&envd, &disk.path("three"), &[], &noise(size)).refused(507);
    }
    assert_eq!(disk.names(), ["one", "two"]);
}

/// Sends the head of an upload and a part of its body.
fn begin(address: SocketAddr, path: &Path, promised: usize, sent: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    let path = encoded(path.to_str().unwrap());
    let head = format!("POST /files?path={path} HTTP/1.1\r\nHost: x\r\n{OCTETS}\r\nContent-Length: {promised}\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(sent).unwrap();
    socket
}

#[tokio::test]
async fn a_client_that_leaves_leaves_nothing() {
    let disk = Small::memory("size=64m");
    let envd = Envd::start();
    std::fs::write(disk.path("kept"), "old").unwrap();
    let before = (disk.free(), envd.open_files());
    for sent in [100, 1 << 20, 10_000_000] {
        for name in ["new", "kept"] {
            let socket = begin(envd.address, &disk.path(name), 20_000_000, &noise(sent));
            if sent > 1 << 20 {
                // It is on the disk, under no name.
                eventually("bytes on the disk", || disk.free().0 < before.0.0).await;
            }
            assert_eq!(disk.names(), ["kept"]);
            drop(socket);
            eventually("nothing left", || (disk.free(), envd.open_files()) == before).await;
        }
    }
    assert_eq!((disk.names(), std::fs::read(disk.path("kept")).unwrap()), (vec!["kept".to_owned()], b"old".to_vec()));
}

// The server is in this process, and the client blocks.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_client_is_told_and_leaves_nothing() {
    let disk = Small::memory("size=64m");
    let settings = Arc::new(envd::settings::Settings::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = envd::files::http::router::<()>(settings, Duration::from_secs(3));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let free = disk.free();
    for sent in [0, 100, 5_000_000] {
        let mut socket = begin(address, &disk.path("file"), 10_000_000, &noise(sent));
        let wire = tokio::task::spawn_blocking(move || {
            let mut wire = Vec::new();
            socket.read_to_end(&mut wire).map(|_| wire)
        });
        let (status, head, body) = response(&wire.await.unwrap().unwrap());
        assert_eq!(
            (status, serde_json::from_slice::<serde_json::Value>(&body).unwrap()["code"].as_u64()),
            (408, Some(408))
        );
        assert!(head.contains("connection: close"), "{head}");
        eventually("nothing left", || disk.free() == free).await;
    }
    assert!(disk.names().is_empty());
    // Slow is not silent: all of it takes longer than the limit.
    let mut socket = begin(address, &disk.path("slow"), 10, b"");
    for byte in b"0123456789" {
        tokio::time::sleep(Duration::from_millis(400)).await;
        socket.write_all(&[*byte]).unwrap();
    }
    let answer = tokio::task::spawn_blocking(move || {
        let mut answer = [0; 12];
        socket.read_exact(&mut answer).map(|()| answer)
    });
    assert_eq!(&answer.await.unwrap().unwrap(), b"HTTP/1.1 200");
    assert_eq!(std::fs::read(disk.path("slow")).unwrap(), b"0123456789");
}

/// What happens in a directory, as E2B's clients see it.
struct Watch(rustix::fd::OwnedFd);

impl Watch {
    fn on(directory: &Path) -> Watch {
        let fd = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        let flags = inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::ATTRIB
            | inotify::WatchFlags::MOVE
            | inotify::WatchFlags::DELETE;
        inotify::add_watch(&fd, directory, flags).unwrap();
        Watch(fd)
    }

    fn seen(&self) -> Vec<(String, &'static str)> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut seen = Vec::new();
        while let Ok(event) = reader.next() {
            let kinds = [
                (inotify::ReadFlags::CREATE, "create"),
                (inotify::ReadFlags::MOVED_TO, "create"),
                (inotify::ReadFlags::ATTRIB, "chmod"),
                (inotify::ReadFlags::MODIFY, "write"),
            ];
            let kind = kinds.iter().find(|(flag, _)| event.events().contains(*flag)).map_or("other", |(_, kind)| kind);
            seen.push((event.file_name().unwrap_or_default().to_string_lossy().into_owned(), kind));
        }
        seen
    }
}

#[test]
fn watchers_see_one_of_each() {
    let (envd, root) = (Envd::start(), tempfile::tempdir().unwrap());
    let expected = |name: &str, kinds: &[&'static str]| -> Vec<(String, &'static str)> {
        kinds.iter().map(|kind| (name.to_owned(), *kind)).collect()
    };
    let watch = Watch::on(root.path());
    for size in [1, 100_000, (1 << 20) - 1, 1 << 20, 5_000_000] {
        let name = format!("f{size}");
        put(&envd, &root.path().join(&name), &[], &noise(size)).written();
        assert_eq!(watch.seen(), expected(&name, &["create", "chmod", "write"]), "{size}");
    }
    put(&envd, &root.path().join("empty"), &[], b"").written();
    assert_eq!(watch.seen(), expected("empty", &["create", "chmod"]));
    // Overwriting: the owner and the contents change; what is replaced comes anew.
    put(&envd, &root.path().join("f1"), &[], b"2").written();
    assert_eq!(watch.seen(), expected("f1", &["chmod", "write"]));
    put(&envd, &root.path().join("f1"), &[], &noise(2_000_000)).written();
    assert_eq!(watch.seen(), expected("f1", &["create", "chmod", "write"]));
    // Reading is nobody's business.
    get(&envd, &root.path().join("f1"), &[]);
    assert_eq!(watch.seen(), []);
}

/// 256 MiB in each direction: as many bytes as a test has time for, and a hundred times what a transfer may hold.
#[test]
fn memory_is_flat_whatever_the_size() {
    const LENGTH: u64 = 256 << 20;
    let (envd, root) = (Envd::start(), tempfile::tempdir().unwrap());
    let path = root.path().join("large");
    for _ in 0..3 {
        put(&envd, &path, &[], &noise(8 << 20)).written();
        get(&envd, &path, &[]);
    }
    let before = envd.resident();
    let piece = noise(1 << 20);
    let mut sent = Sha256::new();
    let mut most = 0;
    let mut socket = begin(envd.address, &path, LENGTH as usize, b"");
    for number in 0..LENGTH / piece.len() as u64 {
        // Every megabyte is another one.
        let mut piece = piece.clone();
        piece[..8].copy_from_slice(&number.to_le_bytes());
        sent.update(&piece);
        socket.write_all(&piece).unwrap();
        most = most.max(envd.resident());
    }
    let mut status = [0; 12];
    socket.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");

    let mut socket = TcpStream::connect(envd.address).unwrap();
    let target = encoded(path.to_str().unwrap());
    write!(socket, "GET /files?path={target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_exact(&mut buffer[..1]).unwrap();
        head.push(buffer[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 200"));
    let (mut received, mut length) = (Sha256::new(), 0);
    loop {
        match socket.read(&mut buffer).unwrap() {
            0 => break,
            count => {
                received.update(&buffer[..count]);
                length += count as u64;
                most = most.max(envd.resident());
            }
        }
    }
    assert_eq!((length, received.finalize()), (LENGTH, sent.finalize()));
    assert!(most < before + (16 << 20), "from {before} to {most} bytes");
}

#[tokio::test]
async fn a_file_that_shrinks_under_a_download_ends_the_connection() {
    let (envd, root) = (Envd::start(), tempfile::tempdir().unwrap());
    let path = root.path().join("file");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut socket = TcpStream::connect(envd.address).unwrap();
    let target = encoded(path.to_str().unwrap());
    write!(socket, "GET /files?path={target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    socket.read_exact(&mut [0; 100]).unwrap();
    file.set_len(10).unwrap();
    let mut rest = Vec::new();
    // Either way the client counts fewer bytes than were promised.
    let _ = socket.read_to_end(&mut rest);
    assert!(rest.len() < 64 << 20);
    drop(socket);
    let files = envd.open_files();
    eventually("the file is closed", || envd.open_files() <= files).await;
    assert_eq!(get(&envd, &path, &[]).body, [0; 10]);
}
