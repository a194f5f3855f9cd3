//! What a client still sends when its answer is there already.
//!
//! A connection that is closed on bytes nobody read is reset, and takes the answer with it; and many clients read only once they
//! have written everything. So a body that is dropped before its end is read on, beside the answer, and thrown away.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use futures::StreamExt;
use hyper::body::{Body as _, Frame, SizeHint};
use tokio::runtime::Handle;
use tokio::time::timeout;

/// How long to wait for more of what is thrown away. A client that has its answer may be waiting for the connection to close.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lets the request's body be dropped at any time.
pub async fn read_on(request: Request) -> Request {
    request.map(|body| Body::new(ReadOn(Some(body))))
}

/// A body that is read to its end; `None` once it is.
struct ReadOn(Option<Body>);

impl hyper::body::Body for ReadOn {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(body) = &mut self.0 else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.0 = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for ReadOn {
    fn drop(&mut self) {
        let Some(body) = self.0.take().filter(|body| !body.is_end_stream()) else { return };
        // Without a runtime there is no connection either.
        if let Ok(runtime) = Handle::try_current() {
            let mut rest = body.into_data_stream();
            runtime.spawn(async move { while let Ok(Some(Ok(_))) = timeout(PATIENCE, rest.next()).await {} });
        }
    }
}
