//! What a driver does with the object store: uploads what is paused, beside everything else, and takes over a memory that
//! came from there.

use std::io;
use std::time::Duration;

use agent_api::CapsuleState;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Driver, Life};
use crate::capsule::pager;
use crate::capsule::record::{Base, Phase, Record};
use crate::capsule::start::Running;
use crate::capsule::{Refused, remote};
use crate::hibernated::Note;

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
        let store = self.host.store();
        let uploaded = |record: &mut Record| (record.uploaded, record.uploaded_to) = (Some(number), store);
        if let Err(error) = self.journal.commit(uploaded) {
            // It is uploaded again, which finds that all of it is there.
            self.upload_pause = longer(self.upload_pause);
            warn!(capsule = %self.journal.record().spec.id, %error, "an upload could not be recorded");
            return;
        }
        self.upload_pause = Duration::ZERO;
        self.publish(CapsuleState::Paused, self.reason());
    }

    /// Gives back what a paused capsule takes here, once the object store has it. `None` when it did.
    pub(super) async fn hibernate(&mut self, done: oneshot::Sender<Result<(), Refused>>) -> Option<Life> {
        let id = self.journal.record().spec.id;
        let destroyed = self.destroyed.clone();
        let stored = tokio::select! {
            biased;
            () = destroyed.cancelled() => return Some(Life::Paused),
            stored = self.store() => stored.map_err(Refused::Remote),
        };
        if let Err(refused) = stored.and_then(|()| self.note_hibernation().map_err(Refused::Note)) {
            warn!(capsule = %id, error = crate::chain(&refused), "the capsule cannot hibernate");
            let _ = done.send(Err(refused));
            return Some(Life::Paused);
        }
        self.end(CapsuleState::Hibernated, String::new()).await;
        let _ = done.send(Ok(()));
        None
    }

    /// Has the next agent tell that the capsule hibernates, and then take what is here for garbage.
    fn note_hibernation(&mut self) -> io::Result<()> {
        // What `end` says last, after that it is being given back.
        let generation = self.journal.record().generation.max(self.observed.borrow().generation + 1) + 1;
        self.host.note_hibernated(&Note::new(self.journal.record(), generation))?;
        self.journal.commit(|record| record.phase = Phase::Stopping)
    }

    /// Sees to it that the object store has the pause.
    async fn store(&mut self) -> Result<(), remote::Error> {
        let objects = self.host.objects.clone().ok_or(remote::Error::NoObjects)?;
        // One try of our own, whose outcome can be told.
        self.stop_upload().await;
        let record = self.journal.record().clone();
        let Base::Snapshot(saved) = &record.base else { return Err(remote::Error::Damaged("it has no snapshot")) };
        // What the record says of that was so once. A bucket may have been emptied, and a manifest that was on its way when
        // its upload was broken off may have come in place of ours.
        if !remote::has(&self.host, &objects, &record).await? {
            if record.is_uploaded() {
                warn!(capsule = %record.spec.id, "the object store does not have it any more");
                // What is written next says it too.
                let _ = self.journal.note(|record| record.uploaded = None);
                self.publish(CapsuleState::Paused, self.reason());
            }
            if record.is_remote {
                return Err(remote::Error::Incomplete);
            }
            let sent = remote::upload(&self.host, &objects, self.journal.dir(), record.clone()).await?;
            debug!(capsule = %record.spec.id, ?sent, "uploaded");
        }
        if !self.journal.record().is_uploaded() {
            self.uploaded(saved.number);
        }
        Ok(())
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
