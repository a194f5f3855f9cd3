//! What a capsule uses.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::CapsuleId;
use crate::limits::Invalid;

/// How far back to look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MetricsRange {
    #[serde(rename = "5m")]
    FiveMinutes,
    #[default]
    #[serde(rename = "10m")]
    TenMinutes,
    #[serde(rename = "1h")]
    Hour,
    #[serde(rename = "2h")]
    TwoHours,
    #[serde(rename = "6h")]
    SixHours,
    #[serde(rename = "12h")]
    TwelveHours,
    #[serde(rename = "24h")]
    Day,
}

impl FromStr for MetricsRange {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Ok(match text {
            "5m" => Self::FiveMinutes,
            "10m" => Self::TenMinutes,
            "1h" => Self::Hour,
            "2h" => Self::TwoHours,
            "6h" => Self::SixHours,
            "12h" => Self::TwelveHours,
            "24h" => Self::Day,
            _ => return Err(Invalid::new("range", "must be one of 5m, 10m, 1h, 2h, 6h, 12h and 24h")),
        })
    }
}

impl MetricsRange {
    /// How far back that is.
    pub fn seconds(self) -> u32 {
        match self {
            Self::FiveMinutes => 300,
            Self::TenMinutes => 600,
            Self::Hour => 3600,
            Self::TwoHours => 7200,
            Self::SixHours => 6 * 3600,
            Self::TwelveHours => 12 * 3600,
            Self::Day => 24 * 3600,
        }
    }
}

/// One reading.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Point {
    /// Seconds since 1970.
    pub timestamp_unix: i64,
    /// Of all its processors together, 0 to 100, since the reading before; 0 in the first.
    pub cpu_pct: f64,
    /// Memory that its microVM takes of its host.
    pub mem_bytes: u64,
    /// Disk space that it takes of its host beyond its template.
    pub disk_bytes: u64,
    /// What it sent since it was started or last resumed.
    pub net_sent_bytes: u64,
    /// What was sent to it since it was started or last resumed.
    pub net_received_bytes: u64,
}

/// What a capsule used, as its host saw it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CapsuleMetrics {
    #[schema(value_type = String, pattern = "^cl-[0-9a-z]{25}$")]
    pub sandbox_id: CapsuleId,
    pub range: MetricsRange,
    /// Oldest first.
    pub points: Vec<Point>,
}
