//! Templates that come of capsules.

use std::sync::Arc;

use api::{Actor, EventName, SafeName, TemplateId};
use chrono::TimeDelta;
use lifecycle::Command;

use super::{Context, Error, usable};
use crate::db;
use crate::db::capsule::Capsule;
use crate::db::garbage;
use crate::db::template::{Model, Snapshot};
use crate::host;

/// How long a template may be in the making before what there is of it is garbage. Longer than its host is waited for.
const MAKING: TimeDelta = TimeDelta::hours(1);
/// Bytes of a name that is made up.
const RANDOM: usize = 4;

/// Makes a template that begins where the capsule is now; the capsule runs on. Without a name it gets one. The work goes on if
/// the client leaves.
pub async fn create(
    ctx: &Arc<Context>,
    capsule: Capsule,
    actor: Actor,
    name: Option<SafeName>,
    overwrite: bool,
) -> Result<Model, Error> {
    let name = name.unwrap_or_else(random);
    match db::template::find(&ctx.db, capsule.team, &name).await? {
        _ if name.is_reserved() => return Err(Error::ReservedName(name)),
        Some(template) if template.platform() => return Err(Error::ReservedName(name)),
        Some(_) if !overwrite => return Err(Error::TakenName(name)),
        Some(_) | None => {}
    }
    let capsule = usable::usable(ctx, capsule, Command::Snapshot, usable::patience()).await?;
    let work = ctx.clone();
    let made = ctx.tasks.spawn(async move {
        let made = make(&work, &capsule, &name, overwrite).await;
        let outcome = made.as_ref().map(drop).map_err(ToString::to_string);
        work.events.template(
            EventName::TemplateSnapshotCreate,
            capsule.team,
            name.as_str(),
            actor,
            outcome,
            Some(&capsule),
        );
        made
    });
    made.await?
}

async fn make(ctx: &Context, capsule: &Capsule, name: &SafeName, overwrite: bool) -> Result<Model, Error> {
    let id = TemplateId::random();
    let image = id.to_string();
    garbage::insert(&ctx.db, id.0, capsule.host, &image, db::now() + MAKING).await?;
    let published = match ctx.host.snapshot(capsule.id, &image).await {
        Ok(made) => publish(ctx, capsule, id, name, made, overwrite).await,
        // The host goes on, and what comes of it is garbage in due time.
        Err(error @ host::Error::Late(_)) => return Err(error.into()),
        Err(host::Error::Absent(_)) => Err(Error::Gone),
        Err(error) => Err(error.into()),
    };
    if published.is_err() {
        garbage::hasten(&ctx.db, id.0).await?;
    }
    // There is garbage of what failed, and of what was overwritten.
    ctx.nudge.notify_one();
    published
}

async fn publish(
    ctx: &Context,
    capsule: &Capsule,
    id: TemplateId,
    name: &SafeName,
    made: host::Snapshot,
    overwrite: bool,
) -> Result<Model, Error> {
    // What was made from it may need what its own template was said to.
    let origin = db::template::find(&ctx.db, capsule.team, &capsule.spec.template).await?;
    let snapshot = Snapshot {
        id,
        team: capsule.team,
        name: name.clone(),
        sizes: made.sizes,
        size_bytes: made.size_bytes,
        default_env: origin.map(|template| template.default_env.0).unwrap_or_default(),
        metadata: capsule.life.versions.clone(),
    };
    let published = db::template::publish(&ctx.db, capsule.host, snapshot, overwrite).await?;
    published.ok_or_else(|| Error::TakenName(name.clone()))
}

/// Deletes a template. Capsules that were made from it are not touched: on their hosts they hold what they need of it.
pub async fn delete(ctx: &Context, template: Model, actor: Actor, team: api::TeamId) -> Result<(), Error> {
    if template.platform() || template.protected {
        return Err(Error::Protected(template.name));
    }
    if db::template::remove(&ctx.db, db::host::CONFIGURED, &template).await? {
        ctx.events.template(EventName::TemplateSnapshotDelete, team, &template.name, actor, Ok(()), None);
        ctx.nudge.notify_one();
    }
    Ok(())
}

/// Has the host forget what it is to forget by now.
pub async fn collect(ctx: &Context) -> Result<(), Error> {
    for garbage in garbage::due(&ctx.db, db::host::CONFIGURED).await? {
        ctx.host.delete_template(&garbage.image).await?;
        garbage::remove(&ctx.db, garbage.id).await?;
    }
    Ok(())
}

fn random() -> SafeName {
    let mut bytes = [0; RANDOM];
    getrandom::fill(&mut bytes).expect("the kernel has random bytes");
    format!("template-{}", hex::encode(bytes)).parse().expect("it follows the rule")
}
