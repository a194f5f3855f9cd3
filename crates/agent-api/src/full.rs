//! What an agent says that has no room: the code and words of the error, and [`HostFull`] as its detail.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use buffa::Message;
use connectrpc::{ConnectError, ErrorDetail};

use crate::HostFull;

const TYPE: &str = "hostagent.v1.HostFull";

/// The error that says so, in those words.
pub fn error(full: &HostFull, message: String) -> ConnectError {
    ConnectError::resource_exhausted(message).with_detail(ErrorDetail::from_message(TYPE, full))
}

/// What the host has not enough of, if that is what the error says.
pub fn of(error: &ConnectError) -> Option<HostFull> {
    let detail = error.details.iter().find(|detail| detail.type_url == TYPE)?;
    let text = detail.value.as_ref()?;
    let bytes = STANDARD_NO_PAD.decode(text).or_else(|_| STANDARD.decode(text)).ok()?;
    HostFull::decode_from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_read_as_it_was_written() {
        let full =
            HostFull { resource: "memory".into(), asked: 512, used: 3584, limit: u64::MAX, ..Default::default() };
        let error = error(&full, "no room".into());
        assert_eq!(of(&error), Some(full));
        assert_eq!(of(&ConnectError::resource_exhausted("no room")), None);
        let broken = ErrorDetail { type_url: TYPE.into(), value: Some("?".into()), debug: None };
        assert_eq!(of(&ConnectError::resource_exhausted("no room").with_detail(broken)), None);
    }
}
