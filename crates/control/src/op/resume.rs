//! Letting a paused capsule go on.

use std::sync::Arc;
use std::time::Duration;

use api::{Actor, EventName, Status};
use lifecycle::{Command, Desired, Observed};

use super::record::{Fact, record};
use super::wish::{Wish, wish};
use super::{Context, Error};
use crate::db;
use crate::db::capsule::Capsule;
use crate::host;

/// How long a request waits for its capsule to run before it is answered with what is. Clients wait 30 s for an answer.
const WAIT: Duration = Duration::from_secs(20);

/// Has the capsule resumed, and answers it as it then is. The resume goes on if the client leaves. After one that fails the
/// capsule is paused as before.
pub async fn resume(ctx: &Arc<Context>, capsule: Capsule, actor: Actor) -> Result<Capsule, Error> {
    let (team, id) = (capsule.team, capsule.id);
    let capsule = match wish(ctx, capsule, Command::Resume, Desired::Running, &actor).await {
        Ok(Wish::Made(capsule)) => capsule,
        Ok(Wish::Done(capsule)) => return Ok(capsule),
        // Another asked for it, and waits longer than we do.
        Err(Error::State(Status::Resuming)) => {
            return db::capsule::get(&ctx.db, team, id).await?.ok_or(Error::Gone);
        }
        Err(error) => return Err(error),
    };
    let resuming = ctx.tasks.spawn(finish(ctx.clone(), capsule.clone()));
    match tokio::time::timeout(WAIT, resuming).await {
        Ok(result) => result?,
        Err(_) => Ok(db::capsule::get(&ctx.db, team, id).await?.unwrap_or(capsule)),
    }
}

async fn finish(ctx: Arc<Context>, capsule: Capsule) -> Result<Capsule, Error> {
    let state = capsule.life.state;
    // One that is on its host is resumed from there, whatever the object store has.
    let adopt = (state.observed == Observed::Hibernated).then_some(state.generation);
    // It may have been changed since it was asked for.
    let egress = db::capsule::get(&ctx.db, capsule.team, capsule.id).await?.ok_or(Error::Gone)?.spec.egress;
    match ctx.host.resume(capsule.id, &egress, adopt).await {
        Ok(report) => record(&ctx, capsule, Fact::Reported(&report)).await,
        // The host goes on, and the reconciler will see what comes of it.
        Err(host::Error::Late(_)) => Ok(db::capsule::get(&ctx.db, capsule.team, capsule.id).await?.unwrap_or(capsule)),
        Err(error) => {
            tracing::warn!(capsule = %capsule.id, error = &error as &dyn std::error::Error, "the capsule was not resumed");
            ctx.events.failed(&capsule, EventName::CapsuleResume, &error.to_string());
            // Its host has more to say: that it is paused still, and why.
            ctx.nudge.notify_one();
            Err(error.into())
        }
    }
}
