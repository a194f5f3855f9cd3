//! What the guest is answered: tokens for PUT, metadata for GET.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use http::header::{ACCEPT, ALLOW, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode};
use serde_json::Value;

use super::Store;
use super::tokens::Tokens;
use crate::api::types::{MmdsConfig, MmdsVersion};

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const LIFETIME: [&str; 2] = ["x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"];
const FORWARDED: &str = "x-forwarded-for";

/// Seconds a token may live.
const LIFETIMES: std::ops::RangeInclusive<u64> = 1..=21_600;

/// The service of one microVM, as its guest sees it.
pub struct Guest {
    version: MmdsVersion,
    imds_compat: bool,
    store: Store,
    tokens: Mutex<Tokens>,
}

impl Guest {
    pub fn new(config: &MmdsConfig, store: Store) -> Self {
        Self { version: config.version, imds_compat: config.imds_compat, store, tokens: Mutex::default() }
    }

    /// Answers one request; its body, if any, means nothing.
    pub fn answer(&self, request: &Parts, now: Instant) -> Response<String> {
        match request.method {
            Method::GET => self.read(request, now),
            Method::PUT => self.open_session(request, now),
            _ => {
                let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "Not allowed HTTP method.");
                response.headers_mut().insert(ALLOW, http::HeaderValue::from_static("GET, PUT"));
                response
            }
        }
    }

    fn open_session(&self, request: &Parts, now: Instant) -> Response<String> {
        if request.headers.contains_key(FORWARDED) {
            return text(StatusCode::BAD_REQUEST, "Invalid header. Reason: X-Forwarded-For is not allowed.");
        }
        if canonical(request.uri.path()) != TOKEN_PATH {
            return text(StatusCode::NOT_FOUND, &format!("Resource not found: {}.", request.uri.path()));
        }
        let lifetime = find(&request.headers, LIFETIME);
        let Some((name, Some(seconds))) = lifetime.map(|(name, value)| (name, value.parse::<u64>().ok())) else {
            return text(StatusCode::BAD_REQUEST, "The header X-metadata-token-ttl-seconds is needed, with a number.");
        };
        if !LIFETIMES.contains(&seconds) {
            return text(StatusCode::BAD_REQUEST, "A token's time to live is 1 to 21600 seconds.");
        }
        let issued =
            self.tokens.lock().unwrap_or_else(|poison| poison.into_inner()).issue(Duration::from_secs(seconds), now);
        match issued {
            Ok(token) => {
                let mut response = text(StatusCode::OK, &token);
                response.headers_mut().insert(name, seconds.into());
                response
            }
            Err(error) => {
                tracing::error!("no randomness for a metadata token: {error}");
                text(StatusCode::SERVICE_UNAVAILABLE, "No token can be made now.")
            }
        }
    }

    fn read(&self, request: &Parts, now: Instant) -> Response<String> {
        if let Some(refusal) = self.check_token(&request.headers, now) {
            return refusal;
        }
        let path = canonical(request.uri.path());
        let data = self.store.get();
        let Some(value) = lookup(&data, &path) else {
            return text(StatusCode::NOT_FOUND, &format!("Resource not found: {path}."));
        };
        let wants_json = || {
            let accepted = request.headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
            accepted.flat_map(|value| value.split(',')).any(|kind| kind.trim().starts_with("application/json"))
        };
        if !self.imds_compat && wants_json() {
            let mut response = text(StatusCode::OK, &value.to_string());
            response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
            return response;
        }
        match imds(value) {
            Some(listing) => text(StatusCode::OK, &listing),
            None => text(StatusCode::NOT_IMPLEMENTED, "Cannot retrieve value. The value has an unsupported type."),
        }
    }

    fn check_token(&self, headers: &HeaderMap, now: Instant) -> Option<Response<String>> {
        match self.version {
            MmdsVersion::V1 => return None,
            MmdsVersion::V2 => {}
        }
        let Some((_, token)) = find(headers, TOKEN) else {
            return Some(text(
                StatusCode::UNAUTHORIZED,
                "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify it.",
            ));
        };
        let valid = self.tokens.lock().unwrap_or_else(|poison| poison.into_inner()).valid(token, now);
        (!valid).then(|| text(StatusCode::UNAUTHORIZED, "MMDS token not valid."))
    }
}

/// The first of two headers that mean the same.
fn find<'a>(headers: &'a HeaderMap, names: [&'static str; 2]) -> Option<(&'static str, &'a str)> {
    names.into_iter().find_map(|name| Some((name, headers.get(name)?.to_str().ok()?)))
}

/// The path without repeated or trailing slashes.
fn canonical(path: &str) -> String {
    path.split('/').filter(|part| !part.is_empty()).fold(String::new(), |joined, part| joined + "/" + part)
}

fn lookup<'a>(data: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('/').skip(1).try_fold(data, |value, key| match value {
        Value::Object(map) => map.get(key),
        Value::Array(list) => list.get(key.parse::<usize>().ok()?),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    })
}

/// EC2's plain text: the keys of an object, one a line, with a slash where there is more below; a string as it is.
fn imds(value: &Value) -> Option<String> {
    match value {
        Value::Object(map) => {
            let slash = |value: &Value| if value.is_object() { "/" } else { "" };
            let lines: Vec<String> = map.iter().map(|(key, value)| format!("{key}{}", slash(value))).collect();
            Some(lines.join("\n"))
        }
        Value::String(text) => Some(text.clone()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => None,
    }
}

fn text(status: StatusCode, body: &str) -> Response<String> {
    let mut response = Response::new(body.to_owned());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    response
}
