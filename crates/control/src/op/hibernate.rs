//! Moving a paused capsule to the object store, so that it takes nothing of its host.

use std::sync::Arc;

use api::Actor;
use lifecycle::{Command, Desired};

use super::record::{Fact, record};
use super::usable::patience;
use super::wish::{Wish, wish};
use super::{Context, Error};
use crate::db;
use crate::db::capsule::Capsule;
use crate::host;

/// Has the capsule hibernate, and answers it as it is when that is done, or when the client has waited long enough. The upload goes on if the client leaves. One that fails leaves the
/// capsule paused, and its host goes on trying to upload it.
pub async fn hibernate(ctx: &Arc<Context>, capsule: Capsule, actor: Actor) -> Result<Capsule, Error> {
    let until = patience();
    let capsule = match wish(ctx, capsule, Command::Hibernate, Desired::Paused, &actor, until).await? {
        Wish::Made(capsule) => capsule,
        Wish::Done(capsule) => return Ok(capsule),
    };
    let (team, id) = (capsule.team, capsule.id);
    let moving = ctx.tasks.spawn(finish(ctx.clone(), capsule.clone()));
    match tokio::time::timeout_at(until, moving).await {
        Ok(result) => result?,
        Err(_) => Ok(db::capsule::get(&ctx.db, team, id).await?.unwrap_or(capsule)),
    }
}

async fn finish(ctx: Arc<Context>, capsule: Capsule) -> Result<Capsule, Error> {
    match ctx.host.hibernate(capsule.id).await {
        Ok(report) => record(&ctx, capsule, Fact::Reported(&report)).await,
        // The host goes on, and the reconciler will see what comes of it.
        Err(host::Error::Late(_)) => Ok(db::capsule::get(&ctx.db, capsule.team, capsule.id).await?.unwrap_or(capsule)),
        Err(error) => {
            tracing::warn!(capsule = %capsule.id, error = &error as &dyn std::error::Error, "the capsule does not hibernate");
            ctx.nudge.notify_one();
            Err(error.into())
        }
    }
}
