//! What happens to a team's capsules, as one stream.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::capsule::Capsule;

/// What happened. Clients end the stream at any other word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum EventName {
    /// The stream begins; nothing that happens from now on is missed.
    #[serde(rename = "connected")]
    Connected,
    /// A capsule was started, or could not be.
    #[serde(rename = "capsule.create")]
    CapsuleCreate,
    /// A capsule was ended on request.
    #[serde(rename = "capsule.destroy")]
    CapsuleDestroy,
    /// A capsule's status is another now.
    #[serde(rename = "capsule.state.changed")]
    CapsuleStateChanged,
}

impl EventName {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::CapsuleCreate => "capsule.create",
            Self::CapsuleDestroy => "capsule.destroy",
            Self::CapsuleStateChanged => "capsule.state.changed",
        }
    }
}

/// How what was asked for came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Success,
    Error,
}

/// Who can ask for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActorKind {
    User,
    ApiKey,
    /// The platform by itself.
    System,
}

/// Who asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Actor {
    #[serde(rename = "type")]
    pub kind: ActorKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// The platform by itself.
pub const SYSTEM: Actor = Actor { kind: ActorKind::System, id: None, name: None };

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resource {
    pub id: String,
    /// `capsule`.
    #[serde(rename = "type")]
    pub kind: String,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    pub event: EventName,
    pub timestamp: DateTime<Utc>,
    /// Of what was asked for; absent for what just happens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource: Option<Resource>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actor: Option<Actor>,
    /// `from` and `to` of a change of status; `reason` when there is one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Only when the outcome is an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The capsule as it was then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Capsule>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_spelt_as_they_are_called() {
        use EventName::*;
        for name in [Connected, CapsuleCreate, CapsuleDestroy, CapsuleStateChanged] {
            assert_eq!(serde_json::to_value(name).unwrap(), name.as_str());
        }
        assert_eq!(serde_json::to_string(&SYSTEM).unwrap(), r#"{"type":"system"}"#);
    }
}
