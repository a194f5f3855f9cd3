//! A capsule on this host: one driver task owns it, everyone else sends it a [`Command`] or watches what it [`Observed`].
//!
//! ```text
//!   create ──► starting ──► running ◄────────────── resuming
//!                  │        │ │ │  ▲                 │   ▲
//!                  │        │ │ └─ pausing ──► paused ◄──┘
//!                  │        │ └ VMM or pager died ──┐  │
//!                  └ a step failed ──► stopping ◄───┴──┘ destroy
//!                  hibernate, from paused ──┘└► stopped | failed(reason) | hibernated
//! ```
//!
//! What a start acquires is named in the capsule's record before it is acquired, and one function, [`release::release`],
//! gives back whatever a record names. A failed start, a destroy and a restarted agent all end there.
//!
//! A pause is one rename of the record ([`save`]), a resume that fails leaves the pause as it was ([`start`]), and what a
//! killed agent leaves is either of the two ([`recover`]). What is paused may go to an object store, and come from there
//! ([`remote`]).

pub mod driver;
pub mod files;
pub mod pager;
pub mod record;
pub mod recover;
pub mod release;
pub mod remote;
pub mod save;
pub mod start;
mod traffic;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use agent_api::CapsuleState;
use api::CapsuleId;
use api::egress::Policy;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::guest::Guest;
use crate::host::Sizes;
use crate::{admission, egress};
use record::Record;
pub use traffic::{Cut, Open, Traffic};

/// What a capsule is made from; it never changes while the capsule lives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// The capsule.
    pub id: CapsuleId,
    /// Name of an image or template on this host.
    pub image: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Size of the root disk in MiB.
    pub disk_mib: u32,
    /// Seconds of inactivity after which the host pauses it; 0 means never.
    pub timeout_sec: u32,
    /// Environment of every process in the guest.
    pub default_env: BTreeMap<String, String>,
    /// What the guest learns of its template.
    pub template_id: String,
}

impl Spec {
    /// What of it a boot depends on.
    pub fn sizes(&self) -> Sizes {
        Sizes { vcpus: self.vcpus, memory_mib: self.memory_mib, disk_mib: self.disk_mib }
    }
}

/// What is true of a capsule now. Published by its driver alone.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Where in the diagram above it is.
    pub state: CapsuleState,
    /// Grows with every change of `state`.
    pub generation: u64,
    /// Why it stopped or failed, was paused by itself, or could not be resumed.
    pub reason: String,
    /// What the host had not enough of, when it failed because of that: another host may have.
    pub host_full: Option<admission::Full>,
    /// What it may reach outside.
    pub egress: Arc<Policy>,
    /// Where this host reaches the guest, once it has a network.
    pub host_ip: Option<Ipv4Addr>,
    /// Versions of the kernel, the VMM, this agent and envd, once it runs.
    pub versions: BTreeMap<String, String>,
    /// The way into the guest while it runs.
    pub guest: Option<Arc<Guest>>,
    /// Whether the object store has it too. Only while it is paused.
    pub is_uploaded: bool,
}

impl Observed {
    /// True when nothing of the capsule is left on this host.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, CapsuleState::Stopped | CapsuleState::Failed | CapsuleState::Hibernated)
    }
}

/// What a driver can be asked. Each is answered when it is done; a capsule that is being started or saved is so first.
pub enum Command {
    /// Put the capsule aside.
    Pause(oneshot::Sender<Result<(), Refused>>),
    /// Let it go on.
    Resume(oneshot::Sender<Result<(), Refused>>),
    /// Give back what a paused capsule takes here, once the object store has it.
    Hibernate(oneshot::Sender<Result<(), Refused>>),
    /// Have it reach this outside, and nothing else.
    SetEgress(Policy, oneshot::Sender<Result<(), Refused>>),
    /// Write what it is now into an empty directory, as a point. Answers with the digest of the state file.
    Capture(PathBuf, oneshot::Sender<Result<(String, Record), Refused>>),
}

