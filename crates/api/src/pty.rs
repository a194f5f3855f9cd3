//! A terminal in a capsule: the text messages of its WebSocket. What is typed and what is shown travel as binary messages,
//! unless the client asks for text.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::ErrorCode;
use crate::exec::{Exec, ExecSpec};
use crate::limits::Invalid;
use crate::process;

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Request {
    /// The first message of a new terminal.
    Start(Start),
    /// The first message of a client that comes back to a terminal.
    Connect {
        tag: String,
        #[serde(default)]
        encoding: Encoding,
    },
    /// Typed bytes in base64, for clients without binary messages.
    Input { data: String },
    /// The window has another size now.
    Resize { cols: i64, rows: i64 },
    /// Ends the process with SIGKILL.
    Kill,
    /// Means nothing; some clients send it.
    Pong,
}

/// What the server says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Answer {
    /// The process runs, or was found again.
    Started { pid: u32, tag: String },
    /// What the terminal shows, in base64, for clients that asked for that.
    Output { data: String },
    /// It ended: with this code, or -1 when by a signal. The last message.
    Exit { exit_code: i32 },
    /// Something went wrong. A fatal error is the last message.
    Error { code: ErrorCode, data: String, fatal: bool },
}

/// How a client wants to get what the terminal shows. What it types is understood in either form.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// Binary messages.
    #[default]
    Binary,
    /// [`Answer::Output`], for clients that take only text.
    Base64,
}

/// A request for a process with a terminal. No shell is added: `cmd` is executed with `args`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// [`DEFAULT_CMD`] when absent or empty.
    pub cmd: Option<String>,
    pub args: Option<Vec<String>>,
    /// Columns and rows; 80 and 24 when absent or 0.
    pub cols: Option<i64>,
    pub rows: Option<i64>,
    pub envs: Option<BTreeMap<String, String>>,
    /// Working directory; the user's home when absent.
    pub cwd: Option<String>,
    /// The capsule's user that runs it; root when absent.
    pub user: Option<String>,
    /// A name by which to come back; made up when absent.
    pub tag: Option<String>,
    #[serde(default)]
    pub encoding: Encoding,
}

/// What a terminal runs when it is not told.
pub const DEFAULT_CMD: &str = "/bin/bash";

/// A terminal's size in characters; neither is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub cols: u16,
    pub rows: u16,
}

impl Default for Size {
    fn default() -> Self {
        Self { cols: 80, rows: 24 }
    }
}

impl Size {
    /// The size a resize asks for.
    pub fn new(cols: i64, rows: i64) -> Result<Self, Invalid> {
        let side = |field: &str, value: i64| match u16::try_from(value) {
            Ok(side) if side > 0 => Ok(side),
            Ok(_) | Err(_) => Err(Invalid::new(field, format!("must be between 1 and {}", u16::MAX))),
        };
        Ok(Self { cols: side("cols", cols)?, rows: side("rows", rows)? })
    }
}

impl Start {
    /// Fills in the defaults and checks every bound.
    pub fn validate(self) -> Result<(ExecSpec, Size), Invalid> {
        let usual = Size::default();
        let side = |field: &str, value: Option<i64>, usual: u16| match value {
            None | Some(0) => Ok(i64::from(usual)),
            Some(value) if (0..=i64::from(u16::MAX)).contains(&value) => Ok(value),
            Some(_) => Err(Invalid::new(field, format!("must be between 0 and {}", u16::MAX))),
        };
        let size = Size::new(side("cols", self.cols, usual.cols)?, side("rows", self.rows, usual.rows)?)?;
        let exec = Exec {
            cmd: self.cmd.filter(|cmd| !cmd.is_empty()).unwrap_or_else(|| DEFAULT_CMD.to_owned()),
            args: self.args,
            timeout_sec: None,
            // Without a time limit.
            background: Some(true),
            tag: self.tag,
            envs: self.envs,
            cwd: self.cwd,
            user: self.user,
        };
        Ok((exec.validate()?, size))
    }
}

/// A tag that can be looked for.
pub fn check_tag(tag: &str) -> Result<(), Invalid> {
    process::check_tag("tag", tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(text: &str) -> Start {
        match serde_json::from_str(text).unwrap() {
            Request::Start(start) => start,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_start_without_anything_is_a_shell_of_the_usual_size() {
        for text in [
            r#"{"type":"start"}"#,
            r#"{"type":"start","cmd":"","cols":0,"rows":0,"args":null,"cwd":"","user":"root"}"#,
            r#"{"cmd":"/bin/bash","type":"start","cols":80,"rows":24}"#,
        ] {
            let (spec, size) = start(text).validate().unwrap();
            assert_eq!((spec.cmd.as_str(), spec.cwd, spec.tag, spec.timeout_sec), ("/bin/bash", None, None, None));
            assert_eq!(size, Size { cols: 80, rows: 24 });
        }
    }

    #[test]
    fn what_is_outside_its_bounds_is_named() {
        for (text, field) in [
            (r#"{"type":"start","cols":65536}"#, "cols"),
            (r#"{"type":"start","rows":-1}"#, "rows"),
            (r#"{"type":"start","cmd":"a\u0000"}"#, "cmd"),
            (r#"{"type":"start","envs":{"":"x"}}"#, "envs"),
            (r#"{"type":"start","user":"a:b"}"#, "user"),
        ] {
            assert_eq!(start(text).validate().unwrap_err().field, field);
        }
        assert_eq!(Size::new(120, 40), Ok(Size { cols: 120, rows: 40 }));
        assert_eq!(Size::new(0, 40).unwrap_err().field, "cols");
        assert_eq!(Size::new(80, 65536).unwrap_err().field, "rows");
        assert!(check_tag("").is_err() && check_tag(&"x".repeat(129)).is_err() && check_tag("pty-1").is_ok());
    }

    #[test]
    fn messages_are_spelt_as_clients_know_them() {
        let read = |text| serde_json::from_str::<Request>(text).unwrap();
        let connect = |encoding| Request::Connect { tag: "t".into(), encoding };
        assert_eq!(read(r#"{"type":"connect","tag":"t"}"#), connect(Encoding::Binary));
        assert_eq!(read(r#"{"type":"connect","tag":"t","encoding":"base64"}"#), connect(Encoding::Base64));
        assert_eq!(read(r#"{"type":"input","data":"bHM="}"#), Request::Input { data: "bHM=".into() });
        assert_eq!(read(r#"{"type":"resize","cols":1,"rows":2}"#), Request::Resize { cols: 1, rows: 2 });
        assert_eq!((read(r#"{"type":"kill"}"#), read(r#"{"type":"pong"}"#)), (Request::Kill, Request::Pong));
        assert!(serde_json::from_str::<Request>(r#"{"type":"dance"}"#).is_err());
        let write = |answer| serde_json::to_string(&answer).unwrap();
        assert_eq!(write(Answer::Started { pid: 7, tag: "t".into() }), r#"{"type":"started","pid":7,"tag":"t"}"#);
        assert_eq!(write(Answer::Exit { exit_code: -1 }), r#"{"type":"exit","exit_code":-1}"#);
        let error = Answer::Error { code: ErrorCode::NotFound, data: "no".into(), fatal: true };
        assert_eq!(write(error), r#"{"type":"error","code":"not_found","data":"no","fatal":true}"#);
    }
}
