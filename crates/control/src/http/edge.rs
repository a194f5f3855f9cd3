//! The edge: requests that are for a capsule and not for us, told by the host they name.
//!
//! ```text
//!   client ─► Host {port}-{capsule}.{domain} ─► may it, does it run ─► the host's agent ─► the guest's port
//!         └─► any other Host ─► the API
//! ```
//!
//! Whom a head is for, and what of it goes on to a guest, is decided in [`proxy::edge`]. What comes of the platform instead of a
//! guest is a [`page`]. Both connections of a request that goes to a guest are carried by threads of their own
//! ([`proxy::aside`]), so that no terminal waits for them.

mod page;

use agent_api::REFUSAL_HEADER;
use agent_api::port::PortRefusal;
use api::{CapsuleId, ErrorCode};
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hyper::body::Body as _;
use proxy::edge::address::Address;
use proxy::edge::{credentials, forwarded, strict};
use proxy::{Answer, Lane, boxed};

use self::page::{Page, Problem};
use super::error::Error;
use super::{App, leftover};
use crate::op::reach::{self, look_again, reach};

/// The header with what a capsule's URLs may want.
const TRAFFIC_TOKEN: &str = "e2b-traffic-access-token";

/// Both that one listener serves.
#[derive(Clone)]
pub struct Front {
    pub app: App,
    pub api: Router,
}

/// Sends every request to whom it is for.
pub async fn front(State(front): State<Front>, request: Request) -> Response {
    if let Err(problem) = strict::any(&request) {
        return Error::new(ErrorCode::InvalidRequest, problem).into_response();
    }
    if strict::is_misdirected(&request) {
        let problem = "the Host is another than the name that the connection was made to";
        let answer = Error::new(ErrorCode::InvalidRequest, problem).into_response();
        // By which a client knows to make another connection.
        return (StatusCode::MISDIRECTED_REQUEST, answer).into_response();
    }
    match Address::of(&request) {
        None => {
            proxy::back(request.extensions()).await;
            api(front.api, request).await
        }
        Some(address) => {
            let wants_page = page::is_wanted(request.headers());
            let answer = match address {
                Ok(address) => carry(&front.app, address, request).await.map_err(|problem| Page {
                    problem,
                    capsule: Some(address.capsule),
                    port: Some(address.port),
                }),
                Err(problem) => Err(Page { problem: Problem::Malformed(problem), capsule: None, port: None }),
            };
            answer.unwrap_or_else(|page| page.answer(wants_page))
        }
    }
}

async fn api(api: Router, request: Request) -> Response {
    use tower::ServiceExt;
    match api.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// Carries one request to the port and its answer back.
async fn carry(app: &App, address: Address, request: Request) -> Result<Response, Problem> {
    strict::for_guest(&request).map_err(Problem::Malformed)?;
    let Address { capsule, port, .. } = address;
    let prefix = proxy::path::prefix(&capsule.to_string(), port);
    let uri = proxy::path::join(&prefix, request.uri());
    let uri = uri.ok_or(Problem::Malformed("there is nothing at a capsule but paths"))?;
    let token = request.headers().get(TRAFFIC_TOKEN).and_then(|token| token.to_str().ok()).map(str::to_owned);
    let checks_itself = port == guest_api::PORT;

    let lane = request.extensions().get::<Lane>().cloned();
    let mut request = leftover::read_on(request).await;
    // Both of them while the header is still as the client sent it.
    forwarded::say(&mut request);
    credentials::strip(request.headers_mut());
    *request.uri_mut() = uri;

    // A request without a body can be sent again.
    let (parts, body) = request.into_parts();
    let mut again = body.is_end_stream().then(|| parts.clone());
    let mut request = Request::from_parts(parts, body);
    loop {
        may_reach(app, lane.as_ref(), capsule, token.clone(), checks_itself).await?;
        proxy::aside(request.extensions()).await;
        let answer = app.ctx.host.ports().exchange(request.map(boxed)).await.map_err(|error| {
            app.ctx.reachable.forget(capsule);
            tracing::warn!(%capsule, error = &error as &dyn std::error::Error, "the host does not carry a request");
            Problem::Host
        })?;
        let (mut response, tunnel) = match answer {
            Answer::Whole(response) => (response, None),
            Answer::Upgraded(response, tunnel) => (response, Some(tunnel)),
        };
        match (PortRefusal::of(response.headers()), again.take()) {
            // It was paused or lost since we knew it to run.
            (Some(PortRefusal::Paused | PortRefusal::Absent), Some(parts)) => {
                look_again(&app.ctx, capsule).await;
                request = Request::from_parts(parts, Body::empty());
                continue;
            }
            (Some(refusal), _) => {
                app.ctx.reachable.forget(capsule);
                app.ctx.nudge.notify_one();
                return Err(refusal.into());
            }
            (None, _) => {}
        }
        if let Some(tunnel) = tunnel {
            let stop = app.ctx.stop.clone();
            tokio::spawn(async move {
                tokio::select! {
                    // How it ended its ends know.
                    _ = tunnel.carry(|| ()) => {}
                    () = stop.cancelled() => {}
                }
            });
        }
        response.headers_mut().remove(REFUSAL_HEADER);
        proxy::path::remove(response.headers_mut(), &prefix);
        credentials::keep_cookies_home(response.headers_mut());
        return Ok(response.map(Body::new));
    }
}

/// As [`reach`], where all that it may begin belongs.
async fn may_reach(
    app: &App,
    lane: Option<&Lane>,
    capsule: CapsuleId,
    token: Option<String>,
    checks_itself: bool,
) -> Result<(), reach::Error> {
    let ctx = app.ctx.clone();
    match lane {
        Some(lane) if !ctx.reachable.knows(capsule) => {
            lane.at_home(async move { reach(&ctx, capsule, token.as_deref(), checks_itself).await }).await
        }
        _ => reach(&ctx, capsule, token.as_deref(), checks_itself).await,
    }
}

impl From<reach::Error> for Problem {
    fn from(error: reach::Error) -> Self {
        match error {
            reach::Error::Unknown => Self::Unknown,
            reach::Error::Private => Self::Private,
            reach::Error::NotRunning(status) => Self::NotRunning(status),
            reach::Error::Soon(status) => Self::Soon(status),
            reach::Error::Failed(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "a capsule cannot be reached");
                Self::Host
            }
        }
    }
}

impl From<PortRefusal> for Problem {
    fn from(refusal: PortRefusal) -> Self {
        match refusal {
            PortRefusal::Malformed => Self::Malformed("the request is not understood"),
            PortRefusal::Absent => Self::Unknown,
            PortRefusal::Paused => Self::NotRunning(api::Status::Paused),
            PortRefusal::Forbidden => Self::Forbidden,
            PortRefusal::Closed => Self::Closed,
            PortRefusal::NoAnswer => Self::NoAnswer,
            PortRefusal::Busy => Self::Busy,
        }
    }
}
