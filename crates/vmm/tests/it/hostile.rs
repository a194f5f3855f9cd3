//! A VMM that its guest has taken over: this same test program, started in the jail, tries what such a process would. Each
//! row says what it met, and the test outside says which rows there must be.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::chown;
use std::path::Path;
use std::time::Duration;

use vmm::cgroup::CONTROLLERS;
use vmm::process::{Exit, Launch, Process};

use crate::host::{Host, SIZE, USER, eventually};

/// Set in the environment of this test program when it is the hostile VMM.
const HOSTILE: &str = "WRENN_TEST_HOSTILE";
/// What it is told of the capsule beside it: pid of its VMM and path of its record, on the host.
const TOLD: &str = "/run/wrenn/vm/told";
const SECRET: &str = "token of another capsule";

/// A host with another capsule on it, and a program that is this one.
struct World {
    ours: Host,
    other: Host,
    victim: Process,
}

impl World {
    async fn new() -> Self {
        let (ours, other) = (Host::new(), Host::new());
        let record = other.dir.join("record.json");
        fs::write(&record, SECRET).unwrap();
        let victim = other.program("cd /run/wrenn/vm/scratch; echo secret > memory; exec sleep 1000");
        let victim = Launch { user: USER + 1, ..other.launch(&victim) }.spawn().await.unwrap();
        fs::write(ours.dir.join("told"), format!("{} {}", victim.identity().pid, record.display())).unwrap();
        fs::write(ours.dir.join("state"), "what it was saved as").unwrap();
        let disk = ours.dir.join("rootfs.ext4");
        File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        chown(&disk, Some(USER), None).unwrap();
        // What lies beside a program as a library of its own is in its jail.
        std::os::unix::fs::symlink(std::env::current_exe().unwrap(), ours.kernel.with_file_name("libhostile.so"))
            .unwrap();
        Self { ours, other, victim }
    }

    /// Starts the hostile VMM, which then does what that test here does.
    async fn attack(&self, test: &str) -> Process {
        let line = format!("{HOSTILE}=1 exec /vmm/libhostile.so --exact {test} --nocapture");
        self.ours.launch(&self.ours.program(&line)).spawn().await.unwrap()
    }

    /// What it said of each thing that it tried.
    fn rows(&self) -> BTreeMap<String, String> {
        let log = fs::read_to_string(&self.ours.log).unwrap();
        // On a machine of one processor the first follows the name of the test.
        let rows = log.lines().filter_map(|line| line.split_once("tried ")?.1.split_once(": "));
        rows.map(|(name, met)| (name.to_owned(), met.to_owned())).collect()
    }

    async fn end(self) {
        assert_eq!(self.victim.exit(), None, "the other capsule lives");
        self.victim.kill().await.unwrap();
        self.ours.cgroup.kill().await.unwrap();
        self.ours.end().await;
        self.other.end().await;
    }
}

#[tokio::test]
async fn a_hostile_vmm_gets_nowhere() {
    let world = World::new().await;
    let process = world.attack("hostile::be_hostile").await;
    process.exited().await;
    let rows = world.rows();
    let log = fs::read_to_string(&world.ours.log).unwrap();
    for name in ROWS {
        let met = rows.get(*name).unwrap_or_else(|| panic!("it did not try `{name}`:\n{log}"));
        assert!(!met.starts_with("possible"), "{name}: {met}");
    }
    assert_eq!(rows.len(), ROWS.len(), "{log}");
    assert_eq!(fs::read_to_string(world.ours.dir.join("state")).unwrap(), "what it was saved as");
    assert_eq!(fs::read_dir(&world.ours.dir).unwrap().count(), 4, "it made files where it may not");
    world.end().await;
}

#[tokio::test]
async fn processes_and_files_of_a_hostile_vmm_have_an_end() {
    let world = World::new().await;
    let process = world.attack("hostile::be_greedy").await;
    eventually("it has taken what it could", || world.rows().contains_key("all")).await;
    let rows = world.rows();
    let count = |name: &str| rows[name].parse::<u64>().unwrap();
    // Its user has as many processes as a VMM of that size may have, whatever the control group can.
    assert!((2..=192 + 2 * u64::from(SIZE.vcpus)).contains(&count("processes")), "{rows:?}");
    assert!(count("files") <= 2048, "{rows:?}");
    // In its own memory, and on the disk.
    assert!(count("scratch") <= u64::from(SIZE.memory_mib) + 64, "{rows:?}");
    assert!(count("disk") <= u64::from(SIZE.memory_mib.max(SIZE.disk_mib)) + 64, "{rows:?}");
    // The machine has processes and files for others.
    let beside = Launch { user: USER + 2, ..world.other.launch(&world.other.program("exit 0")) }.spawn().await.unwrap();
    assert_eq!(beside.exited().await, Exit::Code(0));
    assert!(world.ours.cgroup.pids().unwrap().len() > 2);
    process.kill().await.unwrap();
    assert!(world.ours.cgroup.pids().unwrap().is_empty());
    world.end().await;
}

