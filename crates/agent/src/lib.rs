//! The host agent: makes capsules on one machine and keeps them, whatever happens to the agent itself.
//!
//! It has never heard of users, teams or SQL. Lifecycle comes in by RPC ([`rpc`]), guest traffic by plain HTTP on the
//! same listener ([`guest`] for envd, [`ports`] for what users run); behind both, one driver task owns each capsule ([`capsule`]).

pub mod admission;
pub mod audit;
mod boot;
pub mod capsule;
pub mod egress;
mod forgotten;
mod fork;
pub mod guest;
mod hibernated;
pub mod host;
pub mod images;
mod metrics;
pub mod point;
pub mod ports;
mod rpc;
mod templates;

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::CapsuleId;
use api::egress::Policy;
use axum::Router;
use axum::extract::State;
use axum::routing::{any, get};
use futures::StreamExt;
use futures::future::join_all;
use tracing::{info, warn};

use admission::Promise;
use agent_api::CapsuleState;
use boot::Boots;
use capsule::record::{Journal, Phase};
use capsule::recover::{self, recover};
use capsule::release::release;
use capsule::{Handle, Spec, driver, remote};
pub use disk::Backend as DiskBackend;
use host::Host;
pub use host::{Config, SLOTS_READY, Sizes, VMM_USERS};
use metrics::Metrics;
use templates::Templates;

/// How long the agent remembers a capsule that has ended, for callers that ask what became of it. One that hibernated is
/// remembered until it is adopted or destroyed.
const REMEMBER: Duration = Duration::from_secs(600);
/// How many of those at most; the oldest go first.
const REMEMBER_MOST: usize = 1000;
/// How often garbage is removed from the object store.
const SWEEP: Duration = Duration::from_secs(6 * 3600);
/// What was garbage for less may still be read by who has begun to.
const SWEEP_GRACE: Duration = Duration::from_secs(3600);
/// How long that waits for uploads.
const SWEEP_PATIENCE: Duration = Duration::from_secs(60);
/// How many capsules are paused at the same time when all are.
const PAUSES_AT_ONCE: usize = 4;

