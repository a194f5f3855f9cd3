//! The body of a request as it comes in, and the limit on how long it may keep us waiting.

use super::Error;
use axum::body::{Body, BodyDataStream};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderMap, header};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// How long the rest of a body that was refused is read for.
const DRAIN: Duration = Duration::from_secs(30);

/// The bytes of a body. Time counts only while we wait for the client, not while it waits for us.
pub(super) struct Incoming {
    body: BodyDataStream,
    idle: Duration,
    /// When the client will have been silent for too long.
    silence: Pin<Box<Sleep>>,
    waiting: bool,
    state: State,
}

#[derive(PartialEq)]
enum State {
    /// The client waits to be told to send.
    Asking,
    Open,
    /// Nothing more will come.
    Closed,
}

impl Incoming {
    /// The body behind a head with these headers.
    pub fn new(headers: &HeaderMap, body: Body, idle: Duration) -> Incoming {
        let silence = Box::pin(tokio::time::sleep(idle));
        let state = if headers.contains_key(header::EXPECT) { State::Asking } else { State::Open };
        Incoming { body: body.into_data_stream(), idle, silence, waiting: false, state }
    }

    /// Reads what is still coming and forgets it, for some time. A client that is cut off while it sends never sees our answer:
    /// the kernel resets a connection that is closed with unread bytes.
    pub async fn drain(mut self) {
        if self.state == State::Open {
            let rest = async { while let Some(Ok(_)) = self.next().await {} };
            // What it does not finish in this time, it was told in vain.
            tokio::time::timeout(DRAIN, rest).await.unwrap_or_default();
        }
    }
}

impl Stream for Incoming {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.state == State::Closed {
            return Poll::Ready(None);
        }
        self.state = State::Open;
        let next = match self.body.poll_next_unpin(context) {
            Poll::Ready(next) => next.map(|next| next.map_err(Error::Broken)),
            Poll::Pending => {
                if !self.waiting {
                    let deadline = Instant::now() + self.idle;
                    self.silence.as_mut().reset(deadline);
                    self.waiting = true;
                }
                ready!(self.silence.as_mut().poll(context));
                Some(Err(Error::Idle(self.idle)))
            }
        };
        self.waiting = false;
        if !matches!(next, Some(Ok(_))) {
            self.state = State::Closed;
        }
        Poll::Ready(next)
    }
}
