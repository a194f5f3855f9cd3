//! Requests that two programs in a row could understand in two ways, which we pass on in neither.
//!
//! The parser before us has refused what is not HTTP at all; what it lets pass is told apart here, before anything is decided
//! by it.

use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::uri::Authority;
use http::{Method, Request, Version};

use crate::Secure;

/// What is refused of everyone.
pub fn any<B>(request: &Request<B>) -> Result<(), &'static str> {
    if request.method() == Method::CONNECT {
        return Err("this is no forward proxy");
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (_, Some(_)) => return Err("there is more than one Host"),
        (None, None) if request.version() >= Version::HTTP_11 => return Err("there is no Host"),
        (None, None) => None,
        (Some(host), None) => Some(host.to_str().ok().filter(|host| is_authority(host)).ok_or("the Host is not one")?),
    };
    match (request.uri().authority(), host) {
        (Some(authority), Some(host)) if !authority.as_str().eq_ignore_ascii_case(host) => {
            Err("the target names another host than the Host does")
        }
        (Some(_), None) => Err("there is no Host"),
        _ => Ok(()),
    }
}

/// Whether a request is for another host than its connection was made to by name (SNI). One that is cannot have gone astray by
/// itself, and whoever watches names must not be shown one for another. Of a client that gave no name none is asked.
pub fn is_misdirected<B>(request: &Request<B>) -> bool {
    let Some(name) = request.extensions().get::<Secure>().and_then(Secure::name) else { return false };
    let host = request.headers().get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    !host.is_some_and(|host| host.host().trim_end_matches('.').eq_ignore_ascii_case(name))
}

/// What is refused of those who speak to guests.
pub fn for_guest<B>(request: &Request<B>) -> Result<(), &'static str> {
    let headers = request.headers();
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    let (encoding, second) = (encodings.next(), encodings.next());
    let lengths = headers.get_all(CONTENT_LENGTH).iter().count();
    if lengths > 1 || (lengths == 1 && encoding.is_some()) {
        return Err("the length of the body is told twice");
    }
    if second.is_some() || encoding.is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return Err("the only Transfer-Encoding is chunked");
    }
    Ok(())
}

/// A host with or without a port, and nothing that only looks like one.
fn is_authority(host: &str) -> bool {
    host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~:[]".contains(&byte))
}
