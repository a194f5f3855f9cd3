//! What a driver does with the object store: uploads what is paused, beside everything else, and takes over a memory that
//! came from there.

use std::time::Duration;

use agent_api::CapsuleState;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Driver, Life};
use crate::capsule::pager;
use crate::capsule::record::Base;
use crate::capsule::start::Running;
use crate::capsule::{Refused, remote};

/// After an upload that failed, the next try comes this much later, and each time twice that.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// After a memory could not be taken over, as on a full disk.
const AGAIN: Duration = Duration::from_secs(30);

impl Driver {
    /// Begins to upload the pause, unless that was done or is not wanted.
    pub(super) fn start_upload(&mut self) {
        let record = self.journal.record();
        let Some(objects) = self.host.objects.clone() else { return };
        let Base::Snapshot(saved) = &record.base else { return };
        // After a resume that could not be undone the disk is not that of the pause.
        if self.upload.is_some() || record.is_uploaded() || record.is_remote || !self.is_put_aside() {
            return;
        }
        let (host, dir, record, number) =
            (self.host.clone(), self.journal.dir().to_owned(), record.clone(), saved.number);
        let mut pause = self.upload_pause;
        self.upload = Some(tokio::spawn(async move {
            let id = record.spec.id;
            loop {
                tokio::time::sleep(pause).await;
                pause = longer(pause);
                // Nobody closes it.
                let _turn = host.uploads.acquire().await;
                match remote::upload(&host, &objects, &dir, record.clone()).await {
                    Ok(sent) => {
                        info!(capsule = %id, chunks = sent.chunks, bytes = sent.bytes, "uploaded");
                        return number;
                    }
                    Err(error) => {
                        warn!(capsule = %id, error = crate::chain(&error), "the upload failed; it is tried again")
                    }
                }
            }
        }));
    }

    /// Breaks an upload off. Nothing reads what was paused afterwards.
    pub(super) async fn stop_upload(&mut self) {
        if let Some(upload) = self.upload.take() {
            upload.abort();
            // It ends at its next step; a chunk that is being read is thrown away.
            let _ = upload.await;
        }
    }

    /// Notes that the object store has the pause.
    pub(super) fn uploaded(&mut self, number: u32) {
        self.upload = None;
        if let Err(error) = self.journal.commit(|record| record.uploaded = Some(number)) {
            // It is uploaded again, which finds that all of it is there.
            self.upload_pause = longer(self.upload_pause);
            warn!(capsule = %self.journal.record().spec.id, %error, "an upload could not be recorded");
            return;
        }
        self.upload_pause = Duration::ZERO;
        let reason = self.observed.borrow().reason.clone();
        self.publish(CapsuleState::Paused, reason);
    }

    /// Gives back what a paused capsule takes here, once the object store has it. `None` when it did.
    pub(super) async fn hibernate(&mut self, done: oneshot::Sender<Result<(), Refused>>) -> Option<Life> {
        let id = self.journal.record().spec.id;
        if !self.journal.record().is_uploaded() {
            // One try of our own, whose outcome can be told.
            self.stop_upload().await;
            let Some(objects) = self.host.objects.clone() else {
                let _ = done.send(Err(Refused::Remote(remote::Error::NoObjects)));
                return Some(Life::Paused);
            };
            let uploaded = tokio::select! {
                biased;
                () = self.destroyed.cancelled() => return Some(Life::Paused),
                uploaded = remote::upload(&self.host, &objects, self.journal.dir(), self.journal.record().clone()) => uploaded,
            };
            match (uploaded, &self.journal.record().base) {
                (Ok(sent), Base::Snapshot(saved)) => {
                    debug!(capsule = %id, ?sent, "uploaded");
                    let number = saved.number;
                    self.uploaded(number);
                }
                (Ok(_), _) => {}
                (Err(error), _) => {
                    warn!(capsule = %id, error = crate::chain(&error), "the capsule cannot hibernate");
                    let _ = done.send(Err(Refused::Remote(error)));
                    self.start_upload();
                    return Some(Life::Paused);
                }
            }
        }
        self.end(CapsuleState::Hibernated, String::new()).await;
        let _ = done.send(Ok(()));
        None
    }

    /// Waits until all of the memory has come, where some of it is in the object store.
    pub(super) async fn make_whole(&mut self, running: &Running) -> Result<(), remote::Error> {
        if !self.journal.record().is_remote {
            return Ok(());
        }
        let dir = self.journal.dir().to_owned();
        tokio::select! {
            awaited = remote::awaited(&dir) => awaited?,
            _ = running.process.exited() => return Err(remote::Error::Ended),
            _ = pager::lost(running.pager.as_ref(), &dir) => return Err(remote::Error::Ended),
            () = self.destroyed.cancelled() => return Err(remote::Error::Ended),
        }
        remote::complete(&self.host.memory, &mut self.journal).await
    }

    /// Resolves when the memory has come and is to be taken over; never where it is here.
    pub(super) fn memory_arrived(&self) -> impl Future<Output = ()> + use<> {
        let (is_remote, after) = (self.journal.record().is_remote, self.complete_after);
        let dir = self.journal.dir().to_owned();
        async move {
            if !is_remote {
                return std::future::pending().await;
            }
            if let Some(after) = after {
                tokio::time::sleep_until(after).await;
            }
            remote::arrived(&dir).await;
        }
    }

    /// Takes over the memory that has come.
    pub(super) async fn complete(&mut self) {
        if let Err(error) = remote::complete(&self.host.memory, &mut self.journal).await {
            warn!(capsule = %self.journal.record().spec.id, error = crate::chain(&error), "what came of its memory stays apart for now");
            self.complete_after = Some(Instant::now() + AGAIN);
        }
    }
}

/// How long the next try waits, if this one has waited for so long.
fn longer(pause: Duration) -> Duration {
    (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE)
}

/// Resolves when the upload has succeeded, with the number of what was uploaded; never where there is none.
pub(super) async fn upload_done(upload: &mut Option<JoinHandle<u32>>) -> u32 {
    match upload {
        Some(task) => match task.await {
            Ok(number) => number,
            // It panicked, and said so.
            Err(_) => {
                *upload = None;
                std::future::pending().await
            }
        },
        None => std::future::pending().await,
    }
}
