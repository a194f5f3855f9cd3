//! Putting a capsule aside.

use std::sync::Arc;

use api::{Actor, EventName};
use lifecycle::{Command, Desired};

use super::record::{Fact, record};
use super::usable::patience;
use super::wish::{Wish, change, wish};
use super::{Context, Error};
use crate::db;
use crate::db::capsule::Capsule;
use crate::host;

/// Has the capsule paused, and answers it as it is when that is done, or when the client has waited long enough. The pause goes on if the client leaves. One that fails is not tried
/// again: the capsule runs on, as the client is told.
pub async fn pause(ctx: &Arc<Context>, capsule: Capsule, actor: Actor) -> Result<Capsule, Error> {
    let until = patience();
    let capsule = match wish(ctx, capsule, Command::Pause, Desired::Paused, &actor, until).await? {
        Wish::Made(capsule) => capsule,
        Wish::Done(capsule) => return Ok(capsule),
    };
    let (team, id) = (capsule.team, capsule.id);
    let (work, asked) = (ctx.clone(), capsule.clone());
    let pausing = ctx.tasks.spawn(async move {
        match finish(&work, asked.clone()).await {
            // It may have been asked or not. If it was, this is a pause that nobody waits for.
            Err(Error::Host(error @ host::Error::Unreachable(_))) => Err(give_up(&work, asked, error).await),
            other => other,
        }
    });
    match tokio::time::timeout_at(until, pausing).await {
        Ok(result) => result?,
        Err(_) => Ok(db::capsule::get(&ctx.db, team, id).await?.unwrap_or(capsule)),
    }
}

/// Has the host pause a capsule that shall be paused. If it cannot, the capsule shall run on; a host that does not answer will
/// be asked again.
pub async fn finish(ctx: &Context, capsule: Capsule) -> Result<Capsule, Error> {
    match ctx.host.pause(capsule.id).await {
        Ok(report) => record(ctx, capsule, Fact::Reported(&report)).await,
        // The host goes on, and the reconciler will see what comes of it.
        Err(host::Error::Late(_)) => Ok(db::capsule::get(&ctx.db, capsule.team, capsule.id).await?.unwrap_or(capsule)),
        Err(error @ host::Error::Unreachable(_)) => Err(error.into()),
        Err(error) => Err(give_up(ctx, capsule, error).await),
    }
}

/// Takes the wish back, and tells why.
async fn give_up(ctx: &Context, mut capsule: Capsule, error: host::Error) -> Error {
    tracing::warn!(capsule = %capsule.id, error = &error as &dyn std::error::Error, "the capsule was not paused");
    while capsule.life.state.desired == Desired::Paused {
        match change(ctx, &mut capsule, Desired::Running, None).await {
            Ok(true) => {}
            Ok(false) => match db::capsule::get(&ctx.db, capsule.team, capsule.id).await {
                Ok(Some(current)) => capsule = current,
                Ok(None) => break,
                Err(error) => return error.into(),
            },
            Err(error) => return error,
        }
    }
    ctx.events.failed(&capsule, EventName::CapsulePause, &error.to_string());
    // What its host says now may differ from what is known.
    ctx.nudge.notify_one();
    error.into()
}
