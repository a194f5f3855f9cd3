//! A host agent whose capsules are processes: the whole contract over a real socket, without a virtual machine. What is inside a
//! capsule is a real envd; only its life is imagined. A pause stops its processes where they are. A fork, and a capsule made from
//! a template of another, gets a fresh envd: that what is in a guest is copied, the fake does not imitate.

mod guest;
mod life;
mod ports;
mod service;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use agent_api::{Capsule, CapsuleState, Egress, Endpoint, HostAgentExt, REFUSAL_HEADER, Template, Transport};
use api::CapsuleId;
use axum::extract::{self, Request, State};
use axum::response::{IntoResponse, Response};
use axum::serve::ListenerExt;
use connectrpc::{ConnectError, ErrorCode};
use guest_api::process::{ListRequest, ProcessInfo};
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use guest::Guest;

/// The image every fake agent has.
pub const IMAGE: &str = "minimal";
/// The memory every fake host has.
const MEMORY_MIB: u32 = 65_536;

/// A listener's task, and what ends it when it is dropped.
type Server = (JoinHandle<()>, oneshot::Sender<()>);

/// A fake agent. Dropping it closes its socket and forgets everything.
pub struct FakeAgent {
    inner: Arc<Inner>,
    path: PathBuf,
    server: Option<Server>,
    tcp: Option<Server>,
    _dir: TempDir,
}

pub(crate) struct Inner {
    capsules: Mutex<BTreeMap<String, Entry>>,
    templates: Mutex<BTreeMap<String, Template>>,
    /// The object store: what hibernates.
    stored: Mutex<BTreeMap<String, Entry>>,
    /// Whether what is under way may go on past STARTING, PAUSING and RESUMING.
    open: watch::Sender<bool>,
    /// What the next creates answer instead of working.
    failure: Mutex<Option<ErrorCode>>,
    /// What the next pauses, resumes, forks and snapshots answer instead of working.
    change_failure: Mutex<Option<ErrorCode>>,
    /// How many capsules may run.
    room: Mutex<usize>,
    /// How many children of the next fork do not start.
    failing_children: Mutex<usize>,
    connections: AtomicUsize,
    /// Requests to guests that are not answered.
    unanswered: AtomicUsize,
    creates: watch::Sender<usize>,
    destroys: watch::Sender<usize>,
    pauses: watch::Sender<usize>,
}

