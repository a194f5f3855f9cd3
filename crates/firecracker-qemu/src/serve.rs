//! The API's socket and the life of this process: requests in, one exit code out.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, SERVER};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, mpsc};

use crate::api;
use crate::args::{Args, VERSION};
use crate::log::chain;
use crate::machine::{Error as Fault, Machine, Reply};
use crate::mmds;

/// A failed load ends the process once its answer was written, or after this.
const LAST_ANSWER: Duration = Duration::from_secs(2);

/// How long the end of this process waits for an action that is going on.
const LAST_ACTION: Duration = Duration::from_secs(2);

/// Why the API was not served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {path}")]
    Listen { path: PathBuf, source: io::Error },
    #[error("cannot watch for signals")]
    Signals(#[source] io::Error),
}

/// Serves the API until the microVM or this process ends, and returns the exit code.
pub async fn run(args: Args) -> Result<u8, Error> {
    tracing::info!("Firecracker {VERSION}, id {}", args.id);
    if args.no_seccomp {
        tracing::warn!("--no-seccomp has no effect: QEMU's own filter stays on");
    }
    let path = args.api_sock.clone();
    let listener = UnixListener::bind(&path).map_err(|source| Error::Listen { path: path.clone(), source })?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    let (ends, mut ended) = mpsc::unbounded_channel();
    let (give_up, mut gave_up) = mpsc::channel(1);
    let machine = Arc::new(Mutex::new(Machine::new(&args, ends)));
    let api = Api {
        machine: Arc::clone(&machine),
        max_body: args.http_api_max_payload_size,
        failed: Arc::default(),
        give_up,
    };
    let accepting = tokio::spawn(accept(listener, api));
    let code = tokio::select! {
        Some(end) = ended.recv() => match end.guest_shut_down {
            true => {
                tracing::info!("the guest shut down");
                0
            }
            false => {
                tracing::error!("QEMU ended by itself: {}", end.last_words);
                1
            }
        },
        _ = gave_up.recv() => 1,
        _ = terminate.recv() => 128 + 15,
        _ = interrupt.recv() => 128 + 2,
    };
    accepting.abort();
    // QEMU holds the tap until it is gone. An action in the way is not waited for: QEMU then dies with this process.
    if let Ok(mut machine) = tokio::time::timeout(LAST_ACTION, machine.lock()).await {
        machine.stop().await;
    }
    // It is ours and nobody answers on it any more; that it is gone already is fine.
    let _ = std::fs::remove_file(&path);
    Ok(code)
}

#[derive(Clone)]
struct Api {
    machine: Arc<Mutex<Machine>>,
    max_body: usize,
    /// A load failed: this process ends with its answer.
    failed: Arc<AtomicBool>,
    give_up: mpsc::Sender<()>,
}

async fn accept(listener: UnixListener, api: Api) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(converse(stream, api.clone()))),
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, api: Api) {
    let answer = service_fn(|request| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(api.answer(request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = connection.await {
        tracing::debug!("API connection: {error}");
    }
    if api.failed.load(Ordering::Acquire) {
        // The process is ending already when nobody receives.
        let _ = api.give_up.send(()).await;
    }
}

impl Api {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        let body = match Limited::new(body, self.max_body).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => {
                let limit = self.max_body;
                let message = format!("Request payload is larger than the limit of {limit} allowed by server.");
                return fault(StatusCode::PAYLOAD_TOO_LARGE, &message);
            }
            Err(error) => return fault(StatusCode::BAD_REQUEST, &format!("Cannot read the request: {error}")),
        };
        let action = match api::parse(&head.method, &path, &body) {
            Ok(action) => action,
            Err(error) => {
                tracing::warn!(method = %head.method, path, "refused: {error}");
                return fault(StatusCode::BAD_REQUEST, &error.to_string());
            }
        };
        // A client that hangs up must not leave an action half done, so each runs in a task of its own.
        let machine = Arc::clone(&self.machine);
        let acting = tokio::spawn(async move { machine.lock().await.handle(action).await });
        let outcome = match acting.await {
            Ok(outcome) => outcome,
            Err(_) => return fault(StatusCode::BAD_REQUEST, "This process is ending."),
        };
        match outcome {
            Ok(Reply::Empty) => {
                tracing::info!(method = %head.method, path, "done");
                respond(StatusCode::NO_CONTENT, Bytes::new())
            }
            Ok(Reply::Json(value)) => respond(StatusCode::OK, value.to_string().into()),
            Err(error) => {
                tracing::error!(method = %head.method, path, "failed: {}", chain(&error));
                self.refuse(&error)
            }
        }
    }

    fn refuse(&self, error: &Fault) -> Response<Full<Bytes>> {
        let status = match error {
            Fault::Mmds(mmds::Error::TooLarge { .. }) => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::BAD_REQUEST,
        };
        let mut response = fault(status, &chain(error));
        if let Fault::Load(_) = error {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            self.failed.store(true, Ordering::Release);
            let give_up = self.give_up.clone();
            tokio::spawn(async move {
                tokio::time::sleep(LAST_ANSWER).await;
                let _ = give_up.send(()).await;
            });
        }
        response
    }
}

fn fault(status: StatusCode, message: &str) -> Response<Full<Bytes>> {
    respond(status, json!({ "fault_message": message }).to_string().into())
}

fn respond(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Firecracker API"));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
