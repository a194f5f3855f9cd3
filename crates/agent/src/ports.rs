//! What users' programs listen on in a guest, through the same gate as all its traffic ([`guest::admit`]).
//!
//! Requests come and go undecoded, on threads of their own ([`proxy::aside`]), so that a terminal waits for none of them. Envd's
//! own port is among them for clients that have its token, and only for what those may ask: what steers the guest is the host's.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::REFUSAL_HEADER;
use agent_api::port::{PortRefusal, TCP};
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use guest_api::PORT;
use http::uri::PathAndQuery;
use http::{HeaderMap, StatusCode, Uri};
use hyper::upgrade::OnUpgrade;
use proxy::{Answer, Error, Target, Tunnel, Upstream, boxed};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::Agent;
use crate::guest::{self, Shut};

/// Exchanges with the ports of one guest at once. Its terminals are not among them.
const EXCHANGES: usize = 1024;
/// Ports to which connections are kept at once.
const KEPT: usize = 32;
/// What every guest calls itself, whatever its host calls it.
const GUEST: &str = "169.254.0.21";
/// What of envd's may be asked from outside, by those who have its token or a signature. The rest of it is the host's.
const ENVD: [&str; 5] = ["/health", "/metrics", "/envs", "/files", "/files/compose"];
const ENVD_SERVICES: [&str; 2] = ["/process.Process/", "/filesystem.Filesystem/"];

/// The ports of one guest, and the connections that are kept to them: no longer than there is the guest.
pub struct Ports {
    host_ip: Ipv4Addr,
    /// The last used first.
    kept: Mutex<Vec<(u16, Upstream)>>,
    turns: Arc<Semaphore>,
}

impl Ports {
    /// Of the guest behind `host_ip`; nothing is dialled yet.
    pub fn new(host_ip: Ipv4Addr) -> Self {
        Self { host_ip, kept: Mutex::default(), turns: Arc::new(Semaphore::new(EXCHANGES)) }
    }

    fn address(&self, port: u16) -> SocketAddr {
        (self.host_ip, port).into()
    }

    fn turn(&self) -> Result<OwnedSemaphorePermit, PortRefusal> {
        self.turns.clone().try_acquire_owned().map_err(|_| PortRefusal::Busy)
    }

    fn upstream(&self, port: u16) -> Upstream {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().position(|(of, _)| *of == port).map(|index| kept.remove(index).1);
        let upstream = found.unwrap_or_else(|| Upstream::strangers(self.address(port)));
        kept.insert(0, (port, upstream.clone()));
        kept.truncate(KEPT);
        upstream
    }
}

/// `/proxy/{capsule}/{port}/{path}`: waits as all guest traffic does, then passes the request on as it is, under `path`. A
/// `Location` in the answer that names the guest gets our prefix. What did not come from a guest says so with
/// [`REFUSAL_HEADER`].
pub async fn forward(State(agent): State<Agent>, request: Request) -> Response {
    carry(&agent, request).await.unwrap_or_else(refuse)
}

async fn carry(agent: &Agent, mut request: Request) -> Result<Response, PortRefusal> {
    let (id, port, path) = proxy::path::split(request.uri()).ok_or(PortRefusal::Malformed)?;
    if port == PORT && !is_for_clients(&path) {
        return Err(PortRefusal::Forbidden);
    }
    let (guest, open) = guest::admit(agent, id).await.map_err(shut)?;
    let open = open.holding(guest.ports.turn()?);
    proxy::aside(request.extensions()).await;
    let prefix = proxy::path::prefix(id, port);
    *request.uri_mut() = Uri::from(path);
    if port == PORT {
        // In another protocol it could be asked for anything.
        request.extensions_mut().remove::<OnUpgrade>();
    }
    let asked: HeaderMap =
        request.headers().get(http::header::HOST).map(|host| (http::header::HOST, host.clone())).into_iter().collect();
    let request = request.map(|body| boxed(open.request(body)));
    let upstream = guest.ports.upstream(port);
    let answer = tokio::select! {
        answer = upstream.exchange(request) => answer.map_err(|error| match error {
            Error::Connect(..) | Error::Nobody(..) => PortRefusal::Closed,
            Error::Exchange(..) | Error::Switched(_) => PortRefusal::NoAnswer,
        })?,
        () = open.cut() => return Err(PortRefusal::Paused),
    };
    match answer {
        Answer::Whole(mut response) => {
            // Who speaks, only we say.
            response.headers_mut().remove(REFUSAL_HEADER);
            let ip = guest.ports.host_ip.to_string();
            let own = [ip.as_str(), GUEST, "localhost", "127.0.0.1", "0.0.0.0", "[::1]"];
            proxy::path::add(response.headers_mut(), &prefix, &asked, port, &own);
            Ok(response.map(|body| Body::new(open.answer(body))))
        }
        Answer::Upgraded(mut response, tunnel) => {
            response.headers_mut().remove(REFUSAL_HEADER);
            tokio::spawn(async move {
                tokio::select! {
                    // How it ended its ends know.
                    _ = tunnel.carry(|| open.touch()) => {}
                    () = open.cut() => {}
                }
            });
            Ok(response.map(Body::new))
        }
    }
}

