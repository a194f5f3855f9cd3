use http::header::ACCEPT;
use http::request::Parts;
use http::{Method, Request, Response};
use serde_json::json;

use super::guest::Guest;
use super::*;
use crate::api::types::MmdsVersion;

fn guest(version: MmdsVersion, imds_compat: bool) -> Guest {
    let store = Store::new(1000);
    store.put(json!({ "a": { "b": "text", "c": { "d": true } }, "list": ["x"] })).unwrap();
    let config = MmdsConfig { version, network_interfaces: Vec::new(), ipv4_address: None, imds_compat };
    Guest::new(&config, store)
}

fn request(method: Method, path: &str, headers: &[(&str, &str)]) -> Parts {
    let build = Request::builder().method(method).uri(path);
    headers.iter().fold(build, |build, (name, value)| build.header(*name, *value)).body(()).unwrap().into_parts().0
}

fn token(guest: &Guest, seconds: &str, now: Instant) -> Response<String> {
    let headers = [("X-metadata-token-ttl-seconds", seconds)];
    guest.answer(&request(Method::PUT, "/latest/api/token", &headers), now)
}

#[test]
fn a_token_ends_with_its_time() {
    let (guest, now) = (guest(MmdsVersion::V2, false), Instant::now());
    let answer = token(&guest, "10", now);
    assert_eq!(answer.headers()["x-metadata-token-ttl-seconds"], "10");
    let token = answer.into_body();
    let read = request(Method::GET, "/a/b", &[("X-metadata-token", &token)]);
    assert_eq!(guest.answer(&read, now + Duration::from_secs(9)).status(), 200);
    assert_eq!(guest.answer(&read, now + Duration::from_secs(10)).status(), 401);
}

#[test]
fn a_guest_cannot_fill_the_host_with_tokens() {
    let (guest, now) = (guest(MmdsVersion::V2, false), Instant::now());
    let first = token(&guest, "60", now).into_body();
    for _ in 0..1024 {
        assert_eq!(token(&guest, "61", now).status(), 200);
    }
    let read = request(Method::GET, "/a/b", &[("X-metadata-token", &first)]);
    assert_eq!(guest.answer(&read, now).status(), 401);
}

#[test]
fn version_one_asks_for_no_token() {
    let guest = guest(MmdsVersion::V1, false);
    let answer = guest.answer(&request(Method::GET, "/a//b/", &[]), Instant::now());
    assert_eq!((answer.status().as_u16(), answer.body().as_str()), (200, "text"));
}

#[test]
fn compatibility_means_plain_text_whatever_is_accepted() {
    let read = request(Method::GET, "/a", &[(ACCEPT.as_str(), "application/json")]);
    let json = guest(MmdsVersion::V1, false).answer(&read, Instant::now());
    assert_eq!(json.body(), r#"{"b":"text","c":{"d":true}}"#);
    let plain = guest(MmdsVersion::V1, true).answer(&read, Instant::now());
    assert_eq!(plain.body(), "b\nc/");
}

#[test]
fn lists_are_walked_by_number() {
    let guest = guest(MmdsVersion::V1, false);
    let get = |path: &str| guest.answer(&request(Method::GET, path, &[]), Instant::now());
    assert_eq!(get("/list/0").body(), "x");
    assert_eq!(get("/list/1").status(), 404);
    assert_eq!(get("/list/x").status(), 404);
    assert_eq!(get("/list").status(), 501);
    assert_eq!(get("/a/b/c").status(), 404);
}

#[test]
fn the_store_refuses_what_does_not_fit_and_keeps_what_it_had() {
    let store = Store::new(20);
    assert!(matches!(store.patch(json!({})), Err(Error::Uninitialised)));
    store.put(json!({ "a": 1 })).unwrap();
    assert!(matches!(store.patch(json!({ "b": "xxxxxxxxxxxxxxxx" })), Err(Error::TooLarge { limit: 20 })));
    assert!(matches!(store.put(json!({ "b": "xxxxxxxxxxxxxxxx" })), Err(Error::TooLarge { limit: 20 })));
    assert_eq!(store.get(), json!({ "a": 1 }));
    store.patch(json!({ "a": null, "b": { "c": null, "d": 2 } })).unwrap();
    assert_eq!(store.get(), json!({ "b": { "d": 2 } }));
}
