//! The host agent service: messages in, capsules asked, messages out.

use std::collections::HashSet;
use std::sync::Arc;

use agent_api::*;
use api::CapsuleId;
use api::egress::Policy;
use axum::Router;
use connectrpc::{ConnectError, ErrorCode, RequestContext, Response, ServiceRequest, ServiceResult};

use crate::capsule::driver::From;
use crate::capsule::{Handle, Refused, Spec, remote};
use crate::point::Meta;
use crate::templates::CaptureError;
use crate::{Agent, CreateError, fork, templates};

/// Children of one fork.
const MOST_CHILDREN: usize = 100;

/// The service, ready to be mounted.
pub fn router(agent: Agent) -> Router {
    Router::new().fallback_service(connectrpc::Router::new().add_service(Arc::new(agent)).into_axum_service())
}

impl HostAgent for Agent {
    async fn create_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateCapsuleRequest>,
    ) -> ServiceResult<CreateCapsuleResponse> {
        let request = request.to_owned_message();
        let mut spec = request.spec.into_option().ok_or_else(|| ConnectError::invalid_argument("spec is missing"))?;
        let template = self.find_template(&spec.image).await.map_err(remote_refused)?;
        if template.is_none() && !self.has_image(&spec.image) {
            return Err(ConnectError::not_found(format!("this host has no image or template `{}`", spec.image)));
        }
        let egress = policy(spec.egress.take())?;
        let spec = parse(spec, template.as_ref().map(|point| &point.meta))?;
        let from = template.map_or(From::Image, From::Point);
        let handle = self.create(spec, egress, from, None).map_err(not_created)?;
        let observed = handle.settled().await;
        if observed.state == CapsuleState::Failed {
            return Err(match observed.host_full {
                Some(full) => agent_api::full::error(&full.into(), observed.reason),
                None => ConnectError::internal(observed.reason),
            });
        }
        Response::ok(CreateCapsuleResponse { capsule: message(&handle).into(), ..Default::default() })
    }

    async fn destroy_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroyCapsuleRequest>,
    ) -> ServiceResult<DestroyCapsuleResponse> {
        let id = id(request.id)?;
        let not_noted = |error| ConnectError::internal(crate::chain(&error));
        if request.forget {
            // First, because whoever asks may leave, and this agent may end.
            self.host.note_forgotten(&remote::name(id)).map_err(not_noted)?;
        }
        if let Some(handle) = self.capsule(id) {
            handle.destroy().await;
        }
        self.forget_hibernated(id).map_err(not_noted)?;
        if request.forget {
            self.host.forget_upload(&remote::name(id)).await.map_err(not_noted)?;
        }
        Response::ok(DestroyCapsuleResponse::default())
    }

    async fn list_capsules(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, ListCapsulesRequest>,
    ) -> ServiceResult<ListCapsulesResponse> {
        Response::ok(ListCapsulesResponse { capsules: self.list().iter().map(message).collect(), ..Default::default() })
    }

    async fn pause_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, PauseCapsuleRequest>,
    ) -> ServiceResult<PauseCapsuleResponse> {
        let handle = self.living(request.id)?;
        handle.pause().await.map_err(refused)?;
        Response::ok(PauseCapsuleResponse { capsule: message(&handle).into(), ..Default::default() })
    }

    async fn resume_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ResumeCapsuleRequest>,
    ) -> ServiceResult<ResumeCapsuleResponse> {
        let handle = match self.living(request.id) {
            Err(error) if error.code == ErrorCode::NotFound && request.adopt => {
                self.adopt(id(request.id)?, request.generation).await.map_err(remote_refused)?
            }
            found => found?,
        };
        if let Some(egress) = request.to_owned_message().egress.into_option() {
            handle.set_egress(policy(Some(egress))?).await.map_err(refused)?;
        }
        handle.resume().await.map_err(refused)?;
        Response::ok(ResumeCapsuleResponse { capsule: message(&handle).into(), ..Default::default() })
    }

    async fn hibernate_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, HibernateCapsuleRequest>,
    ) -> ServiceResult<HibernateCapsuleResponse> {
        let handle = self.living(request.id)?;
        handle.hibernate().await.map_err(refused)?;
        Response::ok(HibernateCapsuleResponse { capsule: message(&handle).into(), ..Default::default() })
    }

    async fn fork_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ForkCapsuleRequest>,
    ) -> ServiceResult<ForkCapsuleResponse> {
        let request = request.to_owned_message();
        let parent = self.living(&request.id)?;
        let ids = request.children.iter().map(|text| id(text)).collect::<Result<Vec<_>, _>>()?;
        let distinct: HashSet<_> = ids.iter().collect();
        if !(1..=MOST_CHILDREN).contains(&ids.len()) || distinct.len() < ids.len() {
            let message = format!("children must be 1 to {MOST_CHILDREN} different ids");
            return Err(ConnectError::invalid_argument(message));
        }
        let specs = ids.iter().map(|id| Spec { id: *id, ..(*parent.spec).clone() }).collect();
        let agent = self.clone();
        // Children that are begun are finished, whether or not somebody waits for them.
        let forked = tokio::spawn(async move { agent.fork(&parent, specs).await }).await;
        let forked = forked.expect("the work does not panic, and nobody aborts it");
        let children = forked.map_err(fork_failed)?.into_iter().zip(ids).map(|(child, id)| {
            let id = id.to_string();
            match child {
                Ok(handle) => Child { id, capsule: message(&handle).into(), ..Default::default() },
                Err(reason) => Child { id, reason, ..Default::default() },
            }
        });
        Response::ok(ForkCapsuleResponse { children: children.collect(), ..Default::default() })
    }

    async fn snapshot_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SnapshotCapsuleRequest>,
    ) -> ServiceResult<SnapshotCapsuleResponse> {
        let request = request.to_owned_message();
        let capsule = self.living(&request.id)?;
        let made = self.make_template(capsule, request.name.clone()).await;
        let meta = made.map_err(|error| match error {
            templates::Error::Name(_) => ConnectError::invalid_argument(crate::chain(&error)),
            templates::Error::Exists(_) => ConnectError::already_exists(error.to_string()),
            templates::Error::Capture(error) => capture_failed(error),
            templates::Error::Keep(_) => ConnectError::internal(crate::chain(&error)),
        })?;
        let template = template(request.name, &meta);
        Response::ok(SnapshotCapsuleResponse { template: template.into(), ..Default::default() })
    }

    async fn delete_template(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, DeleteTemplateRequest>,
    ) -> ServiceResult<DeleteTemplateResponse> {
        let request = request.to_owned_message();
        self.forget_template(&request.name);
        let forgotten = self.host.forget_upload(&templates::remote::name(&request.name)).await;
        forgotten.map_err(|error| ConnectError::internal(crate::chain(&error)))?;
        Response::ok(DeleteTemplateResponse::default())
    }

    async fn list_templates(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, ListTemplatesRequest>,
    ) -> ServiceResult<ListTemplatesResponse> {
        let templates = self.templates().into_iter().map(|(name, meta)| template(name, &meta)).collect();
        Response::ok(ListTemplatesResponse { templates, ..Default::default() })
    }

    async fn set_egress(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SetEgressRequest>,
    ) -> ServiceResult<SetEgressResponse> {
        let request = request.to_owned_message();
        let handle = self.living(&request.id)?;
        handle.set_egress(policy(request.egress.into_option())?).await.map_err(refused)?;
        Response::ok(SetEgressResponse::default())
    }

    async fn touch_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, TouchCapsuleRequest>,
    ) -> ServiceResult<TouchCapsuleResponse> {
        self.living(request.id)?.traffic.touch();
        Response::ok(TouchCapsuleResponse::default())
    }

    async fn get_metrics(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, GetMetricsRequest>,
    ) -> ServiceResult<GetMetricsResponse> {
        let handle = self.living(request.id)?;
        let points = self.metrics(&handle, request.seconds).await;
        Response::ok(GetMetricsResponse { points, ..Default::default() })
    }

    async fn get_host(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, GetHostRequest>,
    ) -> ServiceResult<GetHostResponse> {
        let (memory, room) = (rustix::system::sysinfo(), self.host.admission.room());
        let used = |(used, limit)| Used { used, limit, ..Default::default() };
        let running = self.list().iter().filter(|handle| handle.observed().state == CapsuleState::Running).count();
        Response::ok(GetHostResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            vmm: self.vmm_name(),
            cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32),
            memory_mib: ((u64::from(memory.mem_unit) * memory.totalram) >> 20) as u32,
            running: running as u32,
            images: self.images(),
            memory_promised_mib: used(room.memory_mib).into(),
            vcpus_promised: used(room.vcpus).into(),
            disk_used_mib: used(room.disk_mib).into(),
            ..Default::default()
        })
    }
}

