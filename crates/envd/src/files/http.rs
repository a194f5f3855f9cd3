//! The routes, and which status an error is.

use super::incoming::Incoming;
use super::place::Owner;
use super::signature::{self, Operation, Signed};
use super::{Error, blocking, compose, download, upload};
use crate::settings::Settings;
use axum::body::Bytes;
use axum::extract::{Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use guest_api::{ACCESS_TOKEN_HEADER, HttpError, WrittenFile};
use headers::{ContentRange, HeaderMapExt};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use rustix::io::Errno;
use serde::Deserialize;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The route that checks for itself who may: a signature in its address does instead of the token.
pub const PATH: &str = "/files";

/// How long an upload may keep silent. A slow client sends something, and one that is gone often does not say so.
pub const IDLE: Duration = Duration::from_secs(60);

/// What the routes share.
#[derive(Clone)]
struct Files {
    settings: Arc<Settings>,
    idle: Duration,
}

/// The routes; an upload from which nothing comes for as long as `idle` is given up.
pub fn router<S: Clone + Send + Sync + 'static>(settings: Arc<Settings>, idle: Duration) -> Router<S> {
    Router::new()
        .route(PATH, get(read).post(write))
        .route("/files/compose", post(join))
        .with_state(Files { settings, idle })
}

/// What stands in the address.
#[derive(Debug, Default, Deserialize)]
pub struct Params {
    pub path: Option<String>,
    username: Option<String>,
    pub signature: Option<String>,
    signature_expiration: Option<i64>,
}

impl Params {
    /// Those of a caller who may do this.
    pub fn of(uri: &Uri, headers: &HeaderMap, settings: &Settings, operation: Operation) -> Result<Params, Error> {
        let Query(params) = Query::<Params>::try_from_uri(uri).map_err(|error| Error::Query(error.body_text()))?;
        let signed = Signed {
            path: params.path.as_deref().unwrap_or_default(),
            username: params.username.as_deref().unwrap_or_default(),
            signature: params.signature.as_deref(),
            expiration: params.signature_expiration,
        };
        let token = headers.get(ACCESS_TOKEN_HEADER).map(HeaderValue::as_bytes);
        signature::check(settings, token, operation, signed)?;
        Ok(params)
    }
}

/// `GET` and `HEAD`.
async fn read(State(files): State<Files>, request: Request) -> Result<Response, Error> {
    let (request, _) = request.into_parts();
    let params = Params::of(&request.uri, &request.headers, &files.settings, Operation::Read)?;
    blocking(move || {
        let owner = Owner::find(&files.settings, params.username.as_deref())?;
        let path = owner.path(params.path.as_deref().unwrap_or_default())?;
        download::answer(&path, &request.headers, request.method == Method::HEAD)
    })
    .await
}

async fn write(State(files): State<Files>, request: Request) -> Result<Json<Vec<WrittenFile>>, Error> {
    let (request, body) = request.into_parts();
    let mut incoming = Incoming::new(&request.headers, body, files.idle);
    let written = async {
        let params = Params::of(&request.uri, &request.headers, &files.settings, Operation::Write)?;
        let Files { settings, .. } = files;
        let username = params.username.clone();
        let owner = blocking(move || Owner::find(&settings, username.as_deref())).await?;
        upload::receive(&request.headers, &owner, params.path.as_deref(), &mut incoming).await
    };
    match written.await {
        Ok(written) => Ok(Json(written)),
        Err(error) => {
            incoming.drain().await;
            Err(error)
        }
    }
}

/// The body is JSON whatever its content type says.
async fn join(State(files): State<Files>, body: Bytes) -> Result<Json<WrittenFile>, Error> {
    let request = serde_json::from_slice(&body).map_err(|error| Error::Json(error.to_string()))?;
    blocking(move || compose::compose(&files.settings, request)).await.map(Json)
}

impl Error {
    fn status(&self) -> StatusCode {
        match self {
            Error::Signature(_) | Error::User(_) => StatusCode::UNAUTHORIZED,
            Error::Query(_)
            | Error::Path(_)
            | Error::Json(_)
            | Error::ContentType
            | Error::ContentEncoding(_)
            | Error::NoPath
            | Error::NoFileName
            | Error::NoFile
            | Error::Duplicate(_)
            | Error::Form(_)
            | Error::FormHead(_)
            | Error::Gzip(_)
            | Error::Broken(_)
            | Error::Metadata(..)
            | Error::NoMetadata(_)
            | Error::NoSources
            | Error::NoDestination
            | Error::SourceIsDestination(_)
            | Error::Directory(_)
            | Error::NotRegular(_) => StatusCode::BAD_REQUEST,
            Error::NotFound(_) => StatusCode::NOT_FOUND,
            Error::NotAcceptable => StatusCode::NOT_ACCEPTABLE,
            Error::Idle(_) => StatusCode::REQUEST_TIMEOUT,
            Error::Precondition => StatusCode::PRECONDITION_FAILED,
            Error::Range(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            Error::Io { source, .. } => of_io(source),
            Error::Users(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

fn of_io(error: &io::Error) -> StatusCode {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC | Errno::DQUOT) => StatusCode::INSUFFICIENT_STORAGE,
        Some(Errno::NOTDIR | Errno::NAMETOOLONG | Errno::LOOP) => StatusCode::BAD_REQUEST,
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => StatusCode::FORBIDDEN,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::warn!(error = &self as &dyn std::error::Error, "a file was not transferred");
        }
        let body = HttpError { code: status.as_u16(), message: self.to_string() };
        let mut response = (status, Json(body)).into_response();
        match self {
            Error::Range(length) => response.headers_mut().typed_insert(ContentRange::unsatisfied_bytes(length)),
            // What may still come on this connection is the rest of the body.
            Error::Idle(_) => {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}
