//! The host agent service: messages in, capsules asked, messages out.

use std::sync::Arc;

use agent_api::*;
use api::CapsuleId;
use axum::Router;
use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult};

use crate::Agent;
use crate::capsule::{Handle, Spec};

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
        let spec = request.spec.into_option().ok_or_else(|| ConnectError::invalid_argument("spec is missing"))?;
        let spec = parse(spec)?;
        if !self.has_image(&spec.image) {
            return Err(ConnectError::not_found(format!("this host has no image `{}`", spec.image)));
        }
        let handle = self.create(spec).map_err(|error| ConnectError::internal(crate::chain(&error)))?;
        let observed = handle.settled().await;
        if observed.state == CapsuleState::Failed {
            let failed = if observed.host_full { ConnectError::resource_exhausted } else { ConnectError::internal };
            return Err(failed(observed.reason));
        }
        Response::ok(CreateCapsuleResponse { capsule: message(&handle).into(), ..Default::default() })
    }

    async fn destroy_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroyCapsuleRequest>,
    ) -> ServiceResult<DestroyCapsuleResponse> {
        if let Some(handle) = self.capsule(id(request.id)?) {
            handle.destroy().await;
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

    async fn touch_capsule(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, TouchCapsuleRequest>,
    ) -> ServiceResult<TouchCapsuleResponse> {
        let id = id(request.id)?;
        let handle = self.capsule(id).filter(|handle| !handle.observed().has_ended());
        handle.ok_or_else(|| ConnectError::not_found(format!("no capsule {id} on this host")))?.traffic.touch();
        Response::ok(TouchCapsuleResponse::default())
    }

    async fn get_host(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, GetHostRequest>,
    ) -> ServiceResult<GetHostResponse> {
        let memory = rustix::system::sysinfo();
        let running = self.list().iter().filter(|handle| handle.observed().state == CapsuleState::Running).count();
        Response::ok(GetHostResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            vmm: self.vmm_name(),
            cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32),
            memory_mib: ((u64::from(memory.mem_unit) * memory.totalram) >> 20) as u32,
            running: running as u32,
            images: self.images(),
            ..Default::default()
        })
    }
}

fn id(text: &str) -> Result<CapsuleId, ConnectError> {
    text.parse().map_err(|error| ConnectError::invalid_argument(format!("id: {error}")))
}

fn parse(spec: CapsuleSpec) -> Result<Spec, ConnectError> {
    let id = id(&spec.id)?;
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
            ..Default::default()
        }
        .into(),
        last_active_unix_ms: handle.traffic.last_active_ms(),
        versions: observed.versions.into_iter().collect(),
        host_ip: observed.host_ip.map_or_else(String::new, |ip| ip.to_string()),
        ..Default::default()
    }
}
