//! Capsules as clients ask for them and see them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::egress::{Egress, Policy, SetEgress};
use crate::id::CapsuleId;
use crate::limits::{self, Invalid};
use crate::name::SafeName;

/// Where a capsule is in its life. Clients fail on any other word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Accepted; no host has reported it yet.
    Pending,
    /// A host is starting it.
    Starting,
    /// It answers.
    Running,
    /// A host is writing it to disk.
    Pausing,
    /// On disk, using neither processor nor memory.
    Paused,
    /// A template is being made of it.
    Snapshotting,
    /// A host is bringing it back.
    Resuming,
    /// It is to end; a host has yet to confirm.
    Stopping,
    /// In the object store, on no host.
    Hibernated,
    /// It ended.
    Stopped,
    /// Its host no longer knows it, and nobody can say why.
    Missing,
    /// It could not be started, or it failed; `reason` says why.
    Error,
}

/// A request for a new capsule. Everything has a default.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CreateCapsule {
    /// Name of a template; `minimal` (also called `minimal-ubuntu`) when absent.
    #[schema(example = "minimal")]
    pub template: Option<String>,
    /// Virtual processors; 1 when absent. A template that came of a capsule has its own sizes: then these three are absent, or
    /// the same.
    #[schema(minimum = 1, maximum = 32)]
    pub vcpus: Option<i64>,
    /// Memory in MiB; 512 when absent.
    #[schema(minimum = 128, maximum = 65536)]
    pub memory_mb: Option<i64>,
    /// Most the root disk may grow to, in MiB; 5120 when absent.
    #[schema(minimum = 5120, maximum = 102400)]
    pub disk_size_mb: Option<i64>,
    /// Seconds without a command or ping after which the host pauses the capsule. 0, the default, means never; 1 to 59 are raised
    /// to 60.
    #[schema(minimum = 0, maximum = 2592000)]
    pub timeout_sec: Option<i64>,
    /// Up to 20 labels. Keys: 1 to 64 of `a-z A-Z 0-9 . _ -`; values: up to 64 characters. `kernel_version`, `vmm_version`,
    /// `agent_version` and `envd_version` are the platform's.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Whether a request to one of its URLs wakes it when it is paused; false when absent.
    pub auto_resume: Option<bool>,
    /// `false` is short for `0.0.0.0/0` in `network.deny_out`: it reaches nothing outside but what `network.allow_out` names.
    #[serde(alias = "allowInternetAccess")]
    pub allow_internet_access: Option<bool>,
    /// Who may use its URLs, and what it may reach.
    pub network: Option<Network>,
}

/// Who may reach what listens in a capsule, at `{port}-{capsule}.{domain}`, and what the capsule may reach outside.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Network {
    /// Whether knowing a URL is enough; true when absent. Otherwise requests need the capsule's `traffic_access_token`, in the
    /// header `e2b-traffic-access-token`.
    #[serde(alias = "allowPublicTraffic")]
    pub allow_public_traffic: Option<bool>,
    /// As in `PUT /v1/capsules/{id}/network`.
    #[serde(alias = "allowOut")]
    pub allow_out: Option<Vec<String>>,
    /// As in `PUT /v1/capsules/{id}/network`.
    #[serde(alias = "denyOut")]
    pub deny_out: Option<Vec<String>>,
}

/// What a capsule shall be: a request whose every value is within its bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapsuleSpec {
    /// The stored name, with aliases resolved.
    pub template: SafeName,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_size_mb: u32,
    /// 0 means never, otherwise at least 60.
    pub timeout_sec: u32,
    pub metadata: BTreeMap<String, String>,
    /// Traffic wakes it when it is paused.
    pub auto_resume: bool,
    /// What it may reach outside.
    pub egress: Policy,
}

/// The sizes that a template's memory and disk already have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_size_mb: u32,
}

impl CreateCapsule {
    /// The stored name of the template that is asked for.
    pub fn template(&self) -> Result<SafeName, Invalid> {
        let name = match &self.template {
            Some(name) => name.parse().map_err(|invalid| Invalid { field: "template".into(), ..invalid })?,
            None => SafeName::default(),
        };
        Ok(name.canonical_template())
    }

    /// Whether knowing a URL of the capsule is enough to use it.
    pub fn allows_public_traffic(&self) -> bool {
        self.network.as_ref().and_then(|network| network.allow_public_traffic).unwrap_or(true)
    }

