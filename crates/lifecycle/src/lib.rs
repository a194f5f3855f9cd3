//! What a capsule may do in which state.
//!
//! Control writes what it *desires*; hosts report what they *observe*; the status a client sees is [`status`] of both, and
//! nothing else. Everything that moves a capsule goes through four total functions over closed enums:
//!
//! ```text
//!   a client's verb      ─► decide(state, command)   ─► act, wait, refuse
//!   a fact from a host   ─► observe(state, event)    ─► the new state, or none because the fact is old
//!   what a host lists    ─► reconcile(state, on_host) ─► create, pause, destroy or nothing
//!
//!   desired Running:   pending ─► starting ─► running ⇄ missing          any ─► stopped | error (both final)
//!                      running ─► pausing ─► paused ─► resuming ─► running
//!   desired Paused:    pausing ─► paused ─► hibernated ─► resuming
//!   desired Stopped:   stopping ─► stopped
//! ```
//!
//! A host pauses an idle capsule by itself. That is a fact and not a gap to close: a capsule that is desired to run and observed
//! to be paused *is* paused, until a client resumes it. Resuming is never made up for by a reconciler, because nobody may be
//! waiting for it any more; a pause that was asked for and did not come about is, because it is what ends the spending.
//! What its host has uploaded is in the object store too: when the host is lost, or asked to let go of it, it *hibernates* there,
//! until a client resumes it on a host that takes it from there.
//! Forking and making a template leave a capsule running: its host stops it for milliseconds, which is no state.
//!
//! Pure: no IO, no clock (ages are arguments). It refuses to know hosts, networks, SQL and HTTP.

use std::time::Duration;

use api::Status;

/// What control wants of a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Desired {
    /// Or paused by its host.
    Running,
    Paused,
    /// For good: no capsule comes back from this.
    Stopped,
}

/// What is known of a capsule's life on its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Observed {
    /// No host has said anything yet.
    Unreported,
    Starting,
    Running,
    /// Its host is putting it aside.
    Pausing,
    /// On its host's disk.
    Paused,
    /// On its host's disk, and in the object store.
    Uploaded,
    /// In the object store, and on no host.
    Hibernated,
    /// Its host is bringing it back.
    Resuming,
    Stopping,
    /// Its host listed all it has, and this was not among it.
    Missing,
    /// It ended. Final.
    Stopped,
    /// It could not be started, or broke. Final.
    Failed,
}

impl Observed {
    /// Whether its life is over. No later fact changes that, and a host that still runs it is told to end it.
    pub fn ended(self) -> bool {
        match self {
            Self::Stopped | Self::Failed => true,
            Self::Unreported
            | Self::Starting
            | Self::Running
            | Self::Pausing
            | Self::Paused
            | Self::Uploaded
            | Self::Hibernated
            | Self::Resuming
            | Self::Stopping
            | Self::Missing => false,
        }
    }
}

/// All that decides about a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    pub desired: Desired,
    pub observed: Observed,
    /// The newest of its host's generation numbers that went into `observed`.
    pub generation: u64,
}

impl State {
    /// A capsule that was just asked for.
    pub const NEW: Self = Self { desired: Desired::Running, observed: Observed::Unreported, generation: 0 };
}

/// The state in which a host says a capsule is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostState {
    Starting,
    Running,
    Pausing,
    Paused,
    /// Paused, and in the object store too.
    Uploaded,
    /// Ended there; in the object store.
    Hibernated,
    Resuming,
    Stopping,
    Stopped,
    Failed,
}

/// A fact about a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Its host reported it, with its number for this change.
    Reported { state: HostState, generation: u64 },
    /// Its host answered the request to start it with an error, or could not be asked.
    StartFailed,
    /// Its host confirmed that nothing of it is left.
    Destroyed,
    /// Its host listed all it has, after `State` was read, and this was not among it.
    Absent,
}

/// What a client asks of a capsule that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    Destroy,
    Pause,
    /// Keep it in the object store alone.
    Hibernate,
    Resume,
    Touch,
    Exec,
    /// Make others that begin where it is.
    Fork,
    /// Make a template that begins where it is.
    Snapshot,
}

/// Where a capsule begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    Template,
    /// What another capsule was at one moment, which does not come again.
    Fork,
}

/// The answer to a [`Command`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Do it.
    Act,
    /// It is so already.
    Done,
    /// It will be possible in a moment: wait for the next state, then ask again.
    Wait,
    /// Not in this state.
    Refuse,
}

