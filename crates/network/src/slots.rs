//! Making, cleaning and removing one slot.

use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;

use crate::claims::Claims;
use crate::firewall::Firewall;
use crate::namespace::{Census, Fittings};
use crate::netlink::{ROUTE, Requests, Socket};
use crate::slot::{Slot, VETH_PREFIX};
use crate::step::{Failed, Step, Steps};
use crate::{Error, Leftovers, conntrack, namespace, sockets};

/// What it takes to make slots.
pub(crate) struct Slots {
    pub(crate) claims: Claims,
    pub(crate) firewall: Firewall,
    pub(crate) fittings: Fittings,
    pub(crate) steps: Steps,
    /// Held while a slot is made. The kernel changes links one at a time anyway, and who waits for its turn inside a
    /// sysctl does so by trying again and again: eight at once take twice as long as eight in a row.
    turn: Mutex<()>,
    /// What is in a new namespace, once somebody needs to know.
    new: OnceLock<Census>,
}

impl Slots {
    pub(crate) fn new(claims: Claims, firewall: Firewall, fittings: Fittings) -> Self {
        Self { claims, firewall, fittings, steps: Steps::default(), turn: Mutex::default(), new: OnceLock::new() }
    }

    /// Makes everything of a claimed slot, or nothing.
    pub(crate) fn create(&self, slot: Slot) -> Result<(), Error> {
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

    pub(crate) fn build(&self, slot: Slot) -> Result<(), Failed> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.firewall.add(slot).map_err(Step::Firewall.failed())?;
        self.steps.done(Step::Firewall)?;
        namespace::create(slot, self.fittings, &self.steps)?;
        connect_host_end(slot).map_err(Step::HostEnd.failed())?;
        self.steps.done(Step::HostEnd)
    }

    /// Makes a slot that somebody had as good as new. Nothing that its guest did is left: no connection, on the host or
    /// inside, no counter, no rule, no setting of its tap. One that fails here is to be removed.
    ///
    /// No process may be in its namespace.
    pub(crate) fn clean(&self, slot: Slot) -> Result<(), Failed> {
        let new = match self.new.get() {
            Some(new) => new,
            None => {
                let new = namespace::census_of_new(self.fittings)?;
                self.new.get_or_init(|| new)
            }
        };
        namespace::clean(slot, self.fittings, new, &self.steps)?;
        self.forget_connections(slot).map_err(Step::Connections.failed())?;
        self.steps.done(Step::Connections)?;
        shape_anew(slot).map_err(Step::HostEnd.failed())?;
        self.steps.done(Step::HostEnd)?;
        // Last, so that it begins with nothing counted.
        self.firewall.reset(slot).map_err(Step::Firewall.failed())?;
        self.steps.done(Step::Firewall)
    }

    /// Removes everything of a slot and then its claim. Nothing happens to what is not there, and to a slot that is not
    /// ours. Every step is tried; the claim stays if one failed.
    pub(crate) fn destroy(&self, slot: Slot) -> Result<(), Error> {
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

    /// Destroys all of them, whatever happens to each.
    pub(crate) fn destroy_all(&self, slots: &[Slot]) -> Result<(), Error> {
        let mut leftovers = Vec::new();
        for &slot in slots {
            match self.destroy(slot) {
                Err(Error::Destroy(Leftovers(more))) => leftovers.extend(more),
                result => result?,
            }
        }
        if leftovers.is_empty() { Ok(()) } else { Err(Error::Destroy(Leftovers(leftovers))) }
    }

    /// Ends what the host still says to the slot's guest, and forgets what its guest said to others.
    fn forget_connections(&self, slot: Slot) -> io::Result<()> {
        sockets::abort_to(slot.host_ip())?;
        Ok(self.firewall.with_socket(|socket| conntrack::forget(socket, slot))?)
    }

    /// Removes what is there, in reverse; returns what could not be removed.
    fn tear_down(&self, slot: Slot) -> Vec<Failed> {
        let done = |step: Step, removed: Result<(), Failed>| removed.and_then(|()| self.steps.done(step)).err();
        let link = done(Step::Links, delete_link(&slot.veth()).map_err(Step::Links.failed()));
        let namespace = done(Step::Namespace, namespace::unname(slot).map_err(Step::Namespace.failed()));
        let connections = done(Step::Connections, self.forget_connections(slot).map_err(Step::Connections.failed()));
        let firewall = done(Step::Firewall, self.firewall.delete(slot).map_err(Step::Firewall.failed()));
        [link, namespace, connections, firewall].into_iter().flatten().collect()
    }
}

fn connect_host_end(slot: Slot) -> io::Result<()> {
    let socket = Socket::open(ROUTE)?;
    let link = name_to_index(&socket, &slot.veth())?;
    namespace::disable_ipv6(&slot.veth())?;
    let mut requests = Requests::default();
    requests.add_address(link, slot.veth_host_ip(), VETH_PREFIX);
    // While the link is down, so that nothing has to be waited for.
    requests.shape(link);
    requests.set_up(link, Vec::new());
    requests.add_neighbour(link, slot.veth_netns_ip(), slot.veth_netns_mac());
    requests.add_route(Some(slot.host_ip()), slot.veth_netns_ip(), link);
    Ok(socket.transact(requests)?)
}

fn shape_anew(slot: Slot) -> io::Result<()> {
    let socket = Socket::open(ROUTE)?;
    let mut requests = Requests::default();
    requests.shape(name_to_index(&socket, &slot.veth())?);
    Ok(socket.transact(requests)?)
}

/// Deletes the pair by its end on the host; addresses and routes go with it.
fn delete_link(name: &str) -> io::Result<()> {
    let mut requests = Requests::default();
    requests.delete_link(name);
    match Socket::open(ROUTE)?.transact(requests) {
        Err(error) if error.is(Errno::NODEV) => Ok(()),
        result => Ok(result?),
    }
}
