//! Telling what happens to capsules and templates, to whoever listens in this process. Nothing is kept: who was not there has missed it.

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

/// Why a host paused a capsule by itself, for programs.
const EXPIRED: &str = "ttl_expired";

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
        let reason =
            if paused_itself(before, &capsule.life) { Some(EXPIRED.into()) } else { capsule.life.reason.clone() };
        let reason = reason.map(|reason| ("reason".to_owned(), reason));
        if from != to {
            let words = [("from".to_owned(), word(from)), ("to".to_owned(), word(to))];
            let metadata = words.into_iter().chain(reason.clone()).collect();
            self.tell(capsule, EventName::CapsuleStateChanged, SYSTEM, None, metadata);
        }
        let Some((event, outcome)) = came_of(before, &capsule.life) else { return };
        let actor = self.lock().remove(&capsule.id).unwrap_or(SYSTEM);
        self.tell(capsule, event, actor, Some(outcome), reason.into_iter().collect());
    }

    /// Tells that what was asked for failed, where no change of the row says so.
    pub fn failed(&self, capsule: &Capsule, event: EventName, why: &str) {
        let actor = self.lock().remove(&capsule.id).unwrap_or(SYSTEM);
        let told = Event { error: Some(why.to_owned()), ..about(capsule, event, actor, Some(Outcome::Error)) };
        self.send(capsule.team, told);
    }

    /// Tells what was done to a template, with the capsule it came of.
    pub fn template(
        &self,
        event: EventName,
        team: TeamId,
        name: &str,
        actor: Actor,
        outcome: Result<(), String>,
        capsule: Option<&Capsule>,
    ) {
        let told = Event {
            event,
            timestamp: db::now(),
            outcome: Some(if outcome.is_ok() { Outcome::Success } else { Outcome::Error }),
            resource: Some(Resource { id: name.into(), kind: "template".into() }),
            actor: Some(actor),
            metadata: BTreeMap::new(),
            error: outcome.err(),
            sandbox: capsule.cloned().map(show),
        };
        self.send(team, told);
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
        self.send(capsule.team, Event { metadata, error: failed.then(why), ..about(capsule, event, actor, outcome) });
    }

    fn send(&self, team: TeamId, event: Event) {
        // Nobody may be listening.
        let _ = self.listeners.send((team, event));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<CapsuleId, Actor>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn about(capsule: &Capsule, event: EventName, actor: Actor, outcome: Option<Outcome>) -> Event {
    Event {
        event,
        timestamp: db::now(),
        outcome,
        resource: Some(Resource { id: capsule.id.to_string(), kind: "capsule".into() }),
        actor: Some(actor),
        metadata: BTreeMap::new(),
        error: None,
        sandbox: Some(show(capsule.clone())),
    }
}

/// Whether its host has just paused it because nothing happened for its timeout: the only thing for which a host pauses by
/// itself and says why.
fn paused_itself(before: &Life, after: &Life) -> bool {
    let (was, is) = (before.state.observed, after.state);
    is.desired == Desired::Running
        && matches!(is.observed, Observed::Paused | Observed::Uploaded)
        && !matches!(was, Observed::Paused | Observed::Uploaded | Observed::Resuming)
        && after.reason.is_some()
}

/// What was asked for, or is worth telling as if it had been, and has now come to its end, and how.
fn came_of(before: &Life, after: &Life) -> Option<(EventName, Outcome)> {
    let gone = |state: State| state.desired == Desired::Stopped && state.observed.ended();
    if gone(after.state) {
        return (!gone(before.state)).then_some((EventName::CapsuleDestroy, Outcome::Success));
    }
    let (was, is) = (before.state.observed, after.state.observed);
    if was == is {
        return None;
    }
    let never_ran = before.started_at.is_none();
    match is {
        Observed::Running if never_ran => Some((EventName::CapsuleCreate, Outcome::Success)),
        Observed::Running
            if matches!(was, Observed::Paused | Observed::Uploaded | Observed::Hibernated | Observed::Resuming) =>
        {
            Some((EventName::CapsuleResume, Outcome::Success))
        }
        Observed::Paused | Observed::Uploaded if matches!(was, Observed::Running | Observed::Pausing) => {
            Some((EventName::CapsulePause, Outcome::Success))
        }
        Observed::Stopped | Observed::Failed if never_ran => Some((EventName::CapsuleCreate, Outcome::Error)),
        Observed::Unreported
        | Observed::Starting
        | Observed::Running
        | Observed::Pausing
        | Observed::Paused
        | Observed::Uploaded
        | Observed::Hibernated
        | Observed::Resuming
        | Observed::Stopping
        | Observed::Missing
        | Observed::Stopped
        | Observed::Failed => None,
    }
}