struct Entry {
    capsule: Capsule,
    /// Until it ends.
    guest: Option<Arc<Guest>>,
    /// Held by what moves it through its life, but for its end, which waits for nothing.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl FakeAgent {
    /// Listens on a socket of its own.
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("agent.sock");
        let inner = Arc::new(Inner {
            capsules: Mutex::default(),
            templates: Mutex::default(),
            stored: Mutex::default(),
            open: watch::Sender::new(true),
            failure: Mutex::default(),
            change_failure: Mutex::default(),
            room: Mutex::new(usize::MAX),
            failing_children: Mutex::default(),
            connections: AtomicUsize::new(0),
            unanswered: AtomicUsize::new(0),
            creates: watch::Sender::new(0),
            destroys: watch::Sender::new(0),
            pauses: watch::Sender::new(0),
        });
        let server = Some(listen(&inner, &path));
        Self { inner, path, server, tcp: None, _dir: dir }
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.path.clone())
    }

    /// Listens on a TCP port too, and answers that address.
    pub async fn listen_tcp(&mut self) -> Endpoint {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        self.tcp = Some(serve(&self.inner, listener));
        format!("http://{address}").parse().expect("an address is an endpoint")
    }

    /// Closes the socket, as an agent does that is restarted; its capsules run on.
    pub async fn stop(&mut self) {
        let (server, stop) = self.server.take().expect("it listens");
        drop(stop);
        server.await.expect("the server does not panic");
        std::fs::remove_file(&self.path).expect("the socket is ours");
    }

    /// Listens again after [`FakeAgent::stop`].
    pub async fn resume(&mut self) {
        assert!(self.server.is_none(), "it listens already");
        self.server = Some(listen(&self.inner, &self.path));
    }

    /// Creates, pauses and resumes begun from now on stay STARTING, PAUSING and RESUMING until [`FakeAgent::release`].
    pub fn hold(&self) {
        self.inner.open.send_replace(false);
    }

    /// Lets what is held go on.
    pub fn release(&self) {
        self.inner.open.send_replace(true);
    }

    /// Creates from now on answer this code and leave nothing; `None` heals the host.
    pub fn fail_creates(&self, code: Option<ErrorCode>) {
        *self.inner.failure.lock().expect("no panics under this lock") = code;
    }

    /// Pauses, resumes, forks and snapshots from now on answer this code and change nothing; `None` heals the host.
    pub fn fail_changes(&self, code: Option<ErrorCode>) {
        *self.inner.change_failure.lock().expect("no panics under this lock") = code;
    }

    /// No more than that many capsules may run from now on.
    pub fn make_room(&self, capsules: usize) {
        *self.inner.room.lock().expect("no panics under this lock") = capsules;
    }

    /// The last so many children of the next fork do not start.
    pub fn fail_children(&self, count: usize) {
        *self.inner.failing_children.lock().expect("no panics under this lock") = count;
    }

    /// The host pauses the capsule by itself, as when nothing happened for its timeout.
    pub async fn doze(&self, id: CapsuleId) {
        life::pause(&self.inner, &id.to_string(), "nothing happened for 60 s").await.expect("it can be paused");
    }

    /// The names of the templates that were made of capsules here.
    pub fn templates(&self) -> Vec<String> {
        self.inner.templates.lock().expect("no panics under this lock").keys().cloned().collect()
    }

    /// The host has put what is paused into the object store too.
    pub fn upload(&self, id: CapsuleId) {
        life::upload(&self.inner, &id.to_string());
    }

    /// The capsules that the object store has.
    pub fn stored(&self) -> Vec<String> {
        self.inner.stored.lock().expect("no panics under this lock").keys().cloned().collect()
    }

    /// The capsule ends by itself.
    pub fn end(&self, id: CapsuleId, state: CapsuleState, reason: &str) {
        self.inner.change(&id.to_string(), state, reason);
    }

    /// The host forgets the capsule altogether.
    pub fn lose(&self, id: CapsuleId) {
        self.inner.capsules().remove(&id.to_string());
    }

    /// Someone else's capsule appears.
    pub fn put(&self, id: CapsuleId, state: CapsuleState, generation: u64) {
        let capsule = Capsule { id: id.to_string(), state: state.into(), generation, ..Default::default() };
        self.inner.capsules().insert(id.to_string(), Entry::new(capsule));
    }

    /// What a capsule may reach outside.
    pub fn egress(&self, id: CapsuleId) -> Egress {
        let capsules = self.inner.capsules();
        let spec = capsules.get(&id.to_string()).and_then(|entry| entry.capsule.spec.as_option().cloned());
        spec.and_then(|spec| spec.egress.into_option()).unwrap_or_default()
    }

    /// Waits until a capsule may reach that.
    pub async fn until_egress(&self, id: CapsuleId, egress: &Egress) {
        let so = async {
            while self.egress(id) != *egress {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), so).await.expect("it reaches what it should");
    }

    /// The ids of capsules that hold anything: every one that has not ended.
    pub fn alive(&self) -> Vec<String> {
        let alive = |state: &CapsuleState| {
            !matches!(
                state,
                CapsuleState::CAPSULE_STATE_STOPPED
                    | CapsuleState::CAPSULE_STATE_FAILED
                    | CapsuleState::CAPSULE_STATE_HIBERNATED
            )
        };
        let capsules = self.inner.capsules();
        capsules
            .values()
            .filter(|entry| entry.capsule.state.as_known().as_ref().is_some_and(alive))
            .map(|e| e.capsule.id.clone())
            .collect()
    }

    /// The processes that run in a capsule; none when nobody has asked it for anything yet.
    pub async fn processes(&self, id: CapsuleId) -> Vec<ProcessInfo> {
        let processes = Transport::new(self.endpoint()).guest(id);
        let listed = processes.list(ListRequest::default()).await.expect("a running capsule lists its processes");
        listed.into_owned().processes
    }

    /// How many requests to guests wait for their answer.
    pub fn unanswered(&self) -> usize {
        self.inner.unanswered.load(Ordering::Relaxed)
    }

    /// How many connections were ever taken.
    pub fn connections(&self) -> usize {
        self.inner.connections.load(Ordering::Relaxed)
    }

    /// How often a create has arrived, and a way to wait for the next.
    pub fn creates(&self) -> watch::Receiver<usize> {
        self.inner.creates.subscribe()
    }

    /// How often a destroy has been done, and a way to wait for the next.
    pub fn destroys(&self) -> watch::Receiver<usize> {
        self.inner.destroys.subscribe()
    }

    /// How often a pause has been asked for, and a way to wait for the next.
    pub fn pauses(&self) -> watch::Receiver<usize> {
        self.inner.pauses.subscribe()
    }
}

