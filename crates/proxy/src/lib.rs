//! The reverse proxy between control plane, host agent and guest: HTTP/1.1, streaming both ways, nothing decoded.
//!
//! One [`Upstream`] is one destination and its connection pool; dropping it closes the pool, so a destroyed capsule's
//! connections go with it. Who may reach which destination is the caller's business, and so are paths and credentials.

mod dial;
mod headers;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::uri::{Parts, PathAndQuery, Scheme};
use http::{Request, Response, Uri, Version};
use http_body::Body;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use dial::Dial;

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

/// Idle connections are closed after this, below what servers in guests commonly keep them for.
const IDLE: Duration = Duration::from_secs(50);

/// Why a request was not answered by the destination.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing accepts connections there.
    #[error("connecting to {0}")]
    Connect(SocketAddr, #[source] ClientError),
    /// The connection broke, or what came was not HTTP.
    #[error("waiting for the answer of {0}")]
    Exchange(SocketAddr, #[source] ClientError),
}

/// One destination and its connections. Clones share the connections.
#[derive(Clone)]
pub struct Upstream {
    address: SocketAddr,
    client: Client<Dial, BoxBody>,
}

impl Upstream {
    /// A destination; nothing is dialled yet.
    pub fn new(address: SocketAddr) -> Self {
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .build(Dial(address));
        Self { address, client }
    }

    /// Sends the request to this destination under the path and query of `request` as it stands, and hands back the
    /// answer as soon as its head is there. Hop-by-hop headers are dropped in both directions.
    pub async fn forward(&self, mut request: Request<BoxBody>) -> Result<Response<BoxBody>, Error> {
        headers::strip_hop_by_hop(request.headers_mut());
        *request.version_mut() = Version::HTTP_11;
        *request.uri_mut() = self.absolute(request.uri());
        let response = self.client.request(request).await.map_err(|source| match source.is_connect() {
            true => Error::Connect(self.address, source),
            false => Error::Exchange(self.address, source),
        })?;
        let mut response = response.map(boxed);
        headers::strip_hop_by_hop(response.headers_mut());
        Ok(response)
    }

    fn absolute(&self, uri: &Uri) -> Uri {
        let mut parts = Parts::default();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = self.address.to_string().parse().ok();
        parts.path_and_query = uri.path_and_query().cloned().or(Some(PathAndQuery::from_static("/")));
        Uri::from_parts(parts).expect("scheme, authority and path are all there")
    }
}
