//! The contract between the platform and envd, the agent inside a capsule: generated types and client for the Connect
//! services, and the JSON bodies of the plain HTTP endpoints.
//!
//! It owns shapes only: no transport, no policy, no defaults of the platform.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// Messages, client and service trait, generated from `proto/filesystem` and `proto/process`.
#[allow(missing_docs, clippy::all, dead_code)]
pub mod proto {
    connectrpc::include_generated!("contract.rs");
}

pub use proto::{filesystem, process};

/// The TCP port envd listens on inside a capsule.
pub const PORT: u16 = 49983;

/// How many entries one listing may have: it is one message, and all of it is in memory at once.
pub const LIST_ENTRIES: usize = 500_000;

/// The header that carries the capsule's access token, on every request once `/init` has set one.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";

/// The header of `/init`'s answer that carries envd's version.
pub const VERSION_HEADER: &str = "x-envd-version";

/// Answer of `GET /health`: 200 as soon as envd serves. Needs no token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// envd's version, `major.minor.patch`.
    pub version: String,
}

/// Body of `POST /init`, which gives a started or resumed guest what only the host knows. Idempotent.
///
/// Answers: 204 without `restore`, and 200 with [`Restored`] where there is one; 401 when the caller may not set
/// `access_token`; 400 for a body that does not parse. Absent fields leave the guest as it is. Unknown fields (E2B sends
/// `hyperloopIP`, `volumeMounts` and others) are ignored. Whatever was frozen is thawed.
///
/// A token may be set by whoever has the one in force, as `access_token` again or in [`ACCESS_TOKEN_HEADER`]; whose
/// token's SHA-512 the host has put into the metadata service as `accessTokenHash`; and, where the host has put none
/// there, by the first to come.
///
/// # Pausing and restoring
///
/// 1. Before a pause, `POST /snapshot/prepare` writes all file systems; 204 when that is done. Nothing is stopped by it,
///    so a pause that is given up needs no undoing. Where strangers will begin, `POST /snapshot/warm-up` comes before: a
///    login shell runs once, so that what their first command needs is in memory; 204 after that.
/// 2. `POST /freeze` may follow: then no process of a user runs between the restore and the end of step 4, and none sees
///    its twin's randomness or an old clock. A pause that is given up then needs `POST /unfreeze`, as does the parent of a
///    fork, which goes on without a restore.
/// 3. The VM is paused, snapshotted, and loaded elsewhere or later.
/// 4. `POST /init` with `restore` is the first request to the restored guest, and carries the old token in
///    [`ACCESS_TOKEN_HEADER`] where it sets a new one. Every connection of before is gone after it; one that was opened
///    since goes too unless it carries this request.
/// 5. Only the answer 200 with `rng_reseeded` says that the guest is nobody's twin. Anything else: do not let it run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Init {
    /// The token every later request must carry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The user processes run as when the caller names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// The directory processes start in when the caller names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
    /// The environment of every process; replaces what an earlier call set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<HashMap<String, String>>,
    /// The host's wall clock as the call leaves it, in seconds since the epoch; RFC 3339 text is understood too. A call with
    /// an older time than the newest one seen changes nothing.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "timestamp::deserialize")]
    pub timestamp: Option<f64>,
    /// The guest wakes from a snapshot. Needs `timestamp`, which is then never too old.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<Restore>,
}

/// What a guest that wakes from a snapshot has to renew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Restore {
    /// What the snapshot is to this guest.
    pub kind: RestoreKind,
    /// Fresh random bytes of the host, 32 to 512 of them in base64.
    pub entropy: String,
    /// A new name for a fork: letters, digits, `-` and `.`, at most 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// A fork's machine id, 32 hexadecimal digits; random where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// What the metadata service says from now on, so that the guest need not ask it; it asks where this is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Metadata>,
}

/// What the host puts into the guest's metadata service; E2B's names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// The capsule's id.
    #[serde(rename = "instanceID")]
    pub instance_id: String,
    /// The template's id.
    #[serde(rename = "envID")]
    pub env_id: String,
    /// SHA-512, in hexadecimal, of the token that may be set whatever is set already.
    #[serde(rename = "accessTokenHash", skip_serializing_if = "Option::is_none")]
    pub access_token_hash: Option<String>,
}

/// What a snapshot is to the guest that wakes from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RestoreKind {
    /// Its own pause: it keeps its identity.
    Resume,
    /// Another's past: it gets an identity of its own. Template starts are forks.
    Fork,
}

