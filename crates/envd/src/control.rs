//! The routes that only the agent calls: `/init`, those of a snapshot and the freeze family. Like all but a few they need the
//! token ([`crate::http`]); `/init`, which sets it, has rules of its own ([`guest_api::Init`]).
//!
//! What touches the machine rather than envd is refused (501) where envd is not init.

use crate::http::{Context, error, no_store};
use crate::settings::Applied;
use crate::{VERSION, clock, freeze, snapshot};
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use guest_api::{ACCESS_TOKEN_HEADER, Init, VERSION_HEADER};
use serde::Deserialize;
use sha2::{Digest, Sha512};
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub const INIT: &str = "/init";
/// How long an `/init` that begins something waits to learn the guest's name, so that every process has it.
const NAME: Duration = Duration::from_millis(250);
/// How long freezing may take unless the caller says otherwise.
const FREEZE: Duration = Duration::from_millis(1000);

pub fn routes() -> Router<Context> {
    Router::new()
        .route(INIT, post(init))
        .route("/snapshot/prepare", post(prepare))
        .route("/snapshot/warm-up", post(warm_up))
        .route("/freeze", post(freeze_processes))
        .route("/unfreeze", post(unfreeze_processes))
        .route("/fsfreeze", post(|State(context): State<Context>| file_system(context, true)))
        .route("/fsthaw", post(|State(context): State<Context>| file_system(context, false)))
        .route("/collapse", post(collapse))
}

/// The body is JSON whatever its content type says; none at all changes nothing.
async fn init(
    State(context): State<Context>,
    ConnectInfo(caller): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let init = match body.as_ref() {
        [] => Init::default(),
        body => match serde_json::from_slice::<Init>(body) {
            Ok(init) => init,
            Err(reason) => return error(StatusCode::BAD_REQUEST, &format!("invalid body: {reason}")),
        },
    };
    let _turn = context.turn.lock().await;
    if !is_vouched_for(&context, &headers, init.access_token.as_deref()).await {
        return error(StatusCode::UNAUTHORIZED, "access token already set");
    }
    if init.restore.is_some() {
        return restore(&context, caller, init).await;
    }
    if context.is_init
        && let Err(failure) = freeze::thaw_all(&context.cgroups)
    {
        return failed("cannot thaw", &failure);
    }
    let timestamp = init.timestamp;
    if context.settings.apply(init) == Applied::Yes
        && let Some(host) = timestamp.filter(|_| context.is_init)
        && let Err(failure) = clock::follow(host)
    {
        return failed("cannot set the clock", &failure);
    }
    no_store((StatusCode::NO_CONTENT, version()))
}

async fn restore(context: &Context, caller: SocketAddr, mut init: Init) -> Response {
    let Some(restore) = init.restore.take() else { return error(StatusCode::BAD_REQUEST, "restore is missing") };
    let Some(host_time) = init.timestamp else { return error(StatusCode::BAD_REQUEST, "restore needs timestamp") };
    let metadata = restore.metadata.clone();
    let plan = match snapshot::Plan::new(restore) {
        Ok(plan) => plan,
        Err(refused) => return error(StatusCode::BAD_REQUEST, &refused.to_string()),
    };
    if !context.is_init {
        return not_init();
    }
    // A file system that was frozen first: what follows writes to it. Processes last: until then they would be twins.
    let reaper = Arc::clone(&context.reaper);
    let renewed = tokio::task::spawn_blocking(move || {
        freeze::thaw_file_system().map_err(snapshot::Error::Thaw)?;
        plan.carry_out(host_time, caller, &reaper)
    });
    let restored = match renewed.await {
        Ok(Ok(restored)) => restored,
        Ok(Err(failure)) => return failed("not restored", &failure),
        Err(failure) => return failed("not restored", &failure),
    };
    context.settings.apply_anew(init);
    if let Some(metadata) = metadata {
        context.mmds.know(&context.settings, metadata);
    } else {
        context.mmds.forget();
        let (mmds, settings) = (Arc::clone(&context.mmds), Arc::clone(&context.settings));
        tokio::spawn(async move { mmds.learn(&settings).await });
        context.mmds.wait(NAME).await;
    }
    if let Err(failure) = context.cgroups.freeze(false) {
        return failed("cannot thaw", &failure);
    }
    no_store((StatusCode::OK, version(), Json(restored)))
}

