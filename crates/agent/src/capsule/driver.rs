//! The driver: the one task that owns a capsule from its first record to its end.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use agent_api::CapsuleState;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::record::{Journal, Phase};
use super::release::release;
use super::start::{self, Running};
use super::{Command, Handle, Observed, Traffic};
use crate::host::Host;

/// Commands that wait while the driver is busy; a sender past that waits too.
const QUEUE: usize = 8;
/// Bytes of a dead guest's console that are logged.
const CONSOLE: u64 = 2 << 10;

struct Driver {
    host: Arc<Host>,
    journal: Journal,
    commands: mpsc::Receiver<Command>,
    /// Last, so that it is dropped last: who sees it closed knows that `host` is let go.
    observed: watch::Sender<Observed>,
}

/// Starts the capsule that `journal` describes, in a task of its own.
pub fn spawn_start(host: Arc<Host>, journal: Journal) -> Handle {
    let (handle, driver) = pair(host, journal, CapsuleState::Starting);
    tokio::spawn(driver.start());
    handle
}

/// Takes over a capsule that runs already, in a task of its own.
pub fn spawn_adopted(host: Arc<Host>, journal: Journal, running: Running) -> Handle {
    let (handle, driver) = pair(host, journal, CapsuleState::Running);
    driver.observed.send_modify(|observed| observed.guest = Some(running.guest.clone()));
    tokio::spawn(driver.run(running));
    handle
}

fn pair(host: Arc<Host>, journal: Journal, state: CapsuleState) -> (Handle, Driver) {
    let record = journal.record();
    let (command_sender, commands) = mpsc::channel(QUEUE);
    let (observed, observed_receiver) = watch::channel(Observed {
        state,
        generation: record.generation,
        reason: String::new(),
        host_full: false,
        host_ip: record.slot.map(|slot| slot.host_ip()),
        versions: record.versions.clone(),
        guest: None,
    });
    let handle = Handle {
        spec: Arc::new(record.spec.clone()),
        traffic: Arc::new(Traffic::default()),
        commands: command_sender,
        observed: observed_receiver,
    };
    (handle, Driver { host, journal, commands, observed })
}

impl Driver {
    async fn start(mut self) {
        let cancelled = CancellationToken::new();
        let outcome = {
            let starting = start::start(&self.host, &mut self.journal, &cancelled);
            tokio::pin!(starting);
            loop {
                tokio::select! {
                    outcome = &mut starting => break outcome,
                    // The start ends at its next step and releases nothing by itself.
                    Some(Command::Destroy) = self.commands.recv() => cancelled.cancel(),
                }
            }
        };
        match outcome {
            Ok(running) if cancelled.is_cancelled() => {
                drop(running);
                self.end(CapsuleState::Stopped, "destroyed".into()).await;
            }
            Ok(running) => {
                let record = self.journal.record();
                info!(capsule = %record.spec.id, slot = ?record.slot, "running");
                self.observed.send_modify(|observed| {
                    observed.state = CapsuleState::Running;
                    observed.generation = record.generation;
                    observed.host_ip = record.slot.map(|slot| slot.host_ip());
                    observed.versions = record.versions.clone();
                    observed.guest = Some(running.guest.clone());
                });
                self.run(running).await;
            }
            Err(start::Error::Cancelled) => self.end(CapsuleState::Stopped, "destroyed".into()).await,
            Err(error) => {
                let reason = crate::chain(&error);
                let console = last_lines(&self.journal.dir().join("vmm.log"));
                warn!(capsule = %self.journal.record().spec.id, %reason, console, "the start failed");
                self.observed.send_modify(|observed| observed.host_full = matches!(error, start::Error::Claim(_)));
                self.end(CapsuleState::Failed, reason).await;
            }
        }
    }

    async fn run(mut self, running: Running) {
        tokio::select! {
            exit = running.process.exited() => {
                let reason = format!("the VMM ended by itself ({exit})");
                let console = last_lines(&self.journal.dir().join("vmm.log"));
                warn!(capsule = %self.journal.record().spec.id, %reason, console);
                self.end(CapsuleState::Failed, reason).await;
            }
            Some(Command::Destroy) = self.commands.recv() => {
                self.end(CapsuleState::Stopped, "destroyed".into()).await;
            }
            // Every handle is gone: the agent stops, and the capsule outlives it.
            else => {}
        }
    }

    /// Gives everything back and publishes the last state.
    async fn end(mut self, last: CapsuleState, reason: String) {
        let id = self.journal.record().spec.id;
        let recorded = self.journal.update(|record| {
            record.phase = Phase::Stopping;
            record.generation += 1;
        });
        if let Err(error) = recorded {
            // The release needs no record; a restarted agent would only take a dying capsule for a live one.
            error!(capsule = %id, %error, "writing the record of a capsule that ends");
        }
        self.observed.send_modify(|observed| {
            observed.state = CapsuleState::Stopping;
            observed.generation = self.journal.record().generation;
            observed.guest = None;
        });
        let released = release(&self.host, id, self.journal.dir(), Some(self.journal.record())).await;
        let leftovers = released.err().unwrap_or_default();
        for error in &leftovers {
            error!(capsule = %id, error = crate::chain(error), "left behind");
        }
        let state = if leftovers.is_empty() { last } else { CapsuleState::Failed };
        self.observed.send_modify(|observed| {
            observed.state = state;
            observed.generation += 1;
            observed.reason = reason;
        });
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
