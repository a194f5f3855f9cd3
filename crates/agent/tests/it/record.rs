//! Records that cannot be read or written: no capsule is lost with its record.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::audit::{Kind, Verdict};
use agent::capsule::record::Journal;
use agent::capsule::{Spec, remote};
use agent_api::{CapsuleState, ListCapsulesRequest};
use api::CapsuleId;
use api::egress::Policy;
use connectrpc::ErrorCode;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{Host, root, spec};
use crate::pause::{ASK, KEEPER};

#[tokio::test]
async fn a_capsule_whose_record_cannot_be_read_is_left_alone() {
    let host = Host::open(|_| {}).await;
    let (ids, secrets): (Vec<_>, Vec<_>) = [keeper(&host).await, keeper(&host).await].into_iter().unzip();
    for id in &ids {
        host.pause(*id).await.unwrap();
    }
    let at = root(host.dir());
    let record = |id: CapsuleId| at.join("capsules").join(id.to_string()).join("record.json");
    let whole = fs::read(record(ids[0])).unwrap();
    let mut dir = host.put_away().await;

    // As a power cut may leave it, and as one that was written by an agent of tomorrow.
    let tomorrow = String::from_utf8(whole.clone()).unwrap().replace("\"paused\"", "\"asleep\"");
    for bad in ["", "{", &tomorrow] {
        let view = disk::Disks::view(dir.path()).unwrap();
        fs::write(record(ids[0]), bad).unwrap();
        view.close().unwrap();
        let host = Host::open_in(dir, |_| {}).await;
        let listed = host.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned();
        let listed: Vec<_> = listed.capsules.into_iter().map(|capsule| capsule.id).collect();
        assert_eq!(listed, [ids[1].to_string()]);
        assert_eq!(fs::read(record(ids[0])).unwrap(), bad.as_bytes());
        let audit = agent::audit::audit(host.dir(), &["agent.sock"]).await.unwrap();
        let wrong: Vec<_> = audit.wrong().map(|found| (&found.path, found.kind, found.verdict)).collect();
        assert_eq!(wrong, [(&record(ids[0]), Kind::Capsule, Verdict::Broken)]);
        // Nothing that it needs goes with others.
        host.resume(ids[1]).await.unwrap();
        host.pause(ids[1]).await.unwrap();
        dir = host.put_away().await;
    }
    let view = disk::Disks::view(dir.path()).unwrap();
    fs::write(record(ids[0]), &whole).unwrap();
    view.close().unwrap();
    let host = Host::open_in(dir, |_| {}).await;
    for (id, secret) in ids.into_iter().zip(secrets) {
        host.resume(id).await.unwrap();
        assert_eq!(host.sh(id, ASK).await, secret);
    }
    host.close().await;
}

#[test]
fn a_record_that_could_not_be_written_leaves_no_directory() {
    // With room for a directory, and for no file in it.
    let dir = TempDir::with_prefix("wrenn-agent-").unwrap();
    let place = dir.path().join("full");
    fs::create_dir(&place).unwrap();
    mount("none", &place, "tmpfs", MountFlags::empty(), Some(c"nr_inodes=2")).unwrap();
    let made = Journal::create(place.join("capsule"), own_spec(), Policy::default(), String::new());
    let is_left = place.join("capsule").exists();
    unmount(&place, UnmountFlags::DETACH).unwrap();
    assert_eq!(made.unwrap_err().kind(), ErrorKind::StorageFull);
    assert!(!is_left);
}

/// What an agent has of [`spec`].
fn own_spec() -> Spec {
    Spec {
        id: CapsuleId::random(),
        image: "minimal".into(),
        vcpus: 1,
        memory_mib: 256,
        disk_mib: 5120,
        timeout_sec: 0,
        default_env: Default::default(),
        template_id: String::new(),
    }
}