/// What a reconciler does about a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    Nothing,
    Create,
    Pause,
    Destroy,
    /// It was asked for and will not come about.
    GiveUp,
}

/// How long a request may take to reach its host before a reconciler makes it again. Making one twice is harmless, so this only
/// saves work.
pub const GRACE: Duration = Duration::from_secs(60);
/// How long a fork may take to reach its host. It cannot be made again, and the last of many children waits for the others.
pub const FORK_GRACE: Duration = Duration::from_secs(600);

/// Whether a host's report is of the past. A host says of what hibernated there that it did until that is resumed there or
/// destroyed, so of one that has gone on elsewhere since, which the higher generation tells, it has nothing to say.
pub fn is_past(known: State, reported: HostState, generation: u64) -> bool {
    reported == HostState::Hibernated && generation < known.generation
}

/// The word a client sees.
pub fn status(desired: Desired, observed: Observed) -> Status {
    match (desired, observed) {
        (_, Observed::Stopped) | (Desired::Stopped, Observed::Failed) => Status::Stopped,
        (
            Desired::Stopped,
            Observed::Unreported
            | Observed::Starting
            | Observed::Running
            | Observed::Pausing
            | Observed::Paused
            | Observed::Uploaded
            | Observed::Hibernated
            | Observed::Resuming
            | Observed::Stopping
            | Observed::Missing,
        ) => Status::Stopping,
        (Desired::Running | Desired::Paused, observed) => match observed {
            Observed::Unreported => Status::Pending,
            Observed::Starting => Status::Starting,
            Observed::Running if desired == Desired::Running => Status::Running,
            Observed::Resuming if desired == Desired::Running => Status::Resuming,
            Observed::Running | Observed::Resuming | Observed::Pausing => Status::Pausing,
            Observed::Paused | Observed::Uploaded => Status::Paused,
            Observed::Hibernated => Status::Hibernated,
            Observed::Stopping => Status::Stopping,
            Observed::Missing => Status::Missing,
            Observed::Failed => Status::Error,
            Observed::Stopped => Status::Stopped,
        },
    }
}

/// Whether a client's verb is possible now.
pub fn decide(state: State, command: Command) -> Decision {
    let State { desired, observed, .. } = state;
    match (command, desired) {
        (Command::Destroy, Desired::Running | Desired::Paused) => Decision::Act,
        (Command::Destroy, Desired::Stopped) if observed.ended() => Decision::Done,
        (Command::Destroy, Desired::Stopped) => Decision::Act,
        (
            Command::Pause
            | Command::Hibernate
            | Command::Resume
            | Command::Touch
            | Command::Exec
            | Command::Fork
            | Command::Snapshot,
            Desired::Stopped,
        ) => Decision::Refuse,
        (Command::Pause, Desired::Running | Desired::Paused) => match observed {
            Observed::Running => Decision::Act,
            Observed::Paused | Observed::Uploaded | Observed::Hibernated => Decision::Done,
            Observed::Unreported | Observed::Starting | Observed::Pausing | Observed::Resuming => Decision::Wait,
            Observed::Stopping | Observed::Missing | Observed::Stopped | Observed::Failed => Decision::Refuse,
        },
        (Command::Hibernate, Desired::Running | Desired::Paused) => match observed {
            Observed::Paused | Observed::Uploaded => Decision::Act,
            Observed::Hibernated => Decision::Done,
            Observed::Pausing => Decision::Wait,
            Observed::Running if desired == Desired::Paused => Decision::Wait,
            Observed::Running
            | Observed::Unreported
            | Observed::Starting
            | Observed::Resuming
            | Observed::Stopping
            | Observed::Missing
            | Observed::Stopped
            | Observed::Failed => Decision::Refuse,
        },
        (Command::Resume, Desired::Running | Desired::Paused) => match observed {
            Observed::Paused | Observed::Uploaded | Observed::Hibernated => Decision::Act,
            Observed::Running if desired == Desired::Running => Decision::Done,
            // Among them one that is about to be paused.
            Observed::Running | Observed::Unreported | Observed::Starting | Observed::Pausing | Observed::Resuming => {
                Decision::Wait
            }
            Observed::Stopping | Observed::Missing | Observed::Stopped | Observed::Failed => Decision::Refuse,
        },
        (Command::Touch | Command::Exec | Command::Fork | Command::Snapshot, Desired::Running | Desired::Paused) => {
            match observed {
                Observed::Running if desired == Desired::Running => Decision::Act,
                // Among them those that will be refused when they are paused: by then it is known.
                Observed::Running
                | Observed::Unreported
                | Observed::Starting
                | Observed::Pausing
                | Observed::Resuming => Decision::Wait,
                Observed::Paused
                | Observed::Uploaded
                | Observed::Hibernated
                | Observed::Stopping
                | Observed::Missing
                | Observed::Stopped
                | Observed::Failed => Decision::Refuse,
            }
        }
    }
}

