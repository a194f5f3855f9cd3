//! Putting a fact on a capsule's record: the one place where what hosts say becomes what rows say.

use lifecycle::{Event, Observed, State};

use super::{Context, Error};
use crate::db;
use crate::db::capsule::{Capsule, Life};
use crate::host::Report;

/// A fact about a capsule, with what is to be remembered of it.
#[derive(Debug, Clone)]
pub enum Fact<'a> {
    Reported(&'a Report),
    StartFailed {
        reason: String,
    },
    Destroyed,
    /// Its host listed everything, after its row was read in state `seen`, but not this.
    Absent {
        seen: State,
    },
}

/// Records the fact if it is news, wakes who waits for the capsule, and answers its row as it then is.
pub async fn record(ctx: &Context, mut capsule: Capsule, fact: Fact<'_>) -> Result<Capsule, Error> {
    loop {
        let life = after(&capsule, &fact);
        if life == capsule.life {
            return Ok(capsule);
        }
        if db::capsule::advance(&ctx.db, &capsule, &life).await? {
            let before = std::mem::replace(&mut capsule.life, life);
            if before.state != capsule.life.state {
                tracing::info!(capsule = %capsule.id, state = ?capsule.life.state, reason = capsule.life.reason, "the capsule changed");
                ctx.changed(&before, &capsule);
            }
            return Ok(capsule);
        }
        // Someone was faster: decide again from what is there now. Rows are never deleted.
        match db::capsule::get(&ctx.db, capsule.team, capsule.id).await? {
            Some(current) => capsule = current,
            None => return Ok(capsule),
        }
    }
}

/// The changing part of the row after the fact.
fn after(capsule: &Capsule, fact: &Fact<'_>) -> Life {
    let mut life = capsule.life.clone();
    let (event, reason) = match fact {
        Fact::Reported(report) => (report.event(), report.reason.clone()),
        Fact::StartFailed { reason } => (Event::StartFailed, Some(reason.clone())),
        Fact::Destroyed => (Event::Destroyed, None),
        Fact::Absent { seen } if *seen == life.state => (Event::Absent, Some("its host no longer lists it".into())),
        Fact::Absent { .. } => return life,
    };
    if let Fact::Reported(report) = fact
        && report.generation >= life.state.generation
        && !life.state.observed.ended()
    {
        life.last_active_at = life.last_active_at.max(report.last_active_at);
        if !report.versions.is_empty() {
            life.versions.clone_from(&report.versions);
        }
    }
    let Some(state) = lifecycle::observe(life.state, event) else { return life };
    let now = db::now();
    life.state = state;
    life.last_updated = now;
    match state.observed {
        Observed::Running => {
            life.started_at = life.started_at.or(Some(now));
            life.reason = None;
        }
        // By itself, or after a resume that failed; on request there is none.
        Observed::Paused | Observed::Uploaded => life.reason = reason,
        Observed::Hibernated => life.reason = None,
        Observed::Missing | Observed::Stopped | Observed::Failed => life.reason = reason.or(life.reason),
        Observed::Unreported | Observed::Starting | Observed::Pausing | Observed::Resuming | Observed::Stopping => {}
    }
    life
}
