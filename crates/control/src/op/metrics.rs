//! What a capsule used, as its host saw it.

use api::{MetricsRange, Point};

use super::{Context, Error};
use crate::db::capsule::Capsule;
use crate::host;

/// Asks the host, not the guest: it wakes nobody and is no activity. Nothing is known of a capsule that its host does not
/// have, as of one that hibernates.
pub async fn metrics(ctx: &Context, capsule: &Capsule, range: MetricsRange) -> Result<Vec<Point>, Error> {
    match ctx.host.metrics(capsule.id, range.seconds()).await {
        Err(host::Error::Absent(_)) => Ok(Vec::new()),
        points => Ok(points?),
    }
}