fn id(text: &str) -> Result<CapsuleId, ConnectError> {
    text.parse().map_err(|error| ConnectError::invalid_argument(format!("id: {error}")))
}

impl Agent {
    /// The capsule of that id, if it has not ended.
    fn living(&self, text: &str) -> Result<Handle, ConnectError> {
        let id = id(text)?;
        let handle = self.capsule(id).filter(|handle| !handle.observed().has_ended());
        handle.ok_or_else(|| ConnectError::not_found(format!("no capsule {id} on this host")))
    }
}

fn refused(refused: Refused) -> ConnectError {
    let message = crate::chain(&refused);
    match refused {
        Refused::Ended(_) => ConnectError::not_found(message),
        Refused::NotRunning | Refused::NotPaused => ConnectError::failed_precondition(message),
        Refused::Remote(error) => remote_refused(error),
        Refused::Full(full) => agent_api::full::error(&full.into(), message),
        Refused::Resume(error) => match error.is_full() {
            Some(full) => agent_api::full::error(&full.into(), message),
            None if error.is_damage() => ConnectError::data_loss(message),
            None => ConnectError::internal(message),
        },
        Refused::Save(_) | Refused::Egress(_) | Refused::Note(_) => ConnectError::internal(message),
    }
}

fn remote_refused(error: remote::Error) -> ConnectError {
    let message = crate::chain(&error);
    match error {
        remote::Error::Unknown(_) => ConnectError::not_found(message),
        remote::Error::NoObjects | remote::Error::NoImage(_) => ConnectError::failed_precondition(message),
        remote::Error::Busy => ConnectError::new(ErrorCode::Aborted, message),
        error if error.is_damage() => ConnectError::data_loss(message),
        error if error.is_passing() => ConnectError::unavailable(message),
        _ => ConnectError::internal(message),
    }
}

