//! Starts a process the way `posix_spawn` does: `clone3` with a shared address space and a stack of its own, while the
//! calling thread sleeps until the child has executed its program or given up.
//!
//! Nothing is copied, so starting costs the same however large envd is; the child is born inside its cgroup, so no
//! migration (and no RCU grace period) is paid; and the child can leave its error in our memory before it dies.
//!
//! A program that cannot be executed is not an error here: the child says so on its standard error as a shell would, and
//! exits with 127 (not found) or 126. Every such process therefore has a pid, output and an end like any other.

use rustix::fd::{AsRawFd, BorrowedFd, RawFd};
use rustix::process::Pid;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::sync::atomic::AtomicI32;

/// Memory for the child's life between `clone3` and `execve`; it calls nothing that needs more than a few hundred bytes.
const STACK_BYTES: usize = 64 * 1024;
/// How many signals the kernel has.
const SIGNALS: usize = 64;
// Beyond what `c_int` holds, which is how libc declares them.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What to execute, and as whom. All of it is prepared before the clone: the child may not allocate.
pub struct Spawn<'a> {
    /// Paths to try in order, as `PATH` lists them; a name with a slash is the only one.
    pub candidates: &'a [CString],
    /// The arguments, the program's name first.
    pub argv: &'a [CString],
    /// `NAME=value`.
    pub env: &'a [CString],
    pub cwd: &'a CStr,
    pub stdin: BorrowedFd<'a>,
    pub stdout: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
    /// Standard input is a terminal and becomes the controlling one.
    pub terminal: bool,
    /// `None` keeps envd's own identity.
    pub identity: Option<Identity<'a>>,
    /// An open directory of a cgroup2 file system.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Written to `/proc/self/oom_score_adj`.
    pub oom_score_adj: &'a CStr,
    /// The soft limit of open files; the hard one is inherited.
    pub open_files: u64,
}

/// Who a process runs as.
#[derive(Clone, Copy)]
pub struct Identity<'a> {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: &'a [u32],
}

/// What the child was doing when it failed before its program could be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Stage {
    Clone = 1,
    Session,
    Streams,
    Terminal,
    Identity,
    Directory,
}

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
#[error("starting a process failed in stage {stage:?}")]
pub struct Error {
    pub stage: Stage,
    #[source]
    pub source: io::Error,
}

/// Everything the child reads, and the one place it writes to.
struct Shared<'a> {
    candidates: &'a [*const c_char],
    argv: &'a [*const c_char],
    /// `/bin/sh`, then the path slot (filled in by the child), then the arguments: for a script without `#!`.
    script_argv: *mut *const c_char,
    env: &'a [*const c_char],
    cwd: *const c_char,
    streams: [RawFd; 3],
    terminal: bool,
    identity: Option<Identity<'a>>,
    oom_score_adj: &'a CStr,
    open_files: u64,
    complaint: &'a [u8],
    failed_stage: c_int,
    failed_errno: c_int,
}

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Starts the process and returns its pid once it runs its program (or has exited because it cannot).
///
/// The kernel writes the pid to `born` before the process executes its first instruction, so that whoever reaps it knows it
/// at any time. A process that failed before its program is left for the reaper too.
pub fn spawn(spawn: &Spawn<'_>, born: &AtomicI32) -> Result<Pid, Error> {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let candidates = pointers(spawn.candidates);
    let argv = pointers(spawn.argv);
    let env = pointers(spawn.env);
    let mut script_argv = vec![c"/bin/sh".as_ptr(), std::ptr::null()];
    script_argv.extend(argv.iter().skip(1));
    if spawn.argv.is_empty() {
        script_argv.push(std::ptr::null());
    }
    let mut complaint = spawn.argv.first().map(|s| s.as_bytes().to_vec()).unwrap_or_default();
    complaint.extend_from_slice(b": ");

    let mut shared = Shared {
        candidates: &candidates[..candidates.len() - 1],
        argv: &argv,
        script_argv: script_argv.as_mut_ptr(),
        env: &env,
        cwd: spawn.cwd.as_ptr(),
        streams: [spawn.stdin.as_raw_fd(), spawn.stdout.as_raw_fd(), spawn.stderr.as_raw_fd()],
        terminal: spawn.terminal,
        identity: spawn.identity,
        oom_score_adj: spawn.oom_score_adj,
        open_files: spawn.open_files,
        complaint: &complaint,
        failed_stage: 0,
        failed_errno: 0,
    };
    let mut stack = vec![0u128; STACK_BYTES / size_of::<u128>()];
    let mut flags = (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PARENT_SETTID) as u64 | CLONE_CLEAR_SIGHAND;
    let mut cgroup = 0;
    if let Some(directory) = spawn.cgroup {
        flags |= CLONE_INTO_CGROUP;
        cgroup = directory.as_raw_fd() as u64;
    }
    let args = CloneArgs {
        flags,
        parent_tid: born.as_ptr() as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: (stack.len() * size_of::<u128>()) as u64,
        cgroup,
        ..CloneArgs::default()
    };

    let blocked = block_signals();
    // SAFETY: `args` describes a live stack that nothing else uses; CLONE_VFORK suspends this thread until the child has
    // executed a program or exited, so `shared`, what it points to and the stack outlive every use by the child. Signals are
    // blocked, so no handler of ours runs in the child. `child` never returns.
    let result = unsafe { clone3(&args, child, (&raw mut shared).cast()) };
    restore_signals(&blocked);
    drop(stack);

    let failure = |stage, errno| Error { stage, source: io::Error::from_raw_os_error(errno) };
    if result < 0 {
        return Err(failure(Stage::Clone, -result as i32));
    }
    let pid = Pid::from_raw(result as i32).ok_or_else(|| failure(Stage::Clone, libc::ECHILD))?;
    let stage = match shared.failed_stage {
        0 => return Ok(pid),
        2 => Stage::Session,
        3 => Stage::Streams,
        4 => Stage::Terminal,
        5 => Stage::Identity,
        _ => Stage::Directory,
    };
    Err(failure(stage, shared.failed_errno))
}

