//! Forking: one point of the parent, from which all children start at once.

use std::collections::HashMap;

use futures::StreamExt;
use tracing::warn;

use crate::capsule::driver::From;
use crate::capsule::{Handle, Spec};
use crate::{Agent, admission, templates};

/// How many children start at the same time: each takes a processor while it wakes up.
const AT_ONCE: usize = 8;

/// Why there are no children at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host cannot hold them.
    #[error(transparent)]
    Full(#[from] admission::Full),
    /// There is nothing that they could begin from.
    #[error("taking the fork point")]
    Capture(#[source] templates::CaptureError),
}

impl Agent {
    /// Makes a capsule of each spec that begins as `parent` is now. In their order: the child, or why there is none. What
    /// could not be started has left nothing.
    pub(crate) async fn fork(
        &self,
        parent: &Handle,
        children: Vec<Spec>,
    ) -> Result<Vec<Result<Handle, String>>, Error> {
        // All of them or none, before the parent stands still. Those that are there already have what they need.
        let new: Vec<Spec> = children.iter().filter(|spec| self.capsule(spec.id).is_none()).cloned().collect();
        let promises = self.host.admission.admit_all(&new)?;
        let mut promises: HashMap<_, _> = new.iter().map(|spec| spec.id).zip(promises).collect();
        // Nobody keeps it, so it goes with the last child that begins from it.
        let point = self.capture(parent, self.host.passing()).await.map_err(Error::Capture)?;
        let starts = children.into_iter().map(|spec| {
            let promise = promises.remove(&spec.id);
            let (agent, point) = (self.clone(), point.clone());
            // As it is now, not as it was when the parent was made.
            let egress = (*parent.observed().egress).clone();
            async move {
                let id = spec.id;
                let handle =
                    agent.create(spec, egress, From::Point(point), promise).map_err(|error| crate::chain(&error))?;
                let settled = handle.settled().await;
                if settled.has_ended() {
                    warn!(child = %id, reason = settled.reason, "a fork could not be started");
                    return Err(settled.reason);
                }
                Ok(handle)
            }
        });
        Ok(futures::stream::iter(starts).buffered(AT_ONCE).collect().await)
    }
}