#[tokio::test]
async fn an_upload_that_cannot_be_recorded_is_not_repeated_without_end() {
    let objects = TempDir::with_prefix("wrenn-objects-").unwrap();
    let address = format!("file://{}", objects.path().display());
    let host = Host::open(|config| config.objects = Some(objects::Config::parse(&address, []).unwrap())).await;
    let (id, _) = keeper(&host).await;
    host.pause(id).await.unwrap();
    let new = block(&host.capsule(id));
    let manifest = objects.path().join("manifests").join(remote::name(id));
    let written = || fs::metadata(&manifest).and_then(|file| file.modified()).ok();
    while written().is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // How often it is written during some commands in another capsule.
    let (other, _) = keeper(&host).await;
    let mut times = HashSet::new();
    for _ in 0..100 {
        times.extend(written());
        host.sh(other, "true").await;
    }
    assert!(!host.listed(id).await.uploaded);
    assert!(times.len() < 10, "it was uploaded {} times", times.len());
    // And then it is.
    fs::remove_dir(new).unwrap();
    while !host.listed(id).await.uploaded {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    host.close().await;
}

/// Has no record of the capsule be written until that directory is gone.
fn block(capsule: &Path) -> PathBuf {
    let new = capsule.join("record.json.new");
    fs::create_dir(&new).unwrap();
    new
}

/// A capsule that keeps a secret, and the secret.
async fn keeper(host: &Host) -> (CapsuleId, String) {
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    (id, secret)
}

#[tokio::test]
async fn a_pause_that_cannot_be_recorded_loses_nothing() {
    let host = Host::open(|_| {}).await;
    let (id, secret) = keeper(&host).await;
    host.sh(id, "head -c 96M /dev/urandom > /dev/shm/m").await;
    for attempt in 0.. {
        let blocking = async {
            while host.record(id)["phase"] == "running" {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            block(&host.capsule(id))
        };
        let (paused, new) = tokio::join!(host.pause(id), blocking);
        let Err(error) = paused else {
            assert!(attempt < 10, "the record is always written before that");
            fs::remove_dir(new).unwrap();
            host.resume(id).await.unwrap();
            continue;
        };
        assert_eq!(error.code, ErrorCode::Internal, "{error}");
        assert!(error.to_string().contains("record"), "{error}");
        // Once it runs, nothing is left that a next agent could take for a pause.
        assert_eq!(host.listed(id).await.state, CapsuleState::Running);
        assert_eq!(host.sh(id, ASK).await, secret);
        let names = fs::read_dir(host.capsule(id)).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.into_iter().all(|name| !name.to_str().unwrap().starts_with("memory-")));
        fs::remove_dir(new).unwrap();
        break;
    }
    host.pause(id).await.unwrap();
    host.resume(id).await.unwrap();
    assert_eq!(host.sh(id, ASK).await, secret);
    host.close().await;
}

/// What the record is once an agent was killed in the middle of a pause.
pub fn as_if_pausing(capsule: &Path) {
    let path = capsule.join("record.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    (record["phase"], record["base"]) = ("pausing".into(), "lost".into());
    fs::write(path, serde_json::to_vec(&record).unwrap()).unwrap();
}

#[tokio::test]
async fn an_agent_that_can_record_nothing_takes_over_what_was_being_paused() {
    let host = Host::open(|_| {}).await;
    let ((saved, saved_secret), (running, secret)) = (keeper(&host).await, keeper(&host).await);
    host.pause(saved).await.unwrap();
    let capsules = [saved, running].map(|id| host.capsule(id));
    let dir = host.leave().await;
    // All but the record was done, or nothing.
    let blocks = capsules.map(|capsule| {
        as_if_pausing(&capsule);
        block(&capsule)
    });
    let host = Host::open_in(dir, |_| {}).await;
    assert_eq!(host.listed(saved).await.state, CapsuleState::Paused);
    assert_eq!(host.listed(running).await.state, CapsuleState::Running);
    assert_eq!(host.sh(running, ASK).await, secret);
    host.resume(saved).await.unwrap_err();
    assert_eq!(host.listed(saved).await.state, CapsuleState::Paused);
    blocks.iter().for_each(|new| fs::remove_dir(new).unwrap());
    for (id, secret) in [(saved, saved_secret), (running, secret)] {
        host.resume(id).await.unwrap();
        host.pause(id).await.unwrap();
        host.resume(id).await.unwrap();
        assert_eq!(host.sh(id, ASK).await, secret);
    }
    host.close().await;
}
