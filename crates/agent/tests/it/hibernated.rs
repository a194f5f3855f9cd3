//! What hibernated is told of until it is wanted again, and nothing of it goes that the object store has not.

use std::fs;
use std::path::Path;
use std::time::Duration;

use agent::Config;
use agent::capsule::remote;
use agent::images::{DIRECTORY, needed};
use agent_api::{
    Capsule, CapsuleSpec, CapsuleState, DeleteTemplateRequest, ListCapsulesRequest, SnapshotCapsuleRequest,
};
use api::CapsuleId;
use connectrpc::ErrorCode;
use objects::Objects;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

use crate::common::{Host, spec};
use crate::pause::{ASK, KEEPER};

/// An object store that is a folder.
fn store() -> TempDir {
    TempDir::with_prefix("wrenn-objects-").unwrap()
}

fn parse(store: &TempDir) -> objects::Config {
    objects::Config::parse(&format!("file://{}", store.path().display()), []).unwrap()
}

fn with(store: &TempDir) -> impl FnOnce(&mut Config) + use<> {
    let objects = parse(store);
    move |config| config.objects = Some(objects)
}

/// A capsule that keeps a secret and is paused, and the secret.
async fn paused(host: &Host) -> (CapsuleId, String) {
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    host.pause(id).await.unwrap();
    (id, secret)
}

