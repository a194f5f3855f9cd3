//! Comparing what is wanted with what hosts list, and closing the gap through the same verbs that requests use.
//!
//! A round takes no input and repeats harmlessly. It runs every few seconds, and at once when nudged.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use api::CapsuleId;
use futures::StreamExt;
use lifecycle::{Action, HostState};
use tokio_util::sync::CancellationToken;

use crate::db::{self, capsule::Capsule};
use crate::host::Report;
use crate::op::record::{Fact, record};
use crate::op::{Context, Error, create, destroy, egress, pause, snapshot};

const INTERVAL: Duration = Duration::from_secs(3);
/// Capsules acted upon at once.
const AT_ONCE: usize = 8;

/// Runs rounds until `stop`.
pub async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let mut strangers = HashSet::new();
    let mut answered = true;
    while !stop.is_cancelled() {
        match round(&ctx, &mut strangers).await {
            Ok(()) => answered = true,
            // Once per outage, not once per round.
            Err(error) if answered => {
                answered = false;
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot compare capsules with their host");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = ctx.nudge.notified() => {}
            () = stop.cancelled() => {}
        }
    }
}

/// One comparison of everything.
pub async fn round(ctx: &Arc<Context>, strangers: &mut HashSet<CapsuleId>) -> Result<(), Error> {
    // The order matters. What was alive before the listing and is not in it is gone; what is in it is judged by a row read
    // after it, which is there because rows are written before hosts are asked.
    let before = db::capsule::alive_on_any_team(&ctx.db, db::host::CONFIGURED).await?;
    let mut reports: HashMap<CapsuleId, Report> =
        ctx.host.list().await?.into_iter().map(|report| (report.id, report)).collect();
    for capsule in &before {
        let is_past = |report: &Report| lifecycle::is_past(capsule.life.state, report.state, report.generation);
        if reports.get(&capsule.id).is_some_and(is_past) {
            reports.remove(&capsule.id);
        }
    }
    let listed = db::capsule::these_any_team(&ctx.db, reports.keys().copied()).await?;

    let known: HashSet<CapsuleId> = listed.iter().map(|capsule| capsule.id).collect();
    for id in reports.keys().filter(|id| !known.contains(id)) {
        // It was made through another database. Ending it would turn a wrong address in a configuration into lost work.
        if strangers.insert(*id) {
            tracing::warn!(capsule = %id, "the host has a capsule that is not in this database; it is left alone");
        }
    }

    // It may wait: what is not forgotten now is forgotten in a later round.
    if let Err(error) = snapshot::collect(ctx).await {
        tracing::warn!(error = &error as &dyn std::error::Error, "the host cannot forget templates");
    }

    let absent = before.into_iter().filter(|capsule| !reports.contains_key(&capsule.id)).map(|capsule| (capsule, None));
    let listed = listed.into_iter().map(|capsule| {
        let report = reports.get(&capsule.id);
        (capsule, report)
    });
    futures::stream::iter(absent.chain(listed))
        .for_each_concurrent(AT_ONCE, |(capsule, report)| async move {
            let id = capsule.id;
            if let Err(error) = settle(ctx, capsule, report).await {
                tracing::warn!(capsule = %id, error = &error as &dyn std::error::Error, "cannot bring the capsule to what is wanted");
            }
        })
        .await;
    Ok(())
}

/// Brings one capsule's record up to date, and the capsule to what is wanted of it.
async fn settle(ctx: &Arc<Context>, capsule: Capsule, report: Option<&Report>) -> Result<(), Error> {
    let seen = capsule.life.state;
    let fact = report.map_or(Fact::Absent { seen }, Fact::Reported);
    let capsule = record(ctx, capsule, fact).await?;
    let age = (db::now() - capsule.life.last_updated).to_std().unwrap_or_default();
    match lifecycle::reconcile(capsule.life.state, capsule.origin(), report.map(|report| report.state), age) {
        Action::Nothing => {
            if let Some(report) = report
                && matches!(report.state, HostState::Running | HostState::Paused | HostState::Uploaded)
            {
                egress::again(ctx, &capsule, &report.egress).await?;
            }
        }
        Action::GiveUp => {
            record(ctx, capsule, Fact::StartFailed { reason: "the fork did not reach its host".into() }).await?;
        }
        Action::Pause => {
            let work = ctx.clone();
            // It takes long, and says itself what came of it.
            ctx.tasks.spawn(async move { pause::finish(&work, capsule).await });
        }
        Action::Destroy => {
            destroy::finish(ctx, capsule).await?;
        }
        Action::Create => {
            let work = ctx.clone();
            // A start takes long, and says itself what came of it.
            ctx.tasks.spawn(async move { create::again(&work, capsule).await });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