/// Whether the caller may set `offered`, or call at all; the rules are [`Init`]'s.
async fn is_vouched_for(context: &Context, headers: &HeaderMap, offered: Option<&str>) -> bool {
    let settings = &context.settings;
    let offered = offered.filter(|token| !token.is_empty());
    let header = headers.get(ACCESS_TOKEN_HEADER).map(HeaderValue::as_bytes);
    if settings.has_token() && (settings.admits(header) || settings.admits(offered.map(str::as_bytes))) {
        return true;
    }
    let hash = match settings.has_token() {
        true => context.mmds.token_hash().await,
        false => context.mmds.wait(NAME).await.and_then(|metadata| metadata.access_token_hash),
    };
    match hash {
        Some(hash) => offered.is_some_and(|token| hex::encode(Sha512::digest(token)).eq_ignore_ascii_case(&hash)),
        None => !settings.has_token(),
    }
}

async fn prepare() -> Response {
    match tokio::task::spawn_blocking(snapshot::prepare).await {
        Ok(()) => no_store(StatusCode::NO_CONTENT),
        Err(failure) => failed("cannot write the file systems", &failure),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Freeze {
    max_wait_ms: Option<u64>,
}

async fn warm_up(State(context): State<Context>) -> Response {
    if !context.is_init {
        return not_init();
    }
    snapshot::first_command(&context.reaper).await;
    no_store(StatusCode::NO_CONTENT)
}

async fn freeze_processes(State(context): State<Context>, query: Result<Query<Freeze>, QueryRejection>) -> Response {
    let Ok(Query(query)) = query else {
        return error(StatusCode::BAD_REQUEST, "maxWaitMs must be a number of milliseconds");
    };
    if !context.is_init {
        return not_init();
    }
    let limit = query.max_wait_ms.map_or(FREEZE, Duration::from_millis);
    match freeze::processes(&context.cgroups, limit).await {
        Ok(true) => no_store(StatusCode::NO_CONTENT),
        Ok(false) => error(StatusCode::SERVICE_UNAVAILABLE, "a process did not hold still in time; all go on"),
        Err(failure) => failed("cannot freeze processes", &failure),
    }
}

async fn unfreeze_processes(State(context): State<Context>) -> Response {
    done(&context, "cannot let processes go on", context.cgroups.freeze(false))
}

async fn file_system(context: Context, frozen: bool) -> Response {
    if !context.is_init {
        return not_init();
    }
    let result = tokio::task::spawn_blocking(move || freeze::file_system(frozen)).await;
    done(&context, "cannot hold or release the file system", result.map_err(io::Error::other).flatten())
}

async fn collapse(State(context): State<Context>) -> Response {
    let result = tokio::task::spawn_blocking(freeze::collapse).await;
    done(&context, "cannot collapse memory", result.map_err(io::Error::other).flatten())
}

fn done(context: &Context, what: &str, result: io::Result<()>) -> Response {
    match result {
        _ if !context.is_init => not_init(),
        Ok(()) => no_store(StatusCode::NO_CONTENT),
        Err(failure) => failed(what, &failure),
    }
}

fn version() -> [(HeaderName, HeaderValue); 1] {
    [(HeaderName::from_static(VERSION_HEADER), HeaderValue::from_static(VERSION))]
}

fn not_init() -> Response {
    error(StatusCode::NOT_IMPLEMENTED, "envd is not this machine's init")
}

fn failed(what: &str, failure: &dyn Error) -> Response {
    let mut message = format!("{what}: {failure}");
    let mut source = failure.source();
    while let Some(reason) = source {
        message.push_str(&format!(": {reason}"));
        source = reason.source();
    }
    tracing::warn!("{message}");
    error(StatusCode::INTERNAL_SERVER_ERROR, &message).into_response()
}
