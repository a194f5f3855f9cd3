//! Moving a paused capsule to the object store, so that it takes nothing of its host.

use std::sync::Arc;
use std::time::Duration;

use api::Actor;
use lifecycle::{Command, Desired};

use super::record::{Fact, record};
use super::wish::{Wish, wish};
use super::{Context, Error};
use crate::db;
use crate::db::capsule::Capsule;
use crate::host;

/// How long a request waits for its capsule to hibernate before it is answered with what is. Clients wait 30 s for an answer.
const WAIT: Duration = Duration::from_secs(20);

/// Has the capsule hibernate, and answers it as it then is. The upload goes on if the client leaves. One that fails leaves the
/// capsule paused, and its host goes on trying to upload it.
pub async fn hibernate(ctx: &Arc<Context>, capsule: Capsule, actor: Actor) -> Result<Capsule, Error> {
    let capsule = match wish(ctx, capsule, Command::Hibernate, Desired::Paused, &actor).await? {
        Wish::Made(capsule) => capsule,
        Wish::Done(capsule) => return Ok(capsule),
    };
    let (team, id) = (capsule.team, capsule.id);
    let moving = ctx.tasks.spawn(finish(ctx.clone(), capsule.clone()));
    match tokio::time::timeout(WAIT, moving).await {
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
