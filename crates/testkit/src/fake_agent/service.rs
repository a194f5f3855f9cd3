//! The agent's RPCs over a map.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use agent_api::*;
use api::CapsuleId;
use connectrpc::{ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult};

use super::{Entry, IMAGE, Inner};

pub(super) struct Service(pub(super) Arc<Inner>);

pub(super) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_millis() as i64
}

fn check(spec: &CapsuleSpec) -> Result<(), ConnectError> {
    if spec.id.parse::<CapsuleId>().is_err() || spec.vcpus == 0 || spec.memory_mib == 0 {
        return Err(ConnectError::invalid_argument("the specification is not one"));
    }
    if spec.image != IMAGE {
        return Err(ConnectError::not_found(format!("this host has no image {}", spec.image)));
    }
    Ok(())
}

impl Service {
    /// The work of a create, which its caller may leave.
    async fn run(inner: Arc<Inner>, spec: CapsuleSpec) -> Result<Capsule, ConnectError> {
        let id = spec.id.clone();
        let mut open = inner.open.subscribe();
        let _ = open.wait_for(|open| *open).await;
        let started = {
            let mut capsules = inner.capsules();
            match capsules.get_mut(&id) {
                Some(entry) if entry.capsule.state == CapsuleState::CAPSULE_STATE_STARTING => {
                    entry.capsule.state = CapsuleState::CAPSULE_STATE_RUNNING.into();
                    entry.capsule.generation += 1;
                    entry.capsule.last_active_unix_ms = now_ms();
                    let versions = ["kernel_version", "vmm_version", "agent_version", "envd_version"];
                    entry.capsule.versions = versions.map(|name| (name.into(), "fake".into())).into_iter().collect();
                    Some(entry.capsule.clone())
                }
                Some(entry) if entry.capsule.state == CapsuleState::CAPSULE_STATE_RUNNING => {
                    Some(entry.capsule.clone())
                }
                _ => None,
            }
        };
        started.ok_or_else(|| ConnectError::internal("the capsule was ended while it started"))
    }
}

impl HostAgent for Service {
    async fn create_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<CreateCapsuleResponse> + Send + use<'a>> {
        let spec = request.to_owned_message().spec.into_option().unwrap_or_default();
        self.0.creates.send_modify(|count| *count += 1);
        check(&spec)?;
        if let Some(code) = *self.0.failure.lock().expect("no panics under this lock") {
            return Err(ConnectError::new(code, "this host was told to fail"));
        }
        self.0.capsules().entry(spec.id.clone()).or_insert_with(|| {
            Entry::new(Capsule {
                id: spec.id.clone(),
                state: CapsuleState::CAPSULE_STATE_STARTING.into(),
                generation: 1,
                spec: spec.clone().into(),
                host_ip: "10.11.0.1".into(),
                ..Default::default()
            })
        });
        let work = tokio::spawn(Self::run(self.0.clone(), spec));
        let capsule = work.await.map_err(|_| ConnectError::internal("the start panicked"))??;
        Response::ok(CreateCapsuleResponse { capsule: capsule.into(), ..Default::default() })
    }

    async fn destroy_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroyCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<DestroyCapsuleResponse> + Send + use<'a>> {
        let id = request.to_owned_message().id;
        self.0.change(&id, CapsuleState::CAPSULE_STATE_STOPPED, "destroyed");
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

    async fn touch_capsule<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, TouchCapsuleRequest>,
    ) -> ServiceResult<impl Encodable<TouchCapsuleResponse> + Send + use<'a>> {
        let id = request.to_owned_message().id;
        match self.0.capsules().get_mut(&id) {
            Some(entry) if entry.capsule.state == CapsuleState::CAPSULE_STATE_RUNNING => {
                entry.capsule.last_active_unix_ms = now_ms();
                Response::ok(TouchCapsuleResponse::default())
            }
            _ => Err(ConnectError::not_found(format!("no capsule {id} runs here"))),
        }
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
            memory_mib: 65_536,
            running: running as u32,
            images: vec![IMAGE.into()],
            ..Default::default()
        })
    }
}
