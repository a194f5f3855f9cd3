//! A new capsule.

use std::sync::Arc;
use std::time::Duration;

use api::{Actor, CreateCapsule, TeamId};
use lifecycle::Action;

use super::record::{Fact, record};
use super::{CLIENT_WAITS, Context, Error, destroy};
use crate::db;
use crate::db::capsule::Capsule;
use crate::host::{self, Image};

/// How long a request waits for its capsule to run before it is answered with what is.
const WAIT: Duration = Duration::from_secs(20);
const _: () = assert!(WAIT.as_secs() < CLIENT_WAITS.as_secs());

/// A new capsule, and what its URLs want, if they do.
pub struct Created {
    pub capsule: Capsule,
    pub traffic_token: Option<String>,
}

/// Writes the capsule down and has it started. The start goes on if the client leaves.
pub async fn create(ctx: &Arc<Context>, team: TeamId, actor: Actor, request: CreateCapsule) -> Result<Created, Error> {
    let name = request.template()?;
    let template = db::template::find(&ctx.db, team, &name).await?.ok_or_else(|| Error::NoTemplate(name.clone()))?;
    let is_public = request.allows_public_traffic();
    let spec = request.validate(template.baked()?)?;
    let image = image_of(template);
    let mut capsule = Capsule::new(team, db::host::CONFIGURED, spec, None);
    let traffic_token = (!is_public).then(|| capsule.restrict());
    db::capsule::insert(&ctx.db, std::slice::from_ref(&capsule)).await?;
    ctx.events.asked(capsule.id, actor);
    let started = ctx.tasks.spawn(start(ctx.clone(), capsule.clone(), image));
    let capsule = match tokio::time::timeout(WAIT, started).await {
        Ok(result) => result??,
        Err(_) => db::capsule::get(&ctx.db, team, capsule.id).await?.unwrap_or(capsule),
    };
    Ok(Created { capsule, traffic_token })
}

/// Starts a capsule whose request was lost on the way to its host.
pub async fn again(ctx: &Arc<Context>, capsule: Capsule) -> Result<Capsule, Error> {
    match db::template::find(&ctx.db, capsule.team, &capsule.spec.template).await? {
        Some(template) => start(ctx.clone(), capsule, image_of(template)).await,
        None => record(ctx, capsule, Fact::StartFailed { reason: "its template is gone".into() }).await,
    }
}

fn image_of(template: db::template::Model) -> Image {
    Image { name: template.image, template_id: template.id.to_string(), default_env: template.default_env.0 }
}

async fn start(ctx: Arc<Context>, capsule: Capsule, image: Image) -> Result<Capsule, Error> {
    match ctx.host.create(capsule.id, &capsule.spec, image).await {
        Ok(report) => {
            let capsule = record(&ctx, capsule, Fact::Reported(&report)).await?;
            // It may have been destroyed before its host knew of it.
            match lifecycle::reconcile(capsule.life.state, capsule.origin(), Some(report.state), Duration::ZERO) {
                Action::Destroy => destroy::finish(&ctx, capsule).await,
                Action::Nothing | Action::Create | Action::Pause | Action::GiveUp => Ok(capsule),
            }
        }
        // The host goes on, and the reconciler will see what comes of it.
        Err(host::Error::Late(_)) => Ok(db::capsule::get(&ctx.db, capsule.team, capsule.id).await?.unwrap_or(capsule)),
        Err(error) => {
            tracing::warn!(capsule = %capsule.id, error = &error as &dyn std::error::Error, "the capsule did not start");
            record(&ctx, capsule, Fact::StartFailed { reason: error.to_string() }).await?;
            Err(error.into())
        }
    }
}