/// Answer of `POST /init` with `restore`: what was done. Whatever failed made the answer a 500 instead.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Restored {
    /// The host's clock less the guest's as the request came in, in seconds. Within 50 ms it is left alone.
    pub clock_offset: f64,
    /// The kernel's generator starts from the host's entropy.
    pub rng_reseeded: bool,
    /// TCP connections with others than the guest itself that were ended. `None`: this kernel cannot.
    pub connections_closed: Option<u32>,
    /// A fork's new machine id.
    pub machine_id: Option<String>,
    /// A fork's new name.
    pub hostname: Option<String>,
    /// The SSH host keys of before are gone. Where the guest has ssh-keygen a new one, Ed25519, is there, and those of other
    /// kinds are being made.
    pub ssh_host_keys_removed: bool,
}

/// One file that `POST /files` wrote; its answer is an array of these. `POST /files/compose` answers with one alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenFile {
    /// Absolute, with `~` and what is relative resolved; links as the caller wrote them.
    pub path: String,
    /// The last component of `path`.
    pub name: String,
    /// What it is now.
    #[serde(rename = "type")]
    pub kind: FileType,
    /// What the headers `X-Metadata-KEY` said, under their keys in lower case; absent when they said nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
}

/// What an upload makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileType {
    /// A regular file.
    File,
}

/// Body of `POST /files/compose`: the sources become one file in this order, and are gone.
///
/// Answers: 200 with a [`WrittenFile`]; 400 without sources or destination, for a source that is the destination or not a
/// regular file; 401 for an unknown user; 404 for a missing source; 507 when the disk is full. Nothing has changed unless it
/// is 200.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compose {
    /// Paths as in `GET /files`.
    #[serde(default)]
    pub source_paths: Vec<String>,
    /// Where the file goes; what is there is replaced in one step.
    #[serde(default)]
    pub destination: String,
    /// Whose home relative paths start at, and who owns the result; the default user when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
}

/// The error body of every plain HTTP endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpError {
    /// The HTTP status.
    pub code: u16,
    /// What went wrong, for a person.
    pub message: String,
}

/// Both spellings of a point in time that callers of `/init` use.
mod timestamp {
    use buffa_types::google::protobuf::Timestamp;
    use serde::{Deserialize, Deserializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Wire {
        Seconds(f64),
        Rfc3339(Timestamp),
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<Wire>::deserialize(deserializer)?.map(|wire| match wire {
            Wire::Seconds(seconds) => seconds,
            Wire::Rfc3339(time) => time.seconds as f64 + f64::from(time.nanos) / 1e9,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(json: &str) -> Init {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn init_understands_both_timestamps() {
        assert_eq!(init(r#"{"timestamp": 1700000000.25}"#).timestamp, Some(1_700_000_000.25));
        assert_eq!(init(r#"{"timestamp": "2023-11-14T22:13:20.250Z"}"#).timestamp, Some(1_700_000_000.25));
        assert_eq!(init(r#"{"timestamp": "2023-11-14T23:13:20+01:00"}"#).timestamp, Some(1_700_000_000.0));
        assert_eq!(init(r#"{"timestamp": null}"#).timestamp, None);
        assert!(serde_json::from_str::<Init>(r#"{"timestamp": "yesterday"}"#).is_err());
    }

    #[test]
    fn init_is_camel_case_and_tolerant() {
        let body = r#"{"accessToken":"t","defaultUser":"u","defaultWorkdir":"/w","envVars":{"A":"1"},
            "hyperloopIP":"169.254.0.23","volumeMounts":[{"nfs_target":"x","path":"/y"}],"lifecycleID":"z"}"#;
        let expected = Init {
            access_token: Some("t".into()),
            default_user: Some("u".into()),
            default_workdir: Some("/w".into()),
            env_vars: Some([("A".to_owned(), "1".to_owned())].into()),
            timestamp: None,
            restore: None,
        };
        assert_eq!(init(body), expected);
        assert_eq!(init("{}"), Init::default());
        let restore = init(r#"{"restore":{"kind":"fork","entropy":"AAAA","machineId":"0"}}"#).restore.unwrap();
        assert_eq!((restore.kind, restore.machine_id.as_deref()), (RestoreKind::Fork, Some("0")));
        assert!(serde_json::from_str::<Init>(r#"{"restore":{"kind":"copy","entropy":""}}"#).is_err());
        assert_eq!(serde_json::to_string(&Init::default()).unwrap(), "{}");
        let text = serde_json::to_string(&expected).unwrap();
        assert_eq!(init(&text), expected);
    }
}