/// Why a driver did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The capsule has ended, or does before it comes to that.
    #[error("the capsule has ended: {0}")]
    Ended(String),
    /// It is paused.
    #[error("the capsule does not run")]
    NotRunning,
    /// It is not.
    #[error("the capsule is not paused")]
    NotPaused,
    /// The object store could not be used.
    #[error("putting the capsule into the object store")]
    Remote(#[source] remote::Error),
    /// That it hibernates could not be noted.
    #[error("noting that the capsule hibernates")]
    Note(#[source] std::io::Error),
    /// What it may reach outside could not be changed.
    #[error("changing what the capsule may reach")]
    Egress(#[source] egress::Error),
    /// It could not be saved.
    #[error("saving the capsule")]
    Save(#[source] save::Failed),
    /// The host cannot hold it now.
    #[error(transparent)]
    Full(admission::Full),
    /// It could not be resumed.
    #[error("resuming the capsule")]
    Resume(#[source] start::Error),
}

/// The way to a capsule for everyone but its driver.
#[derive(Clone)]
pub struct Handle {
    /// What it was made from.
    pub spec: Arc<Spec>,
    /// Its guest traffic: connections, and when the last byte passed.
    pub traffic: Arc<Traffic>,
    commands: mpsc::Sender<Command>,
    destroyed: CancellationToken,
    observed: watch::Receiver<Observed>,
}

impl Handle {
    /// The way to a capsule that has ended, and has no driver.
    pub fn of_ended(spec: Spec, observed: Observed) -> Self {
        Self {
            spec: Arc::new(spec),
            traffic: Arc::default(),
            commands: mpsc::channel(1).0,
            destroyed: CancellationToken::new(),
            observed: watch::channel(observed).1,
        }
    }

    /// What is true of the capsule now.
    pub fn observed(&self) -> Observed {
        self.observed.borrow().clone()
    }

    /// Waits until the capsule runs, is paused or has ended, and says what is true then.
    pub async fn settled(&self) -> Observed {
        let is_settled = |observed: &Observed| match observed.state {
            CapsuleState::Running | CapsuleState::Paused => true,
            _ => observed.has_ended(),
        };
        self.wait(is_settled).await
    }

    /// Puts the capsule aside; success when it is.
    pub async fn pause(&self) -> Result<(), Refused> {
        self.ask(Command::Pause).await
    }

    /// Lets the capsule go on; success when it runs.
    pub async fn resume(&self) -> Result<(), Refused> {
        self.ask(Command::Resume).await
    }

    /// Gives back what the paused capsule takes here; success when the object store has it and this host has not.
    pub async fn hibernate(&self) -> Result<(), Refused> {
        self.ask(Command::Hibernate).await
    }

    /// Has the capsule reach that outside, and nothing else; success when it is so.
    pub async fn set_egress(&self, policy: Policy) -> Result<(), Refused> {
        self.ask(|done| Command::SetEgress(policy, done)).await
    }

    /// Writes what the capsule is now into `dest`, an empty directory; the digest of its state file, and its record.
    pub async fn capture(&self, dest: PathBuf) -> Result<(String, Record), Refused> {
        self.ask(|done| Command::Capture(dest, done)).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T, Refused>>) -> Command) -> Result<T, Refused> {
        let (done, answer) = oneshot::channel();
        // A driver that is gone, or goes before it gets there, has ended its capsule.
        let _ = self.commands.send(command(done)).await;
        match answer.await {
            Ok(answer) => answer,
            Err(_) => Err(Refused::Ended(self.observed().reason)),
        }
    }

    /// Ends the capsule and waits until all of it is given back.
    pub async fn destroy(&self) -> Observed {
        self.destroyed.cancel();
        self.wait(Observed::has_ended).await
    }

    /// Lets go of the capsule, and waits until its driver has done so too: it is left as it is.
    pub async fn leave(self) {
        let Self { mut observed, commands, .. } = self;
        drop(commands);
        while observed.changed().await.is_ok() {}
    }

    /// Waits until the driver itself is gone, and with it its hold on what capsules share.
    pub async fn gone(&self) {
        let mut observed = self.observed.clone();
        while observed.changed().await.is_ok() {}
    }

    async fn wait(&self, mut condition: impl FnMut(&Observed) -> bool) -> Observed {
        let mut observed = self.observed.clone();
        match observed.wait_for(|observed| condition(observed)).await {
            Ok(now) => now.clone(),
            // The driver is gone; what it said last holds for ever.
            Err(_) => self.observed(),
        }
    }
}
