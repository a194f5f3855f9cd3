//! Every bound and default of the API, and the checks that name the field and the bound.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::name::{RULE, is_safe};

/// Virtual processors of a capsule.
pub const VCPUS: RangeInclusive<i64> = 1..=32;
pub const DEFAULT_VCPUS: u32 = 1;

/// Memory of a capsule, MiB.
pub const MEMORY_MB: RangeInclusive<i64> = 128..=65_536;
pub const DEFAULT_MEMORY_MB: u32 = 512;

/// Size of a capsule's root disk, MiB. Disks are sparse: this is what they may grow to.
pub const DISK_SIZE_MB: RangeInclusive<i64> = 5_120..=102_400;
pub const DEFAULT_DISK_SIZE_MB: u32 = 5_120;

/// Seconds without activity before the host acts by itself; 0 means never.
pub const TIMEOUT_SEC: RangeInclusive<i64> = 0..=30 * 24 * 60 * 60;
/// A timeout between 1 and this is raised to this, without an error.
pub const TIMEOUT_SEC_FLOOR: i64 = 60;

/// Entries of a capsule's metadata, and characters of each value.
pub const METADATA_ENTRIES: usize = 20;
pub const METADATA_VALUE_CHARS: usize = 64;
/// Metadata keys the platform fills in itself.
pub const RESERVED_METADATA: [&str; 4] = ["kernel_version", "vmm_version", "agent_version", "envd_version"];

/// Capsules one fork may make.
pub const FORKS: RangeInclusive<i64> = 1..=100;

/// Entries of each list of what a capsule may, or may not, reach outside.
pub const EGRESS_ENTRIES: usize = 256;

/// Bytes of a JSON request body.
pub const JSON_BODY_BYTES: usize = 1024 * 1024;

/// Seconds a foreground command may run; 0 means the default.
pub const EXEC_TIMEOUT_SEC: RangeInclusive<i64> = 0..=24 * 60 * 60;
pub const DEFAULT_EXEC_TIMEOUT_SEC: u32 = 30;
/// Bytes of standard output and standard error together that a foreground command may write.
pub const EXEC_OUTPUT_BYTES: usize = 256 * 1024 * 1024;
/// Bytes of output that the platform holds at once for all commands in the foreground, until their clients have taken it.
pub const EXEC_OUTPUTS_BYTES: usize = 512 * 1024 * 1024;
pub const EXEC_ARGS: usize = 4_096;
pub const EXEC_ENVS: usize = 1_024;
/// Bytes of one argument or one `NAME=value`; Linux refuses longer ones.
pub const EXEC_STRING_BYTES: usize = 128 * 1024 - 1;
/// Bytes of a path; Linux refuses longer ones.
pub const PATH_BYTES: usize = 4_095;
pub const TAG_BYTES: usize = 128;
/// Bytes of the name of a capsule's user.
pub const USER_BYTES: usize = 64;

/// Bytes of a file in `files/write`; `files/stream/write` has no such bound.
pub const FILE_WRITE_BYTES: u64 = 100 * 1024 * 1024;
/// Levels of directories in one listing.
pub const LIST_DEPTH: RangeInclusive<i64> = 0..=64;

/// A value outside its bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct Invalid {
    /// The field as the client wrote it, such as `vcpus` or `metadata.owner`.
    pub field: String,
    /// What it must be, such as `must be between 1 and 32`.
    pub problem: String,
}

impl Invalid {
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

/// The value, or the default, as the number it stands for.
pub(crate) fn number(
    field: &str,
    value: Option<i64>,
    bounds: RangeInclusive<i64>,
    default: u32,
) -> Result<u32, Invalid> {
    let Some(value) = value else { return Ok(default) };
    let outside = || Invalid::new(field, format!("must be between {} and {}", bounds.start(), bounds.end()));
    if !bounds.contains(&value) {
        return Err(outside());
    }
    u32::try_from(value).map_err(|_| outside())
}

/// The inactivity timeout, raised to its floor.
pub(crate) fn timeout(value: Option<i64>) -> Result<u32, Invalid> {
    let raised =
        value.map(|seconds| if (1..TIMEOUT_SEC_FLOOR).contains(&seconds) { TIMEOUT_SEC_FLOOR } else { seconds });
    number("timeout_sec", raised, TIMEOUT_SEC, 0)
}

pub(crate) fn metadata(entries: &BTreeMap<String, String>) -> Result<(), Invalid> {
    if entries.len() > METADATA_ENTRIES {
        return Err(Invalid::new("metadata", format!("must have at most {METADATA_ENTRIES} entries")));
    }
    for (key, value) in entries {
        let field = || format!("metadata.{key}");
        if !is_safe(key) {
            return Err(Invalid::new("metadata", format!("keys {RULE}")));
        }
        if RESERVED_METADATA.contains(&key.as_str()) {
            return Err(Invalid::new(field(), "is reserved: the platform sets it"));
        }
        if value.chars().count() > METADATA_VALUE_CHARS {
            return Err(Invalid::new(field(), format!("must be at most {METADATA_VALUE_CHARS} characters long")));
        }
        // PostgreSQL cannot store it, and nobody means it.
        if value.contains('\0') {
            return Err(Invalid::new(field(), "must not contain a NUL character"));
        }
    }
    Ok(())
}

/// A path in a capsule: bounded, without NUL, and not empty.
pub fn path(value: &str) -> Result<(), Invalid> {
    if value.is_empty() {
        return Err(Invalid::new("path", "must not be empty"));
    }
    process_string("path", value, PATH_BYTES)
}

/// A string that becomes part of a process: bounded, and without NUL.
pub(crate) fn process_string(field: &str, value: &str, bytes: usize) -> Result<(), Invalid> {
    if value.len() > bytes {
        return Err(Invalid::new(field, format!("must be at most {bytes} bytes long")));
    }
    if value.contains('\0') {
        return Err(Invalid::new(field, "must not contain a NUL character"));
    }
    Ok(())
}
