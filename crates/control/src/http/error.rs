//! Errors on the wire: every code has one status, every error of a verb one code.

use api::{ErrorBody, ErrorCode, ErrorDetail};
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::{db, host, op};

/// An answer that is an error.
#[derive(Debug)]
pub struct Error(ErrorBody);

impl Error {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ErrorBody { error: ErrorDetail { code, message: message.into() } })
    }

    pub fn code(&self) -> ErrorCode {
        self.0.error.code
    }

    pub fn message(&self) -> &str {
        &self.0.error.message
    }

    /// The code and the message, for where there is no status to go with them.
    pub fn into_detail(self) -> ErrorDetail {
        self.0.error
    }
}

fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::InvalidState | ErrorCode::Conflict => StatusCode::CONFLICT,
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::AgentError => StatusCode::BAD_GATEWAY,
        ErrorCode::HostUnavailable | ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::InternalError => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        (status(self.0.error.code), Json(self.0)).into_response()
    }
}

impl From<db::Error> for Error {
    fn from(error: db::Error) -> Self {
        tracing::error!(error = &error as &dyn std::error::Error, "the store failed");
        match error {
            db::Error::Open(_) | db::Error::Migrate(_) | db::Error::Query(_) => {
                Self::new(ErrorCode::Unavailable, "the platform's database does not answer; try again in a moment")
            }
            db::Error::Corrupt { .. } => Self::new(ErrorCode::InternalError, "the request met a fault of the platform"),
        }
    }
}

impl From<api::Invalid> for Error {
    fn from(invalid: api::Invalid) -> Self {
        Self::new(ErrorCode::InvalidRequest, invalid.to_string())
    }
}

impl From<op::Error> for Error {
    fn from(error: op::Error) -> Self {
        let message = error.to_string();
        match error {
            op::Error::Store(error) => error.into(),
            op::Error::Panic(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "a request failed");
                Self::new(ErrorCode::InternalError, "the request met a fault of the platform")
            }
            op::Error::Host(error) => Self::new(host_code(&error), message),
            op::Error::Guest(source) => {
                tracing::warn!(error = &source as &dyn std::error::Error, "a guest did not answer as it should");
                Self::new(ErrorCode::AgentError, message)
            }
            op::Error::GuestAnswer(_) => Self::new(ErrorCode::AgentError, message),
            op::Error::Invalid(_) | op::Error::Refused(_) => Self::new(ErrorCode::InvalidRequest, message),
            op::Error::NoTemplate(_) | op::Error::NoProcess(_) | op::Error::NoFile(_) | op::Error::NoDirectory(_) => {
                Self::new(ErrorCode::NotFound, message)
            }
            op::Error::State(_) | op::Error::Gone => Self::new(ErrorCode::InvalidState, message),
            op::Error::Timeout(_) | op::Error::Deadline => Self::new(ErrorCode::Timeout, message),
            op::Error::Occupied(_) | op::Error::ReservedName(_) | op::Error::TakenName(_) => {
                Self::new(ErrorCode::Conflict, message)
            }
            op::Error::Protected(_) => Self::new(ErrorCode::Forbidden, message),
            op::Error::Fork { .. } => Self::new(ErrorCode::AgentError, message),
            op::Error::DiskFull => Self::new(ErrorCode::DiskFull, message),
            op::Error::TooMuchOutput | op::Error::LongListing => Self::new(ErrorCode::TooLarge, message),
            op::Error::TooManyOutputs | op::Error::Busy => Self::new(ErrorCode::Unavailable, message),
        }
    }
}

fn host_code(error: &host::Error) -> ErrorCode {
    match error {
        host::Error::Unreachable(_) | host::Error::Unable(_) | host::Error::Full(_) => ErrorCode::HostUnavailable,
        host::Error::State(_) => ErrorCode::InvalidState,
        host::Error::Late(_) | host::Error::Absent(_) | host::Error::Failed(_) | host::Error::Answer(_) => {
            ErrorCode::AgentError
        }
    }
}
