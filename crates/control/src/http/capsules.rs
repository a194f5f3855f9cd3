//! `/v1/capsules`

use api::{CreateCapsule, ErrorBody, ForkCapsule, Forked};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::App;
use super::answers::{InCapsule, OfCapsule, OfGuest, OfTeam};
use super::body;
use super::caller::{Caller, Capsule};
use super::error::Error;
use crate::{db, op};

/// Create a capsule
///
/// Answers when the capsule runs, or after 20 seconds with what is. It can be used at once either way: what comes early waits.
#[utoipa::path(
    post, path = "/v1/capsules", tag = "capsules", operation_id = "createCapsule",
    request_body = CreateCapsule,
    responses(
        (status = 201, description = "The capsule", body = api::Capsule),
        OfTeam,
        (status = 400, description = "`invalid_request`: a field is outside its bounds, or contradicts the template's built-in sizes", body = ErrorBody),
        (status = 404, description = "`not_found`: there is no such template", body = ErrorBody),
        (status = 413, description = "`too_large`: the body", body = ErrorBody),
        (status = 502, description = "`agent_error`: the host could not start it", body = ErrorBody),
        (status = 503, description = "`host_unavailable`: no host answers, or all are full; `unavailable`: the platform's database does not answer", body = ErrorBody),
    )
)]
pub async fn create(
    Caller { team, actor }: Caller,
    State(app): State<App>,
    body::Json(request): body::Json<CreateCapsule>,
) -> Result<(StatusCode, Json<api::Capsule>), Error> {
    let made = op::create::create(&app.ctx, team, actor, request).await?;
    let capsule = api::Capsule { traffic_access_token: made.traffic_token, ..op::show(made.capsule) };
    Ok((StatusCode::CREATED, Json(capsule)))
}

/// List capsules
///
/// The team's capsules, newest first, without those that ended.
#[utoipa::path(
    get, path = "/v1/capsules", tag = "capsules", operation_id = "listCapsules",
    responses((status = 200, description = "The capsules", body = [api::Capsule]), OfTeam)
)]
pub async fn list(Caller { team, .. }: Caller, State(app): State<App>) -> Result<Json<Vec<api::Capsule>>, Error> {
    let capsules = db::capsule::list(&app.ctx.db, team).await?;
    Ok(Json(capsules.into_iter().map(op::show).collect()))
}

/// Get a capsule
///
/// Also one that has ended.
#[utoipa::path(
    get, path = "/v1/capsules/{id}", tag = "capsules", operation_id = "getCapsule",
    params(InCapsule),
    responses((status = 200, description = "The capsule", body = api::Capsule), OfCapsule)
)]
pub async fn get(Capsule { row, .. }: Capsule) -> Json<api::Capsule> {
    Json(op::show(row))
}

/// Destroy a capsule
///
/// In any state, and as often as you like. The capsule will end once this is answered, even if its host is away now.
#[utoipa::path(
    delete, path = "/v1/capsules/{id}", tag = "capsules", operation_id = "destroyCapsule",
    params(InCapsule),
    responses((status = 204, description = "It has ended, or is about to"), OfCapsule)
)]
pub async fn destroy(Capsule { caller, row }: Capsule, State(app): State<App>) -> Result<StatusCode, Error> {
    op::destroy::destroy(&app.ctx, row, caller.actor).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Pause a capsule
///
/// Its memory and disk are kept, and nothing of it runs. Answers when that is durable, or after 20 seconds with what is. One
/// that is paused already is answered as it is; one that is starting or resuming is waited for. Open connections into it get 2
/// seconds to end. A pause that fails leaves it running.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/pause", tag = "capsules", operation_id = "pauseCapsule",
    params(InCapsule),
    responses((status = 200, description = "The capsule", body = api::Capsule), OfGuest)
)]
pub async fn pause(Capsule { caller, row }: Capsule, State(app): State<App>) -> Result<Json<api::Capsule>, Error> {
    Ok(Json(op::show(op::pause::pause(&app.ctx, row, caller.actor).await?)))
}

/// Hibernate a capsule
///
/// Moves a paused capsule to the object store, so that it takes nothing of its host; a resume brings it back, on any host.
/// Answers when it is there, with 200; after 20 seconds with 202 and what is, and the upload goes on. One that hibernates
/// already is answered as it is. An upload that fails leaves it paused.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/hibernate", tag = "capsules", operation_id = "hibernateCapsule",
    params(InCapsule),
    responses(
        (status = 200, description = "The capsule, which hibernates", body = api::Capsule),
        (status = 202, description = "The capsule, which is still being uploaded", body = api::Capsule),
        OfGuest,
    )
)]
pub async fn hibernate(
    Capsule { caller, row }: Capsule,
    State(app): State<App>,
) -> Result<(StatusCode, Json<api::Capsule>), Error> {
    let capsule = op::show(op::hibernate::hibernate(&app.ctx, row, caller.actor).await?);
    let is_there = capsule.status == api::Status::Hibernated;
    Ok((if is_there { StatusCode::OK } else { StatusCode::ACCEPTED }, Json(capsule)))
}

/// Resume a capsule
///
/// It goes on where it was: memory, processes and files. Answers when it runs, or after 20 seconds with what is. One that runs
/// already is answered as it is; one that is being paused is waited for. One that hibernates is taken from the object store, its
/// memory as it is touched. A resume that fails leaves it as it was.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/resume", tag = "capsules", operation_id = "resumeCapsule",
    params(InCapsule),
    responses((status = 200, description = "The capsule", body = api::Capsule), OfGuest)
)]
pub async fn resume(Capsule { caller, row }: Capsule, State(app): State<App>) -> Result<Json<api::Capsule>, Error> {
    Ok(Json(op::show(op::resume::resume(&app.ctx, row, caller.actor).await?)))
}

/// Fork a capsule
///
/// Capsules that begin where this one is now: the same memory, processes and files, but identities, clocks and randomness of
/// their own. It stands still for milliseconds and runs on. Answers when all run. If one of them cannot start, none is kept.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/fork", tag = "capsules", operation_id = "forkCapsule",
    params(InCapsule), request_body = ForkCapsule,
    responses((status = 201, description = "The new capsules", body = Forked), OfGuest)
)]
pub async fn fork(
    Capsule { caller, row }: Capsule,
    State(app): State<App>,
    body::Json(request): body::Json<ForkCapsule>,
) -> Result<(StatusCode, Json<Forked>), Error> {
    let made = op::fork::fork(&app.ctx, row, caller.actor, request).await?;
    let capsules = made
        .into_iter()
        .map(|made| api::Capsule { traffic_access_token: made.traffic_token, ..op::show(made.capsule) });
    Ok((StatusCode::CREATED, Json(Forked { capsules: capsules.collect() })))
}

/// Keep a capsule awake
///
/// Restarts its inactivity clock. A capsule that is starting is waited for.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/ping", tag = "capsules", operation_id = "pingCapsule",
    params(InCapsule),
    responses(
        (status = 204, description = "The clock starts anew"),
        OfCapsule,
        (status = 409, description = "`invalid_state`: it does not run", body = ErrorBody),
        (status = 503, description = "`host_unavailable`: its host does not answer; `unavailable`: the platform's database does not", body = ErrorBody),
    )
)]
pub async fn ping(Capsule { row, .. }: Capsule, State(app): State<App>) -> Result<StatusCode, Error> {
    op::touch::touch(&app.ctx, row).await?;
    Ok(StatusCode::NO_CONTENT)
}
