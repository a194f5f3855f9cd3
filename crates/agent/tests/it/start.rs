//! Real capsules by a real agent: one that works, and one that fails at every step of its start.
//!
//! Each failure is made by breaking something real (the image, the kernel, the VMM, the network), and afterwards the
//! machine must hold nothing of the capsule.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::common::{Host, claims, holds, spec};
use agent_api::{CapsuleState, CreateCapsuleRequest, DestroyCapsuleRequest, ListCapsulesRequest};
use api::CapsuleId;
use connectrpc::ErrorCode;
use testkit::agent_conformance::{self, Subject};

#[tokio::test]
async fn a_capsule_runs_and_goes() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    let created =
        host.lifecycle().create_capsule(CreateCapsuleRequest { spec: spec(id).into(), ..Default::default() }).await;
    let capsule = created.unwrap().into_owned().capsule.into_option().unwrap();
    assert_eq!(capsule.state, CapsuleState::Running);
    assert!(!capsule.versions["envd_version"].is_empty() && !capsule.versions["vmm_version"].is_empty());
    assert!(host.holds() > 0);
    let record = host.record(id);
    let status = std::fs::read_to_string(format!("/proc/{}/status", record["vmm"]["pid"])).unwrap();
    let user = u64::from(agent::VMM_USERS) + record["slot"].as_u64().unwrap();
    for line in [
        format!("Uid:\t{user}\t{user}\t{user}\t{user}\n"),
        "CapBnd:\t0000000000000000\n".to_owned(),
        "Seccomp:\t2\n".to_owned(),
    ] {
        assert!(status.contains(&line), "its VMM is not jailed: {status}");
    }
    host.lifecycle().destroy_capsule(DestroyCapsuleRequest { id: id.to_string(), ..Default::default() }).await.unwrap();
    assert_eq!(host.holds(), 0);
    let list = host.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned();
    assert_eq!(list.capsules[0].state, CapsuleState::Stopped);
    host.close().await;
}

/// Creates a capsule that cannot start, and checks that the reason says `why` and that nothing of it is left.
async fn fails(host: Host, why: &str) {
    let id = CapsuleId::random();
    let request = CreateCapsuleRequest { spec: spec(id).into(), ..Default::default() };
    let error = host.lifecycle().create_capsule(request).await.map(drop).expect_err("it cannot start");
    assert_eq!(error.code, ErrorCode::Internal, "{error:?}");
    let reason = error.message.unwrap_or_default();
    assert!(reason.contains(why), "{reason}");
    assert_eq!(host.holds(), 0);
    let list = host.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned();
    assert_eq!((list.capsules[0].state, &list.capsules[0].reason), (CapsuleState::Failed.into(), &reason));
    host.close().await;
}

/// Makes a script the VMM.
fn program(config: &mut agent::Config, text: &str, mode: u32) {
    let path = config.dir.join("vmm.sh");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    config.vmm = path;
}

#[tokio::test]
async fn a_network_that_cannot_be_made() {
    let host = Host::open(|_| {}).await;
    let slot = (1..).find(|slot| std::fs::symlink_metadata(format!("/run/wrenn/slots/{slot}")).is_err()).unwrap();
    // A link of that name, as a crash of somebody else may have left it.
    let name = format!("wrenn-veth{slot}");
    assert!(
        Command::new("ip")
            .args(["link", "add", &name, "type", "veth", "peer", "name", "wrenn-other"])
            .status()
            .unwrap()
            .success()
    );
    fails(host, "network").await;
}

