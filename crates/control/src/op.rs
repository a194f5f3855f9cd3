//! The verbs: each looks up, asks `lifecycle` what to do, acts, and puts on record what came of it.

pub mod create;
pub mod destroy;
pub mod egress;
pub mod events;
pub mod exec;
pub mod files;
pub mod fork;
pub mod guest;
pub mod hibernate;
pub mod metrics;
pub mod pause;
pub mod process;
pub mod reach;
pub mod record;
pub mod resume;
pub mod snapshot;
pub mod touch;
pub mod traffic;
pub mod usable;
pub mod wish;

use std::time::Duration;

use agent_api::Endpoint;
use api::{CapsuleId, SafeName, Selector, Status};
use sea_orm::DatabaseConnection;
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::events::Events;
use self::exec::Outputs;
use self::reach::Reachable;
use crate::db;
use crate::db::capsule::{Capsule, Life};
use crate::host::{self, Host};

/// Changes that may be waiting to be looked at by one waiter; whoever falls behind looks at its row again.
const CHANGES: usize = 1024;
/// How long the SDKs wait for an answer: whatever waits here ends before that.
const CLIENT_WAITS: Duration = Duration::from_secs(30);

/// What every verb works with.
pub struct Context {
    pub db: DatabaseConnection,
    pub host: Host,
    /// The ids of capsules whose row has changed, for those who wait for it.
    pub changes: broadcast::Sender<CapsuleId>,
    /// What happens to capsules, for those who want to be told.
    pub events: Events,
    /// Output of commands that is held for clients.
    pub outputs: Outputs,
    /// Capsules that anyone may reach.
    pub reachable: Reachable,
    /// Wakes the reconciler before its time.
    pub nudge: Notify,
    /// Work that outlives the request that began it.
    pub tasks: TaskTracker,
    /// Ends the background tasks, and streams that have no end of their own.
    pub stop: CancellationToken,
}

impl Context {
    pub fn new(db: DatabaseConnection, agent: Endpoint) -> Self {
        Self {
            db,
            host: Host::new(agent),
            changes: broadcast::Sender::new(CHANGES),
            events: Events::default(),
            outputs: Outputs::default(),
            reachable: Reachable::default(),
            nudge: Notify::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Lets everyone know that a capsule's row was `before` and is another now.
    fn changed(&self, before: &Life, capsule: &Capsule) {
        self.reachable.forget(capsule.id);
        // Nobody may be waiting.
        let _ = self.changes.send(capsule.id);
        self.events.changed(before, capsule);
    }
}

/// Why a verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] api::Invalid),
    #[error("there is no template `{0}`")]
    NoTemplate(SafeName),
    #[error("the name `{0}` is the platform's")]
    ReservedName(SafeName),
    #[error("there is already a template `{0}`; overwrite=true replaces it")]
    TakenName(SafeName),
    #[error("the template `{0}` is the platform's; only the platform can delete it")]
    Protected(String),
    /// How many, and why the first did not.
    #[error("{failed} of {count} forks did not start, so that none was kept: {reason}")]
    Fork { failed: usize, count: usize, reason: String },
    #[error("there is no process with {0}")]
    NoProcess(Selector),
    #[error("the capsule is {}", word(*.0))]
    State(Status),
    /// The row says it runs; its host does not have it. The reconciler will find out.
    #[error("the capsule's host no longer runs it")]
    Gone,
    #[error(transparent)]
    Host(#[from] host::Error),
    /// The guest does not accept the command as it was given.
    #[error("{0}")]
    Refused(String),
    #[error("there is no file or directory `{0}`")]
    NoFile(String),
    #[error("there is something at `{0}`, but no directory")]
    NoDirectory(String),
    #[error("the listing has more than {} entries; list fewer levels", guest_api::LIST_ENTRIES)]
    LongListing,
    #[error("there is already something at `{0}`")]
    Occupied(String),
    #[error("the capsule's disk is full")]
    DiskFull,
    #[error("the command ran longer than timeout_sec, {0} seconds, and was ended")]
    Timeout(u32),
    #[error("the process ran longer than it may, and was ended")]
    Deadline,
    #[error(
        "the command wrote more than {} bytes and was ended; let it write to a file",
        api::limits::EXEC_OUTPUT_BYTES
    )]
    TooMuchOutput,
    #[error(
        "the outputs that the platform holds for clients have more than {} bytes together; try again in a moment",
        api::limits::EXEC_OUTPUTS_BYTES
    )]
    TooManyOutputs,
    #[error("the capsule has {} calls and streams open, and takes no more", agent_api::CALLS)]
    Busy,
    /// It may or may not have been done.
    #[error("the capsule did not do it: {}", .0.message.as_deref().unwrap_or("the guest does not say why"))]
    Guest(#[source] connectrpc::ConnectError),
    #[error("the guest answered out of turn: {0}")]
    GuestAnswer(&'static str),
    #[error("the store failed")]
    Store(#[from] db::Error),
    #[error("a task of this request panicked")]
    Panic(#[from] tokio::task::JoinError),
}

/// A row as clients see it.
pub fn show(capsule: db::capsule::Capsule) -> api::Capsule {
    let db::capsule::Capsule { id, spec, created_at, traffic_token, life, .. } = capsule;
    let mut metadata = spec.metadata;
    metadata.extend(life.versions);
    api::Capsule {
        id,
        status: lifecycle::status(life.state.desired, life.state.observed),
        template: spec.template.to_string(),
        vcpus: spec.vcpus,
        memory_mb: spec.memory_mb,
        disk_size_mb: spec.disk_size_mb,
        timeout_sec: spec.timeout_sec,
        created_at,
        started_at: life.started_at,
        last_active_at: life.last_active_at,
        last_updated: life.last_updated,
        metadata,
        auto_resume: spec.auto_resume,
        network: (&spec.egress).into(),
        allow_public_traffic: traffic_token.is_none(),
        traffic_access_token: None,
        reason: life.reason,
    }
}

/// The status as its wire word.
pub fn word(status: Status) -> String {
    format!("{status:?}").to_lowercase()
}
