//! Capsules that begin where another is.

use std::sync::Arc;

use api::{Actor, CapsuleSpec, ForkCapsule};
use futures::future::join_all;
use lifecycle::Command;

use super::create::Created;
use super::record::{Fact, record};
use super::{Context, Error, usable};
use crate::db;
use crate::db::capsule::Capsule;
use crate::host::{self, Report};

/// Forks the capsule, which runs on: as many capsules as were asked for, all running, or none. The work goes on if the client
/// leaves.
pub async fn fork(
    ctx: &Arc<Context>,
    parent: Capsule,
    actor: Actor,
    request: ForkCapsule,
) -> Result<Vec<Created>, Error> {
    let (count, metadata) = request.validate()?;
    let parent = usable::usable(ctx, parent, Command::Fork, usable::patience()).await?;
    let metadata = metadata.unwrap_or_else(|| parent.spec.metadata.clone());
    let spec = CapsuleSpec { metadata, ..parent.spec.clone() };
    let child = |_| {
        let mut capsule = Capsule::new(parent.team, parent.host, spec.clone(), Some(parent.id));
        // As private as the parent, but no child's token opens another.
        let token = parent.traffic_token.is_some().then(|| capsule.restrict());
        (capsule, token)
    };
    let (children, tokens): (Vec<Capsule>, Vec<_>) = (0..count).map(child).unzip();
    db::capsule::insert(&ctx.db, &children).await?;
    for child in &children {
        ctx.events.asked(child.id, actor.clone());
    }
    let forked = ctx.tasks.spawn(start(ctx.clone(), parent, children)).await??;
    Ok(forked.into_iter().zip(tokens).map(|(capsule, traffic_token)| Created { capsule, traffic_token }).collect())
}

async fn start(ctx: Arc<Context>, parent: Capsule, children: Vec<Capsule>) -> Result<Vec<Capsule>, Error> {
    let ids: Vec<_> = children.iter().map(|child| child.id).collect();
    let error = match ctx.host.fork(parent.id, &ids).await {
        Ok(told) => match all(told.into_iter().map(|child| child.outcome)) {
            Ok(reports) => {
                let pairs = children.into_iter().zip(reports);
                let recorded = pairs.map(async |(child, report)| record(&ctx, child, Fact::Reported(&report)).await);
                return join_all(recorded).await.into_iter().collect();
            }
            Err(error) => error,
        },
        Err(host::Error::Absent(_)) => Error::Gone,
        Err(error) => error.into(),
    };
    tracing::warn!(parent = %parent.id, error = &error as &dyn std::error::Error, "the capsule was not forked");
    let given_up = children.into_iter().map(async |child| give_up(&ctx, child, error.to_string()).await);
    join_all(given_up).await.into_iter().collect::<Result<(), _>>()?;
    // The host may know better than we what it has.
    ctx.nudge.notify_one();
    Err(error)
}

/// The reports of all children, if none failed.
fn all(outcomes: impl ExactSizeIterator<Item = Result<Report, String>>) -> Result<Vec<Report>, Error> {
    let count = outcomes.len();
    let (mut reports, mut reasons) = (Vec::with_capacity(count), Vec::new());
    for outcome in outcomes {
        match outcome {
            Ok(report) => reports.push(report),
            Err(reason) => reasons.push(reason),
        }
    }
    match reasons.first() {
        None => Ok(reports),
        Some(reason) => Err(Error::Fork { failed: reasons.len(), count, reason: reason.clone() }),
    }
}

/// Records that the child failed, and has its host end what there may be of it. A host that does not answer is asked by the
/// reconciler, since what failed is not wanted.
async fn give_up(ctx: &Context, child: Capsule, reason: String) -> Result<(), Error> {
    let child = record(ctx, child, Fact::StartFailed { reason }).await?;
    if let Err(error) = ctx.host.destroy(child.id).await {
        tracing::warn!(capsule = %child.id, error = &error as &dyn std::error::Error, "the host did not end the fork yet");
    }
    Ok(())
}
