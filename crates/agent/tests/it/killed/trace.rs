//! Striking as a process enters its n-th system call that commits something to the disk.
//!
//! The process is traced from outside while it does what is to be interrupted, so nothing in it is there for this.

use std::fs;
use std::thread::JoinHandle;

/// A process that is traced until it is gone.
pub struct Trace(JoinHandle<Seen>);

/// What was seen of a process until it was gone.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Commits that were entered.
    pub commits: usize,
    /// Whether the one to strike at was among them, and it was not too late for that.
    pub is_struck: bool,
}

impl Trace {
    /// Begins to trace the process `pid`, a child of this one, and calls `strike` as it enters its commit number `at`, which
    /// waits for that and for whether it did. Returns when all of its threads are traced.
    pub fn begin(pid: u32, at: usize, strike: impl FnOnce() -> bool + Send + 'static) -> Self {
        let (sender, begun) = std::sync::mpsc::channel();
        // Only the thread that traces can wait for what it traces.
        let thread = std::thread::spawn(move || {
            seize(pid);
            sender.send(()).unwrap();
            follow(pid as i32, at, strike)
        });
        begun.recv().unwrap();
        Self(thread)
    }

    /// Waits until the process is gone, by whomever.
    pub fn end(self) -> Seen {
        self.0.join().unwrap()
    }
}

/// Attaches to every thread; those that begin later are attached by the kernel. Children of the process are not.
fn seize(pid: u32) {
    let options = libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACESYSGOOD;
    let mut seized = std::collections::BTreeSet::new();
    loop {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let tids: Vec<i32> = threads.map(|entry| entry.file_name().to_str().unwrap().parse().unwrap()).collect();
        let new: Vec<i32> = tids.into_iter().filter(|tid| seized.insert(*tid)).collect();
        if new.is_empty() {
            return;
        }
        for tid in new {
            // SAFETY: attaches to a thread of our child, whose memory it does not touch; no pointers.
            let is_seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0, options) } == 0;
            if is_seized {
                // SAFETY: stops a tracee, so that it can be told to stop at system calls; no pointers.
                unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0) };
            }
        }
    }
}

fn follow(pid: i32, at: usize, strike: impl FnOnce() -> bool) -> Seen {
    let mut seen = Seen { commits: 0, is_struck: false };
    let mut strike = Some(strike);
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writes.
        let tid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
        if tid < 0 {
            // Nothing is traced any more.
            return seen;
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if tid == pid {
                return seen;
            }
            continue;
        }
        let mut signal = 0;
        match libc::WSTOPSIG(status) {
            stop if stop == libc::SIGTRAP | 0x80 => {
                if let Some((number, args)) = entered(tid)
                    && is_commit(number, &args)
                {
                    seen.commits += 1;
                    if seen.commits == at
                        && let Some(strike) = strike.take()
                    {
                        seen.is_struck = strike();
                    }
                }
            }
            // A new thread, an interrupt, and what else the kernel tells of itself.
            libc::SIGTRAP | libc::SIGSTOP => {}
            other => signal = if status >> 16 == 0 { other } else { 0 },
        }
        // It may be gone by now.
        // SAFETY: resumes a tracee; no pointers.
        unsafe { libc::ptrace(libc::PTRACE_SYSCALL, tid, 0, signal) };
    }
}

/// Whether a system call makes something there, gone or durable.
fn is_commit(number: i64, args: &[u64; 6]) -> bool {
    const FICLONE: u64 = 0x4004_9409;
    match number {
        libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 | libc::SYS_linkat | libc::SYS_link => true,
        libc::SYS_fsync | libc::SYS_fdatasync => true,
        libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_mkdir | libc::SYS_mkdirat | libc::SYS_rmdir => true,
        libc::SYS_ioctl => args[1] == FICLONE,
        _ => false,
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
