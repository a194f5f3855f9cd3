//! Reaching a capsule from outside, by one of its URLs: no key, but perhaps a token.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::event::SYSTEM;
use api::{CapsuleId, Status};
use lifecycle::Command;
use tokio::time::Instant;

use super::{Context, resume, usable};
use crate::db;
use crate::db::capsule::Capsule;

/// How long it is remembered that a capsule may be reached. Another control plane on the same database may make it private, or
/// pause it; then only the row tells.
const REMEMBER: Duration = Duration::from_secs(2);
/// Capsules remembered at once.
const MOST: usize = 10_000;
/// How long a host may take to say what became of a capsule that it turned out not to run.
const NEWS: Duration = Duration::from_secs(5);

/// Why a capsule cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no such capsule")]
    Unknown,
    #[error("the capsule wants a token")]
    Private,
    /// And will not by itself.
    #[error("the capsule does not run")]
    NotRunning(Status),
    /// But will.
    #[error("the capsule does not run yet")]
    Soon(Status),
    #[error(transparent)]
    Failed(#[from] super::Error),
}

/// Capsules that were lately seen running and that want no token. Those that do are looked up every time, so that a token
/// that was taken back is taken back everywhere.
#[derive(Debug, Default)]
pub struct Reachable(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    until: HashMap<CapsuleId, Instant>,
    /// How often something was forgotten: what was looked up before that is not remembered after it.
    forgotten: u64,
}

impl Reachable {
    /// Has the capsule looked up again.
    pub fn forget(&self, id: CapsuleId) {
        let mut known = self.lock();
        known.until.remove(&id);
        known.forgotten += 1;
    }

    /// Whether nothing needs to be looked up.
    pub fn knows(&self, id: CapsuleId) -> bool {
        self.lock().until.get(&id).is_some_and(|until| Instant::now() < *until)
    }

    fn forgotten(&self) -> u64 {
        self.lock().forgotten
    }

    fn remember(&self, id: CapsuleId, looked_up: u64) {
        let mut known = self.lock();
        if known.forgotten != looked_up {
            return;
        }
        let now = Instant::now();
        if known.until.len() >= MOST {
            known.until.retain(|_, until| now < *until);
        }
        if known.until.len() < MOST {
            known.until.insert(id, now + REMEMBER);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Succeeds once the capsule runs and whoever has `token` may reach it; wakes it if it wants to be woken. `checks_itself` is
/// true where the guest asks for a token of its own.
pub async fn reach(ctx: &Arc<Context>, id: CapsuleId, token: Option<&str>, checks_itself: bool) -> Result<(), Error> {
    if ctx.reachable.knows(id) {
        return Ok(());
    }
    let forgotten = ctx.reachable.forgotten();
    let capsule = db::capsule::get_any_team(&ctx.db, id).await.map_err(super::Error::from)?.ok_or(Error::Unknown)?;
    let is_public = match &capsule.traffic_token {
        None => true,
        Some(hash) if checks_itself || token.is_some_and(|token| hash.is_of(token)) => false,
        Some(_) => return Err(Error::Private),
    };
    running(ctx, capsule).await?;
    if is_public {
        ctx.reachable.remember(id, forgotten);
    }
    Ok(())
}

async fn running(ctx: &Arc<Context>, capsule: Capsule) -> Result<(), Error> {
    let wakes = capsule.spec.auto_resume;
    let until = usable::patience();
    let paused = match usable::usable(ctx, capsule.clone(), Command::Exec, until).await {
        Err(super::Error::State(Status::Paused)) if wakes => capsule,
        other => return other.map(drop).map_err(not_running),
    };
    let resumed = resume::resume(ctx, paused, SYSTEM).await.map_err(not_running)?;
    usable::usable(ctx, resumed, Command::Exec, until).await.map(drop).map_err(not_running)
}

fn not_running(error: super::Error) -> Error {
    match error {
        super::Error::State(
            status @ (Status::Pending | Status::Starting | Status::Resuming | Status::Pausing | Status::Snapshotting),
        ) => Error::Soon(status),
        super::Error::State(status) => Error::NotRunning(status),
        super::Error::Gone => Error::Unknown,
        error => Error::Failed(error),
    }
}

/// After a host has said that it does not run the capsule: waits for the record to say so too.
pub async fn look_again(ctx: &Context, id: CapsuleId) {
    let mut changes = ctx.changes.subscribe();
    ctx.reachable.forget(id);
    ctx.nudge.notify_one();
    let news = async { while changes.recv().await.is_ok_and(|changed| changed != id) {} };
    // The next look at the record finds what there is to find.
    let _ = tokio::time::timeout(NEWS, news).await;
}
