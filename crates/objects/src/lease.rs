//! Keeping uploads and the removal of garbage apart.
//!
//! An upload relies on chunks that it found, and no manifest may name them yet; who collects garbage would remove them.
//! So each says that it is there, by an object of its own, before it looks whether the other is: whoever comes second
//! sees the first, whatever the timing. An object counts while it is young, by the store's clock, and who is at work
//! writes it again from time to time; one that was left by a killed process is soon too old to count.
//!
//! A process that stood still may find that its own has lapsed meanwhile. Its clock cannot tell, as that stands still too
//! while its machine does: what counts is how far apart the store says that its object was written.

use std::time::Duration;

use object_store::ObjectMeta;
use object_store::path::Path;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::{Error, Objects};

/// From this age on an object of a lease does not count: what a process that is gone had asked of the store has come about
/// by then, or never does.
pub const STALE: Duration = Duration::from_secs(600);
/// Without having written it again for so long, one may not rely on it. So far apart from `STALE`, because a process may
/// stand still between looking and acting.
const LAPSE: Duration = Duration::from_secs(300);
/// How often it is written again.
const RENEW: Duration = Duration::from_secs(60);
/// How often one looks whether the other is gone.
const LOOK: Duration = Duration::from_millis(500);

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Upload,
    Collection,
}

impl Work {
    fn directory(self) -> &'static str {
        match self {
            Self::Upload => "uploads",
            Self::Collection => "collections",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Upload => Self::Collection,
            Self::Collection => Self::Upload,
        }
    }

    fn in_the_way(self) -> Error {
        match self {
            Self::Upload => Error::Uploading,
            Self::Collection => Error::Collecting,
        }
    }
}

/// While it is held and renewed, nobody does the other work. Dropped, it is given back in the background.
#[derive(Debug)]
pub(crate) struct Lease {
    objects: Objects,
    path: Path,
    renewed: Instant,
    /// What the store had of it then.
    written: Option<ObjectMeta>,
    /// What is on its way to the store comes there also when nobody waits for it any more, and it is removed after that.
    writing: Option<JoinHandle<Result<(), Error>>>,
    /// It has to last until it is too old if nobody gives it back.
    is_left: bool,
}

impl Lease {
    /// Waits up to `patience` until nobody does the other work, and keeps it so. Collections go first: an upload that
    /// comes while one waits or works gives way.
    pub(crate) async fn take(objects: &Objects, work: Work, patience: Duration) -> Result<Self, Error> {
        let mut name = [0; 16];
        getrandom::fill(&mut name).map_err(Error::Random)?;
        let path = objects.directory(work.directory()).join(hex::encode(name));
        let deadline = Instant::now() + patience;
        let objects = objects.clone();
        let mut lease = Self { objects, path, renewed: Instant::now(), written: None, writing: None, is_left: false };
        loop {
            lease.renewed = Instant::now();
            lease.written = Some(lease.write().await?);
            if !lease.is_in_the_way(work.other()).await? {
                return Ok(lease);
            }
            if Instant::now() >= deadline {
                lease.give_back().await;
                return Err(work.other().in_the_way());
            }
            if work == Work::Upload {
                lease.objects.delete(&lease.path).await?;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn is_in_the_way(&self, other: Work) -> Result<bool, Error> {
        let now = self.meta().await?.last_modified;
        let others = self.objects.list(&self.objects.directory(other.directory())).await?;
        let mut is_one = false;
        for object in others {
            let age = (now - object.last_modified).to_std().unwrap_or_default();
            if age < STALE {
                is_one = true;
            } else {
                // Whoever wrote it has given up by now.
                self.objects.delete(&object.location).await?;
            }
        }
        Ok(is_one)
    }

    /// Of its object, which tells what time it is for the store.
    pub(crate) async fn meta(&self) -> Result<ObjectMeta, Error> {
        self.objects.head(&self.path).await?.ok_or(Error::Lapsed)
    }

    /// Writes its object. What the store has of it then.
    async fn write(&mut self) -> Result<ObjectMeta, Error> {
        // One that was not waited for must not come after this.
        let _ = self.written().await;
        let (objects, path) = (self.objects.clone(), self.path.clone());
        self.writing = Some(tokio::spawn(async move { objects.put(&path, Vec::new()).await }));
        self.written().await?;
        self.meta().await
    }

    /// Waits for what is on its way to the store.
    async fn written(&mut self) -> Result<(), Error> {
        let Some(writing) = &mut self.writing else { return Ok(()) };
        let done = writing.await.expect("the write does not panic, and nobody aborts it");
        self.writing = None;
        done
    }

    /// Writes it again, unless it has lapsed: after that it would look as if it had not.
    async fn renew(&mut self) -> Result<(), Error> {
        self.check()?;
        // Who took it for too old has removed it.
        self.meta().await?;
        let asked = Instant::now();
        let written = self.write().await?;
        self.check_at(&written)?;
        (self.renewed, self.written) = (asked, Some(written));
        Ok(())
    }

    /// Does `work`, and renews the lease meanwhile and at the end.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        tokio::pin!(work);
        let done = loop {
            let next = self.renewed + RENEW;
            tokio::select! {
                // Who stood still looks before anything else goes on.
                biased;
                () = tokio::time::sleep_until(next) => {}
                done = &mut work => break done?,
            }
            // What it is renewed for goes on meanwhile; else a store that hangs would go unnoticed.
            let renewed = tokio::select! {
                renewed = self.renew() => renewed,
                done = &mut work => break done?,
            };
            match renewed {
                Ok(()) => {}
                Err(Error::Lapsed) => return Err(Error::Lapsed),
                Err(error) => {
                    self.check()?;
                    tracing::debug!(error = &error as &dyn std::error::Error, "a lease was not renewed; trying again");
                    tokio::time::sleep(LOOK).await;
                }
            }
        };
        self.renew().await?;
        Ok(done)
    }

    fn check(&self) -> Result<(), Error> {
        if self.renewed.elapsed() < LAPSE { Ok(()) } else { Err(Error::Lapsed) }
    }

    /// Whether it could still be relied on when `object` was written.
    pub(crate) fn check_at(&self, object: &ObjectMeta) -> Result<(), Error> {
        let written = self.written.as_ref().ok_or(Error::Lapsed)?;
        let age = (object.last_modified - written.last_modified).to_std().unwrap_or_default();
        if age < LAPSE { Ok(()) } else { Err(Error::Lapsed) }
    }

    /// From now on something is asked of the store that may come about although nobody waits for it any more: dropped,
    /// the lease stays until it is too old.
    pub(crate) fn leave_if_dropped(&mut self) {
        self.is_left = true;
    }

    /// Ends it. What cannot be removed does not count for long.
    pub(crate) async fn give_back(mut self) {
        self.is_left = true;
        let _ = self.written().await;
        if let Err(error) = self.objects.delete(&self.path).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "a lease stays until it is too old");
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.is_left {
            return;
        }
        // Without a runtime it stays until it is too old.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (objects, path, writing) = (self.objects.clone(), self.path.clone(), self.writing.take());
            runtime.spawn(async move {
                if let Some(writing) = writing {
                    // However it ends.
                    let _ = writing.await;
                }
                if let Err(error) = objects.delete(&path).await {
                    tracing::debug!(error = &error as &dyn std::error::Error, "a lease stays until it is too old");
                }
            });
        }
    }
}

#[cfg(test)]
mod tests;
