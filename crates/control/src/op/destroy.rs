//! The end of a capsule.

use std::sync::Arc;
use std::time::Duration;

use api::Actor;
use lifecycle::{Command, Decision, Desired, State};

use super::record::{Fact, record};
use super::{Context, Error};
use crate::db;
use crate::db::capsule::{Capsule, Life};

/// How long a request waits for the host; the end is certain before that.
const WAIT: Duration = Duration::from_secs(20);

/// Wishes the capsule gone and has its host end it. Once this has answered the capsule will end, whatever happens: a host that
/// cannot be asked now is asked by the reconciler.
pub async fn destroy(ctx: &Arc<Context>, capsule: Capsule, actor: Actor) -> Result<(), Error> {
    let capsule = wish(ctx, capsule, actor).await?;
    match lifecycle::decide(capsule.life.state, Command::Destroy) {
        Decision::Act => {}
        Decision::Done | Decision::Wait | Decision::Refuse => return Ok(()),
    }
    let id = capsule.id;
    let task = ctx.clone();
    let ended = ctx.tasks.spawn(async move { finish(&task, capsule).await });
    match tokio::time::timeout(WAIT, ended).await {
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

/// Writes down that the capsule shall not run.
async fn wish(ctx: &Context, mut capsule: Capsule, actor: Actor) -> Result<Capsule, Error> {
    while capsule.life.state.desired == Desired::Running {
        let state = State { desired: Desired::Stopped, ..capsule.life.state };
        let life = Life { state, last_updated: db::now(), ..capsule.life.clone() };
        if db::capsule::advance(&ctx.db, &capsule, &life).await? {
            let before = std::mem::replace(&mut capsule.life, life);
            ctx.events.asked(capsule.id, actor.clone());
            ctx.changed(&before, &capsule);
        } else if let Some(current) = db::capsule::get(&ctx.db, capsule.team, capsule.id).await? {
            capsule = current;
        }
    }
    Ok(capsule)
}
