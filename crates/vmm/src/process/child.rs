//! Everything that happens between `clone` and `exec`.
//!
//! A child is born in its cgroup and in its new namespaces, by one system call: there is no instant at which it exists and
//! cannot be found.

use std::ffi::{CStr, CString, c_char};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, Rlimit};

use super::{Error, Identity};
use crate::jail::Jail;

/// Score added for the kernel's out-of-memory killer: a guest goes before the agent and the host's own services do.
const OOM_SCORE_ADJ: &[u8] = b"500";
/// `CLONE_INTO_CGROUP`, which the C library's type has no room for.
const INTO_CGROUP: u64 = 1 << 33;
/// What a child that does not become its program exits with; nobody is told.
const NOT_EXECUTED: libc::c_int = 127;

/// How far a child came on its way to being the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Making the child, in its cgroup.
    Fork,
    /// Leaving the agent's session, signal handlers and files behind.
    Detach,
    /// Putting together the root of its jail.
    Root,
    /// Entering its network namespace.
    NetworkNamespace,
    /// Becoming a user without privileges.
    Privileges,
    /// Giving up system calls.
    Filter,
    /// Becoming the program.
    Exec,
}

impl Step {
    const ALL: [Self; 7] =
        [Self::Fork, Self::Detach, Self::Root, Self::NetworkNamespace, Self::Privileges, Self::Filter, Self::Exec];
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fork => "no process could be made in its control group",
            Self::Detach => "it could not detach from the agent",
            Self::Root => "its jail could not be put together",
            Self::NetworkNamespace => "it could not enter the network namespace",
            Self::Privileges => "it could not become a user without privileges",
            Self::Filter => "it could not give up system calls",
            Self::Exec => "it could not be executed",
        })
    }
}

/// What a child has in hand.
pub(super) struct Child {
    /// Path of the program, where the child will be.
    pub program: CString,
    /// The program's name first.
    pub args: Vec<CString>,
    pub environment: Vec<CString>,
    /// Where it is started.
    pub dir: CString,
    pub input: File,
    pub output: File,
    /// The directory of its group.
    pub cgroup: OwnedFd,
    /// Where a VMM is shut in; a companion is not.
    pub jail: Option<Jail>,
}

/// Makes the child and waits until it has become the program, or has failed to.
pub(super) fn start(child: &Child, binary: &Path) -> Result<(Identity, OwnedFd), Error> {
    let failed = |step, source| Error::Start { binary: binary.to_owned(), step, source };
    let (progress, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(Step::Fork, error.into()))?;
    let (args, environment) = (pointers(&child.args), pointers(&child.environment));
    let namespaces = match child.jail {
        Some(_) => libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS,
        None => 0,
    };
    let become_program = || {
        let mut reached = Step::Detach;
        let error = child.become_program(&args, &environment, &mut reached);
        let [a, b, c, d] = error.raw_os_error().unwrap_or_default().to_ne_bytes();
        let _ = rustix::io::write(&writer, &[reached as u8, a, b, c, d]);
    };
    // SAFETY: the closure makes system calls only, with what was made before: it neither allocates nor locks nor unwinds.
    let made = unsafe { clone(namespaces, &child.cgroup, become_program) };
    let (pid, pidfd) = made.map_err(|error| failed(Step::Fork, error))?;
    drop(writer);
    let mut told = [0; 5];
    // It ends when the child has executed, or is gone: no copy of the writing end is left then.
    let result = File::from(progress).read(&mut told).map_err(|error| failed(Step::Exec, error));
    if result? == told.len() {
        super::reap(&pidfd);
        let [step, error @ ..] = told;
        let step = Step::ALL.get(usize::from(step)).copied().unwrap_or(Step::Exec);
        return Err(failed(step, io::Error::from_raw_os_error(i32::from_ne_bytes(error))));
    }
    // Nobody reaped it, so its pid is still its own, even if it has ended already.
    let identity = Identity::of(pid).ok_or_else(|| Error::Watch { pid, source: io::ErrorKind::NotFound.into() })?;
    Ok((identity, pidfd))
}

