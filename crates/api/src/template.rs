//! Templates: what capsules are made from.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a template holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
    pub size_bytes: u64,
    pub created_at: DateTime<Utc>,
    /// Offered to every team by the platform.
    pub platform: bool,
    /// Cannot be deleted.
    pub protected: bool,
    pub metadata: BTreeMap<String, String>,
}
