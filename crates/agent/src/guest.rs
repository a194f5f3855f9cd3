//! The way into a guest: the agent's own questions to envd, and the path on which all guest traffic passes undecoded.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_api::{CALLS, CapsuleState};
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use bytes::Bytes;
use guest_api::{ACCESS_TOKEN_HEADER, Health, Init, Metadata, PORT, Restore, RestoreKind, Restored};
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{StatusCode, Uri};
use http_body_util::Full;
use proxy::{Upstream, boxed};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::Agent;
use crate::capsule::{Cut, Observed, Open};
use crate::ports::Ports;

/// The header in which envd wants its token. Whatever a caller sends in it is replaced.
const TOKEN: HeaderName = HeaderName::from_static(ACCESS_TOKEN_HEADER);
/// A guest that is not up yet drops the first packet of a dial, and the kernel repeats it only after a second: dialling
/// anew is faster.
const DIAL_BOOTING: Duration = Duration::from_millis(50);
/// One that wakes from a snapshot gets it, but may be slow at first; another dial would be more work for it.
const DIAL_WAKING: Duration = Duration::from_millis(500);
/// Pause after a refused dial: the guest's network is up and envd is about to listen.
const REFUSED: Duration = Duration::from_millis(2);
/// How long a guest may take to ready itself for a snapshot, per step.
const ORDER: Duration = Duration::from_secs(5);
/// Who was told the time and answered later than that was told an old one.
const PROMPT: Duration = Duration::from_secs(1);
/// Pauses between two attempts to let a guest go on: the first, and the longest.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];
/// Bytes of entropy that a restored guest gets.
const ENTROPY: usize = 64;
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
    /// No answer in time.
    #[error("envd did not answer to {path} within {} s", ORDER.as_secs())]
    Late { path: &'static str },
    /// A restored guest that does not say that it is nobody's twin.
    #[error("the guest did not confirm that {0} its own")]
    Unconfirmed(&'static str),
    /// No entropy for a restored guest.
    #[error("drawing entropy for the guest")]
    Entropy(#[source] getrandom::Error),
    /// An answer that is not the JSON it should be.
    #[error("envd's answer to {path} is not understood")]
    Malformed { path: &'static str, source: serde_json::Error },
}

/// What a restored guest is told besides what a booted one is.
pub struct Restoring<'a> {
    /// What the snapshot is to it.
    pub kind: RestoreKind,
    /// Its new name.
    pub hostname: Option<&'a str>,
    /// The token of before.
    pub token: &'a str,
    /// What its metadata service says from now on.
    pub metadata: Metadata,
}

/// One guest's envd, its token, and the connections to it and to its other ports.
pub struct Guest {
    address: SocketAddr,
    upstream: Upstream,
    token: String,
    /// What users' programs listen on.
    pub ports: Ports,
    /// For what comes by [`forward`].
    calls: Arc<Semaphore>,
    /// How often it has to confirm yet that it goes on: it was stopped, its processes may stand still and its clock be late.
    held: AtomicU8,
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
        let calls = Arc::new(Semaphore::new(CALLS));
        let (upstream, ports) = (Upstream::new(address), Ports::new(host_ip));
        Self { address, upstream, token, ports, calls, held: AtomicU8::new(0) }
    }

    /// What envd demands of every request.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Waits, without a limit of its own, until envd answers.
    pub async fn first_answer(&self) -> Result<Health, Error> {
        self.reach(DIAL_BOOTING).await;
        let path = "/health";
        let body = self.ask(path, http::Method::GET, Bytes::new(), &self.token).await?;
        serde_json::from_slice(&body).map_err(|source| Error::Malformed { path, source })
    }

    /// Gives envd its token, the time and the environment. From then on it answers only to this agent.
    pub async fn init(&self, default_env: &BTreeMap<String, String>) -> Result<(), Error> {
        self.ask("/init", http::Method::POST, body(&self.settings(default_env)), &self.token).await.map(drop)
    }

    /// The same for a guest that wakes from a snapshot, as soon as it can be reached. Succeeds only when it confirms that
    /// it is a machine of its own.
    pub async fn restore(
        &self,
        default_env: &BTreeMap<String, String>,
        restoring: &Restoring<'_>,
    ) -> Result<(), Error> {
        self.reach(DIAL_WAKING).await;
        let mut entropy = [0; ENTROPY];
        getrandom::fill(&mut entropy).map_err(Error::Entropy)?;
        let restore = Restore {
            kind: restoring.kind,
            entropy: base64::engine::general_purpose::STANDARD.encode(entropy),
            hostname: restoring.hostname.map(str::to_owned),
            machine_id: None,
            metadata: Some(restoring.metadata.clone()),
        };
        let init = Init { restore: Some(restore), ..self.settings(default_env) };
        let path = "/init";
        let answer = self.ask(path, http::Method::POST, body(&init), restoring.token).await?;
        let restored: Restored = serde_json::from_slice(&answer).map_err(|source| Error::Malformed { path, source })?;
        match unconfirmed(restoring, &restored) {
            None => Ok(()),
            Some(what) => Err(Error::Unconfirmed(what)),
        }
    }

    /// Readies the guest for a snapshot: file systems written, users' processes still. Whatever it does not do in time is
    /// only less convenient, and nothing that a guest can keep itself from being paused with. One that is not paused after
    /// all, or goes on after it, has to be [woken](Self::wake).
    pub async fn prepare(&self) {
        self.held.store(1, Ordering::Relaxed);
        self.order("/snapshot/prepare").await;
        if !self.order("/freeze").await {
            self.hold();
        }
    }

    /// Has in memory what users' first commands need.
    pub async fn warm_up(&self) {
        self.order("/snapshot/warm-up").await;
    }

    /// Notes that it may have been stopped, and may still be: what has it stand still was not answered in time, so it may come
    /// to it behind the first word that it goes on.
    pub fn hold(&self) {
        self.held.store(2, Ordering::Relaxed);
    }

    /// Lets users' processes go on that were stopped, and has the clock be right, which stood still with the VMM. One attempt:
    /// what comes to nothing here is for [`keep_waking`](Self::keep_waking).
    pub async fn wake(&self) {
        if let Err(error) = self.try_wake().await {
            warn!(guest = ?self, error = crate::chain(&error), "the guest does not go on yet");
        }
    }

    /// Wakes a guest that may be held until it confirms it, and never ends: who drops this knows that there is nobody to be
    /// woken any more. On a loaded host it may take long, and until then whatever is begun in the guest stands still.
    pub async fn keep_waking(&self) -> Infallible {
        let [mut pause, longest] = AGAIN;
        while self.held.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(pause).await;
            pause = longest.min(pause * 2);
            if let Err(error) = self.try_wake().await {
                debug!(guest = ?self, error = crate::chain(&error), "the guest still does not go on");
            }
        }
        std::future::pending().await
    }

    async fn try_wake(&self) -> Result<(), Error> {
        let begun = Instant::now();
        self.ask_in_time("/init", body(&Init { timestamp: timestamp(), ..Init::default() })).await?;
        if begun.elapsed() < PROMPT {
            // Nobody else counts down.
            self.held.store(self.held.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
        }
        Ok(())
    }

    /// False when it was not done, or may yet be.
    async fn order(&self, path: &'static str) -> bool {
        let done = self.ask_in_time(path, Bytes::new()).await;
        if let Err(error) = &done {
            warn!(guest = ?self, path, error = crate::chain(error), "the guest did not do it");
        }
        done.is_ok()
    }

    async fn ask_in_time(&self, path: &'static str, body: Bytes) -> Result<(), Error> {
        let asked = self.ask(path, http::Method::POST, body, &self.token);
        tokio::time::timeout(ORDER, asked).await.map_err(|_| Error::Late { path })?.map(drop)
    }

    /// Waits until envd can be dialled; a dial may take so long. What is asked next goes that way.
    async fn reach(&self, dial: Duration) {
        loop {
            match tokio::time::timeout(dial, TcpStream::connect(self.address)).await {
                Ok(Ok(stream)) => return self.upstream.begin_with(stream),
                Ok(Err(_)) => tokio::time::sleep(REFUSED).await,
                Err(_) => {}
            }
        }
    }

    fn settings(&self, default_env: &BTreeMap<String, String>) -> Init {
        Init {
            access_token: Some(self.token.clone()),
            default_user: Some("root".into()),
            env_vars: Some(default_env.clone().into_iter().collect()),
            timestamp: timestamp(),
            ..Init::default()
        }
    }

    async fn ask(&self, path: &'static str, method: http::Method, body: Bytes, token: &str) -> Result<Bytes, Error> {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(CONTENT_TYPE, "application/json")
            .header(TOKEN, token)
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

/// What a restored guest has not confirmed that it must: one that wakes from its own pause is who it was, one that wakes from
/// another's past must not be that.
fn unconfirmed(restoring: &Restoring<'_>, restored: &Restored) -> Option<&'static str> {
    let is_named = restoring.hostname.is_none_or(|name| restored.hostname.as_deref() == Some(name));
    let of_a_fork = [
        // Host keys are not asked for: not every guest has any, and a failure to replace them is one of the answer.
        (restored.machine_id.is_some(), "its machine id is"),
        (is_named, "its name is"),
        (restored.connections_closed.is_some(), "its connections are"),
    ];
    let of_all = [(restored.rng_reseeded, "its randomness is")];
    let asked = match restoring.kind {
        RestoreKind::Resume => &of_a_fork[..0],
        RestoreKind::Fork => &of_a_fork[..],
    };
    of_all.iter().chain(asked).find(|(is_confirmed, _)| !is_confirmed).map(|&(_, what)| what)
}

/// The time as envd is told it.
fn timestamp() -> Option<f64> {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs_f64())
}

fn body(init: &Init) -> Bytes {
    serde_json::to_vec(init).expect("an Init has only JSON types").into()
}

/// `/guest/{capsule}/{path}`: waits while the capsule starts, pauses or resumes, then passes the request on as it is, under
/// `path` and with envd's token. Problems on the way are told in the form of a Connect error: 404 `not_found` for a capsule
/// that is not or no longer here, 409 `failed_precondition` for one that is paused, 429 `resource_exhausted` for one that has
/// [`CALLS`] requests, 503 `unavailable` for one that does not answer.
pub async fn forward(State(agent): State<Agent>, mut request: Request) -> Response {
    let Some((id, path)) = split(request.uri()) else {
        return refusal(StatusCode::NOT_FOUND, "not_found", "a guest path is /guest/{capsule}/{path}".into());
    };
    proxy::back(request.extensions()).await;
    let (guest, open) = match admit(&agent, &id).await {
        Ok(admitted) => admitted,
        Err(Shut::Unknown) => {
            return refusal(StatusCode::NOT_FOUND, "not_found", format!("no capsule `{id}` on this host"));
        }
        Err(Shut::Paused) => {
            return refusal(StatusCode::CONFLICT, "failed_precondition", format!("capsule {id} is paused"));
        }
        Err(Shut::Ended(Observed { reason, .. })) => {
            return refusal(StatusCode::NOT_FOUND, "not_found", format!("capsule {id} has ended: {reason}"));
        }
    };
    let Ok(call) = guest.calls.clone().try_acquire_owned() else {
        let message = format!("capsule {id} has {CALLS} calls");
        return refusal(StatusCode::TOO_MANY_REQUESTS, "resource_exhausted", message);
    };
    let open = open.holding(call);
    *request.uri_mut() = Uri::from(path);
    let token = HeaderValue::from_str(&guest.token).expect("a token is hex");
    request.headers_mut().insert(TOKEN, token);
    let request = request.map(|body| boxed(open.request(body)));
    tokio::select! {
        answer = guest.upstream.forward(request) => match answer {
            Ok(response) => response.map(|body| Body::new(open.answer(body))),
            Err(error) => refusal(StatusCode::SERVICE_UNAVAILABLE, "unavailable", crate::chain(&error)),
        },
        () = open.cut() => refusal(StatusCode::SERVICE_UNAVAILABLE, "unavailable", Cut.to_string()),
    }
}

/// Why nothing goes into a guest.
pub enum Shut {
    /// There is no such capsule here.
    Unknown,
    /// It is paused.
    Paused,
    /// It was here.
    Ended(Observed),
}

/// The gate through which all traffic goes into a guest: waits while the capsule starts, pauses or resumes, and counts the
/// exchange that begins.
pub async fn admit(agent: &Agent, id: &str) -> Result<(Arc<Guest>, Open), Shut> {
    let capsule = id.parse().ok().and_then(|id| agent.capsule(id)).ok_or(Shut::Unknown)?;
    loop {
        let settled = capsule.settled().await;
        // Counted first: who closes the gate and then counts has seen either this, or that it was turned away.
        let open = capsule.traffic.enter();
        match capsule.observed().guest {
            Some(guest) => return Ok((guest, open)),
            None if settled.state == CapsuleState::Paused => return Err(Shut::Paused),
            None if settled.has_ended() => return Err(Shut::Ended(settled)),
            None => {}
        }
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
    fn a_guest_must_confirm_what_would_make_it_another_s_twin() {
        let restoring = |kind, hostname| Restoring { kind, hostname, token: "", metadata: Metadata::default() };
        let confirmed = Restored {
            clock_offset: 0.0,
            rng_reseeded: true,
            connections_closed: Some(0),
            machine_id: Some("0123456789abcdef0123456789abcdef".into()),
            hostname: Some("cl-1".into()),
            ssh_host_keys_removed: false,
        };
        let nothing = Restored { connections_closed: None, machine_id: None, hostname: None, ..confirmed.clone() };
        let (resume, fork) = (restoring(RestoreKind::Resume, None), restoring(RestoreKind::Fork, Some("cl-1")));
        let unnamed = restoring(RestoreKind::Fork, None);
        assert_eq!(unconfirmed(&resume, &nothing), None);
        assert_eq!(unconfirmed(&fork, &confirmed), None);
        assert_eq!(unconfirmed(&unnamed, &Restored { hostname: None, ..confirmed.clone() }), None);
        for (restoring, restored, what) in [
            (&resume, Restored { rng_reseeded: false, ..nothing.clone() }, "its randomness is"),
            (&fork, Restored { rng_reseeded: false, ..confirmed.clone() }, "its randomness is"),
            (&fork, Restored { machine_id: None, ..confirmed.clone() }, "its machine id is"),
            (&unnamed, Restored { machine_id: None, ..confirmed.clone() }, "its machine id is"),
            (&fork, Restored { hostname: None, ..confirmed.clone() }, "its name is"),
            (&fork, Restored { hostname: Some("cl-2".into()), ..confirmed.clone() }, "its name is"),
            (&fork, Restored { connections_closed: None, ..confirmed.clone() }, "its connections are"),
        ] {
            assert_eq!(unconfirmed(restoring, &restored), Some(what), "{restored:?}");
        }
    }

    #[tokio::test]
    async fn a_restore_fails_that_was_not_confirmed() {
        // Nobody else's: every test has a process of its own.
        let host_ip = Ipv4Addr::new(127, 73, (std::process::id() >> 8) as u8, std::process::id() as u8);
        let restored = |machine_id: Option<&str>| Restored {
            clock_offset: 0.0,
            rng_reseeded: true,
            connections_closed: Some(0),
            machine_id: machine_id.map(str::to_owned),
            hostname: None,
            ssh_host_keys_removed: false,
        };
        for (answer, is_confirmed) in [(restored(None), false), (restored(Some("0")), true)] {
            let listener = tokio::net::TcpListener::bind((host_ip, PORT)).await.unwrap();
            let envd = axum::Router::new()
                .route("/init", axum::routing::post(move || std::future::ready(axum::Json(answer.clone()))));
            let envd = tokio::spawn(axum::serve(listener, envd).into_future());
            let restoring =
                Restoring { kind: RestoreKind::Fork, hostname: None, token: "", metadata: Metadata::default() };
            let done = Guest::new(host_ip, String::new()).restore(&BTreeMap::new(), &restoring).await;
            assert_eq!(done.is_ok(), is_confirmed, "{done:?}");
            assert!(is_confirmed || matches!(done, Err(Error::Unconfirmed(_))), "{done:?}");
            envd.abort();
            let _ = envd.await;
        }
    }

    #[test]
    fn a_guest_path_is_cut_without_being_decoded() {
        let cut = |uri: &'static str| split(&Uri::from_static(uri)).map(|(id, path)| (id, path.as_str().to_owned()));
        assert_eq!(cut("/guest/cl-1/a%2Fb//c/?x=%20"), Some(("cl-1".into(), "/a%2Fb//c/?x=%20".into())));
        assert_eq!(cut("/guest/cl-1"), Some(("cl-1".into(), "/".into())));
        assert_eq!(cut("/guest/cl-1?x=1"), Some(("cl-1".into(), "/?x=1".into())));
        assert_eq!(cut("/other"), None);
    }
}
