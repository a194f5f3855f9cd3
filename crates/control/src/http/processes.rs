//! `/v1/capsules/{id}/processes`

use api::{ErrorBody, ProcessList, Signal};
use axum::Json;
use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;

use super::App;
use super::answers::{InCapsule, InProcess, OfGuest};
use super::caller::{Guest, Selector, query};
use super::error::Error;
use crate::op;

/// List processes
///
/// Those that were started through the API and run, oldest first.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/processes", tag = "commands", operation_id = "listProcesses", params(InCapsule),
    responses((status = 200, description = "The processes", body = ProcessList), OfGuest)
)]
pub async fn list(Guest(guest): Guest) -> Result<Json<ProcessList>, Error> {
    Ok(Json(op::process::list(&guest).await?))
}

/// The signal the query names.
pub struct Asked(Signal);

impl FromRequestParts<App> for Asked {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Error> {
        query(parts, "signal").map(Self)
    }
}

/// End a process
///
/// With its whole group. Of several with one tag, the youngest is meant.
#[utoipa::path(
    delete, path = "/v1/capsules/{id}/processes/{selector}", tag = "commands", operation_id = "killProcess",
    params(InProcess, ("signal" = Option<Signal>, Query, description = "`SIGKILL` when absent")),
    responses(
        (status = 204, description = "The signal is sent"),
        OfGuest,
        (status = 404, description = "`not_found`: the team has no such capsule, or the capsule no such process", body = ErrorBody),
    )
)]
pub async fn kill(
    Guest(guest): Guest,
    Selector(selector): Selector,
    Asked(signal): Asked,
) -> Result<StatusCode, Error> {
    op::process::signal(&guest, &selector, signal).await?;
    Ok(StatusCode::NO_CONTENT)
}
