//! The reverse proxy between control plane, host agent and guest: HTTP/1.1, streaming both ways, nothing decoded.
//!
//! One [`Upstream`] is one destination and its connection pool; dropping it closes the pool, so a destroyed capsule's
//! connections go with it. [`serve()`] is the other end: listening, with a [`Lane`] aside for what may be much. [`path`] is how a
//! host names a guest's port, and [`edge`] what is decided by a head alone. Who may reach which destination is the caller's
//! business, and so are pages for people and what becomes of a [`Tunnel`].

mod dial;
pub mod edge;
mod expect;
mod headers;
mod lane;
pub mod path;
mod pool;
mod serve;
mod tls;
mod upgrade;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::uri::PathAndQuery;
use http::{Extensions, HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::upgrade::OnUpgrade;

pub use dial::{Io, Target};
pub use lane::{Lane, aside, back, threads_aside};
use pool::Pool;
pub use serve::{Accepted, Listener, Peer, Secure, serve};
pub use tls::Tls;
pub use upgrade::Tunnel;

/// Any error of a body, from either side.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// A streamed body.
pub type BoxBody = UnsyncBoxBody<Bytes, BodyError>;

/// Any body as a streamed one.
pub fn boxed<B>(body: B) -> BoxBody
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BodyError>,
{
    body.map_err(Into::into).boxed_unsync()
}

/// Idle connections to a server that is ours are closed after this.
const IDLE: Duration = Duration::from_secs(50);
/// And to one that is not: below the 5 seconds for which common servers keep them, so that they do not close them first.
const STRANGERS_IDLE: Duration = Duration::from_secs(4);
/// Headers of a request or an answer.
const HEADERS: usize = 256;
/// Bytes of one connection that are read and not yet passed on, and most of a head. What one connection may do at a time is as
/// long as others wait.
const BUFFER: usize = 128 << 10;

/// Why a request was not answered by the destination.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing accepts connections there.
    #[error("connecting to {0}")]
    Connect(Target, #[source] io::Error),
    /// The connection was reset before a single byte came out of it: something accepted it, but no server.
    #[error("nobody listens at {0}")]
    Nobody(Target, #[source] hyper::Error),
    /// The connection broke, or what came was not HTTP.
    #[error("waiting for the answer of {0}")]
    Exchange(Target, #[source] hyper::Error),
    /// The connection became another protocol's, which nobody had asked for.
    #[error("{0} changes the protocol unasked")]
    Switched(Target),
}

/// What a destination said.
pub enum Answer {
    /// An answer, whose body is on its way.
    Whole(Response<BoxBody>),
    /// The 101 that is to be sent to the client, and what is to be carried from then on.
    Upgraded(Response<BoxBody>, Tunnel),
}

/// One destination and its connections. Clones share the connections.
#[derive(Clone)]
pub struct Upstream {
    /// What it is called where a request does not say. A socket file has no name there, so any host stands for it.
    host: HeaderValue,
    pool: Arc<Pool>,
}

impl Upstream {
    /// A server of ours; nothing is dialled yet.
    pub fn new(target: impl Into<Target>) -> Self {
        Self::keeping(target.into(), IDLE)
    }

    /// Anyone's server; nothing is dialled yet.
    pub fn strangers(address: SocketAddr) -> Self {
        Self::keeping(address.into(), STRANGERS_IDLE)
    }

    fn keeping(target: Target, idle: Duration) -> Self {
        let host = match &target {
            Target::Address(address) => HeaderValue::try_from(address.to_string()).ok(),
            Target::Name(name) => HeaderValue::try_from(name).ok(),
            Target::Socket(_) => None,
        };
        let host = host.unwrap_or(HeaderValue::from_static("host"));
        Self { host, pool: Arc::new(Pool::new(target, idle)) }
    }

    /// Uses a connection to this destination that stands already, in place of the next dial.
    pub fn begin_with(&self, stream: tokio::net::TcpStream) {
        self.pool.begin_with(stream);
    }

    /// Sends the request to this destination under the path and query of `request` as it stands, and hands back the
    /// answer as soon as its head is there. Hop-by-hop headers are dropped in both directions.
    pub async fn forward(&self, mut request: Request<BoxBody>) -> Result<Response<BoxBody>, Error> {
        headers::strip_hop_by_hop(request.headers_mut());
        self.name_in(request.headers_mut());
        *request.version_mut() = Version::HTTP_11;
        *request.uri_mut() = path_of(request.uri());
        let mut response = self.pool.send(request, false).await?;
        headers::strip_hop_by_hop(response.headers_mut());
        Ok(response)
    }

    /// The same, for requests that may want their connection to become another protocol's, that may expect to be told to go
    /// on, and that are sent anew where a connection that was kept turns out to be closed and nothing is lost by it.
    pub async fn exchange(&self, request: Request<BoxBody>) -> Result<Answer, Error> {
        let (mut parts, body) = request.into_parts();
        let is_empty = body.is_end_stream();
        let client: Option<OnUpgrade> = parts.extensions.remove();
        let protocol = upgrade::wanted(&parts, !is_empty).filter(|_| client.is_some());
        headers::strip_hop_by_hop(&mut parts.headers);
        if let Some(protocol) = &protocol {
            upgrade::restore(&mut parts.headers, protocol.clone());
        }
        self.name_in(&mut parts.headers);
        parts.version = Version::HTTP_11;
        parts.uri = path_of(&parts.uri);
        // What the server before us knows of its connection is not for the next.
        parts.extensions = Extensions::new();
        let may_repeat =
            is_empty && protocol.is_none() && [Method::GET, Method::HEAD, Method::OPTIONS].contains(&parts.method);
        let request = expect::honoured(Request::from_parts(parts, body));
        let mut response = self.pool.send(request, may_repeat).await?;
        let destination = hyper::upgrade::on(&mut response);
        let said = response.headers().get(http::header::UPGRADE).cloned();
        headers::strip_hop_by_hop(response.headers_mut());
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Answer::Whole(response));
        }
        let (Some(client), Some(asked)) = (client, protocol) else {
            return Err(Error::Switched(self.pool.target().clone()));
        };
        upgrade::restore(response.headers_mut(), said.unwrap_or(asked));
        Ok(Answer::Upgraded(response.map(|_| boxed(Empty::new())), Tunnel { client, destination }))
    }

    fn name_in(&self, headers: &mut HeaderMap) {
        headers.entry(HOST).or_insert_with(|| self.host.clone());
    }
}

/// What is asked of a destination, without whom it is asked of.
fn path_of(uri: &Uri) -> Uri {
    uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/")).into()
}

/// A raw connection to a destination.
pub async fn connect(target: &Target) -> io::Result<Box<dyn Io>> {
    dial::dial(target).await
}

/// The 101 with which a server agrees to `protocol`, and the client's end of the connection, if that is what the request
/// wants.
pub fn accept_upgrade<B>(request: &mut Request<B>, protocol: &'static str) -> Option<(Response<BoxBody>, OnUpgrade)> {
    let asked = request.headers().get(http::header::UPGRADE)?.as_bytes();
    let client: OnUpgrade =
        if asked.eq_ignore_ascii_case(protocol.as_bytes()) { request.extensions_mut().remove()? } else { return None };
    let mut response = Response::new(boxed(Empty::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    upgrade::restore(response.headers_mut(), HeaderValue::from_static(protocol));
    Some((response, client))
}

fn was_reset(error: &hyper::Error) -> bool {
    let kinds = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    causes(error).any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|error| kinds.contains(&error.kind())))
}

/// Whether the other end had closed the connection, in whatever way.
fn was_closed(error: &hyper::Error) -> bool {
    error.is_incomplete_message() || error.is_canceled() || error.is_closed() || was_reset(error)
}

fn causes(error: &hyper::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(error), |error| error.source())
}
