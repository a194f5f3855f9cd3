//! Killed at every point at which it changes something on disk, the store loses nothing that was committed.
//!
//! The life of a capsule runs in a child process that is traced and killed with SIGKILL as it enters its n-th changing
//! system call, for every n there is. What a loss of power does beyond that is not shown here.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use snapshot::{Collected, MERGE_AT, Merged, PAGE_SIZE, Snapshot, Store};

const PAGES: usize = 64;
const PAGE: usize = PAGE_SIZE as usize;
/// Tells the child where to work.
const DIR: &str = "SNAPSHOT_CRASH_DIR";

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    Pause(usize),
    Merge,
    Fork,
    RemoveParent,
    Collect,
}

fn steps() -> Vec<Step> {
    let mut steps: Vec<_> = (0..MERGE_AT).map(Step::Pause).collect();
    steps.extend([Step::Merge, Step::Collect, Step::Pause(MERGE_AT), Step::Fork, Step::RemoveParent, Step::Collect]);
    steps
}

fn parent_header(dir: &Path) -> PathBuf {
    dir.join("parent")
}

fn fork_header(dir: &Path) -> PathBuf {
    dir.join("fork")
}

/// What a pause finds written: a page and its content. The last one takes most of the first generations out of use.
fn writes(pause: usize) -> impl Iterator<Item = (usize, Vec<u8>)> {
    (0..12).map(move |write| {
        let page = (pause * 5 + write) % PAGES;
        let content = if write % 3 == 2 { 0 } else { pause as u8 + 1 };
        (page, vec![content; PAGE])
    })
}

fn diff(dir: &Path, pause: usize) -> PathBuf {
    dir.join(format!("diff-{pause}"))
}

/// Memory of the parent and of the fork after so many steps; `None` while there is no header.
fn expected(done: usize) -> [Option<Vec<u8>>; 2] {
    let (mut parent, mut fork) = (None::<Vec<u8>>, None);
    for step in &steps()[..done] {
        match step {
            Step::Pause(pause) => {
                let memory = parent.get_or_insert_with(|| vec![0; PAGES * PAGE]);
                for (page, content) in writes(*pause) {
                    memory[page * PAGE..(page + 1) * PAGE].copy_from_slice(&content);
                }
            }
            Step::Fork => fork.clone_from(&parent),
            Step::RemoveParent => parent = None,
            Step::Merge | Step::Collect => {}
        }
    }
    [parent, fork]
}

/// The child: does every step and says so.
fn live(dir: &Path) {
    let (parent, fork) = (parent_header(dir), fork_header(dir));
    let (store, _) = Store::open(dir, []).unwrap();
    for (number, step) in steps().into_iter().enumerate() {
        match step {
            Step::Pause(pause) => {
                let diff = File::open(diff(dir, pause)).unwrap();
                let packed = store.pack(&diff, parent.exists().then_some(&*parent)).unwrap();
                store.commit(&packed, &parent).unwrap();
            }
            Step::Merge => {
                assert!(matches!(store.merge(&parent, &AtomicBool::new(false)).unwrap(), Merged::Done(_)));
            }
            Step::Fork => store.link(&parent, &fork).unwrap(),
            Step::RemoveParent => store.remove(&parent).unwrap(),
            Step::Collect => _ = store.collect().unwrap(),
        }
        let mut out = std::io::stdout();
        writeln!(out, "\n@{}", number + 1).unwrap();
        out.flush().unwrap();
    }
}

fn read(store: &Store, header: &Path) -> Vec<u8> {
    let snapshot = Snapshot::open(store.generations(), header).unwrap();
    let mut memory = vec![0; PAGES * PAGE];
    snapshot.read_exact_at(&mut memory, 0).unwrap();
    memory
}

/// What the next agent does and must find after the child was killed in its step `done`.
fn check(dir: &Path, done: usize) {
    let headers = [parent_header(dir), fork_header(dir)];
    let there = headers.iter().filter(|header| header.exists()).cloned();
    let (store, broken) = Store::open(dir, there).unwrap();
    assert!(broken.is_empty(), "{broken:?}");
    let found = headers.each_ref().map(|header| header.exists().then(|| read(&store, header)));
    let is_whole = |done: usize| done <= steps().len() && expected(done) == found;
    assert!(is_whole(done) || is_whole(done + 1), "neither what was before {:?} nor after", steps().get(done));
    store.collect().unwrap();
    let audit = store.audit().unwrap();
    assert_eq!((audit.garbage, audit.broken.len(), audit.foreign.len()), (Collected::default(), 0, 0));
    // Life goes on from there.
    for (header, before) in headers.iter().zip(found) {
        let Some(mut memory) = before else { continue };
        let packed = store.pack(&File::open(diff(dir, 3)).unwrap(), Some(header)).unwrap();
        store.commit(&packed, header).unwrap();
        for (page, content) in writes(3) {
            memory[page * PAGE..(page + 1) * PAGE].copy_from_slice(&content);
        }
        assert!(read(&store, header) == memory);
        store.remove(header).unwrap();
    }
    store.collect().unwrap();
    assert_eq!(fs::read_dir(store.generations()).unwrap().count(), 0);
    // What a first commit left beside its header is gone once the header is named to the store.
    Store::open(dir, headers).unwrap();
    let left = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| !name.starts_with("diff-")).collect::<Vec<_>>(), ["generations"]);
}

