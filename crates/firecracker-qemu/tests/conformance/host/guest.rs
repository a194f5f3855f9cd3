//! The guest: compiled once, packed into an initrd, spoken to over TCP.

use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::{DEADLINE, connect_in};

/// Where the guest listens, on the link to its tap.
const ADDRESS: ([u8; 4], u16) = ([169, 254, 0, 21], 7000);

/// The kernel under test.
pub fn kernel() -> PathBuf {
    if let Some(path) = std::env::var_os("WRENN_KERNEL") {
        return path.into();
    }
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME or a cache is named"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from).join("wrenn");
    let images = std::env::var_os("WRENN_CACHE").map_or(cache, PathBuf::from).join("images");
    let kernels = fs::read_dir(&images).into_iter().flatten().flatten().map(|entry| entry.path());
    let named =
        kernels.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinux-")));
    named
        .max_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).ok())
        .unwrap_or_else(|| panic!("no vmlinux-* in {}; set WRENN_KERNEL", images.display()))
}

/// The initrd with the guest program as its init, made by the first test that needs it.
pub fn initrd() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/main.rs");
        let digest = hex::encode(&Sha256::digest(fs::read(&source).unwrap())[..8]);
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let initrd = directory.join(format!("guest-{digest}.cpio"));
        // Tests are processes of their own under nextest: one compiles, the others wait for it.
        let lock = fs::File::create(directory.join("guest.lock")).unwrap();
        lock.lock().unwrap();
        if !initrd.exists() {
            let program = directory.join(format!("guest-{digest}"));
            let options = ["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"];
            let compiled = Command::new("rustc").args(options).arg(&program).arg(&source).status().unwrap();
            assert!(compiled.success(), "the guest does not compile");
            let unfinished = initrd.with_extension("new");
            fs::write(&unfinished, archive(&fs::read(&program).unwrap())).unwrap();
            fs::rename(&unfinished, &initrd).unwrap();
        }
        initrd
    })
}

/// Compiles it where there is a compiler, for suites that run where there is none.
#[test]
fn the_guest_is_made() {
    assert!(fs::metadata(initrd()).unwrap().len() > 64 << 10);
}

/// A cpio archive in the `newc` format with what the kernel needs to start `init`.
fn archive(init: &[u8]) -> Vec<u8> {
    const DIRECTORY: u32 = 0o040_755;
    const PROGRAM: u32 = 0o100_755;
    let mut archive = Vec::new();
    let entries = [("dev", DIRECTORY, &b""[..]), ("init", PROGRAM, init), ("TRAILER!!!", 0, b"")];
    for (inode, (name, mode, data)) in (1_u32..).zip(entries) {
        let size = u32::try_from(data.len()).unwrap();
        let name_size = u32::try_from(name.len() + 1).unwrap();
        // inode, mode, uid, gid, links, mtime, size, device, of device, name size, checksum
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        archive.extend_from_slice(b"070701");
        archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// A connection to the guest.
pub struct Guest {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Guest {
    pub fn connect(namespace: &str) -> Self {
        let stream = connect_in(namespace, SocketAddr::from(ADDRESS)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        Self { stream, lines }
    }

    /// Runs one command; its answer, or what went wrong in the guest.
    pub fn try_run(&mut self, command: &str) -> Result<String, String> {
        self.ask(command);
        self.answer()
    }

    /// Sends one command.
    pub fn ask(&mut self, command: &str) {
        writeln!(self.stream, "{command}").unwrap();
    }

    /// Whether nothing comes from the guest for so long.
    pub fn silent_for(&mut self, time: Duration) -> bool {
        self.stream.set_read_timeout(Some(time)).unwrap();
        let silent = self.stream.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        self.stream.set_read_timeout(Some(DEADLINE)).unwrap();
        silent
    }

    /// Takes the answer to what was [asked](Self::ask).
    pub fn answer(&mut self) -> Result<String, String> {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("ok", answer) => Ok(answer.to_owned()),
            ("error", reason) => Err(reason.to_owned()),
            _ => panic!("the guest hung up: {line:?}"),
        }
    }

    /// Runs one command that must succeed.
    #[track_caller]
    pub fn run(&mut self, command: &str) -> String {
        self.try_run(command).unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// Has the guest send `count` bytes.
    pub fn download(&mut self, count: u64) {
        writeln!(self.stream, "send {count}").unwrap();
        let got = std::io::copy(&mut (&mut self.lines).take(count), &mut std::io::sink()).unwrap();
        assert_eq!(got, count);
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), "ok");
    }

    /// Sends the guest `count` bytes, until it has them.
    pub fn upload(&mut self, count: usize) {
        writeln!(self.stream, "receive {count}").unwrap();
        self.stream.write_all(&vec![0xa5; count]).unwrap();
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), format!("ok {count}"));
    }
}
