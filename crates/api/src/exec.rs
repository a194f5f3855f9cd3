//! Running a command in a capsule, to its end or in the background.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::CapsuleId;
use crate::limits::{self, Invalid};

/// A request to run a command. No shell is added: `cmd` is executed with `args`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct Exec {
    #[schema(example = "/bin/sh")]
    pub cmd: String,
    #[schema(example = json!(["-c", "echo hello"]))]
    pub args: Option<Vec<String>>,
    /// Seconds a foreground command may run; then it is ended with all its children. 0 and absent mean 30. A background
    /// command has no such limit.
    #[schema(minimum = 0, maximum = 86400)]
    pub timeout_sec: Option<i64>,
    /// Answer as soon as it runs, and let it run on.
    pub background: Option<bool>,
    /// A name by which to find the process again; made up for background commands that bring none.
    pub tag: Option<String>,
    pub envs: Option<BTreeMap<String, String>>,
    /// Working directory; the user's home when absent. A relative one is taken from there.
    pub cwd: Option<String>,
    /// The capsule's user that runs it; root when absent.
    pub user: Option<String>,
}

/// A command whose every value is within its bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecSpec {
    pub cmd: String,
    pub args: Vec<String>,
    pub envs: BTreeMap<String, String>,
    pub cwd: Option<String>,
    pub tag: Option<String>,
    pub user: Option<String>,
    /// Seconds a foreground command may run; `None` for one in the background.
    pub timeout_sec: Option<u32>,
}

impl Exec {
    /// Fills in the defaults and checks every bound.
    pub fn validate(self) -> Result<ExecSpec, Invalid> {
        let timeout_sec = limits::number(
            "timeout_sec",
            self.timeout_sec,
            limits::EXEC_TIMEOUT_SEC,
            limits::DEFAULT_EXEC_TIMEOUT_SEC,
        )?;
        let timeout_sec = if timeout_sec == 0 { limits::DEFAULT_EXEC_TIMEOUT_SEC } else { timeout_sec };
        if self.cmd.is_empty() {
            return Err(Invalid::new("cmd", "must not be empty"));
        }
        limits::process_string("cmd", &self.cmd, limits::PATH_BYTES)?;
        let args = self.args.unwrap_or_default();
        if args.len() > limits::EXEC_ARGS {
            return Err(Invalid::new("args", format!("must have at most {} entries", limits::EXEC_ARGS)));
        }
        for (index, arg) in args.iter().enumerate() {
            limits::process_string(&format!("args[{index}]"), arg, limits::EXEC_STRING_BYTES)?;
        }
        let envs = self.envs.unwrap_or_default();
        check_envs(&envs)?;
        // An empty directory is what clients send who have none to say.
        let cwd = self.cwd.filter(|cwd| !cwd.is_empty());
        if let Some(cwd) = &cwd {
            limits::process_string("cwd", cwd, limits::PATH_BYTES)?;
        }
        let tag = self.tag.filter(|tag| !tag.is_empty());
        if let Some(tag) = &tag {
            limits::process_string("tag", tag, limits::TAG_BYTES)?;
        }
        let user = self.user.filter(|user| !user.is_empty());
        if let Some(user) = &user {
            limits::process_string("user", user, limits::USER_BYTES)?;
            if user.contains(':') {
                return Err(Invalid::new("user", "must not contain ':'"));
            }
        }
        let background = self.background.unwrap_or(false);
        Ok(ExecSpec { cmd: self.cmd, args, envs, cwd, tag, user, timeout_sec: (!background).then_some(timeout_sec) })
    }
}

fn check_envs(envs: &BTreeMap<String, String>) -> Result<(), Invalid> {
    if envs.len() > limits::EXEC_ENVS {
        return Err(Invalid::new("envs", format!("must have at most {} entries", limits::EXEC_ENVS)));
    }
    for (name, value) in envs {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(Invalid::new("envs", "names must be neither empty nor contain '=' or a NUL character"));
        }
        // The kernel counts the name, the equals sign and the value as one string.
        if name.len() + 1 + value.len() > limits::EXEC_STRING_BYTES {
            let problem = format!("must be, with its name, at most {} bytes long", limits::EXEC_STRING_BYTES);
            return Err(Invalid::new("envs", problem));
        }
        if value.contains('\0') {
            return Err(Invalid::new(format!("envs.{name}"), "must not contain a NUL character"));
        }
    }
    Ok(())
}

/// How `stdout` and `stderr` of an [`ExecResult`] are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Encoding {
    /// As they are.
    #[serde(rename = "utf-8")]
    Utf8,
    /// Both in base64, because at least one is not UTF-8.
    #[serde(rename = "base64")]
    Base64,
}

/// What a foreground command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    #[schema(value_type = String, pattern = "^cl-[0-9a-z]{25}$")]
    pub sandbox_id: CapsuleId,
    pub cmd: String,
    pub stdout: String,
    pub stderr: String,
    /// The exit code, or -1 when a signal ended it.
    pub exit_code: i32,
    pub duration_ms: u64,
    pub encoding: Encoding,
}

/// A command that now runs in the background.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecStarted {
    #[schema(value_type = String, pattern = "^cl-[0-9a-z]{25}$")]
    pub sandbox_id: CapsuleId,
    pub cmd: String,
    pub pid: u32,
    #[schema(example = "proc-0123abcd")]
    pub tag: String,
}

#[cfg(test)]
mod tests;
