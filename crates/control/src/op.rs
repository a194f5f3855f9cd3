//! The verbs: each looks up, asks `lifecycle` what to do, acts, and puts on record what came of it.

pub mod create;
pub mod destroy;
pub mod exec;
pub mod pty;
pub mod record;
pub mod touch;
pub mod usable;

use agent_api::Endpoint;
use api::{CapsuleId, SafeName, Status};
use sea_orm::DatabaseConnection;
use tokio::sync::{Notify, broadcast};
use tokio_util::task::TaskTracker;

use crate::db;
use crate::host::{self, Host};

/// Changes that may be waiting to be looked at by one waiter; whoever falls behind looks at its row again.
const CHANGES: usize = 1024;

/// What every verb works with.
pub struct Context {
    pub db: DatabaseConnection,
    pub host: Host,
    /// The ids of capsules whose row has changed, for those who wait for it.
    pub changes: broadcast::Sender<CapsuleId>,
    /// Wakes the reconciler before its time.
    pub nudge: Notify,
    /// Work that outlives the request that began it.
    pub tasks: TaskTracker,
}

impl Context {
    pub fn new(db: DatabaseConnection, agent: Endpoint) -> Self {
        Self {
            db,
            host: Host::new(agent),
            changes: broadcast::Sender::new(CHANGES),
            nudge: Notify::new(),
            tasks: TaskTracker::new(),
        }
    }
}

/// Why a verb did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] api::Invalid),
    #[error("there is no template `{0}`")]
    NoTemplate(SafeName),
    #[error("there is no process with the tag `{0}`")]
    NoProcess(String),
    #[error("the capsule is {}", word(*.0))]
    State(Status),
    /// The row says it runs; its host does not have it. The reconciler will find out.
    #[error("the capsule's host no longer runs it")]
    Gone,
    #[error("the host did not do it")]
    Host(#[from] host::Error),
    /// The guest does not accept the command as it was given.
    #[error("{0}")]
    Refused(String),
    #[error("the command ran longer than timeout_sec, {0} seconds, and was ended")]
    Timeout(u32),
    #[error(
        "the command wrote more than {} bytes and was ended; let it write to a file",
        api::limits::EXEC_OUTPUT_BYTES
    )]
    TooMuchOutput,
    /// The command may or may not have come to its end.
    #[error("the command did not come to its end: {}", .0.message.as_deref().unwrap_or("the guest does not say why"))]
    Guest(#[source] connectrpc::ConnectError),
    #[error("the guest answered out of turn: {0}")]
    GuestAnswer(&'static str),
    #[error("the store failed")]
    Store(#[from] db::Error),
    #[error("a task of this request panicked")]
    Panic(#[from] tokio::task::JoinError),
}

/// The status as its wire word.
fn word(status: Status) -> String {
    format!("{status:?}").to_lowercase()
}
