//! A sign of life from a client: the inactivity clock starts anew.

use lifecycle::Command;

use super::{Context, Error, usable};
use crate::db::capsule::Capsule;
use crate::host;

/// Restarts the clock on the capsule's host. The host's next report carries the new time onto the record.
pub async fn touch(ctx: &Context, capsule: Capsule) -> Result<(), Error> {
    let capsule = usable::usable(ctx, capsule, Command::Touch, usable::patience()).await?;
    let touched = ctx.host.touch(capsule.id).await;
    ctx.nudge.notify_one();
    match touched {
        Err(host::Error::Absent(_)) => Err(Error::Gone),
        other => Ok(other?),
    }
}
