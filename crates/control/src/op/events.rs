//! Telling what happens to capsules, to whoever listens in this process. Nothing is kept: who was not there has missed it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use api::event::{Outcome, SYSTEM};
use api::{Actor, CapsuleId, Event, EventName, Resource, TeamId};
use lifecycle::{Desired, Observed, State};
use tokio::sync::broadcast;

use super::{show, word};
use crate::db;
use crate::db::capsule::{Capsule, Life};

/// Events that may wait for a slow listener; one that falls further behind is sent away.
const BACKLOG: usize = 1024;

/// Who listens, and who asked for what is still to come.
pub struct Events {
    listeners: broadcast::Sender<(TeamId, Event)>,
    /// Until what they asked for has happened.
    asked: Mutex<HashMap<CapsuleId, Actor>>,
}

impl Default for Events {
    fn default() -> Self {
        Self { listeners: broadcast::Sender::new(BACKLOG), asked: Mutex::default() }
    }
}

impl Events {
    /// Everything that happens from now on, to every team.
    pub fn listen_any_team(&self) -> broadcast::Receiver<(TeamId, Event)> {
        self.listeners.subscribe()
    }

    /// Remembers who wants what comes next of the capsule.
    pub fn asked(&self, id: CapsuleId, actor: Actor) {
        self.lock().insert(id, actor);
    }

    /// Tells what a change of a capsule's row means. To be called once per change, by whoever made it.
    pub fn changed(&self, before: &Life, capsule: &Capsule) {
        let status = |state: State| lifecycle::status(state.desired, state.observed);
        let (from, to) = (status(before.state), status(capsule.life.state));
        let reason = capsule.life.reason.clone().map(|reason| ("reason".to_owned(), reason));
        if from != to {
            let words = [("from".to_owned(), word(from)), ("to".to_owned(), word(to))];
            let metadata = words.into_iter().chain(reason.clone()).collect();
            self.tell(capsule, EventName::CapsuleStateChanged, SYSTEM, None, metadata);
        }
        let Some((event, outcome)) = came_of(before, &capsule.life) else { return };
        let actor = self.lock().remove(&capsule.id).unwrap_or(SYSTEM);
        self.tell(capsule, event, actor, Some(outcome), reason.into_iter().collect());
    }

    fn tell(
        &self,
        capsule: &Capsule,
        event: EventName,
        actor: Actor,
        outcome: Option<Outcome>,
        metadata: BTreeMap<String, String>,
    ) {
        let failed = outcome == Some(Outcome::Error);
        let why = || capsule.life.reason.clone().unwrap_or_else(|| "it ended before it ran".into());
        let event = Event {
            event,
            timestamp: db::now(),
            outcome,
            resource: Some(Resource { id: capsule.id.to_string(), kind: "capsule".into() }),
            actor: Some(actor),
            metadata,
            error: failed.then(why),
            sandbox: Some(show(capsule.clone())),
        };
        // Nobody may be listening.
        let _ = self.listeners.send((capsule.team, event));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<CapsuleId, Actor>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was asked for and has now come to its end, and how.
fn came_of(before: &Life, after: &Life) -> Option<(EventName, Outcome)> {
    let gone = |state: State| state.desired == Desired::Stopped && state.observed.ended();
    if gone(after.state) {
        return (!gone(before.state)).then_some((EventName::CapsuleDestroy, Outcome::Success));
    }
    if before.started_at.is_some() || before.state.observed == after.state.observed {
        return None;
    }
    match after.state.observed {
        Observed::Running => Some((EventName::CapsuleCreate, Outcome::Success)),
        Observed::Stopped | Observed::Failed => Some((EventName::CapsuleCreate, Outcome::Error)),
        Observed::Unreported | Observed::Starting | Observed::Stopping | Observed::Missing => None,
    }
}
