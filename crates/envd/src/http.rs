//! The HTTP server: plain endpoints, the Connect services, and the token check in front of both.

use crate::cgroup::Cgroups;
use crate::control::{self, INIT};
use crate::files::http as files;
use crate::metrics::Metrics;
use crate::mmds::Mmds;
use crate::reaper::Reaper;
use crate::settings::Settings;
use crate::{VERSION, filesystem, process};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::ListenerExt;
use axum::{Json, Router};
use connectrpc::{CompressionPolicy, ConnectRpcService, Limits};
use guest_api::{ACCESS_TOKEN_HEADER, Health, HttpError};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tower_http::cors::{Any, CorsLayer};

/// The largest Connect message: what a caller may send as input at once. Bytes.
const MESSAGE_BYTES: usize = 16 * 1024 * 1024;
/// How long, and how much of, a request's body is read that is refused whatever it says.
const REFUSED_FOR: Duration = Duration::from_secs(1);
const REFUSED_BYTES: usize = 64 * 1024;
const HEALTH: &str = "/health";
/// How long a browser may remember that it may call.
const PREFLIGHT: Duration = Duration::from_secs(7200);

/// What the endpoints share.
#[derive(Clone)]
pub struct Context {
    pub settings: Arc<Settings>,
    pub metrics: Arc<Metrics>,
    pub mmds: Arc<Mmds>,
    pub cgroups: Arc<Cgroups>,
    pub reaper: Arc<Reaper>,
    /// envd is init: the machine's clock, names, connections and processes are its to change.
    pub is_init: bool,
    /// `/init` and what belongs to it, one at a time.
    pub turn: Arc<tokio::sync::Mutex<()>>,
}

/// The whole server as one router.
pub fn router(processes: process::rpc::Service, files: filesystem::rpc::Service, context: Context) -> Router {
    let limits =
        Limits::default().with_max_message_size(MESSAGE_BYTES).with_max_request_body_size(MESSAGE_BYTES + 1024);
    // The host is one hop away: compressing would cost a slow guest far more than it saves.
    let services = connectrpc::Router::new().add_service(Arc::new(processes)).add_service(Arc::new(files));
    let connect =
        ConnectRpcService::new(services).with_compression_policy(CompressionPolicy::disabled()).with_limits(limits);
    Router::new()
        .route(HEALTH, get(health))
        .merge(control::routes())
        .route("/envs", get(envs))
        .route("/metrics", get(metrics))
        .merge(files::router(Arc::clone(&context.settings), files::IDLE))
        .route_service("/process.Process/{method}", connect.clone())
        .route_service("/filesystem.Filesystem/{method}", connect)
        .fallback(|| async { error(StatusCode::NOT_FOUND, "not found") })
        .method_not_allowed_fallback(|| async { error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed") })
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&context.settings), authenticate))
        // Outside of the token, which a browser's preflight does not carry.
        .layer(cors())
        .with_state(context)
}

/// Any page may call; what it may do is the token's matter.
fn cors() -> CorsLayer {
    let layer = CorsLayer::new().allow_origin(Any).allow_methods(Any).allow_headers(Any).expose_headers(Any);
    layer.max_age(PREFLIGHT)
}

/// Once a token is set, everything needs it but the paths that must work without, and the one that checks for itself.
async fn authenticate(State(settings): State<Arc<Settings>>, request: Request, next: Next) -> Response {
    let open = matches!(
        (request.method(), request.uri().path()),
        (&Method::GET, HEALTH) | (&Method::POST, INIT) | (&Method::GET | &Method::HEAD | &Method::POST, files::PATH)
    );
    let token = request.headers().get(ACCESS_TOKEN_HEADER).map(HeaderValue::as_bytes);
    if open || settings.admits(token) {
        next.run(request).await
    } else {
        // A caller still busy sending would see a broken connection in place of the answer.
        let _ = tokio::time::timeout(REFUSED_FOR, axum::body::to_bytes(request.into_body(), REFUSED_BYTES)).await;
        error(StatusCode::UNAUTHORIZED, "missing or wrong access token")
    }
}

async fn health() -> Response {
    no_store(Json(Health { version: VERSION.to_owned() }))
}

async fn envs(State(context): State<Context>) -> Response {
    no_store(Json(context.settings.defaults().env))
}

async fn metrics(State(context): State<Context>) -> Response {
    match context.metrics.read() {
        Ok(values) => no_store(Json(values)),
        Err(failure) => error(StatusCode::INTERNAL_SERVER_ERROR, &format!("cannot read metrics: {failure}")),
    }
}

pub(crate) fn no_store(response: impl IntoResponse) -> Response {
    ([(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))], response).into_response()
}

pub(crate) fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(HttpError { code: status.as_u16(), message: message.to_owned() })).into_response()
}

/// Serves until the listener fails. Small writes leave at once: they are somebody's keystrokes.
pub async fn serve(listener: tokio::net::TcpListener, router: Router) -> std::io::Result<()> {
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
    });
    axum::serve(listener, router.into_make_service_with_connect_info::<SocketAddr>()).await
}
