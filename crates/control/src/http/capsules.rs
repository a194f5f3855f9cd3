//! `/v1/capsules`

use api::{CreateCapsule, ErrorBody};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::App;
use super::body;
use super::caller::{Capsule, Team};
use super::error::Error;
use crate::{db, op};

/// A row as clients see it.
fn show(capsule: db::capsule::Capsule) -> api::Capsule {
    let db::capsule::Capsule { id, spec, created_at, life, .. } = capsule;
    let mut metadata = spec.metadata;
    metadata.extend(life.versions);
    api::Capsule {
        id,
        status: lifecycle::status(life.state.desired, life.state.observed),
        template: spec.template.to_string(),
        vcpus: spec.vcpus,
        memory_mb: spec.memory_mb,
        disk_size_mb: spec.disk_size_mb,
        timeout_sec: spec.timeout_sec,
        created_at,
        started_at: life.started_at,
        last_active_at: life.last_active_at,
        last_updated: life.last_updated,
        metadata,
        reason: life.reason,
    }
}

/// Create a capsule
///
/// Answers when the capsule runs, or after 20 seconds with what is. It can be used at once either way: what comes early waits.
#[utoipa::path(
    post, path = "/v1/capsules", tag = "capsules", operation_id = "createCapsule", security(("apiKey" = [])),
    request_body = CreateCapsule,
    responses(
        (status = 201, description = "The capsule", body = api::Capsule),
        (status = 400, description = "`invalid_request`: a field is outside its bounds", body = ErrorBody),
        (status = 401, description = "`unauthorized`", body = ErrorBody),
        (status = 404, description = "`not_found`: there is no such template", body = ErrorBody),
        (status = 413, description = "`too_large`: the body", body = ErrorBody),
        (status = 502, description = "`agent_error`: the host could not start it", body = ErrorBody),
        (status = 503, description = "`host_unavailable`: no host answers, or all are full", body = ErrorBody),
    )
)]
pub async fn create(
    Team(team): Team,
    State(app): State<App>,
    body::Json(request): body::Json<CreateCapsule>,
) -> Result<(StatusCode, Json<api::Capsule>), Error> {
    let capsule = op::create::create(&app.ctx, team, request).await?;
    Ok((StatusCode::CREATED, Json(show(capsule))))
}

/// List capsules
///
/// The team's capsules, newest first, without those that ended.
#[utoipa::path(
    get, path = "/v1/capsules", tag = "capsules", operation_id = "listCapsules", security(("apiKey" = [])),
    responses(
        (status = 200, description = "The capsules", body = [api::Capsule]),
        (status = 401, description = "`unauthorized`", body = ErrorBody),
    )
)]
pub async fn list(Team(team): Team, State(app): State<App>) -> Result<Json<Vec<api::Capsule>>, Error> {
    let capsules = db::capsule::list(&app.ctx.db, team).await?;
    Ok(Json(capsules.into_iter().map(show).collect()))
}

/// Get a capsule
///
/// Also one that has ended.
#[utoipa::path(
    get, path = "/v1/capsules/{id}", tag = "capsules", operation_id = "getCapsule", security(("apiKey" = [])),
    params(("id" = String, Path, description = "The capsule")),
    responses(
        (status = 200, description = "The capsule", body = api::Capsule),
        (status = 400, description = "`invalid_request`: the id is not one", body = ErrorBody),
        (status = 401, description = "`unauthorized`", body = ErrorBody),
        (status = 404, description = "`not_found`: the team has no such capsule", body = ErrorBody),
    )
)]
pub async fn get(Capsule(capsule): Capsule) -> Json<api::Capsule> {
    Json(show(capsule))
}

/// Destroy a capsule
///
/// In any state, and as often as you like. The capsule will end once this is answered, even if its host is away now.
#[utoipa::path(
    delete, path = "/v1/capsules/{id}", tag = "capsules", operation_id = "destroyCapsule", security(("apiKey" = [])),
    params(("id" = String, Path, description = "The capsule")),
    responses(
        (status = 204, description = "It has ended, or is about to"),
        (status = 400, description = "`invalid_request`: the id is not one", body = ErrorBody),
        (status = 401, description = "`unauthorized`", body = ErrorBody),
        (status = 404, description = "`not_found`: the team never had such a capsule", body = ErrorBody),
    )
)]
pub async fn destroy(Capsule(capsule): Capsule, State(app): State<App>) -> Result<StatusCode, Error> {
    op::destroy::destroy(&app.ctx, capsule).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Keep a capsule awake
///
/// Restarts its inactivity clock. A capsule that is starting is waited for.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/ping", tag = "capsules", operation_id = "pingCapsule", security(("apiKey" = [])),
    params(("id" = String, Path, description = "The capsule")),
    responses(
        (status = 204, description = "The clock starts anew"),
        (status = 400, description = "`invalid_request`: the id is not one", body = ErrorBody),
        (status = 401, description = "`unauthorized`", body = ErrorBody),
        (status = 404, description = "`not_found`: the team has no such capsule", body = ErrorBody),
        (status = 409, description = "`invalid_state`: it does not run", body = ErrorBody),
        (status = 503, description = "`host_unavailable`", body = ErrorBody),
    )
)]
pub async fn ping(Capsule(capsule): Capsule, State(app): State<App>) -> Result<StatusCode, Error> {
    op::touch::touch(&app.ctx, capsule).await?;
    Ok(StatusCode::NO_CONTENT)
}