#[tokio::test]
async fn memory_of_a_hostile_vmm_has_an_end() {
    let world = World::new().await;
    let limit = world.ours.cgroup.path().join("memory.max");
    let process = world.attack("hostile::be_endless").await;
    if !limit.exists() {
        // On a host whose cgroup 2 has no memory to give there is no limit, which `wrenn doctor` says: nothing to take here.
        let root = world.ours.root.path().parent().unwrap().join("cgroup.controllers");
        assert!(!fs::read_to_string(root).unwrap().split_whitespace().any(|has| has == "memory"));
        process.kill().await.unwrap();
        return world.end().await;
    }
    assert!(CONTROLLERS.contains(&"memory"));
    fs::write(world.ours.dir.join("go"), "").unwrap();
    assert_eq!(process.exited().await, Exit::Signal(9));
    let events = fs::read_to_string(world.ours.cgroup.path().join("memory.events")).unwrap();
    assert!(events.lines().any(|line| line.starts_with("oom_kill ") && line != "oom_kill 0"), "{events}");
    assert!(world.ours.cgroup.pids().unwrap().is_empty(), "all of the group goes, or none");
    world.end().await;
}

/// Everything that [`be_hostile`] tries.
const ROWS: &[&str] = &[
    "another capsule's record",
    "the host's files",
    "its own record",
    "the kernel's settings",
    "another process by pid",
    "the parent's root",
    "another process's memory",
    "tracing",
    "signal to the victim",
    "signal to everybody",
    "a user namespace by unshare",
    "a user namespace by clone",
    "a user namespace by clone3",
    "another network namespace",
    "a mount",
    "the old root",
    "raw packets",
    "kernel tables",
    "a device node",
    "the host's memory",
    "root again",
    "capabilities",
    "what it is",
    "writing to the root",
    "writing to its program",
    "writing to the system",
    "writing to the kernel",
    "making a file beside its disk",
    "removing its disk",
    "writing to what it was saved as",
    "a BPF program",
    "keys",
    "io_uring",
    "a file handle",
];

/// Not a test by itself: what the hostile VMM does.
#[test]
fn be_hostile() {
    if std::env::var_os(HOSTILE).is_none() {
        return;
    }
    let told = fs::read_to_string(TOLD).unwrap();
    let (pid, record) = told.split_once(' ').unwrap();
    let pid: i32 = pid.parse().unwrap();
    tried("another capsule's record", fs::read_to_string(record));
    tried("the host's files", fs::read("/etc/shadow").or_else(|_| fs::read("/root/.bashrc")).map(|file| file.len()));
    tried("its own record", fs::read("/run/wrenn/vm/../record.json").or_else(|_| fs::read("/run/wrenn/record.json")));
    tried("the kernel's settings", fs::read("/proc/sys/kernel/core_pattern").or_else(|_| fs::read("/proc/kallsyms")));
    tried("another process by pid", fs::read(format!("/proc/{pid}/cmdline")));
    tried("the parent's root", fs::read_dir("/proc/1/root/home").map(Iterator::count));
    tried("another process's memory", call(libc::SYS_process_vm_writev, [pid as u64, 0, 0, 0, 0]));
    tried("tracing", call(libc::SYS_ptrace, [libc::PTRACE_ATTACH as u64, pid as u64, 0, 0, 0]));
    tried("signal to the victim", call(libc::SYS_kill, [pid as u64, 9, 0, 0, 0]));
    // Everybody but itself, and it is alone.
    tried("signal to everybody", call(libc::SYS_kill, [u64::MAX, 9, 0, 0, 0]));
    let new_user = libc::CLONE_NEWUSER as u64;
    tried("a user namespace by unshare", call(libc::SYS_unshare, [new_user, 0, 0, 0, 0]));
    tried("a user namespace by clone", call(libc::SYS_clone, [new_user | libc::SIGCHLD as u64, 0, 0, 0, 0]));
    let args = [new_user, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    tried(
        "a user namespace by clone3",
        call(libc::SYS_clone3, [args.as_ptr().expose_provenance() as u64, 64, 0, 0, 0]),
    );
    let netns = File::open("/proc/self/ns/net").unwrap();
    tried(
        "another network namespace",
        call(libc::SYS_setns, [std::os::fd::AsRawFd::as_raw_fd(&netns) as u64, 0, 0, 0, 0]),
    );
    tried("a mount", rustix::mount::mount(c"proc", c"/proc", c"proc", rustix::mount::MountFlags::empty(), None));
    tried("the old root", rustix::process::chroot(c"/run"));
    tried("raw packets", call(libc::SYS_socket, [libc::AF_PACKET as u64, libc::SOCK_RAW as u64, 768, 0, 0]));
    tried("kernel tables", call(libc::SYS_socket, [libc::AF_ALG as u64, libc::SOCK_SEQPACKET as u64, 0, 0, 0]));
    let node = c"/run/wrenn/vm/scratch/sda";
    let block = (libc::S_IFBLK | 0o600) as u64;
    tried("a device node", call(libc::SYS_mknod, [node.as_ptr().expose_provenance() as u64, block, 0x800, 0, 0]));
    tried("the host's memory", File::open("/dev/mem").or_else(|_| File::open("/dev/sda")).map(drop));
    tried("root again", call(libc::SYS_setuid, [0, 0, 0, 0, 0]));
    tried(
        "capabilities",
        rustix::thread::configure_capability_in_ambient_set(rustix::thread::CapabilitySet::SYS_ADMIN, true),
    );
    tried("what it is", as_it_should_be());
    tried("writing to the root", fs::write("/new", ""));
    tried("writing to its program", File::options().append(true).open("/vmm/libhostile.so").map(drop));
    tried("writing to the system", fs::write("/usr/new", ""));
    tried("writing to the kernel", File::options().append(true).open(vmm::KERNEL).map(drop));
    tried("making a file beside its disk", fs::write("/run/wrenn/vm/new", ""));
    tried("removing its disk", fs::remove_file("/run/wrenn/vm/rootfs.ext4"));
    tried("writing to what it was saved as", File::options().append(true).open("/run/wrenn/vm/state").map(drop));
    tried("a BPF program", call(libc::SYS_bpf, [5, 0, 0, 0, 0]));
    tried("keys", call(libc::SYS_keyctl, [0, 0, 0, 0, 0]));
    tried("io_uring", call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]));
    tried("a file handle", call(libc::SYS_open_by_handle_at, [0, 0, 0, 0, 0]));
}

