//! The public REST vocabulary: requests and answers, ids, error codes, limits and defaults.
//!
//! Pure: no IO and no clock. It refuses to know HTTP: status numbers, headers and extractors belong to `control::http`.

pub mod capsule;
pub mod error;
pub mod exec;
pub mod id;
pub mod limits;
pub mod name;
pub mod pty;
pub mod template;

pub use capsule::{Capsule, CapsuleSpec, CreateCapsule, Status};
pub use error::{ErrorBody, ErrorCode, ErrorDetail};
pub use exec::{Encoding, Exec, ExecResult, ExecSpec, ExecStarted};
pub use id::{CapsuleId, HostId, KeyId, TeamId};
pub use limits::Invalid;
pub use name::SafeName;
pub use template::{Template, TemplateKind};
