//! `/v1/snapshots`: templates, under the name clients know them by.

use api::Template;
use axum::Json;
use axum::extract::State;

use super::App;
use super::answers::OfTeam;
use super::caller::Caller;
use super::error::Error;
use crate::db;

fn show(row: db::template::Model) -> Result<Template, db::Error> {
    Ok(Template {
        kind: row.kind()?,
        platform: row.platform(),
        name: row.name,
        // Never negative: we wrote them.
        vcpus: row.vcpus.unsigned_abs(),
        memory_mb: row.memory_mb.unsigned_abs(),
        size_bytes: row.size_bytes.unsigned_abs(),
        created_at: row.created_at,
        protected: row.protected,
        metadata: row.metadata.0,
    })
}

/// List templates
///
/// The team's and the platform's, newest first.
#[utoipa::path(
    get, path = "/v1/snapshots", tag = "templates", operation_id = "listTemplates",
    responses((status = 200, description = "The templates", body = [Template]), OfTeam)
)]
pub async fn list(Caller { team, .. }: Caller, State(app): State<App>) -> Result<Json<Vec<Template>>, Error> {
    let rows = db::template::list(&app.ctx.db, team).await?;
    Ok(Json(rows.into_iter().map(show).collect::<Result<_, _>>()?))
}
