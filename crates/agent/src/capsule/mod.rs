//! A capsule on this host: one driver task owns it, everyone else sends it a [`Command`] or watches what it [`Observed`].
//!
//! ```text
//!   create ──► starting ──► running ──► stopping ──► stopped
//!                  │            │           ▲
//!                  │            └ VMM died ─┼──────► failed(reason)
//!                  └ a step failed ─────────┘
//! ```
//!
//! What a start acquires is named in the capsule's record before it is acquired, and one function, [`release::release`],
//! gives back whatever a record names. A failed start, a destroy and a restarted agent all end there.

pub mod driver;
pub mod record;
pub mod recover;
pub mod release;
pub mod start;
mod traffic;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use agent_api::CapsuleState;
use api::CapsuleId;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::guest::Guest;
pub use traffic::{Counted, Traffic};

/// What a capsule is made from; it never changes while the capsule lives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// The capsule.
    pub id: CapsuleId,
    /// Name of an image on this host.
    pub image: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Size of the root disk in MiB.
    pub disk_mib: u32,
    /// Seconds of inactivity after which the host acts; 0 means never.
    pub timeout_sec: u32,
    /// Environment of every process in the guest.
    pub default_env: BTreeMap<String, String>,
    /// What the guest learns of its template.
    pub template_id: String,
}

/// What is true of a capsule now. Published by its driver alone.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Where in the diagram above it is.
    pub state: CapsuleState,
    /// Grows with every change of `state`.
    pub generation: u64,
    /// Why it stopped or failed.
    pub reason: String,
    /// True when it failed because the host had no room for it: another host may have.
    pub host_full: bool,
    /// Where this host reaches the guest, once it has a network.
    pub host_ip: Option<Ipv4Addr>,
    /// Versions of the kernel, the VMM, this agent and envd, once it runs.
    pub versions: BTreeMap<String, String>,
    /// The way into the guest while it runs.
    pub guest: Option<Arc<Guest>>,
}

impl Observed {
    /// True when nothing of the capsule is left on this host.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, CapsuleState::Stopped | CapsuleState::Failed)
    }
}

/// What a driver can be asked.
#[derive(Debug)]
pub enum Command {
    /// End the capsule and give back all it holds.
    Destroy,
}

/// The way to a capsule for everyone but its driver.
#[derive(Clone)]
pub struct Handle {
    /// What it was made from.
    pub spec: Arc<Spec>,
    /// Its guest traffic: connections, and when the last byte passed.
    pub traffic: Arc<Traffic>,
    commands: mpsc::Sender<Command>,
    observed: watch::Receiver<Observed>,
}

impl Handle {
    /// What is true of the capsule now.
    pub fn observed(&self) -> Observed {
        self.observed.borrow().clone()
    }

    /// Waits until the capsule runs or has ended, and says what is true then.
    pub async fn settled(&self) -> Observed {
        self.wait(|observed| observed.state == CapsuleState::Running || observed.has_ended()).await
    }

    /// Ends the capsule and waits until all of it is given back.
    pub async fn destroy(&self) -> Observed {
        // A driver that is gone has ended its capsule already.
        let _ = self.commands.send(Command::Destroy).await;
        self.wait(Observed::has_ended).await
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
