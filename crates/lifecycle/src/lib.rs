//! What a capsule may do in which state.
//!
//! Control writes what it *desires*; hosts report what they *observe*; the status a client sees is [`status`] of both, and
//! nothing else. Everything that moves a capsule goes through four total functions over closed enums:
//!
//! ```text
//!   a client's verb      ─► decide(state, command)   ─► act, wait, refuse
//!   a fact from a host   ─► observe(state, event)    ─► the new state, or none because the fact is old
//!   what a host lists    ─► reconcile(state, on_host) ─► create, destroy or nothing
//!
//!   desired Running:   pending ─► starting ─► running ⇄ missing          any ─► stopped | error (both final)
//!   desired Stopped:   stopping ─► stopped
//! ```
//!
//! Pure: no IO, no clock (ages are arguments). It refuses to know hosts, networks, SQL and HTTP.

use std::time::Duration;

use api::Status;

/// What control wants of a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Desired {
    Running,
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
            Self::Unreported | Self::Starting | Self::Running | Self::Stopping | Self::Missing => false,
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
    Touch,
    Exec,
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
    Destroy,
}

/// How long the request that made a capsule may take to reach its host before a reconciler makes it again. Making twice is
/// harmless, so this only saves work.
pub const CREATE_GRACE: Duration = Duration::from_secs(60);

/// The word a client sees.
pub fn status(desired: Desired, observed: Observed) -> Status {
    match (desired, observed) {
        (Desired::Running, Observed::Unreported) => Status::Pending,
        (Desired::Running, Observed::Starting) => Status::Starting,
        (Desired::Running, Observed::Running) => Status::Running,
        (Desired::Running, Observed::Missing) => Status::Missing,
        (Desired::Running, Observed::Failed) => Status::Error,
        (Desired::Running, Observed::Stopping)
        | (
            Desired::Stopped,
            Observed::Unreported | Observed::Starting | Observed::Running | Observed::Stopping | Observed::Missing,
        ) => Status::Stopping,
        (Desired::Running | Desired::Stopped, Observed::Stopped) | (Desired::Stopped, Observed::Failed) => {
            Status::Stopped
        }
    }
}

/// Whether a client's verb is possible now.
pub fn decide(state: State, command: Command) -> Decision {
    match (command, state.desired, state.observed) {
        (Command::Destroy, Desired::Running, _) => Decision::Act,
        (Command::Destroy, Desired::Stopped, observed) => {
            if observed.ended() {
                Decision::Done
            } else {
                Decision::Act
            }
        }
        (Command::Touch | Command::Exec, Desired::Running, observed) => match observed {
            Observed::Unreported | Observed::Starting => Decision::Wait,
            Observed::Running => Decision::Act,
            Observed::Stopping | Observed::Missing | Observed::Stopped | Observed::Failed => Decision::Refuse,
        },
        (Command::Touch | Command::Exec, Desired::Stopped, _) => Decision::Refuse,
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
            (Desired::Stopped, _) | (Desired::Running, Observed::Stopping) => becomes(Observed::Stopped),
            (Desired::Running, Observed::Starting | Observed::Running) => becomes(Observed::Missing),
            // The request that makes it may be on its way.
            (Desired::Running, Observed::Unreported | Observed::Missing | Observed::Stopped | Observed::Failed) => None,
        },
    }
}

/// What to do about a capsule, given what its host lists for it (`None`: nothing) and how long ago it was asked for.
/// `state` already contains that listing.
pub fn reconcile(state: State, on_host: Option<HostState>, age: Duration) -> Action {
    let wanted = state.desired == Desired::Running && !state.observed.ended();
    match on_host {
        Some(HostState::Starting | HostState::Running) if !wanted => Action::Destroy,
        Some(HostState::Starting | HostState::Running) => Action::Nothing,
        Some(HostState::Stopping | HostState::Stopped | HostState::Failed) => Action::Nothing,
        None if wanted && state.observed == Observed::Unreported && age >= CREATE_GRACE => Action::Create,
        None => Action::Nothing,
    }
}

#[cfg(test)]
mod tests;