async fn until_uploaded(host: &Host, id: CapsuleId) {
    while !host.listed(id).await.uploaded {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn until_there(manifest: &Path) {
    while !manifest.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Makes the template `ready` of a capsule that runs.
async fn make_template(host: &Host, id: CapsuleId) {
    let request = SnapshotCapsuleRequest { id: id.to_string(), name: "ready".into(), ..Default::default() };
    host.lifecycle().snapshot_capsule(request).await.unwrap();
}

async fn list(host: &Host) -> Vec<Capsule> {
    host.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned().capsules
}

async fn storage_is_clean(dir: &Path) {
    let audit = agent::audit::audit(dir, &["agent.sock"]).await.unwrap();
    assert!(audit.is_clean(), "{:#?}", audit.findings);
}

#[tokio::test]
async fn what_hibernated_is_listed_until_it_is_adopted_or_destroyed() {
    let store = store();
    let mut host = Host::open(with(&store)).await;
    let (id, secret) = paused(&host).await;
    let hibernated = host.hibernate(id).await.unwrap();
    for _ in 0..2 {
        host = Host::open_in(host.leave().await, with(&store)).await;
        let listed = host.listed(id).await;
        assert_eq!(listed.state, CapsuleState::Hibernated);
        assert_eq!((listed.generation, &listed.spec), (hibernated.generation, &hibernated.spec));
        assert_eq!(host.resume(id).await.unwrap_err().code, ErrorCode::NotFound);
        storage_is_clean(host.dir()).await;
    }
    // Who cannot adopt it has not lost it.
    let (manifest, away) = (store.path().join("manifests").join(remote::name(id)), store.path().join("away"));
    fs::rename(&manifest, &away).unwrap();
    host.adopt(id).await.unwrap_err();
    host = Host::open_in(host.leave().await, with(&store)).await;
    assert_eq!(host.listed(id).await.state, CapsuleState::Hibernated);
    fs::rename(&away, &manifest).unwrap();

    assert!(host.adopt(id).await.unwrap().generation > hibernated.generation);
    assert_eq!(host.sh(id, ASK).await, secret);
    host.destroy(id).await;
    host = Host::open_in(host.leave().await, with(&store)).await;
    assert_eq!(list(&host).await, []);

    for is_forgotten in [false, true] {
        host.adopt(id).await.unwrap();
        host.pause(id).await.unwrap();
        host.hibernate(id).await.unwrap();
        match is_forgotten {
            // This host has nothing more to say of it; the object store has it still.
            false => host.destroy(id).await,
            true => host.forget(id).await,
        }
        assert_eq!(list(&host).await, []);
    }
    host = Host::open_in(host.leave().await, with(&store)).await;
    assert_eq!(list(&host).await, []);
    host.close().await;
}

#[tokio::test]
async fn nothing_goes_that_the_object_store_of_now_has_not() {
    let (one, two) = (store(), store());
    let host = Host::open(with(&one)).await;
    let (id, secret) = paused(&host).await;
    host.resume(id).await.unwrap();
    make_template(&host, id).await;
    host.pause(id).await.unwrap();
    until_uploaded(&host, id).await;
    let template = |store: &TempDir| store.path().join("manifests/templates/ready");
    until_there(&template(&one)).await;

    // Without one, nobody has it but this host.
    let host = Host::open_in(host.leave().await, |_| {}).await;
    assert!(!host.listed(id).await.uploaded);
    let error = host.hibernate(id).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition, "{error}");
    assert_eq!(host.listed(id).await.state, CapsuleState::Paused);

    // Another has not what the first had.
    let manifest = two.path().join("manifests").join(remote::name(id));
    let host = Host::open_in(host.leave().await, with(&two)).await;
    assert!(!host.listed(id).await.uploaded || manifest.exists());
    host.hibernate(id).await.unwrap();
    assert!(manifest.exists(), "it is nowhere");
    until_there(&template(&two)).await;
    host.adopt(id).await.unwrap();
    assert_eq!(host.sh(id, ASK).await, secret);

    // It had, and has not any more, or has what the capsule was earlier.
    let earlier = fs::read(&manifest).unwrap();
    for not_ours in [None, Some(&earlier)] {
        host.pause(id).await.unwrap();
        until_uploaded(&host, id).await;
        match not_ours {
            Some(manifest_then) => fs::write(&manifest, manifest_then).unwrap(),
            None => fs::remove_file(&manifest).unwrap(),
        }
        let number = host.record(id)["snapshots"].clone();
        host.hibernate(id).await.unwrap();
        host.adopt(id).await.unwrap();
        assert_eq!(host.record(id)["snapshots"], number, "it is what it was earlier");
        assert_eq!(host.sh(id, ASK).await, secret);
    }
    host.close().await;
}

#[tokio::test]
async fn a_clean_up_that_fails_does_not_end_what_hibernates() {
    let store = store();
    let host = Host::open(with(&store)).await;
    let (id, secret) = paused(&host).await;
    // It cannot be removed.
    let place = host.capsule(id).join("busy");
    fs::create_dir(&place).unwrap();
    mount("none", &place, "tmpfs", MountFlags::empty(), None).unwrap();
    let hibernated = host.hibernate(id).await;
    let listed = host.listed(id).await;
    let adopted = host.adopt(id).await;
    unmount(&place, UnmountFlags::DETACH).unwrap();
    assert_eq!(hibernated.unwrap().state, CapsuleState::Hibernated);
    assert_eq!(listed.state, CapsuleState::Hibernated);
    assert_eq!(adopted.unwrap_err().code, ErrorCode::Aborted);
    // What was left behind goes when it is in the way.
    host.adopt(id).await.unwrap();
    assert_eq!(host.sh(id, ASK).await, secret);
    host.forget(id).await;
    host.close().await;
}

#[tokio::test]
async fn who_has_not_the_image_takes_it_too() {
    let store = store();
    let one = Host::open(with(&store)).await;
    let (id, secret) = paused(&one).await;
    let image = one.record(id)["image"].as_str().unwrap().to_owned();
    one.resume(id).await.unwrap();
    make_template(&one, id).await;
    one.pause(id).await.unwrap();
    one.hibernate(id).await.unwrap();
    let objects = Objects::open(&parse(&store)).unwrap();
    until_there(&store.path().join("manifests/templates/ready")).await;

    // It was built elsewhere, so what it calls the same is another.
    let two = Host::open(|config| {
        with(&store)(config);
        config.templates.clear();
    })
    .await;
    assert!(!two.root().join("images").join(&image).exists());
    two.adopt(id).await.unwrap();
    assert_eq!(two.sh(id, ASK).await, secret);
    let child = CapsuleId::random();
    two.create(CapsuleSpec { image: "ready".into(), ..spec(child) }).await.unwrap();
    assert_eq!(two.sh(child, ASK).await, secret);
    two.destroy(child).await;
    let images =
        |host: &Host| fs::read_dir(host.root().join("images")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(images(&two).collect::<Vec<_>>(), [image.as_str()]);
    assert_eq!(fs::read_dir(two.root().join("passing")).unwrap().count(), 0);
    storage_is_clean(two.dir()).await;

    // And back.
    two.pause(id).await.unwrap();
    two.hibernate(id).await.unwrap();
    one.adopt(id).await.unwrap();
    assert_eq!(one.sh(id, ASK).await, secret);
    let collect = || objects.collect_unneeded(DIRECTORY, Duration::ZERO, Duration::from_secs(60), needed);
    assert_eq!(collect().await.unwrap(), 0);
    for host in [&one, &two] {
        host.forget(id).await;
        let request = DeleteTemplateRequest { name: "ready".into(), ..Default::default() };
        host.lifecycle().delete_template(request).await.unwrap();
    }
    assert_eq!(collect().await.unwrap(), 1);
    assert_eq!(objects.audit().await.unwrap().uploads, [""; 0]);
    one.close().await;
    two.close().await;
}
