//! What capsules may reach outside: the rules of their slots, and the filters of those that may reach names.
//!
//! Rules outlive this process, filters do not: who is sent to one that is not there gets nowhere, until the next agent has
//! started it again.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::egress::Policy;
use egress::{DNS_PORT, Filter, Resolver, TCP_PORT};
use network::slot::{Slot, TAP_ADDRESS};
use network::{Network, policy};

use crate::host::blocking;

/// Why a capsule does not have the limits that it should have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They could not be written down.
    #[error("writing the capsule's record")]
    Record(#[source] io::Error),
    /// The firewall.
    #[error("changing the slot's rules")]
    Rules(#[source] network::Error),
    /// The filter.
    #[error("starting the filter of names")]
    Filter(#[source] egress::Error),
}

/// The limits of this host's capsules, by slot. Clones are the same.
#[derive(Clone)]
pub struct Egress {
    network: Arc<Network>,
    filters: Arc<Mutex<HashMap<Slot, Filter>>>,
}

impl Egress {
    /// No filters yet.
    pub fn new(network: Arc<Network>) -> Self {
        Self { network, filters: Arc::default() }
    }

    /// Has the slot's guest reach what the policy allows, and nothing else: what it has open that is not allowed is cut.
    pub async fn set(&self, slot: Slot, policy: &Policy) -> Result<(), Error> {
        let (this, policy, resolver) = (self.clone(), policy.clone(), Resolver::system());
        blocking(move || this.change(slot, policy, resolver)).await
    }

    fn change(&self, slot: Slot, policy: Policy, resolver: Resolver) -> Result<(), Error> {
        let rules = rules(&policy);
        let mut filters = self.lock();
        if !policy.has_names() {
            self.network.set_policy(slot, &rules).map_err(Error::Rules)?;
            // After that nobody is sent to it.
            filters.remove(&slot);
            return Ok(());
        }
        match filters.get(&slot) {
            Some(filter) => filter.set(policy),
            // Before anybody is sent to it.
            None => {
                let filter = Filter::start(&slot.netns_path(), TAP_ADDRESS, policy, resolver).map_err(Error::Filter)?;
                filters.insert(slot, filter);
            }
        }
        self.network.set_policy(slot, &rules).map_err(Error::Rules)
    }

    /// Ends the filter of a slot that is about to go. Blocks until it is out of the slot's namespace.
    pub fn end(&self, slot: Slot) {
        let filter = self.lock().remove(&slot);
        drop(filter);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Slot, Filter>> {
        self.filters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rules(policy: &Policy) -> policy::Policy {
    policy::Policy {
        allow: policy.allow.iter().map(|cidr| cidr.range()).collect(),
        deny: policy.deny.iter().map(|cidr| cidr.range()).collect(),
        filter: policy.has_names().then_some(policy::Filter { tcp: TCP_PORT, dns: DNS_PORT }),
    }
}
