//! The server behind the proxies, and our proxy: this program again, as a process of its own.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::body::Body;
use axum::response::IntoResponse;
use axum::routing::any;
use bytes::Bytes;
use clap::Subcommand;
use http::header::{CONNECTION, HOST, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use proxy::{Answer, BoxBody, Upstream, boxed};
use tokio::net::TcpListener;

use crate::client::{HOST as OURS, LARGE_MIB};

/// What this program does when it is its own child.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// The server.
    Upstream,
    /// Our proxy in front of one.
    Ours {
        /// Where that is.
        upstream: SocketAddr,
    },
}

/// A process that ends with this value, with all that it started.
pub struct Process(pub Child);

impl Process {
    /// Starts it in a group of its own.
    pub fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_owned();
        let child = command.process_group(0).stdin(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("starting {}", program.display()))?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(group) = rustix::process::Pid::from_raw(self.0.id() as i32) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

/// Starts this program in that role, and learns where it listens.
pub fn spawn(role: &[&str]) -> Result<(Process, SocketAddr)> {
    let mut process = Process::start(Command::new(std::env::current_exe()?).args(role).stdout(Stdio::piped()))?;
    let mut line = String::new();
    BufReader::new(process.0.stdout.as_mut().context("it is piped")?).read_line(&mut line)?;
    Ok((process, line.trim().parse()?))
}

/// Does what the role is, for ever.
pub fn play(role: Role) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        writeln!(std::io::stdout(), "{address}")?;
        match role {
            Role::Upstream => {
                let small = Bytes::from(vec![b'x'; 1024]);
                let large = Bytes::from(vec![b'x'; (LARGE_MIB as usize) << 20]);
                let router = axum::Router::new()
                    .route("/small", any(move || std::future::ready(small.clone())))
                    .route("/large", any(move || std::future::ready(large.clone())))
                    .route("/socket", any(socket));
                proxy::serve(listener, router, std::future::pending()).await;
            }
            Role::Ours { upstream } => {
                let known = HashMap::from([(OURS.to_owned(), Upstream::new(upstream))]);
                let known = Arc::new(known);
                let service = tower::service_fn(move |request| edge(known.clone(), request));
                proxy::serve(listener, service, std::future::pending()).await;
            }
        }
        Ok(())
    })
}

/// Sends back what comes, once the connection is another protocol's.
async fn socket(mut request: axum::extract::Request) -> impl IntoResponse {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let (mut from, mut to) = tokio::io::split(TokioIo::new(upgraded));
        let _ = tokio::io::copy(&mut from, &mut to).await;
    });
    let accept = HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    let headers = [
        (CONNECTION, HeaderValue::from_static("upgrade")),
        (UPGRADE, HeaderValue::from_static("websocket")),
        (http::header::SEC_WEBSOCKET_ACCEPT, accept),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty())
}

/// As the control plane's edge: whose it is, aside, there and back.
async fn edge(
    known: Arc<HashMap<String, Upstream>>,
    mut request: Request<Incoming>,
) -> Result<Response<BoxBody>, Infallible> {
    proxy::aside(request.extensions()).await;
    let host = request.headers().get(HOST).cloned();
    let upstream = host.as_ref().and_then(|host| host.to_str().ok()).and_then(|host| known.get(host)).cloned();
    let (Some(host), Some(upstream)) = (host, upstream) else { return Ok(status(StatusCode::NOT_FOUND)) };
    let peer = request.extensions().get::<proxy::Peer>().map(|peer| peer.0.to_string()).unwrap_or_default();
    let headers = request.headers_mut();
    headers.insert("x-forwarded-host", host);
    headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    if let Ok(peer) = HeaderValue::try_from(peer) {
        headers.insert("x-forwarded-for", peer);
    }
    match upstream.exchange(request.map(boxed)).await {
        Ok(Answer::Whole(answer)) => Ok(answer),
        Ok(Answer::Upgraded(answer, tunnel)) => {
            tokio::spawn(tunnel.carry(|| ()));
            Ok(answer)
        }
        Err(_) => Ok(status(StatusCode::BAD_GATEWAY)),
    }
}

fn status(status: StatusCode) -> Response<BoxBody> {
    let mut answer = Response::new(boxed(Body::empty()));
    *answer.status_mut() = status;
    answer
}