/// Whether a system call changes what is on disk, by its number and arguments.
fn is_change(number: i64, args: &[u64; 6]) -> bool {
    match number {
        libc::SYS_openat => args[2] as i32 & libc::O_CREAT != 0,
        // Not what it prints.
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_pwritev | libc::SYS_writev => args[0] > 2,
        libc::SYS_fsync | libc::SYS_fdatasync | libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => true,
        libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_mkdir | libc::SYS_mkdirat | libc::SYS_ftruncate => true,
        _ => false,
    }
}

/// Runs the child and kills it as it enters its change number `at`. Says how many steps it reported, and whether it
/// was killed and did not end before.
fn run(dir: &Path, at: usize) -> (usize, bool) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_kill_at_any_change_loses_nothing", "--nocapture"]);
    command.env(DIR, dir).stdout(Stdio::piped());
    // SAFETY: between fork and exec this makes one system call, without arguments, and touches nothing.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.spawn().unwrap();
    let pid = child.id() as i32;
    let is_killed = trace(pid, at);
    // It was waited for as a tracee already.
    assert!(child.wait().is_err());
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    let done = out.lines().filter_map(|line| line.strip_prefix('@')).next_back();
    (done.map_or(0, |done| done.parse().unwrap()), is_killed)
}

/// Follows the child and its threads until it is gone. Whether it was killed here.
fn trace(pid: i32, at: usize) -> bool {
    let (mut changes, mut is_set_up, mut is_killed) = (0, false, false);
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writes.
        let tid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL) };
        assert!(tid > 0, "wait for the child: {}", std::io::Error::last_os_error());
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if tid == pid {
                assert!(is_killed || libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child failed");
                return is_killed;
            }
            continue;
        }
        if !is_set_up {
            let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACESYSGOOD;
            // SAFETY: sets options of a stopped tracee; no pointers.
            assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, options) }, 0);
            is_set_up = true;
        }
        let mut signal = 0;
        match libc::WSTOPSIG(status) {
            stop if stop == libc::SIGTRAP | 0x80 => {
                if let Some((number, args)) = entered(tid)
                    && is_change(number, &args)
                {
                    changes += 1;
                    if changes == at {
                        is_killed = true;
                        // SAFETY: kills the child that this test started and has not reaped.
                        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
                    }
                }
            }
            // The exec, a new thread, and how that begins.
            libc::SIGTRAP | libc::SIGSTOP => {}
            other => signal = other,
        }
        // It may be gone by the kill.
        // SAFETY: resumes a tracee; no pointers.
        unsafe { libc::ptrace(libc::PTRACE_SYSCALL, tid, 0, signal) };
    }
}

/// The system call that a stopped thread is about to make, if it does not come out of one.
fn entered(tid: i32) -> Option<(i64, [u64; 6])> {
    // SAFETY: all zeros is a valid value of this C struct.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = size_of_val(&info);
    // SAFETY: `info` is valid for writes of `size` bytes.
    let got = unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, size, &raw mut info) };
    if got <= 0 || info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: `op` says that `entry` is the member the kernel filled in.
    let entry = unsafe { info.u.entry };
    Some((entry.nr as i64, entry.args))
}

#[test]
fn a_kill_at_any_change_loses_nothing() {
    if let Some(dir) = std::env::var_os(DIR) {
        return live(Path::new(&dir));
    }
    for at in 1.. {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        for pause in 0..=MERGE_AT {
            let file = File::create(diff(dir.path(), pause)).unwrap();
            file.set_len((PAGES * PAGE) as u64).unwrap();
            for (page, content) in writes(pause) {
                file.write_all_at(&content, (page * PAGE) as u64).unwrap();
            }
        }
        let (done, is_killed) = run(dir.path(), at);
        check(dir.path(), done);
        if !is_killed {
            assert_eq!(done, steps().len());
            // Each pause alone makes, writes, syncs and renames two files.
            assert!(at > steps().len() * 8, "only {at} changes were seen");
            break;
        }
    }
}