/// `clone3` whose child runs `entry(argument)` on the stack that `args` names. Returns the pid, or a negative errno.
///
/// # Safety
/// `args.stack` must be memory nothing else uses for as long as the child lives in this address space, `argument` must be
/// valid for `entry` for that long, and `entry` must not return or unwind.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(
    args: &CloneArgs,
    entry: unsafe extern "C" fn(*mut libc::c_void) -> !,
    argument: *mut libc::c_void,
) -> i64 {
    let result: i64;
    // SAFETY: in the parent this is an ordinary system call, which changes rax, rcx and r11 only. The child starts after it
    // with rax = 0, the same registers and an empty, 16-byte aligned stack, and never leaves `entry`.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") size_of::<CloneArgs>(),
            in("r12") argument,
            in("r13") entry,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

fn block_signals() -> libc::sigset_t {
    let mut all = std::mem::MaybeUninit::uninit();
    let mut old = std::mem::MaybeUninit::uninit();
    // SAFETY: both sets are written by the calls that take them before they are read, and the calls cannot fail with these
    // arguments.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr());
        old.assume_init()
    }
}

fn restore_signals(old: &libc::sigset_t) {
    // SAFETY: `old` is a set that `block_signals` read.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, old, std::ptr::null_mut()) };
}

/// The child's whole life.
///
/// # Safety
/// `argument` is the parent's [`Shared`]. Runs in the parent's address space while the calling thread sleeps: it must not
/// allocate, lock, panic, or call anything of the C library that touches other threads (hence the raw system calls for
/// identity: the C library's would signal the parent's threads).
unsafe extern "C" fn child(argument: *mut libc::c_void) -> ! {
    // SAFETY: see above; the parent does not touch it until this process has executed a program or exited.
    let shared = unsafe { &mut *argument.cast::<Shared<'_>>() };
    // SAFETY: same contract.
    let (stage, errno) = match unsafe { prepare(shared) } {
        // SAFETY: same contract, and the process is fully prepared.
        Ok(()) => unsafe { execute(shared) },
        Err(failed) => failed,
    };
    shared.failed_stage = stage as c_int;
    shared.failed_errno = errno;
    // SAFETY: leaves without running the parent's exit handlers.
    unsafe { libc::_exit(1) }
}

fn errno() -> c_int {
    // SAFETY: the thread-local of the sleeping parent thread, which this child uses alone.
    unsafe { *libc::__errno_location() }
}

/// Everything between birth and the program.
///
/// # Safety
/// As for [`child`].
unsafe fn prepare(shared: &Shared<'_>) -> Result<(), (Stage, c_int)> {
    let check = |stage, result: i64| if result < 0 { Err((stage, errno())) } else { Ok(()) };
    // SAFETY: system calls on this process alone; every pointer comes from `shared`, which outlives them.
    unsafe {
        check(Stage::Session, libc::setsid().into())?;
        // Only if these fail does the process run with envd's own favours, which is no reason to refuse it.
        libc::setpriority(libc::PRIO_PROCESS, 0, 0);
        let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file >= 0 {
            libc::write(file, shared.oom_score_adj.as_ptr().cast(), shared.oom_score_adj.count_bytes());
        }
        let mut files = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut files) == 0 {
            files.rlim_cur = shared.open_files.min(files.rlim_max);
            libc::setrlimit(libc::RLIMIT_NOFILE, &files);
        }
        // Out of the way first, so that no source is overwritten before it is used.
        let mut high = [0; 3];
        for (from, to) in shared.streams.iter().zip(&mut high) {
            *to = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, 3);
            check(Stage::Streams, (*to).into())?;
        }
        for (from, to) in high.iter().zip(0..) {
            check(Stage::Streams, libc::dup2(*from, to).into())?;
        }
        check(Stage::Streams, libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC))?;
        if shared.terminal {
            check(Stage::Terminal, libc::ioctl(0, libc::TIOCSCTTY, 0).into())?;
        }
        if let Some(who) = shared.identity {
            check(Stage::Identity, libc::syscall(libc::SYS_setgroups, who.groups.len(), who.groups.as_ptr()))?;
            check(Stage::Identity, libc::syscall(libc::SYS_setresgid, who.gid, who.gid, who.gid))?;
            check(Stage::Identity, libc::syscall(libc::SYS_setresuid, who.uid, who.uid, who.uid))?;
        }
        check(Stage::Directory, libc::chdir(shared.cwd).into())?;
        libc::umask(0o022);
        // CLONE_CLEAR_SIGHAND reset the handlers but not what envd ignores or inherited so; all zero is the default. By system
        // call, because the C library keeps two signals to itself.
        let default = [0u64; 4];
        for signal in 1..=SIGNALS {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, SIGNALS / 8);
        }
        let mut none = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
    Ok(())
}

