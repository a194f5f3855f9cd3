//! The driver: the one task that owns a capsule from its first record to its end.

mod stored;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_api::CapsuleState;
use api::egress::Policy;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::pager::{self, Watch};
use super::record::{Base, Journal, Phase, Record};
use super::release::{self, release};
use super::start::{self, Origin, Running};
use super::{Command, Handle, Observed, Refused, Traffic, files, save};
use crate::admission::Promise;
use crate::boot::Boots;
use crate::egress;
use crate::guest::Guest;
use crate::host::{Host, collect};
use crate::point::Point;

/// Commands that wait while the driver is busy; a sender past that waits too.
const QUEUE: usize = 8;
/// Bytes of a dead guest's console that are logged.
const CONSOLE: u64 = 2 << 10;
/// How long a pause waits for exchanges with the guest to end.
const DRAIN: Duration = Duration::from_secs(2);
struct Driver {
    host: Arc<Host>,
    journal: Journal,
    commands: mpsc::Receiver<Command>,
    /// Ends the capsule, whatever is being done to it.
    destroyed: CancellationToken,
    traffic: Arc<Traffic>,
    /// What it was promised of the host, for as long as anything of it may run.
    promise: Option<Promise>,
    /// Rewrites the capsule's memory into fewer generations.
    merge: Option<(Arc<AtomicBool>, tokio::task::JoinHandle<()>)>,
    /// Puts what is paused into the object store.
    upload: Option<tokio::task::JoinHandle<u32>>,
    /// How long the next of these waits before it begins.
    upload_pause: Duration,
    /// Before that a memory that has come is not taken over.
    complete_after: Option<tokio::time::Instant>,
    /// Last, so that it is dropped last: who sees it closed knows that `host` is let go.
    observed: watch::Sender<Observed>,
}

/// What a driver has in hand between two commands.
enum Life {
    Running(Running),
    Paused,
}

/// How a capsule that is not there yet begins.
pub enum From {
    /// As its image.
    Image,
    /// As what another was.
    Point(Arc<Point>),
}

/// Starts the capsule that `journal` describes, in a task of its own.
pub fn spawn_start(host: Arc<Host>, journal: Journal, from: From, promise: Promise) -> Handle {
    let (handle, driver) = pair(host, journal, CapsuleState::Starting, Some(promise));
    tokio::spawn(driver.begin(from));
    handle
}

/// Takes over a capsule that runs already, in a task of its own.
pub fn spawn_adopted(host: Arc<Host>, journal: Journal, running: Running) -> Handle {
    let promise = host.admission.acknowledge(&journal.record().spec);
    let (handle, driver) = pair(host, journal, CapsuleState::Running, Some(promise));
    driver.observed.send_modify(|observed| observed.guest = Some(running.guest.clone()));
    tokio::spawn(driver.live(Life::Running(running)));
    handle
}

/// Takes over a capsule that is paused, in a task of its own.
pub fn spawn_paused(host: Arc<Host>, journal: Journal) -> Handle {
    let (handle, driver) = pair(host, journal, CapsuleState::Paused, None);
    tokio::spawn(driver.live(Life::Paused));
    handle
}

fn pair(host: Arc<Host>, journal: Journal, state: CapsuleState, promise: Option<Promise>) -> (Handle, Driver) {
    let record = journal.record();
    let (command_sender, commands) = mpsc::channel(QUEUE);
    let (observed, observed_receiver) = watch::channel(Observed {
        state,
        generation: record.generation,
        reason: String::new(),
        host_full: None,
        egress: Arc::new(record.egress.clone()),
        host_ip: record.slot.map(|slot| slot.host_ip()),
        versions: record.versions.clone(),
        guest: None,
        is_uploaded: state == CapsuleState::Paused && record.is_uploaded(),
    });
    let destroyed = CancellationToken::new();
    let traffic = Arc::new(Traffic::default());
    let handle = Handle {
        spec: Arc::new(record.spec.clone()),
        traffic: traffic.clone(),
        commands: command_sender,
        destroyed: destroyed.clone(),
        observed: observed_receiver,
    };
    let driver = Driver {
        host,
        journal,
        commands,
        destroyed,
        traffic,
        promise,
        merge: None,
        upload: None,
        upload_pause: Duration::ZERO,
        complete_after: None,
        observed,
    };
    (handle, driver)
}

