//! Calls to an agent over HTTP/1.1, on pooled connections.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use api::CapsuleId;
use connectrpc::client::{BoxFuture, ClientBody, ClientConfig, ClientTransport};
use connectrpc::{CompressionRegistry, ConnectError, ErrorCode};
use guest_api::HttpError;
use guest_api::filesystem::FilesystemClient;
use guest_api::process::ProcessClient;
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpStream, UnixStream};

use crate::{Endpoint, HostAgentClient};

/// The agent's own RPCs.
pub type Lifecycle = HostAgentClient<Transport>;
/// The processes of one capsule.
pub type GuestProcesses = ProcessClient<Transport>;
/// The files of one capsule, but for what is in them.
pub type GuestFiles = FilesystemClient<Transport>;

/// The header in which an agent says that an answer under `/guest/`, `/proxy/` or `/tcp/` is its own and did not come from a
/// guest.
pub const REFUSAL_HEADER: &str = "x-wrenn-refusal";

/// Calls to one guest's envd, streams among them, that a host carries at once.
pub const CALLS: usize = 1024;

/// An agent that does not take a connection for this long is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of an answer that is an error.
const ERROR_BYTES: usize = 64 << 10;
/// Shorter than what agents keep an idle connection, so that we close first.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A way to one agent, with its own pool of connections; clones share the pool. Lifecycle calls and guest traffic each get
/// one, so that neither waits behind the other. Nothing here limits how long a call or stream may take.
#[derive(Clone)]
pub struct Transport {
    endpoint: Endpoint,
    client: Client<Connector, ClientBody>,
}

impl Transport {
    /// A new pool; connects when first used.
    pub fn new(endpoint: Endpoint) -> Self {
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .build(Connector(endpoint.clone()));
        Self { endpoint, client }
    }

    /// The agent's own RPCs over this transport.
    pub fn lifecycle(&self) -> Lifecycle {
        HostAgentClient::new(self.clone(), self.config("/"))
    }

    /// A capsule's processes over this transport, by the path on which the agent forwards to the guest. The agent adds the
    /// guest's access token.
    pub fn guest(&self, capsule: CapsuleId) -> GuestProcesses {
        ProcessClient::new(self.clone(), self.config(&format!("/guest/{capsule}")))
    }

    /// A capsule's files over this transport.
    pub fn files(&self, capsule: CapsuleId) -> GuestFiles {
        FilesystemClient::new(self.clone(), self.config(&format!("/guest/{capsule}")))
    }

    /// Sends a plain HTTP request to a capsule's envd, under the path and query it has. What is no success becomes the error
    /// that an RPC would have given.
    pub async fn send_to_guest(
        &self,
        capsule: CapsuleId,
        mut request: Request<ClientBody>,
    ) -> Result<Response<Incoming>, ConnectError> {
        let path = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
        *request.uri_mut() = self.endpoint.base(&format!("/guest/{capsule}{path}"));
        let response = self.send(request).await?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await) }
    }

    fn config(&self, path: &str) -> ClientConfig {
        // Compression would only cost time between two processes of one machine or one rack.
        ClientConfig::new(self.endpoint.base(path)).with_compression(CompressionRegistry::new())
    }
}

/// What envd, or the agent before it, has against a plain request.
async fn refusal(response: Response<Incoming>) -> ConnectError {
    let (parts, body) = response.into_parts();
    let bytes = Limited::new(body, ERROR_BYTES).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let message = serde_json::from_slice(&bytes).map(|error: HttpError| error.message);
    let code = match parts.status {
        StatusCode::NOT_FOUND => ErrorCode::NotFound,
        StatusCode::BAD_REQUEST | StatusCode::REQUEST_TIMEOUT => ErrorCode::InvalidArgument,
        StatusCode::FORBIDDEN => ErrorCode::PermissionDenied,
        StatusCode::CONFLICT => ErrorCode::FailedPrecondition,
        StatusCode::TOO_MANY_REQUESTS => ErrorCode::ResourceExhausted,
        StatusCode::INSUFFICIENT_STORAGE => ErrorCode::ResourceExhausted,
        StatusCode::SERVICE_UNAVAILABLE => ErrorCode::Unavailable,
        _ => ErrorCode::Internal,
    };
    let message = match parts.status {
        // In the words in which an RPC tells it.
        StatusCode::INSUFFICIENT_STORAGE => "no space left on device".to_owned(),
        status => message.unwrap_or_else(|_| format!("the guest answers {status}")),
    };
    let mut error = ConnectError::new(code, message);
    error.set_response_headers(parts.headers);
    error
}

impl ClientTransport for Transport {
    type ResponseBody = Incoming;
    type Error = ConnectError;

    fn send(&self, request: Request<ClientBody>) -> BoxFuture<'static, Result<Response<Incoming>, ConnectError>> {
        let response = self.client.request(request);
        Box::pin(async {
            response.await.map_err(|error| ConnectError::unavailable_from_transport("the agent does not answer", error))
        })
    }
}

/// Connects to its endpoint whatever the URI says.
#[derive(Clone)]
struct Connector(Endpoint);

impl tower::Service<Uri> for Connector {
    type Response = Stream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let endpoint = self.0.clone();
        Box::pin(async move { tokio::time::timeout(CONNECT_TIMEOUT, connect(&endpoint)).await? })
    }
}

async fn connect(endpoint: &Endpoint) -> io::Result<Stream> {
    match endpoint {
        Endpoint::Unix(path) => Ok(Stream::Unix(TokioIo::new(UnixStream::connect(path).await?))),
        Endpoint::Http(authority) => {
            let stream = TcpStream::connect(authority.as_str()).await?;
            stream.set_nodelay(true)?;
            Ok(Stream::Tcp(TokioIo::new(stream)))
        }
    }
}

enum Stream {
    Tcp(TokioIo<TcpStream>),
    Unix(TokioIo<UnixStream>),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl Write for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
