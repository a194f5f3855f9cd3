//! A host as the control plane sees it: its agent's calls, and what they answer, in our words.

use std::collections::BTreeMap;
use std::time::Duration;

use agent_api::{
    CapsuleState, CreateCapsuleRequest, DeleteTemplateRequest, DestroyCapsuleRequest, Endpoint, ForkCapsuleRequest,
    GetMetricsRequest, GuestFiles, GuestProcesses, HibernateCapsuleRequest, Lifecycle, ListCapsulesRequest,
    PauseCapsuleRequest, ResumeCapsuleRequest, SetEgressRequest, SnapshotCapsuleRequest, TouchCapsuleRequest,
    Transport,
};
use api::egress::Policy;
use api::{CapsuleId, CapsuleSpec, Point, Sizes};
use chrono::{DateTime, Utc};
use connectrpc::client::{CallOptions, ClientBody};
use connectrpc::{ConnectError, ErrorCode};
use hyper::body::Incoming;
use hyper::{Request, Response};
use lifecycle::{Event, HostState};
use proxy::{Target, Upstream};

/// Why a host did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be asked.
    #[error("the host does not answer")]
    Unreachable(#[source] ConnectError),
    /// Something that it needs, it could not reach.
    #[error("the host cannot do it now: {}", words(.0))]
    Unable(#[source] ConnectError),
    /// It has no room.
    #[error("the host is full: {}", words(.0))]
    Full(#[source] ConnectError),
    /// It has not answered in time, and may still do it.
    #[error("the host did not answer in time")]
    Late(#[source] ConnectError),
    /// It does not have the capsule.
    #[error("the host does not have the capsule")]
    Absent(#[source] ConnectError),
    /// The capsule is not in a state that allows it.
    #[error("the host refuses: {}", words(.0))]
    State(#[source] ConnectError),
    /// It tried.
    #[error("the host failed: {}", words(.0))]
    Failed(#[source] ConnectError),
    /// It answered with something that is not in the contract.
    #[error("the host's answer is not understood: {0}")]
    Answer(&'static str),
}

fn words(error: &ConnectError) -> &str {
    error.message.as_deref().unwrap_or("it does not say why")
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        match error.code {
            // What has a source did not come from the agent but from the way to it.
            ErrorCode::Unavailable if error.source_arc().is_some() => Self::Unreachable(error),
            ErrorCode::Unavailable => Self::Unable(error),
            ErrorCode::ResourceExhausted => Self::Full(error),
            ErrorCode::DeadlineExceeded => Self::Late(error),
            ErrorCode::NotFound => Self::Absent(error),
            ErrorCode::FailedPrecondition => Self::State(error),
            _ => Self::Failed(error),
        }
    }
}

/// What a host says of one capsule.
#[derive(Debug, Clone)]
pub struct Report {
    pub id: CapsuleId,
    pub state: HostState,
    pub generation: u64,
    pub reason: Option<String>,
    pub last_active_at: Option<DateTime<Utc>>,
    pub versions: BTreeMap<String, String>,
    /// What it may reach outside.
    pub egress: Policy,
}

impl Report {
    pub fn event(&self) -> Event {
        Event::Reported { state: self.state, generation: self.generation }
    }
}

impl TryFrom<agent_api::Capsule> for Report {
    type Error = Error;

    fn try_from(capsule: agent_api::Capsule) -> Result<Self, Error> {
        Ok(Self {
            id: capsule.id.parse().map_err(|_| Error::Answer("an id is not one"))?,
            state: match capsule.state.as_known() {
                Some(CapsuleState::CAPSULE_STATE_STARTING) => HostState::Starting,
                Some(CapsuleState::CAPSULE_STATE_RUNNING) => HostState::Running,
                Some(CapsuleState::CAPSULE_STATE_PAUSING) => HostState::Pausing,
                Some(CapsuleState::CAPSULE_STATE_PAUSED) if capsule.uploaded => HostState::Uploaded,
                Some(CapsuleState::CAPSULE_STATE_PAUSED) => HostState::Paused,
                Some(CapsuleState::CAPSULE_STATE_HIBERNATED) => HostState::Hibernated,
                Some(CapsuleState::CAPSULE_STATE_RESUMING) => HostState::Resuming,
                Some(CapsuleState::CAPSULE_STATE_STOPPING) => HostState::Stopping,
                Some(CapsuleState::CAPSULE_STATE_STOPPED) => HostState::Stopped,
                Some(CapsuleState::CAPSULE_STATE_FAILED) => HostState::Failed,
                Some(CapsuleState::CAPSULE_STATE_UNSPECIFIED) | None => {
                    return Err(Error::Answer("a state is unknown"));
                }
            },
            generation: capsule.generation,
            reason: Some(capsule.reason).filter(|reason| !reason.is_empty()),
            last_active_at: DateTime::from_timestamp_millis(capsule.last_active_unix_ms)
                .filter(|at| at.timestamp_millis() > 0),
            versions: capsule.versions.into_iter().collect(),
            egress: capsule
                .spec
                .into_option()
                .and_then(|spec| spec.egress.into_option())
                .map_or(Ok(Policy::default()), Policy::try_from)
                .map_err(|_| Error::Answer("what a capsule may reach"))?,
        })
    }
}

/// A fork, or why there is none.
#[derive(Debug)]
pub struct Child {
    pub id: CapsuleId,
    pub outcome: Result<Report, String>,
}

/// A template that a host made of a capsule.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot {
    pub sizes: Sizes,
    pub size_bytes: u64,
}

/// What the host needs to know of a template.
#[derive(Debug, Clone)]
pub struct Image {
    /// The host's name for it.
    pub name: String,
    pub template_id: String,
    pub default_env: BTreeMap<String, String>,
}

/// How long a call may take before its answer is no longer awaited; the host goes on with what it began.
const CREATE: Duration = Duration::from_secs(180);
const DESTROY: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_secs(300);
/// Most of it is the upload, which goes on if nobody waits.
const HIBERNATE: Duration = Duration::from_secs(600);
const RESUME: Duration = Duration::from_secs(180);
/// A reconciler gives up on forks only later, [`lifecycle::FORK_GRACE`].
const FORK: Duration = Duration::from_secs(300);
const SNAPSHOT: Duration = Duration::from_secs(600);
/// It may wait for a start or a pause.
const EGRESS: Duration = Duration::from_secs(20);
const QUICK: Duration = Duration::from_secs(10);

/// The agent of one host. Lifecycle calls, what the platform does in guests, and traffic with what users run there never
/// share a connection.
pub struct Host {
    lifecycle: Lifecycle,
    guests: Transport,
    ports: Upstream,
}

impl Host {
    /// Connects when first used.
    pub fn new(endpoint: Endpoint) -> Self {
        let target = match &endpoint {
            Endpoint::Unix(path) => Target::Socket(path.clone()),
            Endpoint::Http(authority) => Target::Name(authority.to_string()),
        };
        Self {
            lifecycle: Transport::new(endpoint.clone()).lifecycle(),
            guests: Transport::new(endpoint),
            ports: Upstream::new(target),
        }
    }

    /// Makes the capsule run; answers when its guest does.
    pub async fn create(&self, id: CapsuleId, spec: &CapsuleSpec, image: Image) -> Result<Report, Error> {
        let spec = agent_api::CapsuleSpec {
            id: id.to_string(),
            image: image.name,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mb,
            disk_mib: spec.disk_size_mb,
            timeout_sec: spec.timeout_sec,
            default_env: image.default_env.into_iter().collect(),
            template_id: image.template_id,
            egress: message(&spec.egress).into(),
            ..Default::default()
        };
        let request = CreateCapsuleRequest { spec: spec.into(), ..Default::default() };
        let answer = self.lifecycle.create_capsule_with_options(request, within(CREATE)).await?.into_owned();
        answer.capsule.into_option().ok_or(Error::Answer("it names no capsule"))?.try_into()
    }

    /// Ends the capsule, and what the object store has of it; one that is not there is ended already.
    pub async fn destroy(&self, id: CapsuleId) -> Result<(), Error> {
        let request = DestroyCapsuleRequest { id: id.to_string(), forget: true, ..Default::default() };
        self.lifecycle.destroy_capsule_with_options(request, within(DESTROY)).await?;
        Ok(())
    }

    /// Puts the capsule aside; answers when that is durable.
    pub async fn pause(&self, id: CapsuleId) -> Result<Report, Error> {
        let request = PauseCapsuleRequest { id: id.to_string(), ..Default::default() };
        let answer = self.lifecycle.pause_capsule_with_options(request, within(PAUSE)).await?.into_owned();
        answer.capsule.into_option().ok_or(Error::Answer("it names no capsule"))?.try_into()
    }

    /// Gives back what a paused capsule takes there, once the object store has it.
    pub async fn hibernate(&self, id: CapsuleId) -> Result<Report, Error> {
        let request = HibernateCapsuleRequest { id: id.to_string(), ..Default::default() };
        let answer = self.lifecycle.hibernate_capsule_with_options(request, within(HIBERNATE)).await?.into_owned();
        answer.capsule.into_option().ok_or(Error::Answer("it names no capsule"))?.try_into()
    }

    /// Lets a paused capsule go on; answers when its guest does. With `adopt` it may be in the object store; what the host
    /// says of it then is newer than the generation given.
    pub async fn resume(&self, id: CapsuleId, egress: &Policy, adopt: Option<u64>) -> Result<Report, Error> {
        let (generation, adopt) = (adopt.unwrap_or_default(), adopt.is_some());
        let egress = agent_api::Egress::from(egress).into();
        let request = ResumeCapsuleRequest { id: id.to_string(), adopt, generation, egress, ..Default::default() };
        let answer = self.lifecycle.resume_capsule_with_options(request, within(RESUME)).await?.into_owned();
        answer.capsule.into_option().ok_or(Error::Answer("it names no capsule"))?.try_into()
    }

    /// Makes `children` that begin where the capsule is now. In their order, what came of each.
    pub async fn fork(&self, id: CapsuleId, children: &[CapsuleId]) -> Result<Vec<Child>, Error> {
        let names = children.iter().map(ToString::to_string).collect();
        let request = ForkCapsuleRequest { id: id.to_string(), children: names, ..Default::default() };
        let answer = self.lifecycle.fork_capsule_with_options(request, within(FORK)).await?.into_owned();
        let told: Vec<Child> = answer.children.into_iter().map(Child::try_from).collect::<Result<_, _>>()?;
        if told.iter().map(|child| child.id).ne(children.iter().copied()) {
            return Err(Error::Answer("its children are not those that were asked for"));
        }
        Ok(told)
    }

    /// Keeps what the capsule is now as a template, under the host's own name for it.
    pub async fn snapshot(&self, id: CapsuleId, image: &str) -> Result<Snapshot, Error> {
        let request = SnapshotCapsuleRequest { id: id.to_string(), name: image.into(), ..Default::default() };
        let answer = self.lifecycle.snapshot_capsule_with_options(request, within(SNAPSHOT)).await?.into_owned();
        let template = answer.template.into_option().ok_or(Error::Answer("it names no template"))?;
        let sizes = Sizes { vcpus: template.vcpus, memory_mb: template.memory_mib, disk_size_mb: template.disk_mib };
        Ok(Snapshot { sizes, size_bytes: template.size_bytes })
    }

    /// Forgets a template; one that is not there is forgotten already.
    pub async fn delete_template(&self, image: &str) -> Result<(), Error> {
        let request = DeleteTemplateRequest { name: image.into(), ..Default::default() };
        self.lifecycle.delete_template_with_options(request, within(DESTROY)).await?;
        Ok(())
    }

    /// Everything the host has, and what it lately ended.
    pub async fn list(&self) -> Result<Vec<Report>, Error> {
        let answer = self.lifecycle.list_capsules_with_options(ListCapsulesRequest::default(), within(QUICK)).await?;
        answer.into_owned().capsules.into_iter().map(Report::try_from).collect()
    }

    /// Has the capsule reach that outside, and nothing else.
    pub async fn set_egress(&self, id: CapsuleId, policy: &Policy) -> Result<(), Error> {
        let egress = agent_api::Egress::from(policy).into();
        let request = SetEgressRequest { id: id.to_string(), egress, ..Default::default() };
        self.lifecycle.set_egress_with_options(request, within(EGRESS)).await?;
        Ok(())
    }

    /// Restarts the capsule's inactivity clock.
    pub async fn touch(&self, id: CapsuleId) -> Result<(), Error> {
        let request = TouchCapsuleRequest { id: id.to_string(), ..Default::default() };
        self.lifecycle.touch_capsule_with_options(request, within(QUICK)).await?;
        Ok(())
    }

    /// What the host saw the capsule use in the last `seconds`.
    pub async fn metrics(&self, id: CapsuleId, seconds: u32) -> Result<Vec<Point>, Error> {
        let request = GetMetricsRequest { id: id.to_string(), seconds, ..Default::default() };
        let answer = self.lifecycle.get_metrics_with_options(request, within(QUICK)).await?.into_owned();
        let point = |point: agent_api::MetricsPoint| Point {
            timestamp_unix: point.unix_ms / 1000,
            cpu_pct: point.cpu_percent,
            mem_bytes: point.memory_bytes,
            disk_bytes: point.disk_bytes,
            net_sent_bytes: point.sent_bytes,
            net_received_bytes: point.received_bytes,
        };
        Ok(answer.points.into_iter().map(point).collect())
    }

    /// The processes of a capsule.
    pub fn processes(&self, id: CapsuleId) -> GuestProcesses {
        self.guests.guest(id)
    }

    /// The files of a capsule, but for what is in them.
    pub fn files(&self, id: CapsuleId) -> GuestFiles {
        self.guests.files(id)
    }

    /// A plain HTTP request to the envd of a capsule.
    pub async fn send_to_guest(
        &self,
        id: CapsuleId,
        request: Request<ClientBody>,
    ) -> Result<Response<Incoming>, ConnectError> {
        self.guests.send_to_guest(id, request).await
    }

    /// The way to what users run in capsules, by the paths of `proxy::path` and `agent_api::port`.
    pub fn ports(&self) -> &Upstream {
        &self.ports
    }
}

impl TryFrom<agent_api::Child> for Child {
    type Error = Error;

    fn try_from(child: agent_api::Child) -> Result<Self, Error> {
        let outcome = match child.capsule.into_option() {
            Some(capsule) => Ok(Report::try_from(capsule)?),
            None => Err(child.reason),
        };
        Ok(Self { id: child.id.parse().map_err(|_| Error::Answer("an id is not one"))?, outcome })
    }
}

/// What a capsule may reach, where that is not everything.
fn message(policy: &Policy) -> Option<agent_api::Egress> {
    (!policy.is_open()).then(|| policy.into())
}

fn within(limit: Duration) -> CallOptions {
    CallOptions::default().with_timeout(limit)
}
