//! The agent's RPCs over a map.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use agent_api::*;
use connectrpc::{ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult};

use super::{IMAGE, Inner, MEMORY_MIB, life};

pub(super) struct Service(pub(super) Arc<Inner>);

pub(super) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_millis() as i64
}

/// Does it whether or not its caller waits.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, ConnectError>> + Send + 'static,
) -> Result<T, ConnectError> {
    tokio::spawn(work).await.map_err(|_| ConnectError::internal("the work panicked"))?
}

impl HostAgent for Service {
    async fn create_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<CreateCapsuleResponse> + Send + use<'a>> {
        let spec = request.to_owned_message().spec.into_option().unwrap_or_default();
        self.0.creates.send_modify(|count| *count += 1);
        let spec = life::check(&self.0, spec)?;
        if let Some(code) = *self.0.failure.lock().expect("no panics under this lock") {
            return Err(ConnectError::new(code, "this host was told to fail"));
        }
        let inner = self.0.clone();
        let capsule = detached(async move { life::create(&inner, spec).await }).await?;
        Response::ok(CreateCapsuleResponse { capsule: capsule.into(), ..Default::default() })
    }

    async fn destroy_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroyCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<DestroyCapsuleResponse> + Send + use<'a>> {
        let DestroyCapsuleRequest { id, forget, .. } = request.to_owned_message();
        self.0.change(&id, CapsuleState::CAPSULE_STATE_STOPPED, "destroyed");
        if forget {
            self.0.stored.lock().expect("no panics under this lock").remove(&id);
        }
        self.0.destroys.send_modify(|count| *count += 1);
        Response::ok(DestroyCapsuleResponse::default())
    }

    async fn list_capsules<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListCapsulesRequest>,
    ) -> ServiceResult<impl Encodable<ListCapsulesResponse> + Send + use<'a>> {
        let capsules = self.0.capsules().values().map(|entry| entry.capsule.clone()).collect();
        Response::ok(ListCapsulesResponse { capsules, ..Default::default() })
    }

    async fn pause_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PauseCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<PauseCapsuleResponse> + Send + use<'a>> {
        let (inner, id) = (self.0.clone(), request.to_owned_message().id);
        self.0.pauses.send_modify(|count| *count += 1);
        let capsule = detached(async move { life::pause(&inner, &id, "").await }).await?;
        Response::ok(PauseCapsuleResponse { capsule: capsule.into(), ..Default::default() })
    }

    async fn resume_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResumeCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<ResumeCapsuleResponse> + Send + use<'a>> {
        let (inner, request) = (self.0.clone(), request.to_owned_message());
        if request.adopt {
            life::adopt(&inner, &request.id);
        }
        if let Some(egress) = request.egress.into_option() {
            life::set_egress(&inner, &request.id, egress)?;
        }
        let capsule = detached(async move { life::resume(&inner, &request.id).await }).await?;
        Response::ok(ResumeCapsuleResponse { capsule: capsule.into(), ..Default::default() })
    }

    async fn hibernate_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, HibernateCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<HibernateCapsuleResponse> + Send + use<'a>> {
        let (inner, id) = (self.0.clone(), request.to_owned_message().id);
        let capsule = detached(async move { life::hibernate(&inner, &id).await }).await?;
        Response::ok(HibernateCapsuleResponse { capsule: capsule.into(), ..Default::default() })
    }

    async fn fork_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ForkCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<ForkCapsuleResponse> + Send + use<'a>> {
        let (inner, request) = (self.0.clone(), request.to_owned_message());
        let children = detached(async move { life::fork(&inner, &request.id, request.children).await }).await?;
        Response::ok(ForkCapsuleResponse { children, ..Default::default() })
    }

    async fn snapshot_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SnapshotCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<SnapshotCapsuleResponse> + Send + use<'a>> {
        let (inner, request) = (self.0.clone(), request.to_owned_message());
        let template = detached(async move { life::snapshot(&inner, &request.id, request.name).await }).await?;
        Response::ok(SnapshotCapsuleResponse { template: template.into(), ..Default::default() })
    }

    async fn delete_template<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DeleteTemplateRequest>,
    ) -> ServiceResult<impl Encodable<DeleteTemplateResponse> + Send + use<'a>> {
        let name = request.to_owned_message().name;
        self.0.templates.lock().expect("no panics under this lock").remove(&name);
        Response::ok(DeleteTemplateResponse::default())
    }

    async fn list_templates<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListTemplatesRequest>,
    ) -> ServiceResult<impl Encodable<ListTemplatesResponse> + Send + use<'a>> {
        let templates = self.0.templates.lock().expect("no panics under this lock").values().cloned().collect();
        Response::ok(ListTemplatesResponse { templates, ..Default::default() })
    }

    async fn set_egress<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SetEgressRequest>,
    ) -> ServiceResult<impl Encodable<SetEgressResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        life::set_egress(&self.0, &request.id, request.egress.into_option().unwrap_or_default())?;
        Response::ok(SetEgressResponse::default())
    }

    async fn touch_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, TouchCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<TouchCapsuleResponse> + Send + use<'a>> {
        let id = request.to_owned_message().id;
        match self.0.capsules().get_mut(&id) {
            Some(entry) if !life::ended(&entry.capsule) => {
                entry.capsule.last_active_unix_ms = now_ms();
                Response::ok(TouchCapsuleResponse::default())
            }
            _ => Err(ConnectError::not_found(format!("no capsule {id} is here"))),
        }
    }

    async fn get_metrics<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetMetricsRequest>,
    ) -> ServiceResult<impl Encodable<GetMetricsResponse> + Send + use<'a>> {
        let id = request.to_owned_message().id;
        let points = match self.0.capsules().get(&id) {
            Some(entry) if life::ended(&entry.capsule) => None,
            Some(entry) => Some(life::metrics(&entry.capsule)),
            None => None,
        };
        let points = points.ok_or_else(|| ConnectError::not_found(format!("no capsule {id} is here")))?;
        Response::ok(GetMetricsResponse { points, ..Default::default() })
    }

    async fn get_host<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, GetHostRequest>,
    ) -> ServiceResult<impl Encodable<GetHostResponse> + Send + use<'a>> {
        let running =
            self.0.capsules().values().filter(|e| e.capsule.state == CapsuleState::CAPSULE_STATE_RUNNING).count();
        Response::ok(GetHostResponse {
            agent_version: "fake".into(),
            vmm: "fake".into(),
            cpus: 64,
            memory_mib: MEMORY_MIB,
            running: running as u32,
            images: vec![IMAGE.into()],
            memory_promised_mib: Used { used: 0, limit: MEMORY_MIB.into(), ..Default::default() }.into(),
            vcpus_promised: Used { used: 0, limit: 1024, ..Default::default() }.into(),
            disk_used_mib: Used { used: 0, limit: 65_536, ..Default::default() }.into(),
            ..Default::default()
        })
    }
}
