//! The one place where guest traffic is counted, moves the inactivity clock, and is cut when its guest goes.

use std::pin::Pin;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use proxy::BodyError;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Why an exchange with a guest broke off.
#[derive(Debug, thiserror::Error)]
#[error("the capsule was paused or has ended")]
pub struct Cut;

/// Guest traffic of one capsule.
pub struct Traffic {
    open: AtomicUsize,
    /// Told when an exchange ends.
    closed: Notify,
    last_active_ms: AtomicI64,
    /// The same on a clock that nobody sets: milliseconds after `since`.
    last_active: AtomicU64,
    since: Instant,
    /// Ends the exchanges of the guest that is there now.
    cut: Mutex<CancellationToken>,
}

impl Default for Traffic {
    /// No connection, active now.
    fn default() -> Self {
        let traffic = Self {
            open: AtomicUsize::new(0),
            closed: Notify::new(),
            last_active_ms: AtomicI64::new(0),
            last_active: AtomicU64::new(0),
            since: Instant::now(),
            cut: Mutex::default(),
        };
        traffic.touch();
        traffic
    }
}

impl Traffic {
    /// Restarts the inactivity clock.
    pub fn touch(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64);
        self.last_active_ms.store(now, Ordering::Relaxed);
        self.last_active.store(self.since.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Milliseconds since 1970 of the last traffic or touch.
    pub fn last_active_ms(&self) -> i64 {
        self.last_active_ms.load(Ordering::Relaxed)
    }

    /// Exchanges that have not ended.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Begins an exchange, which lasts until what is returned is dropped.
    pub fn enter(self: &Arc<Self>) -> Open {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.touch();
        Open { traffic: self.clone(), cut: self.cut().clone(), turn: None }
    }

    /// Waits until no exchange is open.
    pub async fn drained(&self) {
        loop {
            let closed = self.closed.notified();
            if self.open() == 0 {
                return;
            }
            closed.await;
        }
    }

    /// Breaks off every exchange that is open.
    pub fn cut_all(&self) {
        std::mem::take(&mut *self.cut()).cancel();
    }

    /// Waits until nothing has passed for `timeout` and nothing is open.
    pub async fn idle(&self, timeout: Duration) {
        loop {
            self.drained().await;
            let end = self.since + Duration::from_millis(self.last_active.load(Ordering::Relaxed)) + timeout;
            if Instant::now() >= end {
                return;
            }
            tokio::time::sleep_until(end).await;
        }
    }

    fn cut(&self) -> std::sync::MutexGuard<'_, CancellationToken> {
        self.cut.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An exchange with the guest.
pub struct Open {
    traffic: Arc<Traffic>,
    cut: CancellationToken,
    turn: Option<OwnedSemaphorePermit>,
}

impl Open {
    /// The exchange gives this back at its end.
    pub fn holding(self, turn: OwnedSemaphorePermit) -> Self {
        let mut open = self;
        open.turn = Some(turn);
        open
    }

    /// Something has passed.
    pub fn touch(&self) {
        self.traffic.touch();
    }

    /// Resolves when the exchange is to be broken off.
    pub async fn cut(&self) {
        self.cut.cancelled().await;
    }

    /// A request's body, whose bytes are traffic.
    pub fn request<B>(&self, body: B) -> Counted<B> {
        Counted { body, traffic: self.traffic.clone(), cut: Box::pin(self.cut.clone().cancelled_owned()), _open: None }
    }

    /// An answer's body, whose bytes are traffic and whose end is the exchange's.
    pub fn answer<B>(self, body: B) -> Counted<B> {
        let cut = Box::pin(self.cut.clone().cancelled_owned());
        Counted { body, traffic: self.traffic.clone(), cut, _open: Some(self) }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.traffic.touch();
        self.traffic.open.fetch_sub(1, Ordering::Relaxed);
        self.traffic.closed.notify_waiters();
    }
}

/// A body whose every frame is traffic, and which breaks off with [`Cut`] when its guest goes.
pub struct Counted<B> {
    body: B,
    traffic: Arc<Traffic>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    _open: Option<Open>,
}

impl<B> Body for Counted<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BodyError>,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            self.traffic.touch();
        } else if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(Cut.into())));
        }
        polled.map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use http_body_util::{BodyExt, Empty, StreamBody};

    use super::*;

    #[tokio::test]
    async fn an_exchange_is_open_until_its_answer_ends() {
        let traffic = Arc::new(Traffic::default());
        let open = traffic.enter();
        drop(open.request(Empty::<Bytes>::new()));
        assert_eq!(traffic.open(), 1);
        assert!(traffic.drained().now_or_never().is_none());
        let answer = open.answer(Empty::<Bytes>::new());
        assert_eq!(traffic.open(), 1);
        let drained = {
            let traffic = traffic.clone();
            tokio::spawn(async move { traffic.drained().await })
        };
        drop(answer);
        drained.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_cut_breaks_off_and_what_comes_after_does_not() {
        let traffic = Arc::new(Traffic::default());
        let silent = || StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, BodyError>>());
        let mut answer = traffic.enter().answer(silent());
        assert!(answer.frame().now_or_never().is_none());
        traffic.cut_all();
        assert!(answer.frame().await.unwrap().unwrap_err().is::<Cut>());
        assert!(traffic.enter().answer(silent()).frame().now_or_never().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_exchange_is_activity_however_silent() {
        let traffic = Arc::new(Traffic::default());
        let timeout = Duration::from_secs(60);
        let open = traffic.enter();
        assert!(tokio::time::timeout(20 * timeout, traffic.idle(timeout)).await.is_err());
        drop(open);
        assert!(tokio::time::timeout(timeout / 2, traffic.idle(timeout)).await.is_err());
        traffic.touch();
        assert!(tokio::time::timeout(timeout * 3 / 4, traffic.idle(timeout)).await.is_err());
        traffic.idle(timeout).await;
    }
}
