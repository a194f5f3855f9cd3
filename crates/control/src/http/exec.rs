//! `/v1/capsules/{id}/exec`

use api::{ErrorBody, Exec, ExecResult, ExecStarted};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::App;
use super::body;
use super::caller::Capsule;
use super::error::Error;
use crate::op;
use crate::op::exec::Outcome;

/// Run a command
///
/// In the foreground the answer comes when the command has ended, with all it wrote; in the background as soon as it runs. A
/// capsule that is starting is waited for.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/exec", tag = "commands", operation_id = "exec", security(("apiKey" = [])),
    params(("id" = String, Path, description = "The capsule")),
    request_body = Exec,
    responses(
        (status = 200, description = "Foreground: what the command did", body = ExecResult),
        (status = 202, description = "Background: it runs", body = ExecStarted),
        (status = 400, description = "`invalid_request`: a field is outside its bounds, or `cwd` is missing in the capsule", body = ErrorBody),
        (status = 401, description = "`unauthorized`", body = ErrorBody),
        (status = 404, description = "`not_found`: the team has no such capsule", body = ErrorBody),
        (status = 409, description = "`invalid_state`: the capsule does not run", body = ErrorBody),
        (status = 413, description = "`too_large`: the body, or more than 256 MiB of output", body = ErrorBody),
        (status = 502, description = "`agent_error`: the capsule went away meanwhile", body = ErrorBody),
        (status = 503, description = "`host_unavailable`", body = ErrorBody),
        (status = 504, description = "`timeout`: it ran longer than `timeout_sec` and was ended with all its children", body = ErrorBody),
    )
)]
pub async fn exec(
    Capsule(capsule): Capsule,
    State(app): State<App>,
    body::Json(request): body::Json<Exec>,
) -> Result<Response, Error> {
    Ok(match op::exec::exec(&app.ctx, capsule, request).await? {
        Outcome::Finished(result) => Json(result).into_response(),
        Outcome::Started(started) => (StatusCode::ACCEPTED, Json(started)).into_response(),
    })
}
