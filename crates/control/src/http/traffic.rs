//! `/v1/capsules/{id}/traffic-token`

use api::TrafficToken;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::App;
use super::answers::{InCapsule, OfCapsule};
use super::caller::Capsule;
use super::error::Error;
use crate::op;

/// Make a capsule's URLs want a token
///
/// Another one, if they do already: the one of before is worth nothing from then on. Nobody is told it a second time.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/traffic-token", tag = "capsules", operation_id = "createTrafficToken",
    params(InCapsule),
    responses((status = 201, description = "The token", body = TrafficToken), OfCapsule)
)]
pub async fn restrict(
    Capsule { row, .. }: Capsule,
    State(app): State<App>,
) -> Result<(StatusCode, Json<TrafficToken>), Error> {
    let traffic_access_token = op::traffic::restrict(&app.ctx, &row).await?;
    Ok((StatusCode::CREATED, Json(TrafficToken { traffic_access_token })))
}

/// Let everyone use a capsule's URLs who knows them
#[utoipa::path(
    delete, path = "/v1/capsules/{id}/traffic-token", tag = "capsules", operation_id = "deleteTrafficToken",
    params(InCapsule),
    responses((status = 204, description = "They want none"), OfCapsule)
)]
pub async fn open(Capsule { row, .. }: Capsule, State(app): State<App>) -> Result<StatusCode, Error> {
    op::traffic::open(&app.ctx, &row).await?;
    Ok(StatusCode::NO_CONTENT)
}
