//! Capsules on each kind of disk: the agent does with all of them the same.

use std::fs;

use agent::DiskBackend;
use agent_api::*;
use api::CapsuleId;

use crate::common::{Host, spec};

/// Also what a machine that has no device-mapper says when it is asked for one.
async fn lives(backend: DiskBackend) {
    if backend == DiskBackend::DeviceMapper && !fs::exists("/dev/mapper/control").unwrap() {
        let dir = tempfile::TempDir::with_prefix("wrenn-agent-").unwrap();
        let mut config = crate::common::config(dir.path());
        config.disks = Some(backend);
        let refused = agent::Agent::open(config).await.map(drop).unwrap_err();
        assert!(format!("{refused:?}").contains("NoDeviceMapper"), "{refused:?}");
        return;
    }
    let with = |config: &mut agent::Config| config.disks = Some(backend);
    let host = Host::open(with).await;
    let instance = host.instance();
    let parent = CapsuleId::random();
    host.create(spec(parent)).await.unwrap();
    // Some of it is written out, some is in the guest's memory only.
    host.sh(parent, "head -c 12M /dev/urandom > /root/one; sync; head -c 3M /dev/urandom > /root/two").await;
    let read = "cat /root/one /root/two /root/own 2>/dev/null | md5sum; df -B1 --output=size / | tail -n 1";
    let told = host.sh(parent, read).await;

    // A fork, while it runs and after both went their own ways.
    let child = CapsuleId::random();
    let forked = host.fork(parent, &[child]).await.unwrap();
    assert!(forked[0].reason.is_empty(), "{}", forked[0].reason);
    assert_eq!(host.sh(child, read).await, told);
    for id in [parent, child] {
        host.sh(id, &format!("echo {id} > /root/own; head -c 2M /dev/urandom > /root/two; sync")).await;
    }
    let (parents, childs) = (host.sh(parent, read).await, host.sh(child, read).await);
    assert_ne!(parents, childs);

    // A pause each, of which one lasts longer than the agent.
    host.pause(child).await.unwrap();
    host.pause(parent).await.unwrap();
    assert_eq!(devices(&instance), Vec::<String>::new(), "what is paused holds none");
    host.resume(parent).await.unwrap();
    assert_eq!(host.sh(parent, read).await, parents);
    // And one that runs while there is no agent.
    let host = Host::open_in(host.leave().await, with).await;
    assert_eq!(host.sh(parent, read).await, parents);
    host.sh(parent, "echo more >> /root/own; sync").await;
    let parents = host.sh(parent, read).await;
    let held = devices(&instance).len();
    assert_eq!(
        held,
        if backend == DiskBackend::DeviceMapper { 2 } else { 0 },
        "one of the capsule and one of its image"
    );

    // What is kept of it outlives it.
    let request = SnapshotCapsuleRequest { id: parent.to_string(), name: "kept".into(), ..Default::default() };
    host.lifecycle().snapshot_capsule(request).await.unwrap();
    host.destroy(parent).await;
    let from = CapsuleId::random();
    host.create(CapsuleSpec { image: "kept".into(), ..spec(from) }).await.unwrap();
    assert_eq!(host.sh(from, read).await, parents);
    host.resume(child).await.unwrap();
    assert_eq!(host.sh(child, read).await, childs);
    // Nothing was written wrongly: the guest's kernel checks what it reads.
    assert_eq!(host.sh(child, "dmesg | grep -c 'EXT4-fs error' || true").await, "0");

    for id in [child, from] {
        host.destroy(id).await;
    }
    assert_eq!(devices(&instance), Vec::<String>::new());
    host.close().await;
}

/// The agent's devices over disks.
fn devices(instance: &str) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path().join("dm/name"));
    let names = devices.filter_map(|name| fs::read_to_string(name).ok());
    names.filter(|name| name.contains(instance)).collect()
}

#[tokio::test]
async fn a_capsule_lives_on_shared_blocks() {
    lives(DiskBackend::Reflink).await;
}

#[tokio::test]
async fn a_capsule_lives_on_copies() {
    lives(DiskBackend::Copy).await;
}

#[tokio::test]
async fn a_capsule_lives_on_device_mapper() {
    lives(DiskBackend::DeviceMapper).await;
}