/// Starting an agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What capsules share could not be opened.
    #[error("opening this host")]
    Host(#[from] host::Error),
    /// What an earlier run left could not be taken over.
    #[error("taking over from an earlier run")]
    Recover(#[from] recover::Error),
    /// The templates that came of capsules could not be read.
    #[error("reading the templates")]
    Templates(#[source] io::Error),
    /// What capsules shared could not be given back.
    #[error("closing this host")]
    Close(#[from] host::CloseError),
}

/// One host's agent. Clones are the same agent.
#[derive(Clone)]
pub struct Agent {
    host: Arc<Host>,
    capsules: Arc<Mutex<HashMap<CapsuleId, Entry>>>,
    templates: Arc<Templates>,
    metrics: Arc<Metrics>,
    /// What is being taken from the object store.
    adopting: Arc<Mutex<HashSet<CapsuleId>>>,
}

/// Why a capsule was not begun.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    /// The host cannot hold it.
    #[error(transparent)]
    Full(#[from] admission::Full),
    /// Its directory could not be made.
    #[error("making the capsule's directory")]
    Place(#[source] io::Error),
}

struct Entry {
    handle: Handle,
    /// When it was first seen to have ended.
    ended: Option<Instant>,
}

impl Agent {
    /// Opens the host and takes over what is on it.
    pub async fn open(config: Config) -> Result<Self, Error> {
        let host = Arc::new(Host::open(config)?);
        let found = recover(&host).await?;
        let entries = found.into_iter().map(|(id, handle)| (id, Entry { handle, ended: None })).collect();
        let templates = Templates::open(&host).map_err(Error::Templates)?;
        if let Some(sizes) = host.config.boot_snapshots {
            host.images.keys().for_each(|image| Boots::want(&host, image, sizes));
        }
        let (capsules, templates) = (Arc::new(Mutex::new(entries)), Arc::new(templates));
        let agent = Self { host, capsules, templates, metrics: Arc::default(), adopting: Arc::default() };
        agent.upload_templates();
        Ok(agent)
    }

    /// Where an agent that shares its process with the control plane listens: short, whatever the data directory is.
    pub fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/run/wrenn/agent-{}.sock", self.host.instance))
    }

    /// Lifecycle RPC and guest traffic.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/guest/{*path}", any(guest::forward))
            .route("/proxy/{*path}", any(ports::forward))
            .route("/tcp/{capsule}/{port}", any(ports::tcp))
            .route("/metrics", get(async |State(agent): State<Self>| agent.metrics_text()))
            .with_state(self.clone())
            .merge(rpc::router(self.clone()))
    }

    /// The capsule of that id, running or lately ended.
    pub fn capsule(&self, id: CapsuleId) -> Option<Handle> {
        self.lock().get(&id).map(|entry| entry.handle.clone())
    }

    /// Starts a capsule, or answers with the one of that id that is already there. It may have been promised its place before.
    fn create(
        &self,
        spec: Spec,
        egress: Policy,
        from: driver::From,
        promise: Option<Promise>,
    ) -> Result<Handle, CreateError> {
        let mut capsules = self.lock();
        if let Some(entry) = capsules.get(&spec.id) {
            return Ok(entry.handle.clone());
        }
        let id = spec.id;
        self.host.admission.check_starts()?;
        let promise = promise.map_or_else(|| self.host.admission.admit(&spec), Ok)?;
        let token = random_token().map_err(CreateError::Place)?;
        let journal = Journal::create(self.host.capsules().join(id.to_string()), spec, egress, token);
        let handle = driver::spawn_start(self.host.clone(), journal.map_err(CreateError::Place)?, from, promise);
        capsules.insert(id, Entry { handle: handle.clone(), ended: None });
        Ok(handle)
    }

    /// Takes a capsule that is not here from the object store. It is paused then. The work goes on if the caller leaves.
    pub(crate) async fn adopt(&self, id: CapsuleId, generation: u64) -> Result<Handle, remote::Error> {
        // This host may remember one that ended here.
        let generation = generation.max(self.capsule(id).map_or(0, |ended| ended.observed().generation));
        let agent = self.clone();
        let adopted = tokio::spawn(async move {
            if !agent.lock_adopting().insert(id) {
                return Err(remote::Error::Busy);
            }
            agent.clear_for(id).await;
            let journal = remote::adopt(&agent.host, id, generation).await;
            let handle = journal.map(|journal| driver::spawn_paused(agent.host.clone(), journal));
            if let Ok(handle) = &handle {
                agent.lock().insert(id, Entry { handle: handle.clone(), ended: None });
                // Who starts after this and finds both goes by the capsule.
                if let Err(error) = agent.host.drop_hibernated(id) {
                    warn!(capsule = %id, %error, "it is here, and noted as one that hibernates");
                }
            }
            agent.lock_adopting().remove(&id);
            handle
        });
        adopted.await.expect("the work does not panic, and nobody aborts it")
    }

    fn lock_adopting(&self) -> std::sync::MutexGuard<'_, HashSet<CapsuleId>> {
        self.adopting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what the capsule left behind when it hibernated here, if that can be now: it would be in the way.
    async fn clear_for(&self, id: CapsuleId) {
        let has_hibernated = |handle: Handle| handle.observed().state == CapsuleState::Hibernated;
        let dir = self.host.capsules().join(id.to_string());
        if !self.capsule(id).is_some_and(has_hibernated) || !dir.exists() {
            return;
        }
        let mut journal = match Journal::open(dir.clone()) {
            Ok(journal) if journal.as_ref().is_none_or(|journal| journal.record().phase == Phase::Stopping) => journal,
            // It may be a capsule.
            _ => return,
        };
        for error in release(&self.host, id, &dir, journal.as_mut()).await.err().unwrap_or_default() {
            warn!(capsule = %id, error = chain(&error), "left behind when it hibernated, and still there");
        }
    }

    /// Forgets that a capsule hibernated here: nobody wants it again, or not of this host.
    fn forget_hibernated(&self, id: CapsuleId) -> io::Result<()> {
        self.host.drop_hibernated(id)?;
        let mut capsules = self.lock();
        if capsules.get(&id).is_some_and(|entry| entry.handle.observed().state == CapsuleState::Hibernated) {
            capsules.remove(&id);
        }
        Ok(())
    }

    fn has_image(&self, name: &str) -> bool {
        self.host.images.contains_key(name)
    }

    fn images(&self) -> Vec<String> {
        self.host.images.keys().cloned().collect()
    }

    fn vmm_name(&self) -> String {
        self.host.config.vmm.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// Every capsule of this host, those that lately ended included.
    fn list(&self) -> Vec<Handle> {
        self.lock().values().map(|entry| entry.handle.clone()).collect()
    }

    /// Forgets capsules that ended long ago, until `shutdown`.
    pub async fn forget_ended(self, shutdown: impl Future<Output = ()>) {
        let mut tick = tokio::time::interval(Duration::from_secs(30));
        let mut sweep = tokio::time::interval_at(tokio::time::Instant::now() + SWEEP, SWEEP);
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => return,
                _ = sweep.tick() => self.sweep(),
                _ = tick.tick() => {
                    self.forget(Instant::now());
                    self.host.forget_uploads().await;
                }
            }
        }
    }

    /// Has what nobody needs in the object store removed, beside everything else.
    fn sweep(&self) {
        let Some(objects) = self.host.objects.clone() else { return };
        tokio::spawn(async move {
            let unneeded =
                objects.collect_unneeded(images::DIRECTORY, SWEEP_GRACE, SWEEP_PATIENCE, images::needed).await;
            if let Err(error) = unneeded {
                warn!(error = chain(&error), "images that nothing needs stay in the object store for now");
            }
            match objects.collect(SWEEP_GRACE, SWEEP_PATIENCE).await {
                Ok(count) if count.objects > 0 => info!(?count, "removed from the object store"),
                Ok(_) => {}
                Err(error) => warn!(error = chain(&error), "garbage stays in the object store for now"),
            }
        });
    }

    fn forget(&self, now: Instant) {
        let mut capsules = self.lock();
        let mut ended = Vec::new();
        for (id, entry) in capsules.iter_mut() {
            let observed = entry.handle.observed();
            if observed.has_ended() && observed.state != CapsuleState::Hibernated {
                ended.push((*entry.ended.get_or_insert(now), *id));
            }
        }
        ended.sort_unstable();
        let surplus = ended.len().saturating_sub(REMEMBER_MOST);
        for (index, (since, id)) in ended.into_iter().enumerate() {
            if index < surplus || now.duration_since(since) > REMEMBER {
                capsules.remove(&id);
            }
        }
    }

    /// Ends every capsule.
    pub async fn destroy_all(&self) {
        self.host.boots.stop().await;
        join_all(self.list().iter().map(Handle::destroy)).await;
    }

    /// Pauses every capsule that runs or is about to, and starts none from then on. Those that could not be paused run on, and
    /// are told with the reason.
    pub async fn pause_all(&self) -> Vec<(CapsuleId, String)> {
        {
            // No start is between the question whether it may and its place in the list.
            let _capsules = self.lock();
            self.host.admission.stop();
        }
        self.host.boots.stop().await;
        let pausing = self.list().into_iter().map(|handle| async move {
            let settled = handle.settled().await;
            if settled.has_ended() {
                return None;
            }
            handle.pause().await.err().map(|error| (handle.spec.id, chain(&error)))
        });
        // Each writes to the same disk, so more at once would not be done sooner.
        futures::stream::iter(pausing).buffer_unordered(PAUSES_AT_ONCE).filter_map(std::future::ready).collect().await
    }

    /// Gives back what the agent itself holds. Only for an agent of whose capsules nothing runs: paused ones are left as
    /// they are, for the next to take over. An agent that merely stops needs none of this.
    pub async fn close(self) -> Result<(), Error> {
        self.host.boots.stop().await;
        self.templates.stop().await;
        let handles: Vec<Handle> = self.lock().drain().map(|(_, entry)| entry.handle).collect();
        join_all(handles.into_iter().map(Handle::leave)).await;
        let Self { host, templates, .. } = self;
        drop(templates);
        let host = Arc::into_inner(host).ok_or(host::CloseError::InUse)?;
        Ok(host.close().await?)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<CapsuleId, Entry>> {
        self.capsules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A new token for a guest's envd, in hex.
fn random_token() -> io::Result<String> {
    let mut token = [0; 32];
    getrandom::fill(&mut token).map_err(io::Error::other)?;
    Ok(hex::encode(token))
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