/// `/tcp/{capsule}/{port}`, which wants to be upgraded to [`TCP`]: becomes a connection to that port.
pub async fn tcp(State(agent): State<Agent>, Path((id, port)): Path<(String, u16)>, request: Request) -> Response {
    connect(&agent, &id, port, request).await.unwrap_or_else(refuse)
}

async fn connect(agent: &Agent, id: &str, port: u16, mut request: Request) -> Result<Response, PortRefusal> {
    let (response, client) = proxy::accept_upgrade(&mut request, TCP).ok_or(PortRefusal::Malformed)?;
    if port == PORT || port == 0 {
        return Err(PortRefusal::Forbidden);
    }
    let (guest, open) = guest::admit(agent, id).await.map_err(shut)?;
    let open = open.holding(guest.ports.turn()?);
    proxy::aside(request.extensions()).await;
    let target = Target::from(guest.ports.address(port));
    let stream = tokio::select! {
        stream = proxy::connect(&target) => stream.map_err(|_| PortRefusal::Closed)?,
        () = open.cut() => return Err(PortRefusal::Paused),
    };
    tokio::spawn(async move {
        tokio::select! {
            // How it ended its ends know.
            _ = Tunnel::carry_to(client, stream, || open.touch()) => {}
            () = open.cut() => {}
        }
    });
    Ok(response.map(Body::new))
}

fn shut(shut: Shut) -> PortRefusal {
    match shut {
        Shut::Unknown | Shut::Ended(_) => PortRefusal::Absent,
        Shut::Paused => PortRefusal::Paused,
    }
}

/// Whether clients may ask envd for it. Literally: a path that is written in another way is another path.
fn is_for_clients(path: &PathAndQuery) -> bool {
    let path = path.path();
    let is_method = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_alphanumeric());
    ENVD.contains(&path) || ENVD_SERVICES.iter().any(|service| path.strip_prefix(service).is_some_and(is_method))
}

fn refuse(refusal: PortRefusal) -> Response {
    let status = match refusal {
        PortRefusal::Malformed => StatusCode::BAD_REQUEST,
        PortRefusal::Absent => StatusCode::NOT_FOUND,
        PortRefusal::Paused => StatusCode::CONFLICT,
        PortRefusal::Forbidden => StatusCode::FORBIDDEN,
        PortRefusal::Closed | PortRefusal::NoAnswer => StatusCode::BAD_GATEWAY,
        PortRefusal::Busy => StatusCode::TOO_MANY_REQUESTS,
    };
    (status, [(REFUSAL_HEADER, refusal.word())]).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_guest_is_not_asked_from_outside() {
        let ask = |path: &'static str| is_for_clients(&PathAndQuery::from_static(path));
        for path in
            ["/health", "/files?path=/x&signature=y", "/process.Process/Start", "/filesystem.Filesystem/ListDir"]
        {
            assert!(ask(path), "{path}");
        }
        for path in [
            "/init",
            "/init/",
            "//init",
            "/./init",
            "/%69nit",
            "/freeze",
            "/unfreeze",
            "/snapshot/prepare",
            "/snapshot/warm-up",
            "/",
            "/health/",
            "/files/../init",
            "/process.Process/../init",
            "/process.Process/%2e%2e/init",
            "/process.Process/",
            "/Init",
        ] {
            assert!(!ask(path), "{path}");
        }
    }

    #[test]
    fn connections_are_kept_to_a_few_ports() {
        let ports = Ports::new(Ipv4Addr::LOCALHOST);
        for port in 1..100 {
            ports.upstream(port);
            ports.upstream(7);
        }
        let kept = ports.kept.lock().unwrap();
        assert_eq!((kept.len(), kept[0].0, kept[1].0), (KEPT, 7, 99));
    }
}
