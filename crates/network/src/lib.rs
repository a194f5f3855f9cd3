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
//! addresses, nothing link-local, no IPv6, and it cannot use an address that is not its own. The host reaches the
//! guest at [`Slot::host_ip`].
//!
//! Owned here: everything named `wrenn-*` among links and namespaces of slots that this instance has claimed, its own
//! nftables table, `/run/wrenn/slots`. Never touched: another instance's slots, and any other table or rule. The one
//! global setting is `net.ipv4.ip_forward`, which is set and never reset, since others may have come to rely on it.
//!
//! Calls block, for some milliseconds at most; from async code they belong into `spawn_blocking`.

mod claims;
mod firewall;
mod namespace;
mod netlink;
mod nft;
mod route;
pub mod slot;
mod step;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;

use claims::Claims;
use firewall::Firewall;
use netlink::{ROUTE, Requests, Socket};
pub use slot::Slot;
use slot::VETH_PREFIX;
use step::Steps;
pub use step::{Failed, Step};

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

/// What makes one agent's network different from another's on the same machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// 8 characters of 0-9 and a-f: unique for each data directory, and the same each time it is opened.
    pub instance: String,
}

/// The slots of one instance. One per agent process.
pub struct Network {
    claims: Claims,
    firewall: Firewall,
    steps: Steps,
    /// Held while a slot is made. The kernel changes links one at a time anyway, and who waits for its turn inside a
    /// sysctl does so by trying again and again: eight at once take twice as long as eight in a row.
    turn: Mutex<()>,
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
        let firewall = Firewall::new(instance);
        let uplinks = firewall::uplinks().map_err(Error::Uplinks)?;
        if uplinks.is_empty() {
            tracing::warn!("no default route: capsules will not reach the internet");
        }
        let slots = claims.all().map_err(Error::Claim)?;
        firewall.rebuild(&slots, &uplinks).map_err(|error| Error::Table(error.into()))?;
        tracing::info!(instance, ?uplinks, slots = slots.len(), "network is ready");
        Ok(Self { claims, firewall, steps: Steps::default(), turn: Mutex::default() })
    }

    /// Claims the lowest free slot of the machine. It is this instance's, across restarts, until it is destroyed.
    pub fn claim(&self) -> Result<Slot, Error> {
        self.claims.claim().map_err(Error::Claim)?.ok_or(Error::Exhausted)
    }

    /// Makes everything of a claimed slot, or nothing.
    pub fn create(&self, slot: Slot) -> Result<(), Error> {
        if !self.claims.owns(slot).map_err(Error::Claim)? {
            return Err(Error::NotOurs(slot));
        }
        self.build(slot).map_err(|source| {
            for leftover in self.tear_down(slot) {
                tracing::warn!(%slot, error = &leftover as &dyn std::error::Error, "undoing a slot");
            }
            Error::Create { slot, source }
        })
    }

    /// Removes everything of a slot and then its claim. Nothing happens to what is not there, and to a slot that is
    /// not ours. Every step is tried; the claim stays if one failed.
    ///
    /// Processes in the namespace keep it alive without a name; they should be gone before.
    pub fn destroy(&self, slot: Slot) -> Result<(), Error> {
        if !self.claims.owns(slot).map_err(Error::Claim)? {
            return Ok(());
        }
        let mut leftovers = self.tear_down(slot);
        if leftovers.is_empty() {
            leftovers.extend(self.claims.release(slot).map_err(Step::Claim.failed()).err());
        }
        if leftovers.is_empty() {
            return Ok(());
        }
        Err(Error::Destroy(Leftovers(leftovers.into_iter().map(|failed| (slot, failed)).collect())))
    }

    /// Destroys every slot of this instance that is not in `keep`: what a killed process left. Returns them.
    pub fn sweep(&self, keep: &HashSet<Slot>) -> Result<Vec<Slot>, Error> {
        let mut gone = self.claims.all().map_err(Error::Claim)?;
        gone.retain(|slot| !keep.contains(slot));
        let mut leftovers = Vec::new();
        for &slot in &gone {
            match self.destroy(slot) {
                Err(Error::Destroy(Leftovers(more))) => leftovers.extend(more),
                result => result?,
            }
        }
        if leftovers.is_empty() { Ok(gone) } else { Err(Error::Destroy(Leftovers(leftovers))) }
    }

    /// Removes this instance's table, unless slots are left that need it.
    pub fn close(self) -> Result<(), Error> {
        if self.claims.all().map_err(Error::Claim)?.is_empty() {
            self.firewall.remove().map_err(|error| Error::Table(error.into()))?;
        }
        Ok(())
    }

    fn build(&self, slot: Slot) -> Result<(), Failed> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.firewall.add(slot).map_err(Step::Firewall.failed())?;
        self.steps.done(Step::Firewall)?;
        namespace::create(slot, &self.steps)?;
        connect_host_end(slot).map_err(Step::HostEnd.failed())?;
        self.steps.done(Step::HostEnd)
    }

    /// Removes what is there, in reverse; returns what could not be removed.
    fn tear_down(&self, slot: Slot) -> Vec<Failed> {
        let link = delete_link(&slot.veth()).map_err(Step::Veth.failed());
        let namespace = namespace::unname(slot).map_err(Step::Namespace.failed());
        let firewall = self.firewall.delete(slot).map_err(Step::Firewall.failed());
        [link, namespace, firewall].into_iter().filter_map(Result::err).collect()
    }
}

fn connect_host_end(slot: Slot) -> io::Result<()> {
    let socket = Socket::open(ROUTE)?;
    let link = name_to_index(&socket, &slot.veth())?;
    namespace::disable_ipv6(&slot.veth())?;
    let mut requests = Requests::default();
    requests.add_address(link, slot.veth_host_ip(), VETH_PREFIX);
    requests.set_up(link, Vec::new());
    requests.add_route(Some(slot.host_ip()), slot.veth_netns_ip(), link);
    Ok(socket.transact(&requests)?)
}

/// Deletes the pair by its end on the host; addresses and routes go with it.
fn delete_link(name: &str) -> io::Result<()> {
    let mut requests = Requests::default();
    requests.delete_link(name);
    match Socket::open(ROUTE)?.transact(&requests) {
        Err(error) if error.is(Errno::NODEV) => Ok(()),
        result => Ok(result?),
    }
}
