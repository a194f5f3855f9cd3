//! The steps by which a slot is made, so that each can be named in an error and failed in a test.

use std::fmt;
use std::io;

/// A step of making or removing a slot, in the order of making.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The slot's elements in the host's table. Before there is a link, so that it never is without rules.
    Firewall,
    /// The named network namespace.
    Namespace,
    /// Forwarding on and IPv6 off inside it.
    Sysctl,
    /// The tap that the VMM attaches to.
    Tap,
    /// The veth pair, one end inside and one on the host; addresses, routes and neighbours inside the namespace.
    Links,
    /// Address translation and limits inside the namespace.
    Rules,
    /// The host's end: its address, its shape, and the route to the guest.
    HostEnd,
    /// Connections that the host knows of, when a slot is cleaned or removed.
    Connections,
    /// Whether there is anything else in a namespace that was cleaned.
    Census,
    /// The claim on the slot's number.
    Claim,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Firewall => "firewall elements",
            Self::Namespace => "network namespace",
            Self::Sysctl => "settings inside the namespace",
            Self::Tap => "tap",
            Self::Links => "veth pair and addresses inside the namespace",
            Self::Rules => "rules inside the namespace",
            Self::HostEnd => "host end of the veth pair",
            Self::Connections => "connections",
            Self::Census => "what else is inside the namespace",
            Self::Claim => "claim",
        })
    }
}

/// The step that failed, and why.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct Failed {
    /// The step.
    pub step: Step,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl Step {
    pub(crate) fn failed<E: Into<io::Error>>(self) -> impl FnOnce(E) -> Failed {
        move |source| Failed { step: self, source: source.into() }
    }
}

/// Told of each step that is done; a test makes it fail there, or ends the process.
#[derive(Default)]
pub(crate) struct Steps {
    #[cfg(test)]
    pub(crate) fail_after: std::sync::Mutex<Option<Step>>,
    #[cfg(test)]
    count: std::sync::atomic::AtomicUsize,
}

/// The environment variable that says at which step a test's process kills itself.
#[cfg(test)]
pub(crate) const KILL_AT: &str = "WRENN_NETWORK_KILL_AT";

impl Steps {
    #[cfg(not(test))]
    pub(crate) fn done(&self, _: Step) -> Result<(), Failed> {
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn done(&self, step: Step) -> Result<(), Failed> {
        let count = 1 + self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if std::env::var(KILL_AT).is_ok_and(|at| at == count.to_string()) {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
        match *self.fail_after.lock().unwrap() {
            Some(last) if last == step => Err(step.failed()(io::Error::other("injected"))),
            _ => Ok(()),
        }
    }
}
