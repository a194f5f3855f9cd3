//! A host as the control plane sees it: its agent's calls, and what they answer, in our words.

use std::collections::BTreeMap;
use std::time::Duration;

use agent_api::{
    CapsuleState, CreateCapsuleRequest, DestroyCapsuleRequest, Endpoint, GuestFiles, GuestProcesses, Lifecycle,
    ListCapsulesRequest, TouchCapsuleRequest, Transport,
};
use api::{CapsuleId, CapsuleSpec};
use chrono::{DateTime, Utc};
use connectrpc::client::{CallOptions, ClientBody};
use connectrpc::{ConnectError, ErrorCode};
use hyper::body::Incoming;
use hyper::{Request, Response};
use lifecycle::{Event, HostState};

/// Why a host did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be asked.
    #[error("the host does not answer")]
    Unreachable(#[source] ConnectError),
    /// It has no room.
    #[error("the host is full")]
    Full(#[source] ConnectError),
    /// It has not answered in time, and may still do it.
    #[error("the host did not answer in time")]
    Late(#[source] ConnectError),
    /// It does not have the capsule.
    #[error("the host does not have the capsule")]
    Absent(#[source] ConnectError),
    /// It tried.
    #[error("the host failed: {}", .0.message.as_deref().unwrap_or("it does not say why"))]
    Failed(#[source] ConnectError),
    /// It answered with something that is not in the contract.
    #[error("the host's answer is not understood: {0}")]
    Answer(&'static str),
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        match error.code {
            // What has a source did not come from the agent but from the way to it.
            ErrorCode::Unavailable => Self::Unreachable(error),
            ErrorCode::ResourceExhausted => Self::Full(error),
            ErrorCode::DeadlineExceeded => Self::Late(error),
            ErrorCode::NotFound => Self::Absent(error),
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
        })
    }
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
const QUICK: Duration = Duration::from_secs(10);

/// The agent of one host. Lifecycle calls and guest traffic never share a connection.
pub struct Host {
    lifecycle: Lifecycle,
    guests: Transport,
}

impl Host {
    /// Connects when first used.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { lifecycle: Transport::new(endpoint.clone()).lifecycle(), guests: Transport::new(endpoint) }
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
            ..Default::default()
        };
        let request = CreateCapsuleRequest { spec: spec.into(), ..Default::default() };
        let answer = self.lifecycle.create_capsule_with_options(request, within(CREATE)).await?.into_owned();
        answer.capsule.into_option().ok_or(Error::Answer("it names no capsule"))?.try_into()
    }

    /// Ends the capsule; one that is not there is ended already.
    pub async fn destroy(&self, id: CapsuleId) -> Result<(), Error> {
        let request = DestroyCapsuleRequest { id: id.to_string(), ..Default::default() };
        self.lifecycle.destroy_capsule_with_options(request, within(DESTROY)).await?;
        Ok(())
    }

    /// Everything the host has, and what it lately ended.
    pub async fn list(&self) -> Result<Vec<Report>, Error> {
        let answer = self.lifecycle.list_capsules_with_options(ListCapsulesRequest::default(), within(QUICK)).await?;
        answer.into_owned().capsules.into_iter().map(Report::try_from).collect()
    }

    /// Restarts the capsule's inactivity clock.
    pub async fn touch(&self, id: CapsuleId) -> Result<(), Error> {
        let request = TouchCapsuleRequest { id: id.to_string(), ..Default::default() };
        self.lifecycle.touch_capsule_with_options(request, within(QUICK)).await?;
        Ok(())
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
}

fn within(limit: Duration) -> CallOptions {
    CallOptions::default().with_timeout(limit)
}