/// Serves on the socket until the sender is dropped and the last call is answered.
fn listen(inner: &Arc<Inner>, path: &Path) -> Server {
    serve(inner, UnixListener::bind(path).expect("a socket in our own directory"))
}

fn serve<L>(inner: &Arc<Inner>, listener: L) -> Server
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    let rpc = Arc::new(service::Service(inner.clone())).register(connectrpc::Router::new());
    let router = axum::Router::new()
        .route("/guest/{id}/{*path}", axum::routing::any(guest))
        .route("/proxy/{*path}", axum::routing::any(ports::forward))
        .route("/tcp/{id}/{port}", axum::routing::any(ports::tcp))
        .with_state(inner.clone())
        .fallback_service(rpc.into_axum_service());
    let counted = inner.clone();
    let listener = listener.tap_io(move |_| {
        counted.connections.fetch_add(1, Ordering::Relaxed);
    });
    let (stop, stopped) = oneshot::channel();
    let server = tokio::spawn(async move {
        let stopped = async {
            let _ = stopped.await;
        };
        axum::serve(listener, router).with_graceful_shutdown(stopped).await.expect("serving does not fail");
    });
    (server, stop)
}

impl Entry {
    fn new(capsule: Capsule) -> Self {
        let guest = Guest::new(capsule.spec.clone().into_option().unwrap_or_default());
        Self { capsule, guest: Some(Arc::new(guest)), turn: Arc::default() }
    }
}

impl Inner {
    fn capsules(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.capsules.lock().expect("no panics under this lock")
    }

    /// Moves a capsule that is there to a new state, and answers it as it is then.
    fn change(&self, id: &str, state: CapsuleState, reason: &str) -> Option<Capsule> {
        let mut capsules = self.capsules();
        let entry = capsules.get_mut(id)?;
        if entry.capsule.state != state {
            entry.capsule.state = state.into();
            entry.capsule.generation += 1;
            entry.capsule.reason = reason.into();
            entry.capsule.uploaded = false;
            if life::ended(&entry.capsule) {
                entry.guest = None;
            }
        }
        Some(entry.capsule.clone())
    }
}

/// What the agent does with guest traffic: find the guest, take its prefix off, and pass on.
async fn guest(
    State(inner): State<Arc<Inner>>,
    extract::Path((id, _)): extract::Path<(String, String)>,
    mut request: Request,
) -> Response {
    let guest = match inner.capsules().get_mut(&id) {
        Some(Entry { capsule, guest: Some(guest), .. }) if capsule.state == CapsuleState::CAPSULE_STATE_RUNNING => {
            capsule.last_active_unix_ms = service::now_ms();
            guest.clone()
        }
        Some(Entry { capsule, .. }) if capsule.state == CapsuleState::CAPSULE_STATE_PAUSED => {
            let mut response = refusal(ConnectError::failed_precondition(format!("capsule {id} is paused")));
            *response.status_mut() = axum::http::StatusCode::CONFLICT;
            return response;
        }
        _ => return refusal(ConnectError::not_found(format!("no capsule {id} runs here"))),
    };
    let whole = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    let path = whole.strip_prefix(&format!("/guest/{id}")).expect("an id has nothing to decode");
    *request.uri_mut() = path.parse().expect("the rest of a path is a path");
    let _counted = Unanswered::new(inner);
    guest.forward(request).await.unwrap_or_else(|error| refusal(ConnectError::unavailable(error.to_string())))
}

/// Counts a request until its answer begins or nobody waits for it.
struct Unanswered(Arc<Inner>);

impl Unanswered {
    fn new(inner: Arc<Inner>) -> Self {
        inner.unanswered.fetch_add(1, Ordering::Relaxed);
        Self(inner)
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.unanswered.fetch_sub(1, Ordering::Relaxed);
    }
}

fn refusal(error: ConnectError) -> Response {
    let mut response = error.into_response();
    response.headers_mut().insert(REFUSAL_HEADER, axum::http::HeaderValue::from_static("agent"));
    response
}