    /// Fills in the defaults and checks every bound. Sizes that are `baked` into the template are the only ones it can have.
    pub fn validate(self, baked: Option<Sizes>) -> Result<CapsuleSpec, Invalid> {
        let template = self.template()?;
        let metadata = self.metadata.unwrap_or_default();
        limits::metadata(&metadata)?;
        let Network { allow_out, deny_out, .. } = self.network.unwrap_or_default();
        let egress = SetEgress { allow_internet_access: self.allow_internet_access, allow_out, deny_out };
        let size = |field, value, bounds, default, baked| match (value, baked) {
            (None, Some(baked)) => Ok(baked),
            (Some(value), Some(baked)) if value == i64::from(baked) => Ok(baked),
            (Some(_), Some(baked)) => Err(Invalid::new(
                field,
                format!("must be {baked} or absent: the template `{template}` has it built in"),
            )),
            (value, None) => limits::number(field, value, bounds, default),
        };
        Ok(CapsuleSpec {
            vcpus: size("vcpus", self.vcpus, limits::VCPUS, limits::DEFAULT_VCPUS, baked.map(|sizes| sizes.vcpus))?,
            memory_mb: size(
                "memory_mb",
                self.memory_mb,
                limits::MEMORY_MB,
                limits::DEFAULT_MEMORY_MB,
                baked.map(|sizes| sizes.memory_mb),
            )?,
            disk_size_mb: size(
                "disk_size_mb",
                self.disk_size_mb,
                limits::DISK_SIZE_MB,
                limits::DEFAULT_DISK_SIZE_MB,
                baked.map(|sizes| sizes.disk_size_mb),
            )?,
            timeout_sec: limits::timeout(self.timeout_sec)?,
            auto_resume: self.auto_resume.unwrap_or(false),
            egress: egress.validate("network.")?,
            metadata,
            template,
        })
    }
}

/// A request for capsules that begin where another is now: with its memory, processes, files, sizes and timeout.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ForkCapsule {
    /// How many; 1 when absent.
    #[schema(minimum = 1, maximum = 100)]
    pub count: Option<i64>,
    /// Labels of each, as when a capsule is created; those of the capsule that is forked when absent.
    pub metadata: Option<BTreeMap<String, String>>,
}

impl ForkCapsule {
    /// How many, and the labels they shall have.
    pub fn validate(self) -> Result<(u32, Option<BTreeMap<String, String>>), Invalid> {
        self.metadata.as_ref().map_or(Ok(()), limits::metadata)?;
        Ok((limits::number("count", self.count, limits::FORKS, 1)?, self.metadata))
    }
}

/// What requests to a capsule's URLs need. It is told once, where it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TrafficToken {
    /// For the header `e2b-traffic-access-token`.
    pub traffic_access_token: String,
}

/// The capsules that a fork made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Forked {
    pub capsules: Vec<Capsule>,
}

/// A capsule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capsule {
    #[schema(value_type = String, pattern = "^cl-[0-9a-z]{25}$", example = "cl-0a1b2c3d4e5f6g7h8i9j0k1l2")]
    pub id: CapsuleId,
    pub status: Status,
    /// Name of the template it was made from.
    #[schema(example = "minimal")]
    pub template: String,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_size_mb: u32,
    pub timeout_sec: u32,
    pub created_at: DateTime<Utc>,
    /// When it was first seen running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    /// The last command, ping or other traffic its host has reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_active_at: Option<DateTime<Utc>>,
    pub last_updated: DateTime<Utc>,
    /// The labels of its creation and, once it has run, the versions of what runs it.
    pub metadata: BTreeMap<String, String>,
    /// Whether a request to one of its URLs wakes it when it is paused.
    #[serde(default)]
    pub auto_resume: bool,
    /// Whether knowing a URL of it is enough to use it.
    #[serde(default)]
    pub allow_public_traffic: bool,
    /// What it may reach outside.
    #[serde(default)]
    pub network: Egress,
    /// What requests to its URLs need in the header `e2b-traffic-access-token`. It is told once, where it is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traffic_access_token: Option<String>,
    /// Why it ended or is missing, why its host paused it, or why it could not be resumed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[cfg(test)]
mod tests;
