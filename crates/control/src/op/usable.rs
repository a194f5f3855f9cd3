//! Waiting for a capsule that is about to run, or to be paused, so that a request which comes early need not be sent again.

use std::time::Duration;

use lifecycle::{Command, Decision};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

use super::{CLIENT_WAITS, Context, Error};
use crate::db;
use crate::db::capsule::Capsule;

/// How long an early request waits, all in all.
const WAIT: Duration = Duration::from_secs(25);
const _: () = assert!(WAIT.as_secs() < CLIENT_WAITS.as_secs());
/// Another control plane on the same database may be the one that learns of the change; then only the row tells.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Until when a request that came now waits.
pub fn patience() -> Instant {
    Instant::now() + WAIT
}

/// Answers when the capsule can do `command`, at once if it can; says why when it cannot.
pub async fn usable(ctx: &Context, mut capsule: Capsule, command: Command, until: Instant) -> Result<Capsule, Error> {
    let mut changes = ctx.changes.subscribe();
    let mut current = false;
    loop {
        match lifecycle::decide(capsule.life.state, command) {
            Decision::Act | Decision::Done => return Ok(capsule),
            Decision::Refuse => return Err(state(&capsule)),
            // What was read before we listened may have changed meanwhile.
            Decision::Wait if !current => current = true,
            Decision::Wait => {
                let changed = async {
                    loop {
                        match changes.recv().await {
                            Ok(id) if id != capsule.id => {}
                            Ok(_) | Err(RecvError::Lagged(_)) => return,
                            // The sender is in the context we hold.
                            Err(RecvError::Closed) => return,
                        }
                    }
                };
                if Instant::now() >= until {
                    return Err(state(&capsule));
                }
                // Woken or not, the row says what is.
                let _ = tokio::time::timeout_at(until.min(Instant::now() + LOOK_AGAIN), changed).await;
            }
        }
        capsule = db::capsule::get(&ctx.db, capsule.team, capsule.id).await?.ok_or(Error::Gone)?;
    }
}

fn state(capsule: &Capsule) -> Error {
    Error::State(lifecycle::status(capsule.life.state.desired, capsule.life.state.observed))
}
