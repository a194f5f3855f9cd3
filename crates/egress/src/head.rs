//! Whom a connection is for, by the first bytes that its guest sends: a TLS server name or an HTTP Host. Pure.

mod http;
mod tls;

/// Bytes that a head may have. Larger ones are nobody's: a TLS hello with post-quantum keys and a ticket takes four thousand.
pub const LIMIT: usize = 16 << 10;

/// Why a connection is not let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Neither a TLS hello nor an HTTP/1 request.
    #[error("it is neither TLS nor HTTP/1")]
    Unknown,
    /// Its head has no end within [`LIMIT`].
    #[error("its head is longer than {LIMIT} bytes")]
    TooLong,
    /// The head is malformed, or could be read in two ways.
    #[error("its head is malformed: {0}")]
    Malformed(&'static str),
    /// There is no name in it.
    #[error("it names no host")]
    NoName,
    /// The name that counts is encrypted, and the readable one may be any.
    #[error("its server name is encrypted")]
    Encrypted,
    /// What should be a name has bytes that no name has, or is an address.
    #[error("it has a host that is no name")]
    BadName,
}

/// The name that a connection is for, as [`api::egress::name`] writes it; `None` while too little has come to tell.
pub fn name(bytes: &[u8]) -> Result<Option<String>, Refused> {
    let Some(first) = bytes.first() else { return Ok(None) };
    let found = match first {
        &tls::HANDSHAKE => tls::server_name(bytes)?,
        b'A'..=b'Z' => http::host(bytes)?,
        _ => return Err(Refused::Unknown),
    };
    match found {
        Some(found) => {
            let name = String::from_utf8(found).ok().as_deref().and_then(api::egress::name).ok_or(Refused::BadName)?;
            // An address is no name, whatever list it may be in.
            let is_address = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
            if is_address { Err(Refused::BadName) } else { Ok(Some(name)) }
        }
        None if bytes.len() >= LIMIT => Err(Refused::TooLong),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests;
