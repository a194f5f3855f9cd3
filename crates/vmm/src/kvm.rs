//! Whether `/dev/kvm` can run a guest. That it exists proves nothing: a nested or emulated KVM may offer the whole API and
//! still fail at instructions that every kernel uses.
//!
//! So a guest is run: a dozen instructions in 64-bit mode that say by port writes how far they came. It happens in a child
//! process with a time limit, because what is being found out is whether this hangs or crashes. It refuses to fix
//! anything.

mod child;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// How long the guest may take; it needs less than a millisecond where KVM works.
const LIMIT: Duration = Duration::from_secs(5);
/// How long the killed child may take to be gone before it is left to itself.
const REAP_LIMIT: Duration = Duration::from_secs(2);

/// What became of the attempt to run a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// It ran to its end.
    Usable,
    /// There is no such device.
    Missing,
    /// The device may not be opened; the system's reason.
    Denied(String),
    /// The device is there, but a guest does not run: what failed.
    Broken(String),
}

impl std::fmt::Display for Kvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usable => f.write_str("KVM runs guests"),
            Self::Missing => f.write_str("KVM is not there"),
            Self::Denied(why) => write!(f, "KVM may not be used: {why}"),
            Self::Broken(what) => write!(f, "KVM is there but cannot run a guest: {what}"),
        }
    }
}

/// One message of the child: what happened, and a number that says more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Event {
    /// A call to KVM failed: which, in `child::CALLS`, and the error number.
    CallFailed = 1,
    /// The guest wrote this number to its port.
    Reached = 2,
    /// The guest halted.
    Halted = 3,
    /// KVM returned from the guest for another reason: which, by KVM's number.
    Left = 4,
}

/// Bytes of a message: the event, then two numbers of its own.
const MESSAGE: usize = 3;

/// Runs the guest on `device`, which is `/dev/kvm`. Blocks for up to seven seconds where KVM is broken.
pub fn probe(device: &Path) -> Kvm {
    let opened = match File::options().read(true).write(true).open(device) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Kvm::Missing,
        Err(error) => return Kvm::Denied(error.to_string()),
    };
    match watch_child(opened) {
        Ok((messages, ended)) => judge(&messages, ended),
        Err(error) => Kvm::Broken(format!("the probe could not be run: {error}")),
    }
}

/// Runs the child and collects its messages; `true` when it ended in time.
fn watch_child(device: File) -> io::Result<(Vec<u8>, bool)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let child = child::fork(device.into(), writer)?;
    let mut messages = Vec::new();
    let ended = read_until_closed(reader, &mut messages);
    let _ = kill_process(child, Signal::KILL);
    reap(child);
    Ok((messages, ended?))
}

fn read_until_closed(reader: OwnedFd, messages: &mut Vec<u8>) -> io::Result<bool> {
    let end = Instant::now() + LIMIT;
    let mut reader = File::from(reader);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let mut buffer = [0; 64 * MESSAGE];
        match reader.read(&mut buffer)? {
            0 => return Ok(true),
            // A guest that never stops talking is as bad as one that never stops.
            _ if messages.len() > buffer.len() => return Ok(false),
            count => messages.extend_from_slice(&buffer[..count]),
        }
    }
}

/// Waits for the killed child, unless KVM holds it where no signal reaches.
fn reap(child: Pid) {
    let end = Instant::now() + REAP_LIMIT;
    while matches!(waitpid(Some(child), WaitOptions::NOHANG), Ok(None)) && Instant::now() < end {
        // There is nothing to wait on but its end, and this thread is the caller's to block.
        let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 }));
    }
}

/// What the guest was doing after it had written this number to its port.
fn doing(reached: u8) -> &'static str {
    match reached {
        0 => "entering 64-bit mode",
        1 => "executing `cmpxchg16b`",
        2 => "executing `xsave` and `xrstor`",
        3 => "taking an `int3` exception",
        _ => "halting",
    }
}

