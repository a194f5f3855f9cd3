//! Real capsules by a real agent: one that works, and one that fails at every step of its start.
//!
//! Each failure is made by breaking something real (the image, the kernel, the VMM, the network), and afterwards the
//! machine must hold nothing of the capsule.

mod common;

use agent_api::{CapsuleState, CreateCapsuleRequest, DestroyCapsuleRequest, ListCapsulesRequest};
use api::CapsuleId;
use common::{Host, spec};
use connectrpc::ErrorCode;

#[tokio::test]
async fn a_capsule_runs_and_goes() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    let created = host.lifecycle().create_capsule(CreateCapsuleRequest { spec: spec(id).into(), ..Default::default() }).await;
    let capsule = created.unwrap().into_owned().capsule.into_option().unwrap();
    assert_eq!(capsule.state, CapsuleState::Running);
    assert!(!capsule.versions["envd_version"].is_empty() && !capsule.versions["vmm_version"].is_empty());
    assert!(host.holds() > 0);
    host.lifecycle().destroy_capsule(DestroyCapsuleRequest { id: id.to_string(), ..Default::default() }).await.unwrap();
    assert_eq!(host.holds(), 0);
    let list = host.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned();
    assert_eq!(list.capsules[0].state, CapsuleState::Stopped);
    host.close().await;
}
