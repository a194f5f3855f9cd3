//! `/v1/capsules/{id}/metrics`

use api::{CapsuleMetrics, ErrorBody, ErrorCode, MetricsRange};
use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use lifecycle::Desired;

use super::App;
use super::answers::{InCapsule, OfCapsule};
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
/// As its host sees it: of the last 10 minutes every second or some, of 2 hours every 30 seconds, of 24 hours every 5 minutes, and
/// of a capsule that runs, now. Asking is no activity and goes to no guest. What was before its agent last started is not known.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/metrics", tag = "capsules", operation_id = "capsuleMetrics",
    params(InCapsule, ("range" = Option<MetricsRange>, Query, description = "`10m` when absent")),
    responses(
        (status = 200, description = "The points", body = CapsuleMetrics),
        OfCapsule,
        (status = 404, description = "`not_found`: the team has no such capsule, or it has ended", body = ErrorBody),
        (status = 503, description = "`host_unavailable`: its host does not answer; `unavailable`: the platform's database does not", body = ErrorBody),
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
    let points = op::metrics::metrics(&app.ctx, &row, range).await?;
    Ok(Json(CapsuleMetrics { sandbox_id: row.id, range, points }))
}
