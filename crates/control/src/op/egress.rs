//! What a capsule may reach outside.

use api::egress::Policy;
use api::{Egress, SetEgress};

use super::{Context, Error};
use crate::db;
use crate::db::capsule::Capsule;
use crate::host;

/// Writes down what the capsule may reach, and has its host see to it. One that no host has gets it when it is resumed.
pub async fn set(ctx: &Context, capsule: Capsule, request: SetEgress) -> Result<Egress, Error> {
    let policy = request.validate("")?;
    let state = capsule.life.state;
    if state.observed.ended() {
        return Err(Error::State(lifecycle::status(state.desired, state.observed)));
    }
    db::capsule::set_egress(&ctx.db, capsule.team, capsule.id, &policy).await?;
    let shown = Egress::from(&policy);
    if state.observed == lifecycle::Observed::Hibernated {
        return Ok(shown);
    }
    match ctx.host.set_egress(capsule.id, &policy).await {
        // It has not come there yet, and will with its limits.
        Err(host::Error::Absent(_)) if state.observed == lifecycle::Observed::Unreported => {}
        result => result.inspect_err(|_| ctx.nudge.notify_one())?,
    }
    Ok(shown)
}

/// Has the host see to what is written down, where it reports another.
pub async fn again(ctx: &Context, capsule: &Capsule, reported: &Policy) -> Result<(), Error> {
    if capsule.spec.egress == *reported {
        return Ok(());
    }
    // The listing may be older than the row.
    let Some(capsule) = db::capsule::get(&ctx.db, capsule.team, capsule.id).await? else { return Ok(()) };
    tracing::warn!(capsule = %capsule.id, "its host lets it reach something else than it may");
    Ok(ctx.host.set_egress(capsule.id, &capsule.spec.egress).await?)
}
