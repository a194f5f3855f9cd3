//! Processes that run in a capsule.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::{self, Invalid};

/// A process that was started through the API and runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Process {
    pub pid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "proc-0123abcd")]
    pub tag: Option<String>,
    #[schema(example = "/bin/sh")]
    pub cmd: String,
    pub args: Vec<String>,
}

/// The processes of a capsule, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProcessList {
    pub processes: Vec<Process>,
}

/// Names a process: digits are its pid, anything else its tag. Of several with one tag, the youngest is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    Pid(u32),
    Tag(String),
}

impl Selector {
    /// The selector a client wrote into a path.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            let outside = |_| Invalid::new("selector", format!("must be a pid, at most {}, or a tag", u32::MAX));
            return text.parse().map(Self::Pid).map_err(outside);
        }
        check_tag("selector", text)?;
        Ok(Self::Tag(text.to_owned()))
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "the pid {pid}"),
            Self::Tag(tag) => write!(f, "the tag `{tag}`"),
        }
    }
}

/// A tag that can be looked for.
pub(crate) fn check_tag(field: &str, tag: &str) -> Result<(), Invalid> {
    if tag.is_empty() {
        return Err(Invalid::new(field, "must not be empty"));
    }
    limits::process_string(field, tag, limits::TAG_BYTES)
}

/// What ends a process, with its whole group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Signal {
    /// It may clean up, or ignore it.
    #[serde(rename = "SIGTERM")]
    Term,
    #[default]
    #[serde(rename = "SIGKILL")]
    Kill,
}

impl FromStr for Signal {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "SIGTERM" => Ok(Self::Term),
            "SIGKILL" => Ok(Self::Kill),
            _ => Err(Invalid::new("signal", "must be SIGTERM or SIGKILL")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_a_pid_and_the_rest_is_a_tag() {
        assert_eq!(Selector::parse("17"), Ok(Selector::Pid(17)));
        assert_eq!(Selector::parse("proc-1"), Ok(Selector::Tag("proc-1".into())));
        assert_eq!(Selector::parse("-1"), Ok(Selector::Tag("-1".into())));
        for bad in ["", "4294967296", "a\0", &"x".repeat(129)] {
            assert_eq!(Selector::parse(bad).unwrap_err().field, "selector", "{bad}");
        }
    }

    #[test]
    fn only_two_signals_have_names() {
        assert_eq!(("SIGTERM".parse(), "SIGKILL".parse()), (Ok(Signal::Term), Ok(Signal::Kill)));
        for bad in ["", "sigterm", "TERM", "15", "SIGHUP"] {
            assert!(bad.parse::<Signal>().is_err(), "{bad}");
        }
    }
}
