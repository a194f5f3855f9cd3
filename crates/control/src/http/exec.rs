//! `/v1/capsules/{id}/exec`

use api::{ErrorBody, Exec, ExecResult, ExecStarted};
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::answers::{InCapsule, OfGuest};
use super::body;
use super::caller::Guest;
use super::error::Error;
use crate::op;
use crate::op::exec::Outcome;

/// Run a command
///
/// In the foreground the answer comes when the command has ended, with all it wrote; in the background as soon as it runs. A
/// client that leaves does not end the command. A capsule that is starting is waited for.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/exec", tag = "commands", operation_id = "exec", params(InCapsule),
    request_body = Exec,
    responses(
        (status = 200, description = "Foreground: what the command did", body = ExecResult),
        (status = 202, description = "Background: it runs", body = ExecStarted),
        OfGuest,
        (status = 400, description = "`invalid_request`: a field is outside its bounds, or `cwd` or `user` is missing in the capsule", body = ErrorBody),
        (status = 413, description = "`too_large`: the body, or more than 256 MiB of output", body = ErrorBody),
        (status = 504, description = "`timeout`: it ran longer than `timeout_sec` and was ended with all its children", body = ErrorBody),
    )
)]
pub async fn exec(Guest(guest): Guest, body::Json(request): body::Json<Exec>) -> Result<Response, Error> {
    Ok(match op::exec::exec(&guest, request).await? {
        Outcome::Finished(result) => Json(result).into_response(),
        Outcome::Started(started) => (StatusCode::ACCEPTED, Json(started)).into_response(),
    })
}
