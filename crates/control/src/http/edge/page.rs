//! What a client sees where there is no guest to answer: a page for people, JSON for programs. The JSON has what E2B's SDKs
//! look for beside what ours do.

use api::{CapsuleId, Status};
use axum::Json;
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_SECURITY_POLICY, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{Html, IntoResponse, Response};
use serde_json::json;

use crate::op::word;

/// Why no guest answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// The request is not one that can be for a guest.
    Malformed(&'static str),
    Unknown,
    /// The capsule's URLs want a token.
    Private,
    /// What is asked of envd is not for clients.
    Forbidden,
    NotRunning(Status),
    /// But about to.
    Soon(Status),
    /// Nobody listens on the port.
    Closed,
    /// Whoever listens broke off.
    NoAnswer,
    Busy,
    /// Its host does not answer, or our database.
    Host,
}

/// A problem of a port.
#[derive(Debug)]
pub struct Page {
    pub problem: Problem,
    pub capsule: Option<CapsuleId>,
    pub port: Option<u16>,
}

/// Whether a person is to read the answer.
pub fn is_wanted(headers: &HeaderMap) -> bool {
    headers.get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok()).any(|accept| accept.contains("text/html"))
}

/// What every page looks like.
const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:34em;margin:18vh auto;padding:0 1.5em;color:#222;background:#fff}\
    h1{font-size:1.4em}code{font-size:.9em;color:#666}@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}}";

impl Page {
    /// The answer, for a person or a program.
    pub fn answer(&self, for_people: bool) -> Response {
        let status = self.status();
        let mut response = if for_people { self.html().into_response() } else { self.json(status).into_response() };
        *response.status_mut() = status;
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.is_passing() {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }

    /// E2B's clients take 502 for a capsule that is not there, whatever the reason; ours repeat on 502 and 503, and on nothing
    /// else.
    fn status(&self) -> StatusCode {
        match self.problem {
            Problem::Malformed(_) => StatusCode::BAD_REQUEST,
            Problem::Private => StatusCode::FORBIDDEN,
            Problem::Forbidden => StatusCode::NOT_FOUND,
            Problem::Unknown | Problem::NotRunning(_) | Problem::Closed | Problem::NoAnswer => StatusCode::BAD_GATEWAY,
            Problem::Busy => StatusCode::TOO_MANY_REQUESTS,
            Problem::Soon(_) | Problem::Host => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn is_passing(&self) -> bool {
        matches!(self.problem, Problem::Soon(_) | Problem::Busy | Problem::Host)
    }

    fn code(&self) -> &'static str {
        match self.problem {
            Problem::Malformed(_) => "invalid_request",
            Problem::Private => "forbidden",
            Problem::Unknown | Problem::Forbidden => "not_found",
            Problem::NotRunning(_) | Problem::Soon(_) => "invalid_state",
            Problem::Closed => "port_closed",
            Problem::NoAnswer => "no_answer",
            Problem::Busy => "too_many_connections",
            Problem::Host => "host_unavailable",
        }
    }

    /// A title, and what there is to know or to do.
    fn words(&self) -> (&'static str, String) {
        let port = self.port.unwrap_or_default();
        match self.problem {
            Problem::Malformed(what) => {
                ("This address or request is not right", format!("What is wrong with it: {what}."))
            }
            Problem::Unknown => ("There is no such capsule", "It may have ended, or the address is mistyped.".into()),
            Problem::Private => (
                "This capsule is private",
                "Requests to it need its traffic token, in the header e2b-traffic-access-token.".into(),
            ),
            Problem::Forbidden => {
                ("There is nothing here", "This port steers the capsule and is not for visitors.".into())
            }
            Problem::NotRunning(Status::Paused) => {
                ("The capsule is paused", "Whoever owns it can resume it. It was not made to wake on visits.".into())
            }
            Problem::NotRunning(status) => ("The capsule does not run", format!("It is {}.", word(status))),
            Problem::Soon(status) => {
                ("The capsule is on its way", format!("It is {}. This page tries again by itself.", word(status)))
            }
            Problem::Closed => (
                "Nothing listens on this port",
                format!("The capsule runs, but no program in it listens on port {port}. One may be about to start."),
            ),
            Problem::NoAnswer => (
                "The program in the capsule did not answer",
                format!("What listens on port {port} closed the connection without an answer, or does not speak HTTP."),
            ),
            Problem::Busy => {
                ("Too many connections", "The capsule has as many open connections as it may have.".into())
            }
            Problem::Host => ("The capsule cannot be reached", "Its host does not answer at the moment.".into()),
        }
    }

    fn json(&self, status: StatusCode) -> Json<serde_json::Value> {
        let (title, more) = self.words();
        let message = match self.problem {
            // In the words that E2B's clients know.
            Problem::Unknown | Problem::NotRunning(_) => "The sandbox was not found",
            Problem::Closed => "The sandbox is running but port is not open",
            _ => title,
        };
        let mut body = json!({
            "error": {"code": self.code(), "message": format!("{title}. {more}")},
            "message": message,
            "code": status.as_u16(),
        });
        if let Some(capsule) = self.capsule {
            body["sandboxId"] = capsule.to_string().into();
        }
        if let Some(port) = self.port {
            body["port"] = port.into();
        }
        Json(body)
    }

    /// Nothing in it comes from the client but an id and a number.
    fn html(&self) -> impl IntoResponse {
        let (title, more) = self.words();
        let which = match (self.capsule, self.port) {
            (Some(capsule), Some(port)) => format!("<p><code>{capsule}, port {port}</code></p>"),
            _ => String::new(),
        };
        let again = if self.is_passing() { "<meta http-equiv=refresh content=2>" } else { "" };
        let page = format!(
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">{again}\
             <title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{more}</p>{which}</html>"
        );
        ([(CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'")], Html(page))
    }
}
