//! The Connect service `filesystem.Filesystem`: requests to calls on [`operations`] and [`watch`], away from the runtime's
//! own threads, and what comes back to the wire.

use crate::filesystem::entry::{Owners, clean, entry};
use crate::filesystem::operations;
use crate::filesystem::watch::{self, Change, Target, Watch};
use crate::filesystem::watchers::Watchers;
use crate::path;
use crate::rpc::{keepalive, username};
use crate::settings::{Defaults, Settings};
use crate::user::{self, User};
use bytes::Bytes;
use connectrpc::{
    CodecFormat, ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use guest_api::filesystem::watch_dir_response::{Event, KeepAlive, StartEvent};
use guest_api::filesystem::{self as wire, EntryInfo, EventType, FilesystemEvent, WatchDirResponse};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::time::{Instant, timeout_at};

/// From how many entries on a message takes so long to encode that the runtime should know.
const LONG_LISTING: usize = 1000;

/// The service.
pub struct Service {
    pub settings: Arc<Settings>,
    pub watchers: Arc<Watchers>,
}

/// Who calls, and where that one's paths begin.
struct Caller {
    user: User,
    workdir: Option<String>,
}

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("invalid username: '{0}'")]
    UnknownUser(String),
    #[error("cannot read the user database")]
    UserDatabase(#[source] io::Error),
    #[error(transparent)]
    Path(#[from] path::Error),
    #[error("{0} is empty")]
    Empty(&'static str),
    #[error(transparent)]
    Operation(#[from] operations::Error),
    #[error(transparent)]
    Watch(#[from] watch::Error),
    #[error(transparent)]
    Full(#[from] crate::filesystem::watchers::Full),
}

#[expect(refining_impl_trait, reason = "the concrete types are what the trait's `impl Encodable` stands for")]
impl wire::Filesystem for Service {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::StatRequest>,
    ) -> ServiceResult<wire::StatResponse> {
        let request = request.to_owned_message();
        let stat = move |caller: Caller| Ok(operations::stat(&caller.path(&request.path)?)?);
        let entry = self.run(&context, stat).await?;
        Response::ok(wire::StatResponse { entry: entry.into(), ..Default::default() })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<wire::MakeDirResponse> {
        let request = request.to_owned_message();
        let make = move |caller: Caller| Ok(operations::make_dir(&caller.path(&request.path)?, &caller.user)?);
        let entry = self.run(&context, make).await?;
        Response::ok(wire::MakeDirResponse { entry: entry.into(), ..Default::default() })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<wire::MoveResponse> {
        let request = request.to_owned_message();
        let rename = move |caller: Caller| {
            let source = caller.explicit_path(&request.source, "source")?;
            let destination = caller.explicit_path(&request.destination, "destination")?;
            Ok(operations::rename(&source, &destination, &caller.user)?)
        };
        let entry = self.run(&context, rename).await?;
        Response::ok(wire::MoveResponse { entry: entry.into(), ..Default::default() })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<Listing> {
        let request = request.to_owned_message();
        let list = move |caller: Caller| Ok(operations::list(&caller.path(&request.path)?, request.depth)?);
        let entries = self.run(&context, list).await?;
        Response::ok(Listing(wire::ListDirResponse { entries, ..Default::default() }))
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<wire::RemoveResponse> {
        let request = request.to_owned_message();
        let remove = move |caller: Caller| {
            let path = caller.explicit_path(&request.path, "path")?;
            match operations::remove(&path)? {
                false if request.must_exist => Err(operations::Error::NotFound(path.display().to_string()).into()),
                _ => Ok(()),
            }
        };
        self.run(&context, remove).await?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<WatchDirResponse>> {
        let request = request.to_owned_message();
        let include_entry = request.include_entry;
        let begin = move |caller: Caller| {
            let target = Target {
                root: caller.path(&request.path)?,
                recursive: request.recursive,
                allow_network_mounts: request.allow_network_mounts,
            };
            Ok(Watch::new(target)?)
        };
        let watch = self.run(&context, begin).await?;
        let keepalive = keepalive(&context);
        let deadline = context.deadline().map(Instant::from_std);
        let first = VecDeque::from([StartEvent::default().into()]);
        let events = Events { watch, include_entry, ready: first, keepalive, deadline };
        Response::stream_ok(futures::stream::unfold(Some(events), |events| async {
            match events?.next().await {
                Ok((event, events)) => Some((Ok(event), Some(events))),
                Err(error) => Some((Err(error), None)),
            }
        }))
    }

    async fn create_watcher(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<wire::CreateWatcherResponse> {
        let request = request.to_owned_message();
        let watchers = Arc::clone(&self.watchers);
        let create = move |caller: Caller| {
            let target = Target {
                root: caller.path(&request.path)?,
                recursive: request.recursive,
                allow_network_mounts: request.allow_network_mounts,
            };
            Ok(watchers.create(target, request.include_entry)??)
        };
        let watcher_id = self.run(&context, create).await?;
        Response::ok(wire::CreateWatcherResponse { watcher_id, ..Default::default() })
    }

    async fn get_watcher_events(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<wire::GetWatcherEventsResponse> {
        let id = request.to_owned_message().watcher_id;
        let taken = match self.watchers.take(&id) {
            None => return Err(unknown_watcher(&id)),
            Some(Err(error)) => return Err(watch_ended(&error)),
            Some(Ok(taken)) => taken,
        };
        let events = blocking(move || describe(taken.changes, &taken.root, taken.include_entry)).await?;
        Response::ok(wire::GetWatcherEventsResponse { events, ..Default::default() })
    }

    async fn remove_watcher(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<wire::RemoveWatcherResponse> {
        let id = request.to_owned_message().watcher_id;
        if !self.watchers.remove(&id) {
            return Err(unknown_watcher(&id));
        }
        Response::ok(wire::RemoveWatcherResponse::default())
    }
}

impl Service {
    /// Does `work` for the caller where it may block.
    async fn run<T: Send + 'static>(
        &self,
        context: &RequestContext,
        work: impl FnOnce(Caller) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, ConnectError> {
        let (asked, defaults) = (username(context)?, self.settings.defaults());
        let work = move || Caller::new(asked, defaults).and_then(work);
        blocking(work).await?.map_err(|refusal| refused(&refusal))
    }
}

impl Caller {
    fn new(asked: Option<String>, defaults: Defaults) -> Result<Caller, Refusal> {
        let name = asked.unwrap_or(defaults.user);
        match user::lookup(&name) {
            Ok(Some(user)) => Ok(Caller { user, workdir: defaults.workdir }),
            Ok(None) => Err(Refusal::UnknownUser(name)),
            Err(error) => Err(Refusal::UserDatabase(error)),
        }
    }

    fn path(&self, given: &str) -> Result<PathBuf, Refusal> {
        Ok(clean(&path::resolve(given, self.workdir.as_deref(), &self.user.home)?))
    }

    /// A path that must be given: its default would be a whole home.
    fn explicit_path(&self, given: &str, what: &'static str) -> Result<PathBuf, Refusal> {
        if given.is_empty() { Err(Refusal::Empty(what)) } else { self.path(given) }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ConnectError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ConnectError::unavailable("envd is shutting down"))
}

/// An answer of many entries.
pub struct Listing(wire::ListDirResponse);

impl Encodable<wire::ListDirResponse> for Listing {
    fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
        let encode = || Encodable::<wire::ListDirResponse>::encode(&self.0, codec);
        let is_long = self.0.entries.len() >= LONG_LISTING;
        let has_others = Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread;
        if is_long && has_others { tokio::task::block_in_place(encode) } else { encode() }
    }
}

/// A stream of what happens in a directory.
struct Events {
    watch: Watch,
    include_entry: bool,
    /// What waits to be sent.
    ready: VecDeque<Event>,
    keepalive: Duration,
    deadline: Option<Instant>,
}

impl Events {
    /// The next event, and what is left.
    async fn next(mut self) -> Result<(WatchDirResponse, Events), ConnectError> {
        let idle = Instant::now() + self.keepalive;
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok((WatchDirResponse { event: Some(event), ..Default::default() }, self));
            }
            let until = self.deadline.map_or(idle, |deadline| deadline.min(idle));
            if timeout_at(until, self.watch.ready()).await.is_err() {
                if self.deadline.is_some_and(|deadline| deadline <= idle) {
                    return Err(ConnectError::deadline_exceeded("the call's deadline passed"));
                }
                self.ready.push_back(KeepAlive::default().into());
                continue;
            }
            let (events, changes) = blocking(move || {
                let changes = self.watch.changes();
                let changes = changes.map(|changes| describe(changes, self.watch.root(), self.include_entry));
                (self, changes)
            })
            .await?;
            self = events;
            self.ready.extend(changes.map_err(|error| watch_ended(&error))?.into_iter().map(Event::from));
        }
    }
}

/// Changes as the wire has them. An entry that is gone by now is left out, and what goes has none.
fn describe(changes: Vec<Change>, root: &Path, include_entry: bool) -> Vec<FilesystemEvent> {
    let owners = (include_entry && !changes.is_empty()).then(Owners::load);
    let event = |change: Change| {
        let entry: Option<EntryInfo> = match (change.kind, &owners) {
            (EventType::EVENT_TYPE_REMOVE | EventType::EVENT_TYPE_RENAME, _) | (_, None) => None,
            (_, Some(owners)) => entry(&clean(&root.join(&change.path)), owners).ok(),
        };
        FilesystemEvent {
            name: change.path.to_string_lossy().into_owned(),
            r#type: change.kind.into(),
            entry: entry.into(),
            ..Default::default()
        }
    };
    changes.into_iter().map(event).collect()
}

fn unknown_watcher(id: &str) -> ConnectError {
    ConnectError::not_found(format!("watcher with id {id} not found"))
}

fn refused(refusal: &Refusal) -> ConnectError {
    let message = refusal.to_string();
    match refusal {
        Refusal::UnknownUser(_) => ConnectError::unauthenticated(message),
        Refusal::UserDatabase(source) => ConnectError::internal(format!("{message}: {source}")),
        Refusal::Path(_) | Refusal::Empty(_) => ConnectError::invalid_argument(message),
        Refusal::Operation(error) => failed(error),
        Refusal::Watch(error) => watch_ended(error),
        Refusal::Full(_) => ConnectError::resource_exhausted(message),
    }
}

fn failed(error: &operations::Error) -> ConnectError {
    use operations::Error;
    let message = error.to_string();
    match error {
        Error::NotFound(_) => ConnectError::not_found(message),
        Error::Exists(_) => ConnectError::already_exists(message),
        Error::NotDirectory(_) | Error::Root => ConnectError::invalid_argument(message),
        Error::Loop(_) | Error::OtherFilesystem(_) => ConnectError::failed_precondition(message),
        Error::TooMany(_) => ConnectError::resource_exhausted(message),
        Error::Io { source, .. } => {
            let message = format!("{message}: {source}");
            match Errno::from_io_error(source) {
                Some(Errno::INVAL | Errno::NAMETOOLONG | Errno::ISDIR) => ConnectError::invalid_argument(message),
                Some(Errno::EXIST | Errno::NOTEMPTY | Errno::BUSY) => ConnectError::failed_precondition(message),
                Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => ConnectError::permission_denied(message),
                Some(Errno::NOSPC | Errno::DQUOT | Errno::MFILE | Errno::NFILE | Errno::NOMEM) => {
                    ConnectError::resource_exhausted(message)
                }
                _ => ConnectError::internal(message),
            }
        }
    }
}

fn watch_ended(error: &watch::Error) -> ConnectError {
    use watch::Error;
    let message = error.to_string();
    match error {
        Error::Path(error) => failed(error),
        Error::Network(_) => ConnectError::invalid_argument(message),
        Error::Overflow => ConnectError::resource_exhausted(message),
        Error::Limit(source) => ConnectError::resource_exhausted(format!("{message}: {source}")),
        Error::Gone(_) => ConnectError::not_found(message),
        Error::Watch { source, .. } | Error::Read(source) => ConnectError::internal(format!("{message}: {source}")),
    }
}
