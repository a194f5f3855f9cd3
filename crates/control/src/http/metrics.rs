//! `/v1/capsules/{id}/metrics`

use api::{CapsuleMetrics, ErrorBody, ErrorCode, MetricsRange};
use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use lifecycle::Desired;

use super::App;
use super::answers::{InCapsule, OfGuest};
use super::caller::{Capsule, query};
use super::error::Error;
use crate::op;

/// The range the query names.
pub struct Asked(MetricsRange);

impl FromRequestParts<App> for Asked {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Error> {
        query(parts, "range").map(Self)
    }
}

/// Read what a capsule uses
///
/// One point for now, whatever the range: what the guest says at this moment. Asking counts as activity.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/metrics", tag = "capsules", operation_id = "capsuleMetrics",
    params(InCapsule, ("range" = Option<MetricsRange>, Query, description = "`10m` when absent")),
    responses(
        (status = 200, description = "The points", body = CapsuleMetrics),
        OfGuest,
        (status = 404, description = "`not_found`: the team has no such capsule, or it has ended", body = ErrorBody),
    )
)]
pub async fn read(
    Capsule { row, .. }: Capsule,
    Asked(range): Asked,
    State(app): State<App>,
) -> Result<Json<CapsuleMetrics>, Error> {
    let state = row.life.state;
    if state.desired == Desired::Stopped || state.observed.ended() {
        return Err(Error::new(ErrorCode::NotFound, format!("capsule {} has ended", row.id)));
    }
    let guest = op::guest::enter(&app.ctx, row).await?;
    let points = vec![op::metrics::now(&guest).await?];
    Ok(Json(CapsuleMetrics { sandbox_id: guest.id, range, points }))
}
