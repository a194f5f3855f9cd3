//! Guests' ports on a host: the paths under which it serves them, and the words in which it refuses.

use api::CapsuleId;

use crate::REFUSAL_HEADER;

/// The path at which a request that asks to be upgraded to [`TCP`] becomes a connection to a guest's port.
pub fn tcp_path(capsule: CapsuleId, port: u16) -> String {
    format!("/tcp/{capsule}/{port}")
}

/// The protocol of that upgrade: bytes.
pub const TCP: &str = "tcp";

/// Why a host did not carry something to a guest's port: the value of [`REFUSAL_HEADER`] in its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortRefusal {
    /// The path is none of a port, or what it asks for cannot be asked.
    Malformed,
    /// The capsule is not here, or no longer.
    Absent,
    /// It is paused.
    Paused,
    /// The port is envd's, and this is not for everybody.
    Forbidden,
    /// Nobody listens on the port.
    Closed,
    /// Whoever listens broke off before an answer, or does not speak HTTP.
    NoAnswer,
    /// The capsule has as many connections as it may have.
    Busy,
}

impl PortRefusal {
    const ALL: [Self; 7] =
        [Self::Malformed, Self::Absent, Self::Paused, Self::Forbidden, Self::Closed, Self::NoAnswer, Self::Busy];

    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Absent => "absent",
            Self::Paused => "paused",
            Self::Forbidden => "forbidden",
            Self::Closed => "closed",
            Self::NoAnswer => "no-answer",
            Self::Busy => "busy",
        }
    }

    /// The refusal that an answer is, if it is one.
    pub fn of(headers: &http::HeaderMap) -> Option<Self> {
        let word = headers.get(REFUSAL_HEADER)?;
        Self::ALL.into_iter().find(|refusal| word == refusal.word())
    }
}
