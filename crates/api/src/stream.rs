//! A command in a capsule, followed as it runs: the text messages of its WebSocket.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ErrorCode;
use crate::exec::{Exec, ExecSpec};
use crate::limits::Invalid;

/// What a client says. Its binary messages are bytes for standard input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Request {
    /// The first message.
    Start(Start),
    /// Text for standard input.
    Stdin { data: String },
    /// The end of standard input.
    Eof,
    /// No more is to be sent. The process goes on.
    Stop,
}

/// A request to run a command. No shell is added: `cmd` is executed with `args`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub cmd: String,
    pub args: Option<Vec<String>>,
    pub envs: Option<BTreeMap<String, String>>,
    /// Working directory; the user's home when absent.
    pub cwd: Option<String>,
    /// The capsule's user that runs it; root when absent.
    pub user: Option<String>,
    /// A name by which to find the process again; made up when absent.
    pub tag: Option<String>,
    /// Seconds it may run; 0 and absent mean without an end.
    pub timeout_sec: Option<i64>,
    /// Whether the client will write to standard input; otherwise it is empty.
    #[serde(default)]
    pub stdin: bool,
    #[serde(default)]
    pub encoding: Encoding,
}

/// How a client wants to get output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Encoding {
    /// As text: characters are never cut, and what is not UTF-8 becomes U+FFFD.
    #[default]
    #[serde(rename = "utf-8")]
    Utf8,
    /// In base64: byte for byte.
    #[serde(rename = "base64")]
    Base64,
}

impl FromStr for Encoding {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "utf-8" => Ok(Self::Utf8),
            "base64" => Ok(Self::Base64),
            _ => Err(Invalid::new("encoding", "must be utf-8 or base64")),
        }
    }
}

/// What the server says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Answer {
    /// It runs, or was found.
    Start {
        pid: u32,
    },
    Stdout {
        data: String,
    },
    Stderr {
        data: String,
    },
    /// It ended: with this code, or -1 when by a signal. The last message.
    Exit {
        exit_code: i32,
    },
    /// Something went wrong. A fatal error is the last message.
    Error {
        code: ErrorCode,
        data: String,
        fatal: bool,
    },
}

impl Start {
    /// Fills in the defaults and checks every bound. Without a time limit the specification has none.
    pub fn validate(self) -> Result<ExecSpec, Invalid> {
        let endless = matches!(self.timeout_sec, None | Some(0));
        let exec = Exec {
            cmd: self.cmd,
            args: self.args,
            timeout_sec: self.timeout_sec,
            background: Some(endless),
            tag: self.tag,
            envs: self.envs,
            cwd: self.cwd,
            user: self.user,
        };
        exec.validate()
    }
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
    fn what_the_sdk_sends_is_enough() {
        let plain = start(r#"{"type":"start","cmd":"/bin/sh","args":["-c","true"]}"#);
        assert_eq!((plain.stdin, plain.encoding), (false, Encoding::Utf8));
        let spec = plain.validate().unwrap();
        assert_eq!((spec.cmd.as_str(), spec.args.len(), spec.timeout_sec), ("/bin/sh", 2, None));
        assert_eq!(start(r#"{"type":"start","cmd":"x","timeout_sec":0}"#).validate().unwrap().timeout_sec, None);
        assert_eq!(start(r#"{"type":"start","cmd":"x","timeout_sec":7}"#).validate().unwrap().timeout_sec, Some(7));
        for (text, field) in [
            (r#"{"type":"start","cmd":""}"#, "cmd"),
            (r#"{"type":"start","cmd":"x","timeout_sec":-1}"#, "timeout_sec"),
            (r#"{"type":"start","cmd":"x","user":"a\u0000"}"#, "user"),
        ] {
            assert_eq!(start(text).validate().unwrap_err().field, field);
        }
    }

    #[test]
    fn an_encoding_is_named_in_a_query_as_in_a_message() {
        for encoding in [Encoding::Utf8, Encoding::Base64] {
            let name = serde_json::to_value(encoding).unwrap();
            assert_eq!(name.as_str().unwrap().parse(), Ok(encoding));
        }
        assert_eq!("latin1".parse::<Encoding>().unwrap_err().field, "encoding");
    }

    #[test]
    fn messages_are_spelt_as_clients_know_them() {
        let write = |answer| serde_json::to_string(&answer).unwrap();
        assert_eq!(write(Answer::Start { pid: 7 }), r#"{"type":"start","pid":7}"#);
        assert_eq!(write(Answer::Stderr { data: "é".into() }), r#"{"type":"stderr","data":"é"}"#);
        assert_eq!(write(Answer::Exit { exit_code: -1 }), r#"{"type":"exit","exit_code":-1}"#);
        let read = |text| serde_json::from_str::<Request>(text).unwrap();
        assert_eq!((read(r#"{"type":"stop"}"#), read(r#"{"type":"eof"}"#)), (Request::Stop, Request::Eof));
        assert!(serde_json::from_str::<Request>(r#"{"type":"start"}"#).is_err());
    }
}
