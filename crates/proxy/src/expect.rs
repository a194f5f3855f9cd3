//! `Expect: 100-continue`: a body that waits until the destination wants it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::EXPECT;
use http::{Request, StatusCode};
use http_body::{Body, Frame, SizeHint};
use tokio::sync::oneshot;
use tokio::time::Sleep;

use crate::{BodyError, BoxBody};

/// How long a destination may stay silent before the body is sent anyway: old servers never say that they want it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Has the body of a request that expects to be told so wait for the destination's word. A destination that answers at once,
/// with a refusal perhaps, is never sent the body; so whoever sends it to us is not asked for it either.
pub fn honoured(request: Request<BoxBody>) -> Request<BoxBody> {
    let expects =
        request.headers().get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    if !expects {
        return request;
    }
    let (tell, told) = oneshot::channel();
    let waiting =
        |body| crate::boxed(Waiting { body, wait: Some((Some(told), Box::pin(tokio::time::sleep(PATIENCE)))) });
    let mut request = request.map(waiting);
    let tell = Mutex::new(Some(tell));
    hyper::ext::on_informational(&mut request, move |answer| {
        let tell = if answer.status() == StatusCode::CONTINUE { tell.lock().ok() } else { None };
        if let Some(tell) = tell.and_then(|mut tell| tell.take()) {
            // The body may be gone by now.
            let _ = tell.send(());
        }
    });
    request
}

type Wait = (Option<oneshot::Receiver<()>>, Pin<Box<Sleep>>);

struct Waiting {
    body: BoxBody,
    wait: Option<Wait>,
}

impl Body for Waiting {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some((told, patience)) = &mut self.wait {
            let is_wanted = match told.as_mut().map(|told| Pin::new(told).poll(cx)) {
                Some(Poll::Ready(Ok(()))) => true,
                // Its answer is there, and it was not to go on.
                Some(Poll::Ready(Err(_))) => {
                    *told = None;
                    false
                }
                Some(Poll::Pending) | None => false,
            };
            if !is_wanted && patience.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.wait = None;
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
