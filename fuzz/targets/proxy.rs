//! What strangers send to the edge, and what guests answer: host names, routing headers, paths, addresses, cookies and keys.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use http::header::{AUTHORIZATION, CONTENT_LENGTH, COOKIE, HOST, LOCATION, SET_COOKIE, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Uri};
use libfuzzer_sys::fuzz_target;
use proxy::edge::address::Address;
use proxy::edge::{credentials, forwarded, strict};
use proxy::{Peer, path};

/// A request as a parser hands it over: a line `METHOD target`, then headers.
fn request(bytes: &[u8]) -> Option<Request<()>> {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let mut words = lines.next()?.splitn(2, |byte| *byte == b' ');
    let mut request = Request::new(());
    *request.method_mut() = words.next()?.try_into().ok()?;
    *request.uri_mut() = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        request.headers_mut().append(name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?);
    }
    Some(request)
}

/// Names in the spelling in which programs compare them.
fn spelled(headers: &HeaderMap) -> Vec<String> {
    headers.keys().map(|name| name.as_str().replace('_', "-")).collect()
}

/// A host that looks like a capsule's is never taken for the API's, and what is taken for a capsule's names it.
fn addressed(request: &Request<()>) {
    let host = request.headers()[HOST].to_str().expect("a strict host is text").to_ascii_lowercase();
    let label = host.split([':', '.']).next().unwrap_or_default();
    let looks = label.split_once("-cl-").is_some_and(|(port, _)| port.bytes().all(|byte| byte.is_ascii_digit()));
    match Address::of(request) {
        None => assert!(!looks, "{host}"),
        Some(Ok(Address { capsule, port })) if looks => assert_eq!(label, format!("{port}-{capsule}")),
        Some(Ok(Address { port, .. })) => {
            assert_eq!(request.headers()["e2b-sandbox-port"], port.to_string());
            assert_eq!(request.headers().get_all("e2b-sandbox-id").iter().count(), 1);
        }
        Some(Err(_)) => {}
    }
}

/// What is asked for arrives, byte for byte, at the port it was asked of.
fn paths(uri: &Uri) {
    let prefix = path::prefix("cl-1", 80);
    if let Some(joined) = path::join(&prefix, uri) {
        let (capsule, port, rest) = path::split(&joined).expect("what was joined can be split");
        let asked = uri.path_and_query().map_or("/", |path| path.as_str());
        assert_eq!((capsule, port, rest.as_str()), ("cl-1", 80, asked));
    }
    if let Some((capsule, port, rest)) = path::split(uri) {
        let whole = uri.path_and_query().expect("it has one").as_str();
        let behind = whole.strip_prefix(&path::prefix(capsule, port)).expect("one way to write it");
        assert!(rest.as_str() == behind || rest.as_str() == format!("/{behind}"), "{whole}");
    }
}

/// An address in an answer is left alone, or leads to the same port; nothing that was a path becomes a host.
fn locations(location: &HeaderValue, host: &HeaderValue) {
    let prefix = path::prefix("cl-1", 80);
    let mut asked = HeaderMap::new();
    asked.insert(HOST, host.clone());
    let mut headers = HeaderMap::new();
    headers.insert(LOCATION, location.clone());
    path::add(&mut headers, &prefix, &asked, 80, &["localhost", "127.0.0.1"]);
    let inside = headers[LOCATION].clone();
    path::remove(&mut headers, &prefix);
    let outside = headers[LOCATION].as_bytes();
    if inside != *location {
        assert!(inside.as_bytes().starts_with(prefix.as_bytes()), "{inside:?}");
        assert!(
            outside.starts_with(b"/") && !outside.starts_with(b"//") && !outside.starts_with(b"/\\"),
            "{outside:?}"
        );
    }
}

/// Nothing of the platform's passes, whatever it is spelled like, and doing it again changes nothing.
fn stripped(headers: &mut HeaderMap) {
    credentials::strip(headers);
    for name in spelled(headers) {
        assert!(!name.starts_with("x-wrenn-") && name != "x-api-key" && !name.starts_with("e2b-sandbox-"), "{name}");
    }
    for value in headers.get_all(AUTHORIZATION) {
        let text = value.as_bytes().to_ascii_lowercase();
        assert!(!text.windows(4).any(|word| word == b"wrn_" || word == b"e2b_"), "{value:?}");
    }
    for pair in headers.get_all(COOKIE).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b';')) {
        assert!(!pair.trim_ascii().to_ascii_lowercase().starts_with(b"wrenn"), "{pair:?}");
    }
    let once = headers.clone();
    credentials::strip(headers);
    assert_eq!(*headers, once);
}

fn cookies_at_home(cookie: &HeaderValue) {
    let mut headers = HeaderMap::new();
    headers.insert(SET_COOKIE, cookie.clone());
    credentials::keep_cookies_home(&mut headers);
    if let Some(kept) = headers.get(SET_COOKIE) {
        let mut parts = kept.as_bytes().split(|byte| *byte == b';').skip(1);
        assert!(!parts.any(|part| part.trim_ascii().to_ascii_lowercase().starts_with(b"domain=")), "{kept:?}");
        let once = headers.clone();
        credentials::keep_cookies_home(&mut headers);
        assert_eq!(headers, once);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some(mut request) = request(bytes) else { return };
    paths(request.uri());
    if strict::any(&request).is_err() {
        return;
    }
    let Some(host) = request.headers().get(HOST).cloned() else { return };
    addressed(&request);
    for name in ["location", "x-location"] {
        request.headers().get(name).into_iter().for_each(|location| locations(location, &host));
    }
    request.headers().get_all(SET_COOKIE).iter().for_each(cookies_at_home);
    if strict::for_guest(&request).is_ok() {
        let lengths = request.headers().get_all(CONTENT_LENGTH).iter().count();
        assert!(lengths + request.headers().get_all(TRANSFER_ENCODING).iter().count() <= 1);
    }

    let stranger = IpAddr::from(Ipv4Addr::new(9, 9, 9, 9));
    request.extensions_mut().insert(Peer(stranger));
    forwarded::say(&mut request);
    let headers = request.headers_mut();
    assert_eq!(headers["x-forwarded-for"], stranger.to_string());
    assert_eq!((&headers["x-real-ip"], &headers["x-forwarded-host"]), (&headers["x-forwarded-for"], &host));
    assert_eq!(headers["x-forwarded-proto"], "http");
    let said = spelled(headers).into_iter().filter(|name| name.starts_with("x-forwarded-") || name == "forwarded");
    assert_eq!(said.count(), 4);
    stripped(headers);
});