/// Says what came of it. `Ok` of anything is that it was possible.
#[expect(clippy::print_stdout, reason = "this is how it speaks to the test that started it")]
fn tried<T: std::fmt::Debug, E: std::fmt::Display>(what: &str, result: Result<T, E>) {
    match result {
        Ok(came) => println!("tried {what}: possible ({came:?})"),
        Err(error) => println!("tried {what}: {error}"),
    }
    io::stdout().flush().unwrap();
}

fn call(number: libc::c_long, [a, b, c, d, e]: [u64; 5]) -> io::Result<libc::c_long> {
    // SAFETY: each call is refused, or does nothing to this process's memory.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An error when all is as it should be, as of everything that was refused.
fn as_it_should_be() -> Result<String, String> {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or("").split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let user = [USER.to_string(), USER.to_string(), USER.to_string(), USER.to_string()].join(" ");
    let none = "0000000000000000";
    let good = field("Uid") == user
        && field("Gid") == user
        && field("Groups").is_empty()
        && ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].iter().all(|set| field(set) == none)
        && field("NoNewPrivs") == "1"
        && field("Seccomp") == "2"
        && field("Pid") == "1";
    if good { Err("a user without privileges".to_owned()) } else { Ok(status) }
}

/// Not a test by itself: takes all that it can get, but for memory.
#[test]
#[expect(clippy::print_stdout, reason = "this is how it speaks to the test that started it")]
fn be_greedy() {
    if std::env::var_os(HOSTILE).is_none() {
        return;
    }
    let mut files = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        files.push(file);
    }
    println!("tried files: {}", files.len());
    drop(files);
    println!("tried scratch: {}", fill("/run/wrenn/vm/scratch/full"));
    fs::remove_file("/run/wrenn/vm/scratch/full").unwrap();
    println!("tried disk: {}", fill("/run/wrenn/vm/rootfs.ext4"));
    let mut processes = 1;
    while processes < 10_000 {
        // SAFETY: the child makes one system call again and again and nothing else, until the whole group is killed.
        match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            },
            -1 => break,
            _ => processes += 1,
        }
    }
    println!("tried processes: {processes}");
    println!("tried all: of it");
    io::stdout().flush().unwrap();
    loop {
        std::thread::park();
    }
}

/// Writes to a file until that is refused. How many MiB.
fn fill(path: &str) -> u64 {
    let mut file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
    let megabyte = vec![1; 1 << 20];
    (0..4096).take_while(|_| file.write_all(&megabyte).is_ok()).count() as u64
}

/// Not a test by itself: takes memory, for ever.
#[test]
fn be_endless() {
    if std::env::var_os(HOSTILE).is_none() {
        return;
    }
    while !Path::new("/run/wrenn/vm/go").exists() {
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let mut taken = Vec::new();
    loop {
        taken.push(vec![1_u8; 16 << 20]);
    }
}
