//! `/v1/capsules/{id}/exec`

use api::{ErrorBody, Exec, ExecResult, ExecStarted};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;

use super::App;
use super::answers::{InCapsule, OfGuest};
use super::body;
use super::caller::Capsule;
use super::error::Error;
use crate::op;
use crate::op::exec::{Held, Outcome};

/// An answer that counts among the [outputs](op::exec::Outputs) until it is written.
struct Answer {
    json: Vec<u8>,
    _held: Held,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.json
    }
}

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
        (status = 503, description = "`host_unavailable`: its host does not answer; `unavailable`: the database does not, the capsule has too many calls open, or the platform holds too much output", body = ErrorBody),
        (status = 504, description = "`timeout`: it ran longer than `timeout_sec` and was ended with all its children", body = ErrorBody),
    )
)]
pub async fn exec(
    State(app): State<App>,
    Capsule { row, .. }: Capsule,
    body::Json(request): body::Json<Exec>,
) -> Result<Response, Error> {
    Ok(match op::exec::exec(&app.ctx, row, request).await? {
        Outcome::Finished(result, held) => {
            // It may be long.
            let json =
                tokio::task::spawn_blocking(move || serde_json::to_vec(&result).expect("a result is plain data"));
            let answer = Bytes::from_owner(Answer { json: json.await.map_err(op::Error::from)?, _held: held });
            ([(CONTENT_TYPE, "application/json")], answer).into_response()
        }
        Outcome::Started(started) => (StatusCode::ACCEPTED, Json(started)).into_response(),
    })
}