/// Makes a process that runs `child` and nothing else. Says its pid, here, and a descriptor of it.
///
/// # Safety
/// `child` runs in a copy of this process that has no other thread, while their locks may be held for ever: it must do
/// nothing that takes one, such as allocating, and must not unwind.
unsafe fn clone(namespaces: libc::c_int, cgroup: &OwnedFd, child: impl FnOnce()) -> io::Result<(u32, OwnedFd)> {
    let mut pidfd: libc::c_int = -1;
    let args = libc::clone_args {
        flags: (libc::CLONE_PIDFD | namespaces) as u64 | INTO_CGROUP,
        pidfd: (&raw mut pidfd).expose_provenance() as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.as_raw_fd() as u64,
    };
    // SAFETY: both sets are plain data that the calls fill; signals of this thread alone are held back, so that no handler of
    // the agent's runs in the child, and are let through again below, on this thread.
    let before = unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        before
    };
    // SAFETY: without CLONE_VM the child has a copy of this process's memory, with this thread alone in it, and goes on from
    // here on the same stack. The kernel reads `args` and writes `pidfd`, which live across the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        child();
        // SAFETY: ends the process at once, without running what the agent has registered for its own end.
        unsafe { libc::_exit(NOT_EXECUTED) }
    }
    let error = io::Error::last_os_error();
    // SAFETY: `before` is the set that was taken above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    match u32::try_from(pid) {
        // SAFETY: the kernel made this descriptor for us.
        Ok(pid) => Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        Err(_) => Err(error),
    }
}

/// As `execve` takes them. Valid for as long as the strings are.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

impl Child {
    /// Turns this process, a child, into the program, or says why not. System calls only.
    fn become_program(&self, args: &[*const c_char], environment: &[*const c_char], reached: &mut Step) -> io::Error {
        let mut ready = || -> io::Result<()> {
            self.detach()?;
            if let Some(jail) = &self.jail {
                jail.enter(reached)?;
            }
            *reached = Step::Exec;
            rustix::process::umask(Mode::RWXG | Mode::RWXO);
            rustix::process::chdir(self.dir.as_c_str())?;
            close_all_on_exec()
        };
        if let Err(error) = ready() {
            return error;
        }
        // SAFETY: both lists end with a null pointer, and all strings that they point to live as long as `self`.
        unsafe { libc::execve(self.program.as_ptr(), args.as_ptr(), environment.as_ptr()) };
        io::Error::last_os_error()
    }

    /// Own session, default signals, its own files, no core dumps (they would hold the guest's memory).
    fn detach(&self) -> io::Result<()> {
        rustix::process::setsid()?;
        rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
        let score = rustix::fs::open(OOM_SCORE, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        // Lowering it is a privilege of its own, which an agent that runs with a higher score may lack: then that one stays.
        let _ = rustix::io::write(&score, OOM_SCORE_ADJ);
        for (from, to) in [(self.input.as_fd(), 0), (self.output.as_fd(), 1), (self.output.as_fd(), 2)] {
            // SAFETY: the call takes two numbers. What was the agent's standard input and output is nobody's value here.
            if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: `default` and `none` are plain data for which all zeroes is valid (SIG_DFL, no flags; the empty set), both
        // live across the calls, and the calls are async-signal-safe. Signals that cannot be set answer EINVAL, which is fine.
        unsafe {
            let default: libc::sigaction = std::mem::zeroed();
            for signal in 1..=libc::SIGRTMAX() {
                libc::sigaction(signal, &default, std::ptr::null_mut());
            }
            let none: libc::sigset_t = std::mem::zeroed();
            if libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

const OOM_SCORE: &CStr = c"/proc/self/oom_score_adj";

/// Marks every descriptor above the standard three, also those that some library forgot to mark. Kernels before 5.11
/// cannot; there it is left to those who open descriptors, who all mark them.
fn close_all_on_exec() -> io::Result<()> {
    // SAFETY: the call takes three numbers and touches no memory. It closes nothing now, so descriptors owned by values in
    // this process stay valid until the image is replaced.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) { Ok(()) } else { Err(error) }
}
