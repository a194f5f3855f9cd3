//! Writing down what a client wants of a capsule, before its host is asked: whatever dies then, the wish is known.

use api::Actor;
use lifecycle::{Command, Decision, Desired, State};
use tokio::time::Instant;

use super::{Context, Error, usable};
use crate::db;
use crate::db::capsule::{Capsule, Life};

/// What came of a wish.
pub enum Wish {
    /// It is written down, and its host has to be asked.
    Made(Capsule),
    /// It is so already.
    Done(Capsule),
}

/// Writes down that the capsule shall be `desired`, once `command` is possible, for which it waits until `until`.
pub async fn wish(
    ctx: &Context,
    mut capsule: Capsule,
    command: Command,
    desired: Desired,
    actor: &Actor,
    until: Instant,
) -> Result<Wish, Error> {
    loop {
        capsule = usable::usable(ctx, capsule, command, until).await?;
        if lifecycle::decide(capsule.life.state, command) == Decision::Done {
            return Ok(Wish::Done(capsule));
        }
        if capsule.life.state.desired == desired {
            ctx.events.asked(capsule.id, actor.clone());
            return Ok(Wish::Made(capsule));
        }
        if change(ctx, &mut capsule, desired, Some(actor)).await? {
            return Ok(Wish::Made(capsule));
        }
        capsule = db::capsule::get(&ctx.db, capsule.team, capsule.id).await?.ok_or(Error::Gone)?;
    }
}

/// Writes down another wish, and whose it is, if nothing about the capsule has changed since it was read.
pub async fn change(
    ctx: &Context,
    capsule: &mut Capsule,
    desired: Desired,
    actor: Option<&Actor>,
) -> Result<bool, Error> {
    let state = State { desired, ..capsule.life.state };
    let life = Life { state, last_updated: db::now(), ..capsule.life.clone() };
    if !db::capsule::advance(&ctx.db, capsule, &life).await? {
        return Ok(false);
    }
    let before = std::mem::replace(&mut capsule.life, life);
    // Whoever is told of what follows is told who asked for it.
    if let Some(actor) = actor {
        ctx.events.asked(capsule.id, actor.clone());
    }
    ctx.changed(&before, capsule);
    Ok(true)
}
