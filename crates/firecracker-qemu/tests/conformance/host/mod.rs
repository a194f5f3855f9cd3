//! What every test stands on: a scratch directory and a network namespace that are gone when the test is.

pub mod guest;
pub mod http;
pub mod pager;
pub mod vm;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tempfile::TempDir;

use vm::Vm;

/// Nothing in this suite takes this long; a test that waits longer fails instead of hanging.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// A directory and any number of namespaces, counted out at the end.
pub struct Host {
    scratch: Option<TempDir>,
    namespaces: std::cell::RefCell<Vec<String>>,
}

impl Host {
    pub fn new() -> Self {
        Self { scratch: Some(TempDir::with_prefix("fc-conformance-").unwrap()), namespaces: Default::default() }
    }

    /// A path in the scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.as_ref().unwrap().path().join(name)
    }

    /// A sparse file of `size` bytes in the scratch directory.
    pub fn disk(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// A process with nothing configured, in a namespace with a tap called `tap`.
    pub fn vm_on(&self, tap: &str) -> Vm {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("fcq-{}-{number}", std::process::id());
        ip(&["netns", "add", &namespace]);
        self.namespaces.borrow_mut().push(namespace.clone());
        let within = |arguments: &[&str]| ip(&[&["-n", &namespace], arguments].concat());
        within(&["tuntap", "add", tap, "mode", "tap"]);
        within(&["addr", "add", "169.254.0.22/30", "dev", tap]);
        // The host would send packets of its own, which a VMM puts into the guest's memory even while that is paused.
        within(&["link", "set", tap, "addrgenmode", "none"]);
        // The same everywhere: a restored guest still has it in its neighbour table.
        within(&["link", "set", tap, "address", "02:fc:00:00:00:06", "up"]);
        within(&["neigh", "replace", "169.254.0.21", "lladdr", vm::MAC, "dev", tap, "nud", "permanent"]);
        Vm::start(self, namespace)
    }

    /// [`vm_on`](Self::vm_on) `tap0`.
    pub fn vm(&self) -> Vm {
        self.vm_on("tap0")
    }

    /// A microVM that has booted the suite's guest.
    pub fn booted(&self) -> Vm {
        let mut vm = self.vm();
        vm.configure();
        vm.boot();
        vm
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let Some(scratch) = self.scratch.take() else { return };
        let directory = scratch.path().to_owned();
        let left = still_running(&self.namespaces.borrow());
        for namespace in self.namespaces.borrow().iter() {
            ip(&["netns", "del", namespace]);
        }
        scratch.close().unwrap();
        if !thread::panicking() {
            assert_eq!(left, Vec::<String>::new(), "processes outlived their microVM");
            for namespace in self.namespaces.borrow().iter() {
                assert!(!Path::new("/run/netns").join(namespace).exists(), "{namespace} is left");
            }
            assert!(!directory.exists(), "{} is left", directory.display());
        }
    }
}

/// Connects from within a network namespace; the socket stays there.
pub fn connect_in(namespace: &str, address: SocketAddr) -> std::io::Result<TcpStream> {
    let path = Path::new("/run/netns").join(namespace);
    thread::spawn(move || {
        let namespace = fs::File::open(path)?;
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network))?;
        let stream = TcpStream::connect_timeout(&address, DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    })
    .join()
    .unwrap()
}

/// Asks again, a few milliseconds apart, until there is an answer; for what sends no event.
pub fn until<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    until_every(Duration::from_millis(5), what, ask)
}

/// [`until`], but so far apart that the asking takes nothing from what is waited for.
pub fn until_every<T>(pause: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(started.elapsed() < DEADLINE, "waited too long for {what}");
        thread::park_timeout(pause);
    }
}

/// Processes, zombies aside, in one of the namespaces. They are given a moment to end: the kernel ends QEMU after its
/// parent is reaped.
fn still_running(namespaces: &[String]) -> Vec<String> {
    let inode = |path: PathBuf| fs::metadata(path).ok().map(|data| data.ino());
    let ours: Vec<u64> = namespaces.iter().map(|name| inode(Path::new("/run/netns").join(name)).unwrap()).collect();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let left: Vec<String> = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse::<u32>().ok())
            .filter(|pid| inode(format!("/proc/{pid}/ns/net").into()).is_some_and(|its| ours.contains(&its)))
            .map(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " "))
            .filter(|command| !command.is_empty())
            .collect();
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        thread::park_timeout(Duration::from_millis(20));
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
