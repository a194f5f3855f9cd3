//! What the Connect services share: what their callers say in headers.

use base64::Engine;
use connectrpc::{ConnectError, RequestContext};
use std::time::Duration;

/// How often an idle stream says that it lives, unless the caller asks otherwise.
const KEEPALIVE: Duration = Duration::from_secs(90);
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";

/// Who the caller wants to act as: HTTP Basic with an empty password. The right to be here is the token's matter.
pub fn username(context: &RequestContext) -> Result<Option<String>, ConnectError> {
    let Some(header) = context.header(http::header::AUTHORIZATION) else { return Ok(None) };
    let malformed = || ConnectError::unauthenticated("authorization must be 'Basic' with 'user:' in base64");
    let (scheme, encoded) = header.to_str().ok().and_then(|header| header.split_once(' ')).ok_or_else(malformed)?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err(malformed());
    }
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).map_err(|_| malformed())?;
    let decoded = String::from_utf8(decoded).map_err(|_| malformed())?;
    let name = decoded.split_once(':').map_or(decoded.as_str(), |(name, _)| name);
    Ok(Some(name.to_owned()).filter(|name| !name.is_empty()))
}

/// How often the caller wants an idle stream to say that it lives.
pub fn keepalive(context: &RequestContext) -> Duration {
    let asked = context.header(KEEPALIVE_HEADER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    asked.filter(|seconds| *seconds > 0).map_or(KEEPALIVE, Duration::from_secs)
}
