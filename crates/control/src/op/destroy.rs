//! The end of a capsule.

use std::sync::Arc;

use api::Actor;
use lifecycle::{Command, Desired};

use super::record::{Fact, record};
use super::usable::patience;
use super::wish::{Wish, wish};
use super::{Context, Error};
use crate::db::capsule::Capsule;

/// Wishes the capsule gone and has its host end it. Once this has answered the capsule will end, whatever happens: a host that
/// cannot be asked now is asked by the reconciler.
pub async fn destroy(ctx: &Arc<Context>, capsule: Capsule, actor: Actor) -> Result<(), Error> {
    let until = patience();
    let capsule = match wish(ctx, capsule, Command::Destroy, Desired::Stopped, &actor, until).await? {
        Wish::Made(capsule) => capsule,
        Wish::Done(_) => return Ok(()),
    };
    let id = capsule.id;
    let task = ctx.clone();
    let ended = ctx.tasks.spawn(async move { finish(&task, capsule).await });
    match tokio::time::timeout_at(until, ended).await {
        Ok(Ok(Err(Error::Host(error)))) => {
            tracing::warn!(capsule = %id, error = &error as &dyn std::error::Error, "the host did not end the capsule yet");
            Ok(())
        }
        Ok(result) => result?.map(|_| ()),
        Err(_) => Ok(()),
    }
}

/// Has the host end a capsule that is not wanted, and records that it is gone.
pub async fn finish(ctx: &Context, capsule: Capsule) -> Result<Capsule, Error> {
    ctx.host.destroy(capsule.id).await?;
    record(ctx, capsule, Fact::Destroyed).await
}