fn not_created(error: CreateError) -> ConnectError {
    let message = crate::chain(&error);
    match error {
        CreateError::Full(full) => agent_api::full::error(&full.into(), message),
        CreateError::Place(_) => ConnectError::internal(message),
    }
}

fn fork_failed(error: fork::Error) -> ConnectError {
    match error {
        fork::Error::Full(full) => agent_api::full::error(&full.into(), full.to_string()),
        fork::Error::Capture(error) => capture_failed(error),
    }
}

fn capture_failed(error: CaptureError) -> ConnectError {
    match error {
        CaptureError::Dir(_) => ConnectError::internal(crate::chain(&error)),
        CaptureError::Refused(reason) => refused(reason),
    }
}

/// What a message says that a capsule may reach.
fn policy(egress: Option<Egress>) -> Result<Policy, ConnectError> {
    egress
        .unwrap_or_default()
        .try_into()
        .map_err(|error: egress::Error| ConnectError::invalid_argument(error.to_string()))
}

/// A spec that can be made, from a template if there is one.
fn parse(mut spec: CapsuleSpec, template: Option<&Meta>) -> Result<Spec, ConnectError> {
    let id = id(&spec.id)?;
    if let Some(Meta { vcpus, memory_mib, disk_mib, .. }) = template {
        let baked = [
            ("vcpus", &mut spec.vcpus, *vcpus),
            ("memory_mib", &mut spec.memory_mib, *memory_mib),
            ("disk_mib", &mut spec.disk_mib, *disk_mib),
        ];
        for (field, asked, baked) in baked {
            if ![0, baked].contains(asked) {
                let message = format!("{field} of template `{}` is {baked} and cannot be another", spec.image);
                return Err(ConnectError::invalid_argument(message));
            }
            *asked = baked;
        }
    }
    let nonzero = [("vcpus", spec.vcpus), ("memory_mib", spec.memory_mib), ("disk_mib", spec.disk_mib)];
    if let Some((field, _)) = nonzero.into_iter().find(|&(_, value)| value == 0) {
        return Err(ConnectError::invalid_argument(format!("{field} must be at least 1")));
    }
    Ok(Spec {
        id,
        image: spec.image,
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        disk_mib: spec.disk_mib,
        timeout_sec: spec.timeout_sec,
        default_env: spec.default_env.into_iter().collect(),
        template_id: spec.template_id,
    })
}

fn template(name: String, meta: &Meta) -> Template {
    let Meta { vcpus, memory_mib, disk_mib, created_unix_ms, .. } = *meta;
    Template { name, vcpus, memory_mib, disk_mib, created_unix_ms, ..Default::default() }
}

fn message(handle: &Handle) -> Capsule {
    let observed = handle.observed();
    let spec = &handle.spec;
    Capsule {
        id: spec.id.to_string(),
        state: observed.state.into(),
        generation: observed.generation,
        reason: observed.reason,
        spec: CapsuleSpec {
            id: spec.id.to_string(),
            image: spec.image.clone(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk_mib: spec.disk_mib,
            timeout_sec: spec.timeout_sec,
            default_env: spec.default_env.clone().into_iter().collect(),
            template_id: spec.template_id.clone(),
            egress: (!observed.egress.is_open()).then(|| Egress::from(&*observed.egress)).into(),
            ..Default::default()
        }
        .into(),
        last_active_unix_ms: handle.traffic.last_active_ms(),
        versions: observed.versions.into_iter().collect(),
        host_ip: observed.host_ip.map_or_else(String::new, |ip| ip.to_string()),
        uploaded: observed.is_uploaded,
        ..Default::default()
    }
}
