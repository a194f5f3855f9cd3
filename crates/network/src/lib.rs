//! Capsule networks: slots, namespaces, veth pairs, taps and the firewall.
//!
//! ```text
//!   host                        namespace wrenn-ns-{i}                       guest
//!   wrenn-veth{i} ───────────── eth0 ──────────────── tap0 ───────────────── 169.254.0.21
//!   10.12.x.2i    veth /31      10.12.x.2i+1          169.254.0.22/30        02:FC:00:00:00:05
//!        ▲                        source: guest → 10.12.x.2i+1
//!   route to 10.11.x.i            destination: 10.11.x.i → guest
//! ```
//!
//! Every guest has the same address, so a snapshot resumes in any slot; translation inside the namespace gives it the
//! slot's. [`slot`] has the arithmetic. [`Network`] makes and removes slots by netlink alone, no other program is run.
//!
//! A guest reaches the internet by the host's default route, and nothing else: no other slot, none of the host's own
//! addresses, nothing private or link-local unless the operator says so, no IPv6, and it cannot use an address that is
//! not its own. A [`Policy`] takes more away from one slot. The host reaches the guest at [`Slot::host_ip`].
//!
//! Owned here: everything named `wrenn-*` among links and namespaces of slots that this instance has claimed, its own
//! nftables table, `/run/wrenn/slots`. Never touched: another instance's slots, and any other table or rule. The one
//! global setting is `net.ipv4.ip_forward`, which is set and never reset, since others may have come to rely on it.
//!
//! Calls block, for some milliseconds at most; from async code they belong into `spawn_blocking`.

mod attributes;
mod claims;
mod conntrack;
mod firewall;
mod guard;
pub mod limits;
mod namespace;
mod netlink;
mod nft;
pub mod policy;
mod pool;
mod ranges;
mod route;
pub mod slot;
mod slots;
mod sockets;
mod step;
mod traffic;
mod uplink;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use claims::Claims;
use firewall::Firewall;
use namespace::Fittings;
pub use policy::Policy;
pub use pool::Claim;
use pool::Pool;
pub use ranges::Range;
pub use slot::Slot;
use slots::Slots;
pub use step::{Failed, Step};
pub use traffic::{Count, Traffic};

