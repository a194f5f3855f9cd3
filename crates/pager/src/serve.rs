//! One pager's life: listen, take the handshake, watch over the threads that serve.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use snapshot::Snapshot;

use crate::crew::Crew;
use crate::fill::Guest;
use crate::peer::{Listener, Peer, Wait, Waited, timeout};
use crate::working_set::{Recorder, WorkingSet};
use crate::{Config, Ended, Error, Fetch, WorkingSetError};

/// A pager that listens for its VMM.
#[derive(Debug)]
pub struct Pager {
    config: Config,
    snapshot: Snapshot,
    listener: Listener,
    fetch: Option<Arc<dyn Fetch>>,
}

impl Pager {
    /// Opens the snapshot and listens: from here on the VMM can be told to resume.
    pub fn listen(config: Config) -> Result<Self, Error> {
        let snapshot = Snapshot::open(&config.generations, &config.header).map_err(Error::Open)?;
        let listener = Listener::bind(&config.socket, config.vmm_uid)?;
        Ok(Self { config, snapshot, listener, fetch: None })
    }

    /// What brings pages that are not in the snapshot's files yet.
    pub fn with_fetch(self, fetch: Arc<dyn Fetch>) -> Self {
        Self { fetch: Some(fetch), ..self }
    }

    /// Serves until there is nothing left to serve, or `stop` can be read. The threads that served end on their own, soon
    /// after this returned.
    pub fn serve(self, stop: BorrowedFd<'_>) -> Result<Ended, Error> {
        let Self { config, snapshot, listener, fetch: elsewhere } = self;
        let wait = || Wait { deadline: Instant::now() + config.patience, stop };
        let Waited::Came(peer) = listener.accept(config.vmm_uid, &wait())? else {
            return Ok(Ended::Stopped);
        };
        let Waited::Came((uffd, regions)) = peer.receive(&wait())? else {
            return Ok(Ended::Stopped);
        };
        let memory_size = snapshot.memory_size();
        regions.fit(memory_size)?;
        let fetch = config.prefetch.as_deref().and_then(|path| match WorkingSet::read(path, memory_size) {
            Ok(set) => Some(set),
            Err(WorkingSetError::File(error)) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, path = %path.display(), "no prefetch");
                None
            }
        });
        let recorder = config.record.is_some().then(|| Recorder::new(memory_size));
        let crew = Crew::start(Guest::new(uffd, regions, snapshot, elsewhere), fetch.as_ref(), recorder)?;
        let mut window = config.record.as_ref().map(|_| Instant::now() + config.record_for);
        let outcome = loop {
            if let Some(outcome) = crew.outcome() {
                break outcome;
            }
            if window.is_some_and(|end| end <= Instant::now()) {
                window = None;
                write(&config, &crew, fetch.as_ref());
            }
            watch(&crew, &peer, stop, window);
        };
        let ended = outcome?;
        write(&config, &crew, fetch.as_ref());
        Ok(ended)
    }
}

/// Waits until something may have changed, and says so to the crew if it is the end.
fn watch(crew: &Crew, peer: &Peer, stop: BorrowedFd<'_>, window: Option<Instant>) {
    let mut ready = vec![crew.ended(), PollFd::new(&stop, PollFlags::IN)];
    ready.extend(peer.signs_of_death());
    let left = window.map(|end| timeout(end.saturating_duration_since(Instant::now())));
    match poll(&mut ready, left.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return crew.end(Err(Error::SetUp(error.into()))),
    }
    if !ready[1].revents().is_empty() {
        crew.end(Ok(Ended::Stopped));
    } else if ready[2..].iter().any(|sign| !sign.revents().is_empty()) {
        crew.end(Ok(Ended::VmmGone));
    }
}

/// Writes what was recorded, once. A resume without a record is slower and not wrong.
fn write(config: &Config, crew: &Crew, fetched: Option<&WorkingSet>) {
    let (Some(path), Some(recorder)) = (&config.record, crew.recorded()) else { return };
    if let Err(error) = recorder.finish(fetched).write(path) {
        tracing::warn!(error = &error as &dyn std::error::Error, path = %path.display(), "nothing recorded");
    }
}