fn judge(messages: &[u8], ended: bool) -> Kvm {
    let mut reached = 0;
    for message in messages.chunks_exact(MESSAGE) {
        let (event, first, second) = (message[0], message[1], message[2]);
        if event == Event::Reached as u8 && first == child::WRONG {
            return Kvm::Broken(format!("the guest got a wrong result {}", doing(reached)));
        } else if event == Event::Reached as u8 {
            reached = first;
        } else if event == Event::Halted as u8 && reached == child::LAST {
            return Kvm::Usable;
        } else if event == Event::CallFailed as u8 {
            let call = child::CALLS.get(usize::from(first)).unwrap_or(&"a call");
            let error = io::Error::from_raw_os_error(second.into());
            return Kvm::Broken(format!("{call} failed while the guest was {}: {error}", doing(reached)));
        } else {
            return Kvm::Broken(format!("the guest {} {}", leave_reason(event, first), doing(reached)));
        }
    }
    let how = if ended { "the probe crashed" } else { "the guest hung" };
    Kvm::Broken(format!("{how} {}", doing(reached)))
}

/// How a guest left that should have gone on, for the reasons that a broken KVM gives.
fn leave_reason(event: u8, reason: u8) -> String {
    match u32::from(reason) {
        _ if event == Event::Halted as u8 => "halted".to_owned(),
        kvm_bindings::KVM_EXIT_SHUTDOWN => "crashed (triple fault)".to_owned(),
        kvm_bindings::KVM_EXIT_FAIL_ENTRY => "was refused by the processor".to_owned(),
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR => "met an instruction that KVM cannot emulate".to_owned(),
        kvm_bindings::KVM_EXIT_MMIO => "touched memory that it does not have".to_owned(),
        other => format!("stopped (KVM exit {other})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reached(stages: &[u8], rest: &[u8]) -> Vec<u8> {
        let mut messages: Vec<u8> = stages.iter().flat_map(|&stage| [Event::Reached as u8, stage, 0]).collect();
        messages.extend_from_slice(rest);
        messages
    }

    #[test]
    fn only_a_guest_that_ran_to_its_end_makes_it_usable() {
        let halted = [Event::Halted as u8, 0, 0];
        assert_eq!(judge(&reached(&[1, 2, 3, 4], &halted), true), Kvm::Usable);
        let broken = |messages: &[u8], ended| match judge(messages, ended) {
            Kvm::Broken(what) => what,
            other => panic!("{other}"),
        };
        assert_eq!(broken(&reached(&[1, 2], &halted), true), "the guest halted executing `xsave` and `xrstor`");
        assert_eq!(broken(&reached(&[1], &[]), false), "the guest hung executing `cmpxchg16b`");
        assert_eq!(broken(&[], true), "the probe crashed entering 64-bit mode");
        assert_eq!(broken(&reached(&[1, 2, 3, 4], &[]), true), "the probe crashed halting");
        assert_eq!(
            broken(&reached(&[1, child::WRONG], &[]), true),
            "the guest got a wrong result executing `cmpxchg16b`"
        );
        let shutdown = [Event::Left as u8, 8, 0];
        assert_eq!(
            broken(&reached(&[1, 2, 3], &shutdown), true),
            "the guest crashed (triple fault) taking an `int3` exception"
        );
        let failed = [Event::CallFailed as u8, 1, 12];
        assert!(broken(&failed, true).starts_with("KVM_CREATE_VM failed while the guest was entering 64-bit mode:"));
    }

    #[test]
    fn what_is_not_kvm_is_not_believed() {
        assert_eq!(probe(Path::new("/nowhere/kvm")), Kvm::Missing);
        assert!(matches!(probe(Path::new("/dev/null")), Kvm::Broken(what) if what.starts_with("KVM_GET_API_VERSION")));
        assert!(matches!(probe(Path::new("/dev")), Kvm::Denied(_)));
    }

    #[test]
    fn this_host_gets_an_answer_and_no_child_stays() {
        let before = children();
        match probe(Path::new("/dev/kvm")) {
            Kvm::Broken(what) => assert!(!what.contains("the probe crashed"), "{what}"),
            Kvm::Usable | Kvm::Missing | Kvm::Denied(_) => {}
        }
        assert_eq!(children(), before);
    }

    fn children() -> String {
        std::fs::read_to_string("/proc/thread-self/children").unwrap()
    }
}
