//! Letting a paused capsule go on.

use std::sync::Arc;

use api::{Actor, EventName, Status};
use lifecycle::{Command, Desired, Observed};

use super::record::{Fact, record};
use super::usable::patience;
use super::wish::{Wish, wish};
use super::{Context, Error};
use crate::db;
use crate::db::capsule::Capsule;
use crate::host;

/// Has the capsule resumed, and answers it as it is when that is done, or when the client has waited long enough. The resume goes on if the client leaves. After one that fails the
/// capsule is paused as before.
pub async fn resume(ctx: &Arc<Context>, capsule: Capsule, actor: Actor) -> Result<Capsule, Error> {
    let (team, id) = (capsule.team, capsule.id);
    let until = patience();
    let capsule = match wish(ctx, capsule, Command::Resume, Desired::Running, &actor, until).await {
        Ok(Wish::Made(capsule)) => capsule,
        Ok(Wish::Done(capsule)) => return Ok(capsule),
        // Another asked for it, and waits longer than we do.
        Err(Error::State(Status::Resuming)) => {
            return db::capsule::get(&ctx.db, team, id).await?.ok_or(Error::Gone);
        }
        Err(error) => return Err(error),
    };
    let resuming = ctx.tasks.spawn(finish(ctx.clone(), capsule.clone()));
    match tokio::time::timeout_at(until, resuming).await {
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
