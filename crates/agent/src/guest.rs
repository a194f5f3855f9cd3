//! The way into a guest: the agent's own questions to envd, and the path on which all guest traffic passes undecoded.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use guest_api::{ACCESS_TOKEN_HEADER, Health, Init, PORT};
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{StatusCode, Uri};
use http_body_util::Full;
use proxy::{Upstream, boxed};
use tokio::net::TcpStream;

use crate::Agent;
use crate::capsule::Counted;

/// The header in which envd wants its token. Whatever a caller sends in it is replaced.
const TOKEN: HeaderName = HeaderName::from_static(ACCESS_TOKEN_HEADER);
/// A guest that is not up yet drops the first packet of a dial, and the kernel repeats it only after a second: dialling
/// anew is faster.
const DIAL: Duration = Duration::from_millis(50);
/// Pause after a refused dial: the guest's network is up and envd is about to listen.
const REFUSED: Duration = Duration::from_millis(2);
/// Answers of envd to the agent are small.
const ANSWER_LIMIT: usize = 64 << 10;

/// Talking to envd.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer.
    #[error("asking envd")]
    Ask(#[source] proxy::Error),
    /// The answer broke off or was too long.
    #[error("reading envd's answer")]
    Read(#[source] axum::Error),
    /// An answer, but not the one that was hoped for.
    #[error("envd answered {status} to {path}: {body}")]
    Refused { path: &'static str, status: StatusCode, body: String },
    /// An answer that is not the JSON it should be.
    #[error("envd's answer to {path} is not understood")]
    Malformed { path: &'static str, source: serde_json::Error },
}

/// One guest's envd, its token, and the connections to it.
pub struct Guest {
    address: SocketAddr,
    upstream: Upstream,
    token: String,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Guest {
    /// The envd behind `host_ip`; nothing is dialled yet.
    pub fn new(host_ip: Ipv4Addr, token: String) -> Self {
        let address = SocketAddr::from((host_ip, PORT));
        Self { address, upstream: Upstream::new(address), token }
    }

    /// Waits, without a limit of its own, until envd answers.
    pub async fn first_answer(&self) -> Result<Health, Error> {
        loop {
            match tokio::time::timeout(DIAL, TcpStream::connect(self.address)).await {
                Ok(Ok(_)) => break,
                Ok(Err(_)) => tokio::time::sleep(REFUSED).await,
                Err(_) => {}
            }
        }
        let path = "/health";
        let body = self.ask(path, http::Method::GET, Bytes::new()).await?;
        serde_json::from_slice(&body).map_err(|source| Error::Malformed { path, source })
    }

    /// Gives envd its token, the time and the environment. From then on it answers only to this agent.
    pub async fn init(&self, default_env: &BTreeMap<String, String>) -> Result<(), Error> {
        let init = Init {
            access_token: Some(self.token.clone()),
            default_user: Some("root".into()),
            env_vars: Some(default_env.clone().into_iter().collect()),
            timestamp: SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs_f64()),
            ..Init::default()
        };
        let body = serde_json::to_vec(&init).expect("an Init has only JSON types");
        self.ask("/init", http::Method::POST, body.into()).await.map(drop)
    }

    async fn ask(&self, path: &'static str, method: http::Method, body: Bytes) -> Result<Bytes, Error> {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(CONTENT_TYPE, "application/json")
            .header(TOKEN, &self.token)
            .body(boxed(Full::new(body)))
            .expect("the parts of this request are constants and a hex token");
        let response = self.upstream.forward(request).await.map_err(Error::Ask)?;
        let status = response.status();
        let body = to_bytes(Body::new(response.into_body()), ANSWER_LIMIT).await.map_err(Error::Read)?;
        if status.is_success() {
            return Ok(body);
        }
        Err(Error::Refused { path, status, body: String::from_utf8_lossy(&body).into_owned() })
    }
}

/// `/guest/{capsule}/{path}`: waits while the capsule starts, then passes the request on as it is, under `path` and with
/// envd's token. Problems on the way are told in the form of a Connect error: 404 `not_found` for a capsule that is not or
/// no longer here, 503 `unavailable` for one that does not answer.
pub async fn forward(State(agent): State<Agent>, mut request: Request) -> Response {
    let Some((id, path)) = split(request.uri()) else {
        return refusal(StatusCode::NOT_FOUND, "not_found", "a guest path is /guest/{capsule}/{path}".into());
    };
    let Some(capsule) = id.parse().ok().and_then(|id| agent.capsule(id)) else {
        return refusal(StatusCode::NOT_FOUND, "not_found", format!("no capsule `{id}` on this host"));
    };
    let observed = capsule.settled().await;
    let Some(guest) = observed.guest else {
        return refusal(StatusCode::NOT_FOUND, "not_found", format!("capsule {id} has ended: {}", observed.reason));
    };
    *request.uri_mut() = Uri::from(path);
    let token = HeaderValue::from_str(&guest.token).expect("a token is hex");
    request.headers_mut().insert(TOKEN, token);
    let request = request.map(|body| boxed(Counted::new(body, capsule.traffic.clone())));
    match guest.upstream.forward(request).await {
        Ok(response) => response.map(|body| Body::new(Counted::new(body, capsule.traffic))),
        Err(error) => refusal(StatusCode::SERVICE_UNAVAILABLE, "unavailable", crate::chain(&error)),
    }
}

/// The capsule's text and the path behind it, percent-encoding and slashes untouched.
fn split(uri: &Uri) -> Option<(String, PathAndQuery)> {
    let rest = uri.path_and_query()?.as_str().strip_prefix("/guest/")?;
    let (id, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let path = if path.starts_with('/') { path.parse() } else { format!("/{path}").parse() };
    Some((id.to_owned(), path.ok()?))
}

fn refusal(status: StatusCode, code: &str, message: String) -> Response {
    // A guest's envd answers in the same form, and callers must know who speaks.
    let ours = [(agent_api::REFUSAL_HEADER, "agent")];
    (status, ours, axum::Json(serde_json::json!({"code": code, "message": message}))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_path_is_cut_without_being_decoded() {
        let cut = |uri: &'static str| split(&Uri::from_static(uri)).map(|(id, path)| (id, path.as_str().to_owned()));
        assert_eq!(cut("/guest/cl-1/a%2Fb//c/?x=%20"), Some(("cl-1".into(), "/a%2Fb//c/?x=%20".into())));
        assert_eq!(cut("/guest/cl-1"), Some(("cl-1".into(), "/".into())));
        assert_eq!(cut("/guest/cl-1?x=1"), Some(("cl-1".into(), "/?x=1".into())));
        assert_eq!(cut("/other"), None);
    }
}