/// What is known after a fact; `None` when the fact changes nothing: it is older than what is known, or the capsule ended.
pub fn observe(state: State, event: Event) -> Option<State> {
    if state.observed.ended() {
        return None;
    }
    let becomes = |observed| Some(State { observed, ..state });
    match event {
        Event::Reported { state: reported, generation } => {
            // Nothing the host said went into these two, so what it said last still counts.
            let heard_nothing = matches!(state.observed, Observed::Unreported | Observed::Missing);
            let news = generation > state.generation || (heard_nothing && generation == state.generation);
            news.then_some(State {
                observed: match reported {
                    HostState::Starting => Observed::Starting,
                    HostState::Running => Observed::Running,
                    HostState::Pausing => Observed::Pausing,
                    HostState::Paused => Observed::Paused,
                    HostState::Uploaded => Observed::Uploaded,
                    HostState::Hibernated => Observed::Hibernated,
                    HostState::Resuming => Observed::Resuming,
                    HostState::Stopping => Observed::Stopping,
                    HostState::Stopped => Observed::Stopped,
                    HostState::Failed => Observed::Failed,
                },
                generation,
                ..state
            })
        }
        Event::StartFailed => becomes(Observed::Failed),
        Event::Destroyed => becomes(Observed::Stopped),
        Event::Absent => match (state.desired, state.observed) {
            // It is on no host. One that is not wanted has to be forgotten by the object store first.
            (_, Observed::Hibernated) => None,
            // Its host has lost it, and need not be the one that it goes on on.
            (_, Observed::Uploaded) => becomes(Observed::Hibernated),
            (Desired::Stopped, _) | (Desired::Running | Desired::Paused, Observed::Stopping) => {
                becomes(Observed::Stopped)
            }
            (
                Desired::Running | Desired::Paused,
                Observed::Starting | Observed::Running | Observed::Pausing | Observed::Paused | Observed::Resuming,
            ) => becomes(Observed::Missing),
            (
                Desired::Running | Desired::Paused,
                // The request that makes it may be on its way.
                Observed::Unreported | Observed::Missing | Observed::Stopped | Observed::Failed,
            ) => None,
        },
    }
}

/// What to do about a capsule, given what its host lists for it (`None`: nothing) and how long ago its row last changed.
/// `state` already contains that listing.
pub fn reconcile(state: State, origin: Origin, on_host: Option<HostState>, age: Duration) -> Action {
    let wanted = state.desired != Desired::Stopped && !state.observed.ended();
    match on_host {
        Some(
            HostState::Starting
            | HostState::Running
            | HostState::Pausing
            | HostState::Paused
            | HostState::Uploaded
            | HostState::Resuming,
        ) if !wanted => Action::Destroy,
        Some(HostState::Running)
            if state.desired == Desired::Paused && state.observed == Observed::Running && age >= GRACE =>
        {
            Action::Pause
        }
        Some(
            HostState::Starting
            | HostState::Running
            | HostState::Pausing
            | HostState::Paused
            | HostState::Uploaded
            | HostState::Resuming,
        ) => Action::Nothing,
        // The object store is to forget it, and its host that it was there.
        Some(HostState::Hibernated) if state.desired == Desired::Stopped => Action::Destroy,
        None if state.desired == Desired::Stopped && state.observed == Observed::Hibernated => Action::Destroy,
        Some(HostState::Stopping | HostState::Stopped | HostState::Failed | HostState::Hibernated) => Action::Nothing,
        None if wanted && state.observed == Observed::Unreported => match origin {
            Origin::Template if age >= GRACE => Action::Create,
            Origin::Fork if age >= FORK_GRACE => Action::GiveUp,
            Origin::Template | Origin::Fork => Action::Nothing,
        },
        None => Action::Nothing,
    }
}

#[cfg(test)]
mod tests;