/// Waits until that many slots are claimed by the agent, and as many were made; which.
async fn until_ready(host: &Host, count: usize) -> Vec<String> {
    loop {
        let claims = claims(&host.instance());
        // Routes come last.
        let routes = Command::new("ip").args(["-4", "route"]).output().unwrap();
        let routes = String::from_utf8(routes.stdout).unwrap();
        let is_made = |slot: &String| routes.split_whitespace().any(|word| *word == format!("wrenn-veth{slot}"));
        if claims.len() == count && claims.iter().all(is_made) {
            return claims;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn slots_that_are_ready_are_taken_and_come_back() {
    let host = Host::open(|config| config.slots_ready = 2).await;
    let (root, instance) = (host.root(), host.instance());
    let ready = until_ready(&host, 2).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    let slot = host.record(id)["slot"].to_string();
    assert!(ready.contains(&slot), "{slot} of {ready:?}");
    assert_eq!(host.sh(id, "echo hello").await, "hello");
    let more = until_ready(&host, 3).await;
    // A pause gives its slot back, and a resume takes one.
    host.pause(id).await.unwrap();
    until_ready(&host, 2).await;
    host.resume(id).await.unwrap();
    assert!(more.contains(&host.record(id)["slot"].to_string()));

    // The next agent has them as they were.
    until_ready(&host, 3).await;
    let dir = host.leave().await;
    assert_eq!(claims(&instance).len(), 3);
    let host = Host::open_in(dir, |config| config.slots_ready = 2).await;
    assert_eq!(host.sh(id, "echo hello").await, "hello");
    until_ready(&host, 3).await;
    host.destroy(id).await;
    until_ready(&host, 2).await;
    host.close().await;
    assert_eq!(holds(&root, &instance), 0);
}

#[tokio::test]
async fn an_image_that_is_gone() {
    let host = Host::open(|_| {}).await;
    std::fs::remove_dir_all(host.root().join("images")).unwrap();
    fails(host, "making the root disk").await;
}

#[tokio::test]
async fn a_vmm_that_cannot_be_executed() {
    fails(Host::open(|config| program(config, "#!/bin/sh\n", 0o644)).await, "starting the VMM").await;
}

#[tokio::test]
async fn a_vmm_that_ends_at_once() {
    fails(Host::open(|config| program(config, "#!/bin/sh\nexit 7\n", 0o755)).await, "ended with code 7").await;
}

#[tokio::test]
async fn a_vmm_that_never_listens() {
    fails(Host::open(|config| program(config, "#!/bin/sh\nexec sleep 1000\n", 0o755)).await, "configuring the VMM")
        .await;
}

#[tokio::test]
async fn a_vmm_that_refuses_the_kernel() {
    fails(Host::open(|config| config.kernel = "/etc/passwd".into()).await, "/actions").await;
}

#[tokio::test]
async fn a_guest_that_cannot_boot() {
    let blank = |config: &mut agent::Config| {
        let image = config.dir.join("blank");
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        config.templates = [("minimal".to_owned(), image)].into();
    };
    fails(Host::open(blank).await, "ended").await;
}

#[tokio::test]
async fn a_destroy_overtakes_the_start() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    let lifecycle = host.lifecycle();
    let creating = tokio::spawn(async move {
        lifecycle.create_capsule(CreateCapsuleRequest { spec: spec(id).into(), ..Default::default() }).await.map(drop)
    });
    while host.holds() == 0 {
        tokio::task::yield_now().await;
    }
    host.lifecycle().destroy_capsule(DestroyCapsuleRequest { id: id.to_string(), ..Default::default() }).await.unwrap();
    assert_eq!(host.holds(), 0);
    // Whatever the create says by now, it does not hang.
    let _ = creating.await.unwrap();
    host.close().await;
}

#[tokio::test]
async fn a_real_agent_keeps_every_promise_of_the_contract() {
    let objects = tempfile::tempdir().unwrap();
    let address = format!("file://{}", objects.path().display());
    let host = Host::open(|config| config.objects = Some(objects::Config::parse(&address, []).unwrap())).await;
    let subject = Subject { endpoint: host.endpoint(), image: "minimal".into() };
    agent_conformance::all(&subject).await;
    assert_eq!(host.holds(), 0);
    host.close().await;
}
