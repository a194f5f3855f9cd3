//! The public REST vocabulary: requests and answers, ids, error codes, limits and defaults.
//!
//! Pure: no IO and no clock. It refuses to know HTTP: status numbers, headers and extractors belong to `control::http`.

pub mod capsule;
pub mod egress;
pub mod error;
pub mod event;
pub mod exec;
pub mod file;
pub mod id;
pub mod limits;
pub mod metrics;
pub mod name;
pub mod process;
pub mod pty;
pub mod stream;
pub mod template;

pub use capsule::{Capsule, CapsuleSpec, CreateCapsule, ForkCapsule, Forked, Network, Sizes, Status, TrafficToken};
pub use egress::{Egress, SetEgress};
pub use error::{ErrorBody, ErrorCode, ErrorDetail};
pub use event::{Actor, ActorKind, Event, EventName, Resource};
pub use exec::{Encoding, Exec, ExecResult, ExecSpec, ExecStarted};
pub use file::{Depth, DirectoryEntries, FileEntry, FileForm, FileKind, FilePath, MadeDirectory};
pub use id::{CapsuleId, HostId, KeyId, TeamId, TemplateId};
pub use limits::Invalid;
pub use metrics::{CapsuleMetrics, MetricsRange, Point};
pub use name::SafeName;
pub use process::{Process, ProcessList, Selector, Signal};
pub use template::{CreateSnapshot, Template, TemplateKind};
