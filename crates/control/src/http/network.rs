//! `/v1/capsules/{id}/network`

use api::{Egress, ErrorBody, SetEgress};
use axum::Json;
use axum::extract::State;

use super::App;
use super::answers::{InCapsule, OfCapsule};
use super::body;
use super::caller::Capsule;
use super::error::Error;
use crate::op;

/// Set what a capsule may reach outside
///
/// All of it: what is absent is not limited. What is open and not allowed any more is cut, and nothing gets out in between. In
/// every state; a paused capsule wakes up with it, and forks have it. It is kept before the host is asked: if the host does not
/// answer, it is asked again until it does.
///
/// An address may be reached if `allow_out` has it, or if `deny_out` has not. Where `allow_out` has names, whatever else it does
/// not have must be denied (`0.0.0.0/0`): then TLS connections and HTTP/1 requests to those names pass, to addresses that the
/// capsule was told for them, and DNS answers those names alone. Private and link-local networks, other capsules and the host
/// are out of reach whatever is said here.
#[utoipa::path(
    put, path = "/v1/capsules/{id}/network", tag = "capsules", operation_id = "setNetwork",
    params(InCapsule), request_body = SetEgress,
    responses(
        (status = 200, description = "What it may reach now", body = Egress),
        OfCapsule,
        (status = 400, description = "`invalid_request`: an entry is none; the message names it", body = ErrorBody),
        (status = 409, description = "`invalid_state`: it has ended", body = ErrorBody),
        (status = 413, description = "`too_large`: the body", body = ErrorBody),
        (status = 502, description = "`agent_error`: the host could not do it, and is asked again", body = ErrorBody),
        (status = 503, description = "`host_unavailable`: its host does not answer, and is asked again; `unavailable`: the platform's database does not answer", body = ErrorBody),
    )
)]
pub async fn set(
    Capsule { row, .. }: Capsule,
    State(app): State<App>,
    body::Json(request): body::Json<SetEgress>,
) -> Result<Json<Egress>, Error> {
    Ok(Json(op::egress::set(&app.ctx, row, request).await?))
}
