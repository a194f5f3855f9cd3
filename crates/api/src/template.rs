//! Templates: what capsules are made from.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::CapsuleId;
use crate::limits::Invalid;
use crate::name::SafeName;

/// What a template holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TemplateKind {
    /// A disk to boot from.
    Base,
    /// A disk and the memory of a capsule that ran.
    Snapshot,
}

/// A template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    #[schema(example = "minimal")]
    pub name: String,
    #[serde(rename = "type")]
    pub kind: TemplateKind,
    pub vcpus: u32,
    pub memory_mb: u32,
    /// Capsules made from a `snapshot` have exactly these sizes.
    pub disk_size_mb: u32,
    pub size_bytes: u64,
    pub created_at: DateTime<Utc>,
    /// Offered to every team by the platform.
    pub platform: bool,
    /// Cannot be deleted.
    pub protected: bool,
    pub metadata: BTreeMap<String, String>,
}

/// A request for a template that begins where a capsule is now.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateSnapshot {
    #[schema(value_type = String, pattern = "^cl-[0-9a-z]{25}$", example = "cl-0a1b2c3d4e5f6g7h8i9j0k1l2")]
    pub sandbox_id: CapsuleId,
    /// 1 to 64 of `a-z A-Z 0-9 . _ -`, beginning with a letter or digit; `template-` and 8 hex digits when absent.
    pub name: Option<String>,
}

impl CreateSnapshot {
    /// The name that is asked for, if it is one.
    pub fn name(&self) -> Result<Option<SafeName>, Invalid> {
        self.name.as_deref().map(str::parse).transpose()
    }
}