/// What failed, by what we were doing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name of the instance cannot be part of a table's name.
    #[error("`{0}` is not an instance: 8 characters of 0-9 and a-f")]
    Instance(String),
    /// Forwarding could not be switched on.
    #[error("set net.ipv4.ip_forward")]
    Forwarding(#[source] io::Error),
    /// `/run/netns` could not be made.
    #[error("prepare {}", slot::NETNS_DIR)]
    NetnsDir(#[source] io::Error),
    /// The default route could not be looked up.
    #[error("find the default route")]
    Uplinks(#[source] io::Error),
    /// This instance's table could not be made or removed.
    #[error("change this instance's nftables table")]
    Table(#[source] io::Error),
    /// The thread that makes slots ahead could not be started.
    #[error("start the thread that makes slots ahead")]
    Worker(#[source] io::Error),
    /// What slots have counted could not be read.
    #[error("read what slots have counted")]
    Traffic(#[source] io::Error),
    /// Claims could not be read or made.
    #[error("claim a slot")]
    Claim(#[source] io::Error),
    /// Every slot of the machine is taken.
    #[error("all {} slots of this machine are taken", Slot::MAX)]
    Exhausted,
    /// The slot is not claimed by this instance.
    #[error("slot {0} is not ours")]
    NotOurs(Slot),
    /// A slot could not be made. What was made of it is gone again; its claim stays until it is destroyed.
    #[error("make slot {slot}")]
    Create {
        /// The slot.
        slot: Slot,
        #[source]
        source: Failed,
    },
    /// What its guest may reach could not be changed; it is as it was.
    #[error("change what slot {slot} may reach")]
    Policy {
        /// The slot.
        slot: Slot,
        #[source]
        source: Failed,
    },
    /// The kernel could not be made to see that a VMM has attached to a slot's tap.
    #[error("look at the tap of slot {slot}")]
    Attached {
        /// The slot.
        slot: Slot,
        #[source]
        source: Failed,
    },
    /// Parts of slots could not be removed. Their claims stay, and another attempt may be made.
    #[error("remove a slot: {0}")]
    Destroy(Leftovers),
}

/// What could not be removed, and why.
#[derive(Debug)]
pub struct Leftovers(pub Vec<(Slot, Failed)>);

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (slot, Failed { step, source })) in self.0.iter().enumerate() {
            write!(f, "{}{step} of slot {slot} ({source})", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// How the network of one agent is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// 8 characters of 0-9 and a-f: unique for each data directory, and the same each time it is opened.
    pub instance: String,
    /// Ranges that guests may reach although they are private or link-local.
    pub allow: Vec<Range>,
    /// Ranges that no guest may reach.
    pub deny: Vec<Range>,
    /// How many slots are made ahead, from the first [`Network::sweep`] on, so that taking one costs nothing. With 0, slots are made when they are asked for and
    /// removed when they are given back.
    pub ready: usize,
    /// The user that attaches to the tap of slot N, and may use the network by that alone, has the number `users` + N.
    pub users: u32,
}

/// The slots of one instance. One per agent process.
pub struct Network {
    pool: Arc<Pool>,
    /// What makes slots ahead and cleans those that were given back.
    worker: Option<JoinHandle<()>>,
}

impl Network {
    /// Prepares the machine and this instance's table, with all slots in it that are still claimed from before.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let instance = &config.instance;
        if instance.len() != 8 || !instance.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(Error::Instance(instance.clone()));
        }
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(Error::Forwarding)?;
        namespace::prepare().map_err(Error::NetnsDir)?;
        let claims = Claims::open(instance).map_err(Error::Claim)?;
        let firewall = Firewall::new(instance, &config.allow, &config.deny);
        let uplinks = uplink::all().map_err(Error::Uplinks)?;
        let mtu = uplink::mtu(&uplinks).map_err(Error::Uplinks)?;
        if uplinks.is_empty() {
            tracing::warn!("no default route: capsules will not reach the internet");
        }
        let slots = claims.all().map_err(Error::Claim)?;
        firewall.open(&slots, &uplinks).map_err(|error| Error::Table(error.into()))?;
        tracing::info!(instance, ?uplinks, mtu, slots = slots.len(), "network is ready");
        let pool =
            Arc::new(Pool::new(Slots::new(claims, firewall, Fittings { mtu, users: config.users }), config.ready));
        let work = || {
            let pool = pool.clone();
            thread::Builder::new().name("wrenn-slots".into()).spawn(move || pool.work()).map_err(Error::Worker)
        };
        let worker = if config.ready > 0 { Some(work()?) } else { None };
        Ok(Self { pool, worker })
    }

    /// Claims a slot: one that was made ahead, or the lowest free one of the machine. It is this instance's, across restarts,
    /// until it is given back.
    pub fn claim(&self) -> Result<Claim, Error> {
        self.pool.claim()
    }

    /// The same of a slot that an earlier process of this instance claimed, for who has taken over what is in it. Nobody else
    /// may have it.
    pub fn take_over(&self, slot: Slot) -> Result<Claim, Error> {
        self.pool.take_over(slot)
    }

    /// Makes everything of a claimed slot, or nothing. One that was made ahead is there already.
    pub fn create(&self, slot: Slot) -> Result<(), Error> {
        self.pool.create(slot)
    }

    /// Has the guest of a slot that is made reach what the policy allows, and nothing else, from its next packet on. A slot that
    /// is made, or cleaned, has the default.
    pub fn set_policy(&self, slot: Slot, policy: &Policy) -> Result<(), Error> {
        let refused = |source| Error::Policy { slot, source };
        let socket = namespace::netfilter(slot).map_err(refused)?;
        policy::set(&socket, policy).map_err(|error| refused(Step::Rules.failed()(error)))
    }

    /// To be called when a VMM has attached to the slot's tap. Without it nothing reaches the guest until the kernel looks at
    /// links again, which is at most once a second for all of them together.
    pub fn attached(&self, slot: Slot) -> Result<(), Error> {
        namespace::look_at_tap(slot).map_err(|source| Error::Attached { slot, source })
    }

    /// Takes a slot back, which is then nobody's: it is cleaned for the next or removed, in the background where slots are made
    /// ahead. Nothing happens to one that was given back before, whosoever it is now. When it fails the claim still holds.
    ///
    /// Processes in its namespace keep that alive without a name; they must be gone before.
    pub fn give_back(&self, claim: Claim) -> Result<(), Error> {
        self.pool.give_back(claim)
    }

    /// Removes every slot of this instance that is neither in `keep` nor in the pool: what a killed process left. Returns
    /// them. With a pool that takes them, to clean them or remove them in the background, and is filled from then on.
    pub fn sweep(&self, keep: &HashSet<Slot>) -> Result<Vec<Slot>, Error> {
        let gone = self.pool.sweep(keep)?;
        if self.worker.is_none() {
            self.pool.slots.destroy_all(&gone)?;
        }
        Ok(gone)
    }

    /// What went through every slot of this instance, those of the pool included.
    pub fn traffic(&self) -> Result<BTreeMap<Slot, Traffic>, Error> {
        self.pool.slots.firewall.traffic().map_err(|error| Error::Traffic(error.into()))
    }

    /// The user whose VMM may attach to the tap of a slot: of no other slot of this machine, if all its agents are told the same.
    pub fn user(&self, slot: Slot) -> u32 {
        self.pool.slots.fittings.user(slot)
    }

    /// What fits into one packet on the way out: the MTU of every slot's links.
    pub fn mtu(&self) -> u32 {
        self.pool.slots.fittings.mtu
    }

    /// Removes the slots of the pool, and this instance's table unless slots are left that need it.
    pub fn close(mut self) -> Result<(), Error> {
        self.stop();
        self.pool.empty()?;
        if self.pool.slots.claims.all().map_err(Error::Claim)?.is_empty() {
            self.pool.slots.firewall.remove().map_err(|error| Error::Table(error.into()))?;
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.pool.stop();
        if let Some(worker) = self.worker.take() {
            // One that panicked has said so.
            let _ = worker.join();
        }
    }
}

impl Drop for Network {
    /// Leaves the slots as they are, as a kill would.
    fn drop(&mut self) {
        self.stop();
    }
}
