//! The Host of an HTTP/1 request.

use super::Refused;

/// Fields that a head may have.
const FIELDS: usize = 100;

/// The host without its port, `None` while the head is not all there.
pub(super) fn host(bytes: &[u8]) -> Result<Option<Vec<u8>>, Refused> {
    // Servers differ in what they make of a line that ends otherwise.
    let whole = bytes.windows(4).position(|end| end == b"\r\n\r\n").map_or(bytes, |end| &bytes[..end + 4]);
    if whole.iter().enumerate().any(|(at, byte)| *byte == b'\n' && (at == 0 || whole[at - 1] != b'\r')) {
        return Err(Refused::Malformed("a line does not end in CR LF"));
    }
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(whole) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::Version | httparse::Error::Token) => return Err(Refused::Unknown),
        Err(httparse::Error::TooManyHeaders) => return Err(Refused::TooLong),
        Err(_) => return Err(Refused::Malformed("a request")),
    }
    // In the request line a host counts more than any field, for those who read it there.
    if !request.path.is_some_and(|path| path.starts_with('/') || path == "*") {
        return Err(Refused::Malformed("its request line has a host"));
    }
    let mut hosts = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case("host"));
    let host = hosts.next().ok_or(Refused::NoName)?.value.trim_ascii();
    if hosts.next().is_some() {
        return Err(Refused::Malformed("two Host fields"));
    }
    let (name, port) = match host.iter().position(|byte| *byte == b':') {
        Some(colon) => (&host[..colon], &host[colon + 1..]),
        None => (host, &b""[..]),
    };
    if !port.iter().all(u8::is_ascii_digit) {
        return Err(Refused::BadName);
    }
    Ok(Some(name.to_vec()))
}