impl Driver {
    async fn begin(mut self, from: From) {
        let started = match from {
            From::Point(point) => {
                start::start(&self.host, &mut self.journal, Origin::Point(&point), &self.destroyed).await
            }
            From::Image => self.begin_as_image().await,
        };
        match started {
            Ok(running) => {
                let record = self.journal.record();
                info!(capsule = %record.spec.id, slot = ?record.slot, "running");
                self.publish_running(&running);
                self.live(Life::Running(running)).await;
            }
            Err(start::Error::Cancelled) => self.end(CapsuleState::Stopped, "destroyed".into()).await,
            Err(error) => {
                let reason = crate::chain(&error);
                let console = last_lines(&self.journal.dir().join(files::VMM_LOG));
                warn!(capsule = %self.journal.record().spec.id, %reason, console, "the start failed");
                self.observed.send_modify(|observed| observed.host_full = error.is_full());
                self.end(CapsuleState::Failed, reason).await;
            }
        }
    }

    /// Resumes what the image is after a boot, or boots it.
    async fn begin_as_image(&mut self) -> Result<Running, start::Error> {
        let spec = &self.journal.record().spec;
        let (id, name) = (spec.id, spec.image.clone());
        let sizes = spec.sizes();
        let image = self.host.images.get(&name);
        if let Some(point) = image.and_then(|image| self.host.boots.get(image, sizes)) {
            let origin = Origin::Boot(&point);
            match start::start(&self.host, &mut self.journal, origin, &self.destroyed).await {
                Err(error) if error.is_of_origin() => {
                    warn!(capsule = %id, error = crate::chain(&error), "a boot snapshot is of no use; booting");
                    self.host.boots.discard(&name, sizes, &point);
                    if self.stop().await.is_err() {
                        return Err(error);
                    }
                    let begin_anew = |record: &mut Record| {
                        record.snapshots = 0;
                        record.base = Base::Boot;
                    };
                    self.stopped(begin_anew).map_err(start::Error::Record)?;
                    files::tidy(&self.host.memory, self.journal.dir(), None);
                    match std::fs::remove_file(self.journal.dir().join(files::DISK)) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                            return Err(start::Error::Place(error));
                        }
                        _ => {}
                    }
                }
                started => return started,
            }
        }
        let started = start::start(&self.host, &mut self.journal, Origin::Image, &self.destroyed).await;
        if started.is_ok() {
            Boots::want(&self.host, &name, sizes);
        }
        started
    }

    /// From one command to the next, until the capsule ends or the agent does.
    async fn live(mut self, mut life: Life) {
        loop {
            let next = match life {
                Life::Running(running) => self.run(running).await,
                Life::Paused => self.lie().await,
            };
            life = match next {
                Some(life) => life,
                None => {
                    self.stop_upload().await;
                    return self.stop_merge().await;
                }
            };
            if self.destroyed.is_cancelled() {
                return self.end(CapsuleState::Stopped, "destroyed".into()).await;
            }
        }
    }

    /// Waits while the capsule runs, and does the first thing that comes up. `None` when the driver is to go.
    async fn run(&mut self, running: Running) -> Option<Life> {
        let (traffic, timeout) = (self.traffic.clone(), self.journal.record().spec.timeout_sec);
        let idle = async move {
            match timeout {
                0 => std::future::pending().await,
                seconds => traffic.idle(Duration::from_secs(seconds.into())).await,
            }
        };
        tokio::select! {
            biased;
            () = self.destroyed.cancelled() => Some(Life::Running(running)),
            exit = running.process.exited() => self.fail(format!("the VMM ended by itself ({exit})")).await,
            exit = pager::lost(running.pager.as_ref(), self.journal.dir()) => {
                self.fail(pager::reason(exit, self.journal.dir())).await
            }
            never = running.guest.keep_waking() => match never {},
            () = self.memory_arrived() => {
                self.complete().await;
                Some(Life::Running(running))
            }
            command = self.commands.recv() => match command {
                Some(Command::Pause(done)) => self.pause(running, None, done).await,
                Some(Command::Resume(done)) => {
                    let _ = done.send(Ok(()));
                    Some(Life::Running(running))
                }
                Some(Command::Capture(dest, done)) => self.capture(running, &dest, done).await,
                Some(Command::SetEgress(policy, done)) => {
                    let _ = done.send(self.set_egress(policy).await);
                    Some(Life::Running(running))
                }
                Some(Command::Hibernate(done)) => {
                    let _ = done.send(Err(Refused::NotPaused));
                    Some(Life::Running(running))
                }
                // Every handle is gone: the agent stops, and the capsule outlives it.
                None => None,
            },
            () = idle => {
                let reason = format!("nothing happened for {timeout} s");
                self.pause(running, Some(reason), oneshot::channel().0).await
            }
        }
    }

    /// Waits while the capsule is paused.
    async fn lie(&mut self) -> Option<Life> {
        self.start_upload();
        tokio::select! {
            biased;
            () = self.destroyed.cancelled() => Some(Life::Paused),
            number = stored::upload_done(&mut self.upload) => {
                self.uploaded(number);
                Some(Life::Paused)
            }
            command = self.commands.recv() => match command {
                Some(Command::Pause(done)) => {
                    let _ = done.send(Ok(()));
                    Some(Life::Paused)
                }
                Some(Command::Resume(done)) => Some(self.resume(done).await),
                Some(Command::Hibernate(done)) => self.hibernate(done).await,
                Some(Command::SetEgress(policy, done)) => {
                    let _ = done.send(self.set_egress(policy).await);
                    Some(Life::Paused)
                }
                Some(Command::Capture(_, done)) => {
                    let _ = done.send(Err(Refused::NotRunning));
                    Some(Life::Paused)
                }
                None => None,
            },
        }
    }

    /// Saves the capsule and gives back what runs of it; by itself if there is a `reason`.
    async fn pause(
        &mut self,
        running: Running,
        reason: Option<String>,
        done: oneshot::Sender<Result<(), Refused>>,
    ) -> Option<Life> {
        let id = self.journal.record().spec.id;
        if let Err(error) = self.make_whole(&running).await {
            let failed = save::Failed { error: save::Error::Remote(error), goes_on: true };
            warn!(capsule = %id, error = crate::chain(&failed), "it cannot be paused yet");
            self.publish_running(&running);
            let _ = done.send(Err(Refused::Save(failed)));
            return Some(Life::Running(running));
        }
        self.publish(CapsuleState::Pausing, String::new());
        if reason.is_some() && self.traffic.open() > 0 {
            // Something came in time after all.
            self.publish_running(&running);
            return Some(Life::Running(running));
        }
        if tokio::time::timeout(DRAIN, self.traffic.drained()).await.is_err() {
            debug!(capsule = %id, open = self.traffic.open(), "pausing with open exchanges");
        }
        let watch = Watch::over(&self.host, &self.journal, &running);
        let (saved, lost) = watch.during(save::pause(&self.host, &mut self.journal, &running)).await;
        if let Err(failed) = saved {
            let why = pager::why(&failed, lost);
            warn!(capsule = %id, error = why, "the pause failed");
            if !failed.goes_on {
                let _ = done.send(Err(Refused::Save(failed)));
                return self.fail(format!("the pause failed, and the guest could not go on: {why}")).await;
            }
            self.publish_running(&running);
            let _ = done.send(Err(Refused::Save(failed)));
            return Some(Life::Running(running));
        }
        drop(running);
        self.traffic.cut_all();
        self.put_aside().await;
        info!(capsule = %id, reason, "paused");
        self.publish(CapsuleState::Paused, reason.unwrap_or_default());
        let _ = done.send(Ok(()));
        self.start_merge();
        Some(Life::Paused)
    }

    /// Gives back what runs of a capsule whose record says that it is paused.
    async fn put_aside(&mut self) {
        let id = self.journal.record().spec.id;
        match self.stop().await {
            // Written or not: what is gone is given back again without harm.
            Ok(()) => {
                self.promise = None;
                let _ = self.stopped(|_| {});
            }
            Err(errors) => {
                for error in &errors {
                    error!(capsule = %id, error = crate::chain(error), "left behind by a pause");
                }
            }
        }
        let keep = match &self.journal.record().base {
            Base::Snapshot(saved) => Some(saved.number),
            Base::Boot | Base::Lost => None,
        };
        files::tidy(&self.host.memory, self.journal.dir(), keep);
        collect(&self.host.memory);
    }

    /// Brings a paused capsule back. When that fails it is paused as before.
    async fn resume(&mut self, done: oneshot::Sender<Result<(), Refused>>) -> Life {
        let id = self.journal.record().spec.id;
        if !self.is_put_aside() {
            // A pause before this could not give all back then, or a resume not be undone.
            self.back_to_paused().await;
        }
        if !self.is_put_aside() {
            let _ = done.send(Err(Refused::Resume(start::Error::Unfinished)));
            return Life::Paused;
        }
        if self.promise.is_none() {
            match self.host.admission.admit(&self.journal.record().spec) {
                Ok(promise) => self.promise = Some(promise),
                Err(full) => {
                    warn!(capsule = %id, %full, "not resumed");
                    let _ = done.send(Err(Refused::Full(full)));
                    return Life::Paused;
                }
            }
        }
        // It reads the disk, which the guest is about to write.
        self.stop_upload().await;
        self.publish(CapsuleState::Resuming, String::new());
        let resumed = match self.journal.commit(|record| record.phase = Phase::Resuming) {
            Ok(()) => start::start(&self.host, &mut self.journal, Origin::Pause, &self.destroyed).await,
            Err(error) => Err(start::Error::Record(error)),
        };
        match resumed {
            Ok(running) => {
                info!(capsule = %id, "resumed");
                self.publish_running(&running);
                let _ = done.send(Ok(()));
                collect(&self.host.memory);
                Life::Running(running)
            }
            Err(error) => {
                let reason = crate::chain(&error);
                let console = last_lines(&self.journal.dir().join(files::VMM_LOG));
                warn!(capsule = %id, reason, console, "the resume failed");
                self.back_to_paused().await;
                self.publish(CapsuleState::Paused, reason);
                let _ = done.send(Err(Refused::Resume(error)));
                Life::Paused
            }
        }
    }

    /// After a resume that came to nothing: the disk that the pause had, and nothing that runs.
    async fn back_to_paused(&mut self) {
        let id = self.journal.record().spec.id;
        if let Err(errors) = self.stop().await {
            for error in &errors {
                error!(capsule = %id, error = crate::chain(error), "left behind by a resume");
            }
            return;
        }
        self.promise = None;
        if let Err(error) = super::recover::pause_again(&mut self.journal) {
            // The record still says that it is being resumed, which comes to the same at the next start of the agent.
            error!(capsule = %id, %error, "a resume that failed could not be undone on disk");
        }
    }

    async fn capture(
        &mut self,
        running: Running,
        dest: &Path,
        done: oneshot::Sender<Result<(String, Record), Refused>>,
    ) -> Option<Life> {
        if let Err(error) = self.make_whole(&running).await {
            let _ = done.send(Err(Refused::Save(save::Failed { error: save::Error::Remote(error), goes_on: true })));
            return Some(Life::Running(running));
        }
        let watch = Watch::over(&self.host, &self.journal, &running);
        let (captured, lost) = watch.during(save::capture(&self.host, &mut self.journal, &running, dest)).await;
        match captured {
            Ok(digest) => {
                let _ = done.send(Ok((digest, self.journal.record().clone())));
                collect(&self.host.memory);
                self.start_merge();
                Some(Life::Running(running))
            }
            Err(failed) => {
                let (why, goes_on) = (pager::why(&failed, lost), failed.goes_on);
                warn!(capsule = %self.journal.record().spec.id, error = why, "a snapshot failed");
                let _ = done.send(Err(Refused::Save(failed)));
                if goes_on {
                    return Some(Life::Running(running));
                }
                self.fail(format!("a snapshot failed, and the guest could not go on: {why}")).await
            }
        }
    }

    /// Has the capsule reach that outside: now if it runs, when it runs again otherwise.
    async fn set_egress(&mut self, policy: Policy) -> Result<(), Refused> {
        let before = self.journal.record().egress.clone();
        // Every resume says it, and few change it.
        if before == policy && self.journal.record().slot.is_none() {
            return Ok(());
        }
        // Recorded first: were it the other way round, an agent that dies in between would be followed by one that lifts what
        // somebody was told is forbidden.
        let record = |error| Refused::Egress(egress::Error::Record(error));
        self.journal.commit(|record| record.egress = policy.clone()).map_err(record)?;
        if let Some(slot) = self.journal.record().slot
            && let Err(error) = self.host.egress.set(slot, &policy).await
        {
            self.journal.commit(|record| record.egress = before).map_err(record)?;
            return Err(Refused::Egress(error));
        }
        info!(capsule = %self.journal.record().spec.id, ?policy, "it reaches this now");
        self.observed.send_modify(|observed| observed.egress = Arc::new(policy));
        Ok(())
    }

    /// Ends what runs of the capsule.
    async fn stop(&mut self) -> Result<(), Vec<release::Error>> {
        let (id, dir) = (self.journal.record().spec.id, self.journal.dir().to_owned());
        release::stop(&self.host, id, &dir, Some(&mut self.journal)).await
    }

    /// Whether it is paused and nothing of it runs any more.
    fn is_put_aside(&self) -> bool {
        let record = self.journal.record();
        record.phase == Phase::Paused && record.vmm.is_none() && record.slot.is_none()
    }

    /// Notes that nothing runs.
    fn stopped(&mut self, change: impl FnOnce(&mut Record)) -> std::io::Result<()> {
        self.journal.note(|record| {
            record.slot = None;
            record.vmm = None;
            record.pager = None;
            change(record);
        })
    }

    fn start_merge(&mut self) {
        if let Some((stop, _)) = self.merge.take() {
            // It works on a header that is not there any more.
            stop.store(true, Ordering::Relaxed);
        }
        let record = self.journal.record();
        let Base::Snapshot(saved) = &record.base else { return };
        if record.is_remote {
            return;
        }
        let (memory, header) = (self.host.memory.clone(), self.journal.dir().join(files::memory(saved.number)));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let merge = tokio::task::spawn_blocking(move || match memory.merge(&header, &stopped) {
            Ok(snapshot::Merged::Done(bytes)) => {
                debug!(header = %header.display(), bytes, "merged");
                collect(&memory);
            }
            Ok(_) => {}
            Err(error) => warn!(header = %header.display(), error = crate::chain(&error), "merging failed"),
        });
        self.merge = Some((stop, merge));
    }

    async fn stop_merge(&mut self) {
        if let Some((stop, merge)) = self.merge.take() {
            stop.store(true, Ordering::Relaxed);
            // One that panicked has said so, and replaced nothing.
            let _ = merge.await;
        }
    }

    /// Also begins its inactivity anew: a pause that failed is not tried again before that.
    fn publish_running(&mut self, running: &Running) {
        self.traffic.touch();
        self.tell(CapsuleState::Running, String::new(), Some(running.guest.clone()));
    }

    /// The reason that was published last.
    fn reason(&self) -> String {
        self.observed.borrow().reason.clone()
    }

    fn publish(&mut self, state: CapsuleState, reason: String) {
        self.tell(state, reason, None);
    }

    /// Says what is true now. The generation is recorded first: the next agent must not say less.
    fn tell(&mut self, state: CapsuleState, reason: String, guest: Option<Arc<Guest>>) {
        let generation = self.journal.record().generation.max(self.observed.borrow().generation + 1);
        // What is being given back has no next agent, and in the end no directory either.
        if generation > self.journal.record().generation
            && self.journal.record().phase != Phase::Stopping
            && let Err(error) = self.journal.update(|record| record.generation = generation)
        {
            error!(capsule = %self.journal.record().spec.id, %error, "writing the capsule's record");
        }
        let record = self.journal.record();
        self.observed.send_modify(|observed| {
            observed.state = state;
            observed.generation = generation;
            observed.reason = reason;
            observed.host_ip = record.slot.map(|slot| slot.host_ip());
            observed.versions = record.versions.clone();
            observed.guest = guest;
            observed.is_uploaded = state == CapsuleState::Paused && record.is_uploaded();
        });
    }

    async fn fail(&mut self, reason: String) -> Option<Life> {
        let [console, pager] = [files::VMM_LOG, files::PAGER_LOG].map(|log| last_lines(&self.journal.dir().join(log)));
        warn!(capsule = %self.journal.record().spec.id, %reason, console, pager);
        self.end(CapsuleState::Failed, reason).await;
        None
    }

    /// Gives everything back and publishes the last state.
    async fn end(&mut self, last: CapsuleState, reason: String) {
        let id = self.journal.record().spec.id;
        self.stop_upload().await;
        self.stop_merge().await;
        if let Err(error) = self.journal.update(|record| record.phase = Phase::Stopping) {
            // The release needs no record; a restarted agent would only take a dying capsule for a live one.
            error!(capsule = %id, %error, "writing the record of a capsule that ends");
        }
        self.publish(CapsuleState::Stopping, String::new());
        self.traffic.cut_all();
        let dir = self.journal.dir().to_owned();
        let released = release(&self.host, id, &dir, Some(&mut self.journal)).await;
        let leftovers = released.err().unwrap_or_default();
        for error in &leftovers {
            error!(capsule = %id, error = crate::chain(error), "left behind");
        }
        // Who waits for its end may begin another.
        self.promise = None;
        // What hibernates is in the object store, whatever became of what was here.
        let is_last = leftovers.is_empty() || last == CapsuleState::Hibernated;
        self.publish(if is_last { last } else { CapsuleState::Failed }, reason);
        info!(capsule = %id, "ended");
    }
}

/// The end of what the VMM and the guest's console printed: all that is left to understand a guest that died.
fn last_lines(log: &Path) -> String {
    let Ok(mut file) = File::open(log) else { return String::new() };
    let mut text = Vec::new();
    let end = file.metadata().map_or(0, |metadata| metadata.len());
    // A log that cannot be read is no reason to fail.
    let _ = file.seek(SeekFrom::Start(end.saturating_sub(CONSOLE))).and_then(|_| file.read_to_end(&mut text));
    String::from_utf8_lossy(&text).into_owned()
}
