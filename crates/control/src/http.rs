//! REST: shapes in, shapes out, and the only place that knows status numbers. One file per resource.

mod answers;
mod body;
mod caller;
mod capsules;
mod edge;
mod error;
mod events;
mod exec;
mod files;
mod leftover;
mod meta;
mod metrics;
mod network;
mod processes;
mod pty;
mod session;
mod socket;
mod streams;
mod tcp;
mod templates;
mod traffic;
mod upload;
mod utf8;

use std::any::Any;
use std::sync::Arc;

use api::ErrorCode;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::response::IntoResponse;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::error::Error;
use crate::op::Context;

/// What handlers work with.
#[derive(Clone)]
pub struct App {
    pub ctx: Arc<Context>,
    pub version: Arc<str>,
}

fn documented() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(meta::document())
        .routes(routes!(meta::health))
        .routes(routes!(meta::openapi))
        .routes(routes!(capsules::create, capsules::list))
        .routes(routes!(capsules::get, capsules::destroy))
        .routes(routes!(capsules::ping))
        .routes(routes!(capsules::pause))
        .routes(routes!(capsules::hibernate))
        .routes(routes!(capsules::resume))
        .routes(routes!(capsules::fork))
        .routes(routes!(traffic::restrict, traffic::open))
        .routes(routes!(network::set))
        .routes(routes!(tcp::connect))
        .routes(routes!(metrics::read))
        .routes(routes!(exec::exec))
        .routes(routes!(streams::exec))
        .routes(routes!(processes::list))
        .routes(routes!(processes::kill))
        .routes(routes!(streams::follow))
        .routes(routes!(pty::pty))
        .routes(routes!(files::list))
        .routes(routes!(files::mkdir))
        .routes(routes!(files::remove))
        .routes(routes!(files::read))
        .routes(routes!(files::write))
        .routes(routes!(files::stream_read))
        .routes(routes!(files::stream_write))
        .routes(routes!(events::stream))
        .routes(routes!(templates::create, templates::list))
        .routes(routes!(templates::delete))
}

/// The description of every route.
fn description() -> OpenApi {
    documented().into_openapi()
}

/// Everything that one listener serves: capsules under their hosts, the API under every other.
pub fn router(app: App) -> Router {
    let front = edge::Front { api: api(app.clone()), app };
    Router::new().fallback(edge::front).with_state(front).layer(CatchPanicLayer::custom(panicked))
}

/// Every route of the API, at the root and under `/api`.
fn api(app: App) -> Router {
    let (routes, _) = documented().split_for_parts();
    let routes = routes.method_not_allowed_fallback(wrong_method);
    Router::new()
        .merge(routes.clone())
        .nest("/api", routes)
        .fallback(nowhere)
        .layer(axum::middleware::map_request(leftover::read_on))
        // Bodies are bounded by the extractor, which answers in JSON.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(app)
}

async fn nowhere(uri: axum::http::Uri) -> Error {
    Error::new(ErrorCode::NotFound, format!("there is nothing at {}", uri.path()))
}

async fn wrong_method(method: axum::http::Method, uri: axum::http::Uri) -> Error {
    Error::new(ErrorCode::MethodNotAllowed, format!("{} does not answer to {method}", uri.path()))
}

fn panicked(panic: Box<dyn Any + Send>) -> axum::response::Response {
    let what = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = what.unwrap_or("not a text"), "a handler panicked");
    Error::new(ErrorCode::InternalError, "the request met a fault of the platform").into_response()
}

#[cfg(test)]
mod tests;
