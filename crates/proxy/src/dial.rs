//! Dialling a destination, with the patience a program needs that was started a moment ago.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Dials of one connection; after the n-th failure n × [`PAUSE`] passes.
const DIALS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(100);
/// How long one dial may take. A guest on the same host answers in microseconds or not at all.
const LIMIT: Duration = Duration::from_secs(5);

/// A connector that knows one address, whatever the URI says.
#[derive(Clone, Copy)]
pub struct Dial(pub SocketAddr);

impl tower::Service<Uri> for Dial {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<TcpStream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(dial(self.0))
    }
}

async fn dial(address: SocketAddr) -> io::Result<TokioIo<TcpStream>> {
    let mut attempt = 1;
    loop {
        let result = match tokio::time::timeout(LIMIT, TcpStream::connect(address)).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        match result {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(TokioIo::new(stream));
            }
            Err(error) if attempt == DIALS => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE * attempt).await,
        }
        attempt += 1;
    }
}
