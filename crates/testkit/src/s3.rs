//! An S3 server of its own on loopback, with its objects in a folder that tests may look into and damage.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::Method;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const BUCKET: &str = "capsules";
const KEY: &str = "key";
const SECRET: &str = "secret";

/// A server with one bucket. It ends when it is dropped.
pub struct S3 {
    root: TempDir,
    address: SocketAddr,
    state: Arc<State>,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    written: AtomicU64,
    read: AtomicU64,
    /// Writes past that many wait; reads past that many.
    writes: watch::Sender<Option<u64>>,
    reads: watch::Sender<Option<u64>>,
    /// Milliseconds that each read takes at least.
    delay: AtomicU64,
    /// What goes wrong, and with how many requests still.
    fault: Mutex<Option<(Fault, u64)>>,
}

/// What a server does in place of what it is asked.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// It answers with that status.
    Status(u16),
    /// It has no such bucket, as S3 says it. That of this crate says that it has no such object.
    NoBucket,
    /// It breaks off in the middle of its answer.
    Cut,
}

impl State {
    /// What goes wrong with the next request.
    fn fault(&self) -> Option<Fault> {
        let mut fault = self.fault.lock().expect("nobody panics with it");
        let (what, left) = fault.as_mut().filter(|(_, left)| *left > 0)?;
        *left -= 1;
        Some(*what)
    }
}

impl S3 {
    /// Starts one.
    pub async fn start() -> Self {
        let root = TempDir::with_prefix("wrenn-s3-").unwrap();
        std::fs::create_dir(root.path().join(BUCKET)).unwrap();
        let state = Arc::new(State::default());
        // No client's end of a connection gets its port while it is stopped: those are at 127.0.0.1.
        let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, service(&root), state.clone()));
        Self { root, address, state, server }
    }

    /// The address of the bucket, or of a part of it.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// What a client needs in its environment.
    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://{}", self.address);
        let variables = [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", "us-east-1"),
        ];
        variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    /// The folder of the bucket's objects: a file for each, at its key.
    pub fn folder(&self) -> PathBuf {
        self.root.path().join(BUCKET)
    }

    /// How many objects were written, and how many were read, so far.
    pub fn counts(&self) -> (u64, u64) {
        (self.state.written.load(Ordering::SeqCst), self.state.read.load(Ordering::SeqCst))
    }

    /// Lets `more` objects be written from now on; who writes another waits until this is called again. `None` lets all.
    pub fn let_write(&self, more: Option<u64>) {
        let written = self.state.written.load(Ordering::SeqCst);
        self.state.writes.send_replace(more.map(|more| written + more));
    }

    /// The same for reading.
    pub fn let_read(&self, more: Option<u64>) {
        let read = self.state.read.load(Ordering::SeqCst);
        self.state.reads.send_replace(more.map(|more| read + more));
    }

    /// Makes every read from now on take that long, as far away stores do.
    pub fn delay_reads(&self, delay: Duration) {
        self.state.delay.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Has that go wrong with so many requests from now on.
    pub fn fail(&self, fault: Fault, requests: u64) {
        *self.state.fault.lock().expect("nobody panics with it") = Some((fault, requests));
    }

    /// Waits until so many objects were written, or are waiting to be.
    pub async fn until_written(&self, count: u64) {
        while self.state.written.load(Ordering::SeqCst) < count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the server and its connections: it is out of reach.
    pub async fn stop(&mut self) {
        self.server.abort();
        let _ = (&mut self.server).await;
    }

    /// Serves again, where it did before.
    pub async fn restart(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.server = tokio::spawn(serve(listener, service(&self.root), self.state.clone()));
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.server.abort();
        // What it has begun to write, it ends, and nobody can wait for that.
        while self.root.path().exists() {
            let _ = std::fs::remove_dir_all(self.root.path());
        }
    }
}

fn service(root: &TempDir) -> S3Service {
    let mut builder = S3ServiceBuilder::new(FileSystem::new(root.path()).unwrap());
    builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
    builder.build()
}

async fn serve(listener: TcpListener, service: S3Service, state: Arc<State>) {
    // Dropped with this task, and with it every connection.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (service, state) = (service.clone(), state.clone());
        let respond = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let (service, state) = (service.clone(), state.clone());
            async move {
                match state.fault() {
                    Some(Fault::Status(status)) => return Ok(refused(status, "")),
                    Some(Fault::NoBucket) => return Ok(refused(404, "<Error><Code>NoSuchBucket</Code></Error>")),
                    Some(Fault::Cut) => return Ok(cut(answer(&service, request).await).await),
                    None => {}
                }
                let (count, limit) = match *request.method() {
                    Method::PUT => (&state.written, &state.writes),
                    Method::GET => (&state.read, &state.reads),
                    _ => return Ok::<_, Infallible>(answer(&service, request).await),
                };
                if *request.method() == Method::GET {
                    tokio::time::sleep(Duration::from_millis(state.delay.load(Ordering::SeqCst))).await;
                }
                let number = count.fetch_add(1, Ordering::SeqCst);
                let mut limit = limit.subscribe();
                let may = limit.wait_for(|limit| limit.is_none_or(|limit| number < limit)).await;
                drop(may.expect("the state is held"));
                Ok(answer(&service, request).await)
            }
        });
        connections.spawn(async move {
            let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), respond).await;
        });
    }
}

fn refused(status: u16, why: &str) -> s3s::HttpResponse {
    let body = s3s::Body::from(why.to_owned());
    hyper::Response::builder().status(status).body(body).expect("a test gives a status")
}

/// The first half of an answer.
async fn cut(answer: s3s::HttpResponse) -> s3s::HttpResponse {
    let (head, body) = answer.into_parts();
    let body = axum::body::to_bytes(Body::new(body), usize::MAX).await.expect("it is whole");
    let half = Ok(body.slice(..body.len() / 2));
    let broken = Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
    let body = s3s::Body::http_body_unsync(Body::from_stream(futures::stream::iter([half, broken])));
    s3s::HttpResponse::from_parts(head, body)
}

async fn answer(service: &S3Service, request: hyper::Request<hyper::body::Incoming>) -> s3s::HttpResponse {
    let request = request.map(s3s::Body::from);
    service.call(request).await.unwrap_or_else(|error| panic!("the S3 server failed: {error:?}"))
}
