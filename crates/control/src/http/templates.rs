//! `/v1/snapshots`: templates, under the name clients know them by.

use std::str::FromStr;

use api::{CreateSnapshot, ErrorBody, Invalid, TemplateKind};
use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::StatusCode;
use axum::http::request::Parts;

use super::App;
use super::answers::OfTeam;
use super::body;
use super::caller::{Caller, Template, query};
use super::error::Error;
use crate::{db, op};

fn show(row: db::template::Model) -> Result<api::Template, db::Error> {
    Ok(api::Template {
        kind: row.kind()?,
        platform: row.platform(),
        name: row.name,
        // Never negative: we wrote them.
        vcpus: row.vcpus.unsigned_abs(),
        memory_mb: row.memory_mb.unsigned_abs(),
        disk_size_mb: row.disk_size_mb.unsigned_abs(),
        size_bytes: row.size_bytes.unsigned_abs(),
        created_at: row.created_at,
        protected: row.protected,
        metadata: row.metadata.0,
    })
}

/// Whether a template of that name may be replaced, as the query says.
pub struct Overwrite(bool);

impl FromRequestParts<App> for Overwrite {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Error> {
        #[derive(Default)]
        struct Flag(bool);

        impl FromStr for Flag {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                match text {
                    "true" | "1" => Ok(Self(true)),
                    "false" | "0" | "" => Ok(Self(false)),
                    _ => Err(Invalid::new("overwrite", "must be true or false")),
                }
            }
        }

        let Flag(overwrite) = query(parts, "overwrite")?;
        Ok(Self(overwrite))
    }
}

/// Which templates the query asks for.
#[derive(Default)]
pub enum Kind {
    #[default]
    Any,
    Of(TemplateKind),
    /// A word that is no kind: no template is of it.
    Nothing,
}

impl FromStr for Kind {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Ok(match text {
            "" => Self::Any,
            "base" => Self::Of(TemplateKind::Base),
            "snapshot" => Self::Of(TemplateKind::Snapshot),
            _ => Self::Nothing,
        })
    }
}

impl FromRequestParts<App> for Kind {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Error> {
        query(parts, "type")
    }
}

/// Make a template of a capsule
///
/// It begins where the capsule is now: memory, processes and files. The capsule stands still for milliseconds and runs on.
/// Capsules made from the template have exactly its sizes.
#[utoipa::path(
    post, path = "/v1/snapshots", tag = "templates", operation_id = "createTemplate",
    params(("overwrite" = Option<bool>, Query, description = "Whether the team's template of that name is replaced, if there is one")),
    request_body = CreateSnapshot,
    responses(
        (status = 201, description = "The template", body = api::Template),
        OfTeam,
        (status = 400, description = "`invalid_request`: a field is not what it must be", body = ErrorBody),
        (status = 404, description = "`not_found`: the team has no such capsule", body = ErrorBody),
        (status = 409, description = "`invalid_state`: the capsule does not run; `conflict`: the name is taken, or the platform's", body = ErrorBody),
        (status = 413, description = "`too_large`: the body", body = ErrorBody),
        (status = 502, description = "`agent_error`: the host could not make it", body = ErrorBody),
        (status = 503, description = "`host_unavailable`: its host does not answer; `unavailable`: the platform's database does not answer", body = ErrorBody),
    )
)]
pub async fn create(
    caller: Caller,
    Overwrite(overwrite): Overwrite,
    State(app): State<App>,
    body::Json(request): body::Json<CreateSnapshot>,
) -> Result<(StatusCode, Json<api::Template>), Error> {
    let name = request.name()?;
    let capsule = caller.capsule(&app, request.sandbox_id).await?;
    let template = op::snapshot::create(&app.ctx, capsule, caller.actor, name, overwrite).await?;
    Ok((StatusCode::CREATED, Json(show(template)?)))
}

/// List templates
///
/// The team's and the platform's, newest first.
#[utoipa::path(
    get, path = "/v1/snapshots", tag = "templates", operation_id = "listTemplates",
    params(("type" = Option<TemplateKind>, Query, description = "Only those of this kind; of any other word there are none")),
    responses((status = 200, description = "The templates", body = [api::Template]), OfTeam)
)]
pub async fn list(
    Caller { team, .. }: Caller,
    kind: Kind,
    State(app): State<App>,
) -> Result<Json<Vec<api::Template>>, Error> {
    let kind = match kind {
        Kind::Any => None,
        Kind::Of(kind) => Some(kind),
        Kind::Nothing => return Ok(Json(Vec::new())),
    };
    let rows = db::template::list(&app.ctx.db, team, kind).await?;
    Ok(Json(rows.into_iter().map(show).collect::<Result<_, _>>()?))
}

/// Delete a template
///
/// Capsules that were made from it are not touched, whether they run or are paused.
#[utoipa::path(
    delete, path = "/v1/snapshots/{name}", tag = "templates", operation_id = "deleteTemplate",
    params(("name" = String, Path, description = "The template")),
    responses(
        (status = 204, description = "It is gone"),
        OfTeam,
        (status = 403, description = "`forbidden`: it is the platform's", body = ErrorBody),
        (status = 404, description = "`not_found`: the team has no such template", body = ErrorBody),
    )
)]
pub async fn delete(Template { caller, row }: Template, State(app): State<App>) -> Result<StatusCode, Error> {
    op::snapshot::delete(&app.ctx, row, caller.actor, caller.team).await?;
    Ok(StatusCode::NO_CONTENT)
}
