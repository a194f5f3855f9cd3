//! The one place where guest traffic is counted and moves the inactivity clock.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use http_body::{Body, Frame, SizeHint};

/// Guest traffic of one capsule.
pub struct Traffic {
    open: AtomicUsize,
    last_active_ms: AtomicI64,
}

impl Default for Traffic {
    /// No connection, active now.
    fn default() -> Self {
        let traffic = Self { open: AtomicUsize::new(0), last_active_ms: AtomicI64::new(0) };
        traffic.touch();
        traffic
    }
}

impl Traffic {
    /// Restarts the inactivity clock.
    pub fn touch(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64);
        self.last_active_ms.store(now, Ordering::Relaxed);
    }

    /// Milliseconds since 1970 of the last traffic or touch.
    pub fn last_active_ms(&self) -> i64 {
        self.last_active_ms.load(Ordering::Relaxed)
    }

    /// Exchanges that have not ended.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// A body that counts as traffic from its first poll until it is dropped.
pub struct Counted<B> {
    body: B,
    traffic: Arc<Traffic>,
}

impl<B> Counted<B> {
    /// Counts `body` in `traffic` from now on.
    pub fn new(body: B, traffic: Arc<Traffic>) -> Self {
        traffic.open.fetch_add(1, Ordering::Relaxed);
        traffic.touch();
        Self { body, traffic }
    }
}

impl<B> Drop for Counted<B> {
    fn drop(&mut self) {
        self.traffic.touch();
        self.traffic.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<B: Body + Unpin> Body for Counted<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            self.traffic.touch();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
