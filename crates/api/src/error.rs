//! What a client sees when something went wrong.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Every error code of the API. Clients choose what to do by this, never by the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is not understood, or a value is outside its bounds; the message names the field.
    InvalidRequest,
    /// The API key is missing or unknown.
    Unauthorized,
    /// There is no such thing, or it belongs to another team.
    NotFound,
    /// The path exists, but not with this method.
    MethodNotAllowed,
    /// The capsule is not in a state that allows this.
    InvalidState,
    /// What was to be made is there already.
    Conflict,
    /// A body, or a command's output, is larger than its bound.
    TooLarge,
    /// The capsule's disk has no room for it.
    DiskFull,
    /// The command ran longer than its `timeout_sec` and was ended.
    Timeout,
    /// The host tried and failed.
    AgentError,
    /// No host can take the work now: none answers, or all are full.
    HostUnavailable,
    /// The platform's own database does not answer.
    Unavailable,
    /// A fault of the platform itself.
    InternalError,
}

/// The body of every answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// The code for programs, the message for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    pub code: ErrorCode,
    #[schema(example = "vcpus must be between 1 and 32")]
    pub message: String,
}
