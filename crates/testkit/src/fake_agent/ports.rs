//! What users run in a fake capsule: it is on this machine's loopback, so that every capsule has the same ports.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use agent_api::port::{PortRefusal, TCP};
use agent_api::{CapsuleState, REFUSAL_HEADER};
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::header::HOST;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use proxy::{Answer, Error, Target, Tunnel, Upstream, boxed};

use super::{Inner, service};

/// `/proxy/{capsule}/{port}/{path}`, as the contract has it.
pub async fn forward(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    carry(&inner, request).await.unwrap_or_else(refuse)
}

async fn carry(inner: &Inner, mut request: Request) -> Result<Response, PortRefusal> {
    let (id, port, path) = proxy::path::split(request.uri()).ok_or(PortRefusal::Malformed)?;
    runs(inner, id)?;
    if port == guest_api::PORT && path.path() != "/health" {
        return Err(PortRefusal::Forbidden);
    }
    let prefix = proxy::path::prefix(id, port);
    *request.uri_mut() = Uri::from(path);
    let asked: HeaderMap = request.headers().get(HOST).map(|host| (HOST, host.clone())).into_iter().collect();
    let upstream = Upstream::strangers(address(port));
    let answer = upstream.exchange(request.map(boxed)).await.map_err(|error| match error {
        Error::Connect(..) | Error::Nobody(..) => PortRefusal::Closed,
        Error::Exchange(..) | Error::Switched(_) => PortRefusal::NoAnswer,
    })?;
    let mut response = match answer {
        Answer::Whole(response) => response,
        Answer::Upgraded(response, tunnel) => {
            tokio::spawn(tunnel.carry(|| ()));
            response
        }
    };
    response.headers_mut().remove(REFUSAL_HEADER);
    proxy::path::add(response.headers_mut(), &prefix, &asked, port, &["localhost", "127.0.0.1"]);
    Ok(response.map(Body::new))
}

/// `/tcp/{capsule}/{port}`, as the contract has it.
pub async fn tcp(State(inner): State<Arc<Inner>>, Path((id, port)): Path<(String, u16)>, request: Request) -> Response {
    connect(&inner, &id, port, request).await.unwrap_or_else(refuse)
}

async fn connect(inner: &Inner, id: &str, port: u16, mut request: Request) -> Result<Response, PortRefusal> {
    let (response, client) = proxy::accept_upgrade(&mut request, TCP).ok_or(PortRefusal::Malformed)?;
    runs(inner, id)?;
    let stream = proxy::connect(&Target::from(address(port))).await.map_err(|_| PortRefusal::Closed)?;
    tokio::spawn(Tunnel::carry_to(client, stream, || ()));
    Ok(response.map(Body::new))
}

fn address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn runs(inner: &Inner, id: &str) -> Result<(), PortRefusal> {
    let mut capsules = inner.capsules();
    let capsule = &mut capsules.get_mut(id).ok_or(PortRefusal::Absent)?.capsule;
    match capsule.state.as_known() {
        Some(CapsuleState::CAPSULE_STATE_RUNNING) => {
            capsule.last_active_unix_ms = service::now_ms();
            Ok(())
        }
        Some(CapsuleState::CAPSULE_STATE_PAUSED) => Err(PortRefusal::Paused),
        _ => Err(PortRefusal::Absent),
    }
}

fn refuse(refusal: PortRefusal) -> Response {
    (StatusCode::BAD_GATEWAY, [(REFUSAL_HEADER, refusal.word())]).into_response()
}