/// Tries the candidates as `execvp` would, and leaves as a shell would when none can be executed.
///
/// # Safety
/// As for [`child`]; standard error is the process's own.
unsafe fn execute(shared: &Shared<'_>) -> ! {
    let mut worst = libc::ENOENT;
    for &path in shared.candidates {
        // SAFETY: null-terminated arrays of C strings that outlive the call. `script_argv` has two leading entries of its own.
        unsafe {
            libc::execve(path, shared.argv.as_ptr(), shared.env.as_ptr());
            if errno() == libc::ENOEXEC {
                *shared.script_argv.add(1) = path;
                libc::execve(c"/bin/sh".as_ptr(), shared.script_argv, shared.env.as_ptr());
            }
        }
        match errno() {
            libc::ENOENT | libc::ENOTDIR => {}
            other => worst = other,
        }
    }
    let reason: &[u8] = match worst {
        libc::ENOENT if shared.candidates.len() == 1 => b"No such file or directory\n",
        libc::ENOENT => b"command not found\n",
        libc::EACCES => b"Permission denied\n",
        libc::E2BIG => b"Argument list too long\n",
        libc::ENOEXEC => b"Exec format error\n",
        libc::EISDIR => b"Is a directory\n",
        libc::ENOMEM => b"Cannot allocate memory\n",
        libc::ETXTBSY => b"Text file busy\n",
        _ => b"cannot execute\n",
    };
    // SAFETY: plain writes of live buffers to the process's own standard error, then the end.
    unsafe {
        libc::write(2, shared.complaint.as_ptr().cast(), shared.complaint.len());
        libc::write(2, reason.as_ptr().cast(), reason.len());
        libc::_exit(if worst == libc::ENOENT { 127 } else { 126 })
    }
}
