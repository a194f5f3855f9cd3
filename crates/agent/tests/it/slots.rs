//! Slots that go from one capsule to the next.

use std::fs;
use std::path::PathBuf;

use agent_api::CapsuleState;
use api::CapsuleId;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::common::{Host, spec};
use crate::pause::{ASK, KEEPER};

/// Something in what the capsule's VMM was given that cannot be removed.
struct Stuck(PathBuf);

impl Stuck {
    fn new(host: &Host, id: CapsuleId) -> Self {
        let path = host.capsule(id).join("vm/stuck");
        fs::create_dir(&path).unwrap();
        mount("none", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        Self(path)
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

/// Pauses a capsule, which gives back its slot and not all, and makes another, which has that slot then.
async fn pause_and_create(host: &Host, id: CapsuleId) -> (Stuck, CapsuleId) {
    let stuck = Stuck::new(host, id);
    let slot = host.record(id)["slot"].clone();
    host.pause(id).await.unwrap();
    let next = CapsuleId::random();
    host.create(spec(next)).await.unwrap();
    assert_eq!(host.record(next)["slot"], slot);
    (stuck, next)
}

#[tokio::test]
async fn a_capsule_that_could_not_give_all_back_takes_nothing_of_who_has_its_slot() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    let (stuck, next) = pause_and_create(&host, id).await;
    drop(stuck);
    host.destroy(id).await;
    host.sh(next, "true").await;
    host.close().await;
}

#[tokio::test]
async fn what_ran_of_a_capsule_is_ended_before_it_is_resumed() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    let (stuck, next) = pause_and_create(&host, id).await;
    let refused = host.resume(id).await.unwrap_err();
    assert!(refused.to_string().contains("what ran of it before"), "{refused}");
    assert_eq!(host.listed(id).await.state, CapsuleState::Paused);
    drop(stuck);
    host.resume(id).await.unwrap();
    assert_eq!(host.sh(id, ASK).await, secret);
    host.sh(next, "true").await;
    host.close().await;
}

#[tokio::test]
async fn a_slot_stays_with_a_capsule_of_which_something_may_run() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    let groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let groups = groups.map(|root| root.join(format!("wrenn-{}/{id}", host.instance())));
    let stuck = groups.iter().find(|group| group.exists()).unwrap().join("stuck");
    // Its group cannot go.
    fs::create_dir(&stuck).unwrap();
    let slot = host.record(id)["slot"].clone();
    host.pause(id).await.unwrap();
    assert_eq!(host.record(id)["slot"], slot);
    let next = CapsuleId::random();
    host.create(spec(next)).await.unwrap();
    assert_ne!(host.record(next)["slot"], slot);
    fs::remove_dir(stuck).unwrap();
    host.resume(id).await.unwrap();
    host.destroy(id).await;
    host.destroy(next).await;
    assert_eq!(host.holds(), 0);
    host.close().await;
}
