//! What begins from a running capsule: forks, templates, and what images begin from in place of a boot.

use std::collections::BTreeSet;

use crate::common::{Host, spec};
use agent::Sizes;
use agent_api::*;
use api::CapsuleId;
use connectrpc::ErrorCode;

/// What makes a machine one of its own, a line each.
const IDENTITY: &str =
    "cat /etc/machine-id; hostname; head -c 16 /dev/urandom | md5sum; cat /proc/sys/kernel/random/uuid";

async fn snapshot(host: &Host, id: CapsuleId, name: &str) -> Result<Template, connectrpc::ConnectError> {
    let request = SnapshotCapsuleRequest { id: id.to_string(), name: name.into(), ..Default::default() };
    Ok(host.lifecycle().snapshot_capsule(request).await?.into_owned().template.into_option().unwrap())
}

async fn forget(host: &Host, name: &str) {
    let request = DeleteTemplateRequest { name: name.into(), ..Default::default() };
    host.lifecycle().delete_template(request).await.unwrap();
}

async fn templates(host: &Host) -> Vec<Template> {
    host.lifecycle().list_templates(ListTemplatesRequest::default()).await.unwrap().into_owned().templates
}

#[tokio::test]
async fn forks_agree_in_memory_and_differ_in_everything_that_must_be_their_own() {
    let host = Host::open(|_| {}).await;
    let parent = CapsuleId::random();
    host.create(spec(parent)).await.unwrap();
    host.sh(parent, "head -c 4M /dev/urandom > /dev/shm/m; echo disk > /root/file").await;
    let agreed = "md5sum < /dev/shm/m; cat /root/file; cat /proc/sys/kernel/random/boot_id";
    let told = host.sh(parent, agreed).await;

    let ids: Vec<CapsuleId> = (0..5).map(|_| CapsuleId::random()).collect();
    let children = host.fork(parent, &ids).await.unwrap();
    assert_eq!(
        children.iter().map(|child| &child.id).collect::<Vec<_>>(),
        ids.iter().map(ToString::to_string).collect::<Vec<_>>().iter().collect::<Vec<_>>()
    );
    for child in &children {
        assert!(child.reason.is_empty(), "{}", child.reason);
        assert_eq!(child.capsule.as_option().unwrap().state, CapsuleState::Running);
    }
    let all: Vec<CapsuleId> = ids.iter().copied().chain([parent]).collect();
    let mut lines = BTreeSet::new();
    for id in &all {
        assert_eq!(host.sh(*id, agreed).await, told);
        let own = host.sh(*id, IDENTITY).await;
        lines.extend(own.lines().map(str::to_owned));
    }
    assert_eq!(lines.len(), 4 * all.len(), "{lines:#?}");
    // Each has a disk and a memory of its own.
    for id in &all {
        host.sh(*id, &format!("echo {id} >> /root/file; echo {id} > /dev/shm/m")).await;
    }
    for id in &all {
        assert_eq!(host.sh(*id, "cat /root/file /dev/shm/m").await, format!("disk\n{id}\n{id}"));
    }
    // The parent and a child are paused and forked like any other, and do not need one another.
    let grandchild = CapsuleId::random();
    assert_eq!(host.fork(ids[0], &[grandchild]).await.unwrap()[0].reason, "");
    host.pause(parent).await.unwrap();
    host.pause(ids[0]).await.unwrap();
    for id in &ids[1..] {
        host.destroy(*id).await;
    }
    for id in [parent, ids[0]] {
        host.resume(id).await.unwrap();
        assert_eq!(host.sh(id, "cat /dev/shm/m").await, id.to_string());
        host.destroy(id).await;
    }
    assert_eq!(host.sh(grandchild, "cat /dev/shm/m").await, ids[0].to_string());
    host.destroy(grandchild).await;
    assert_eq!((host.holds(), host.processes()), (0, 0));
    host.until_generations(0).await;
    host.close().await;
}

#[tokio::test]
async fn what_cannot_be_forked_is_refused_and_a_child_that_fails_leaves_nothing() {
    let host = Host::open(|_| {}).await;
    let parent = CapsuleId::random();
    host.create(spec(parent)).await.unwrap();
    let one = CapsuleId::random();
    for children in [vec![], vec![one, one], (0..101).map(|_| CapsuleId::random()).collect()] {
        assert_eq!(host.fork(parent, &children).await.unwrap_err().code, ErrorCode::InvalidArgument);
    }
    assert_eq!(host.fork(CapsuleId::random(), &[one]).await.unwrap_err().code, ErrorCode::NotFound);
    // The place of one child is taken by something that is no capsule.
    let bad = CapsuleId::random();
    std::fs::create_dir(host.capsule(bad)).unwrap();
    let children = host.fork(parent, &[bad, one]).await.unwrap();
    assert!(!children[0].reason.is_empty() && children[0].capsule.as_option().is_none());
    assert_eq!(children[1].reason, "");
    std::fs::remove_dir(host.capsule(bad)).unwrap();
    host.destroy(one).await;
    host.pause(parent).await.unwrap();
    assert_eq!(host.fork(parent, &[one]).await.unwrap_err().code, ErrorCode::FailedPrecondition);
    host.destroy(parent).await;
    assert_eq!(host.holds(), 0);
    host.until_generations(0).await;
    host.close().await;
}

#[tokio::test]
async fn a_template_is_begun_from_with_its_sizes_and_outlives_its_capsule_and_the_agent() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    host.sh(id, "head -c 4M /dev/urandom > /dev/shm/m; echo disk > /root/file").await;
    let agreed = "md5sum < /dev/shm/m; cat /root/file";
    let told = host.sh(id, agreed).await;
    assert_eq!(snapshot(&host, id, "../x").await.unwrap_err().code, ErrorCode::InvalidArgument);
    assert_eq!(snapshot(&host, id, "minimal").await.unwrap_err().code, ErrorCode::AlreadyExists);
    let made = snapshot(&host, id, "mine").await.unwrap();
    assert_eq!((made.vcpus, made.memory_mib, made.disk_mib), (1, 256, 5120));
    assert_eq!(snapshot(&host, id, "mine").await.unwrap_err().code, ErrorCode::AlreadyExists);
    assert_eq!(host.sh(id, agreed).await, told, "the capsule goes on");
    host.destroy(id).await;

    let dir = host.put_away().await;
    let host = Host::open_in(dir, |_| {}).await;
    assert_eq!(templates(&host).await, [made]);
    let from = |id: CapsuleId| CapsuleSpec { id: id.to_string(), image: "mine".into(), ..Default::default() };
    let bigger = CapsuleSpec { memory_mib: 512, ..from(CapsuleId::random()) };
    assert_eq!(host.create(bigger).await.unwrap_err().code, ErrorCode::InvalidArgument);
    let (one, two) = (CapsuleId::random(), CapsuleId::random());
    let (first, second) = tokio::join!(host.create(from(one)), async {
        let creating = host.create(from(two));
        // It is taken away under one that begins.
        forget(&host, "mine").await;
        creating.await
    });
    let spec = first.unwrap().spec.into_option().unwrap();
    assert_eq!((spec.vcpus, spec.memory_mib, spec.disk_mib), (1, 256, 5120));
    if let Err(error) = &second {
        assert_eq!(error.code, ErrorCode::NotFound, "it was faster: {error}");
    }
    assert_eq!(host.sh(one, agreed).await, told);
    assert!(templates(&host).await.is_empty());
    assert_eq!(host.create(from(CapsuleId::random())).await.unwrap_err().code, ErrorCode::NotFound);
    // What was made from it does not need it.
    host.pause(one).await.unwrap();
    host.resume(one).await.unwrap();
    assert_eq!(host.sh(one, agreed).await, told);
    host.destroy(one).await;
    host.destroy(two).await;
    assert_eq!(host.holds(), 0);
    host.until_generations(0).await;
    host.close().await;
}

/// Waits until there are so many boot snapshots that were begun from once.
async fn until_boots(host: &Host, count: usize) -> Vec<std::path::PathBuf> {
    loop {
        let entries = std::fs::read_dir(host.root().join("boots")).unwrap().flatten();
        let is_whole = |dir: &std::path::PathBuf| dir.join("point.json").exists() && dir.join("working-set").exists();
        let whole: Vec<_> = entries.map(|entry| entry.path()).filter(is_whole).collect();
        if whole.len() == count && host.processes() == 0 && host.holds() == 0 {
            return whole;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

const SIZES: Sizes = Sizes { vcpus: 1, memory_mib: 256, disk_mib: 5120 };

#[tokio::test]
async fn capsules_begin_from_a_boot_that_was_done_before_and_from_one_when_that_is_of_no_use() {
    let host = Host::open(|config| config.boot_snapshots = Some(SIZES)).await;
    let boot = until_boots(&host, 1).await.remove(0);
    let list = host.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned();
    assert!(list.capsules.is_empty() && templates(&host).await.is_empty());
    assert_eq!(host.holds(), 0);

    let ids = [CapsuleId::random(), CapsuleId::random()];
    let mut own = BTreeSet::new();
    let needed = std::fs::read(boot.join("working-set")).unwrap();
    // A header and a checksum are 28 bytes.
    assert!(needed.starts_with(b"WRENNWSS") && needed.len() > 28, "{} bytes", needed.len());
    for (id, program) in ids.into_iter().zip(["/usr/local/bin/envd", "/usr/bin/bash"]) {
        let env = [("WHO".to_owned(), id.to_string())].into_iter().collect();
        let capsule = host.create(CapsuleSpec { default_env: env, ..spec(id) }).await.unwrap();
        assert!(!capsule.versions["kernel_version"].is_empty() && !capsule.versions["envd_version"].is_empty());
        let in_memory = host.sh(id, &format!("fincore --bytes --noheadings --output pages,size {program}")).await;
        let numbers: Vec<u64> = in_memory.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let all = numbers[1].div_ceil(4096);
        let is_read = if program.ends_with("envd") { numbers[0] == all } else { numbers[0] > all / 4 };
        assert!(is_read, "{program} comes from the disk before a first command: {} of {all} pages", numbers[0]);
        own.insert(host.sh(id, "cat /etc/machine-id").await);
        own.insert(host.sh(id, "cat /proc/sys/kernel/random/uuid").await);
        // Something serves its memory: it was not booted.
        assert!(host.record(id)["pager"].is_object());
        assert_eq!(
            host.sh(id, "echo $WHO; hostname; cat /run/wrenn/.WRENN_SANDBOX_ID").await,
            format!("{id}\ncapsule\n{id}")
        );
        assert_eq!(
            std::fs::read(host.capsule(id).join("working-set")).unwrap(),
            needed,
            "what its first resume fetches"
        );
    }
    assert_eq!(own.len(), 4, "they are not the same");

    // Its state is damaged: the capsule is booted, and the boot snapshot is gone.
    std::fs::write(boot.join("state"), "x").unwrap();
    let third = CapsuleId::random();
    host.create(spec(third)).await.unwrap();
    assert!(host.record(third)["pager"].is_null());
    assert!(!boot.join("point.json").exists());
    for id in [ids[0], ids[1], third] {
        host.destroy(id).await;
    }
    assert_eq!(host.holds(), 0);

    // After a while there is another: what was wrong with the first may have been over at once.
    tokio::time::sleep(std::time::Duration::from_secs(10)).await;
    let fourth = CapsuleId::random();
    host.create(spec(fourth)).await.unwrap();
    host.destroy(fourth).await;
    until_boots(&host, 1).await;
    let dir = host.put_away().await;

    // Another size gets one after its first boot.
    let host = Host::open_in(dir, |config| config.boot_snapshots = Some(SIZES)).await;
    until_boots(&host, 1).await;
    let id = CapsuleId::random();
    host.create(CapsuleSpec { memory_mib: 320, ..spec(id) }).await.unwrap();
    host.destroy(id).await;
    until_boots(&host, 2).await;
    let dir = host.put_away().await;

    // Those of another kernel are of no use.
    let kernel = dir.path().join("vmlinux-6.1.192-other");
    let host = Host::open_in(dir, |config| {
        std::fs::copy(&config.kernel, &kernel).unwrap();
        config.kernel = kernel;
        config.boot_snapshots = Some(SIZES);
    })
    .await;
    until_boots(&host, 1).await;
    host.close().await;
}

#[tokio::test]
async fn a_full_disk_is_the_guests_own_problem_and_forks_share_what_it_wrote() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(CapsuleSpec { disk_mib: 5200, ..spec(id) }).await.unwrap();
    let size: u64 = host.sh(id, "cat /sys/block/vda/size").await.parse().unwrap();
    assert_eq!(size * 512, 5200 << 20);
    host.sh(id, "head -c 8M /dev/urandom > /root/whole; md5sum /root/whole > /root/sum; sync").await;
    // All of it at once is unwritten space; what is written into it is not.
    let said = host.sh(id, "fallocate -l 100G /root/big 2>&1; fallocate -l 6G /root/big 2>&1 || echo refused").await;
    assert!(said.contains("No space left") && said.contains("refused"), "{said}");
    let said = host.sh(id, "rm -f /root/big; avail=$(df -k / | awk 'END{print $4}'); fallocate -l $((avail - 256))K /root/big; head -c 16M /dev/zero 2>/dev/null > /root/more || echo full").await;
    assert!(said.contains("full"), "{said}");
    host.pause(id).await.unwrap();
    host.resume(id).await.unwrap();
    host.sh(id, "md5sum -c /root/sum").await;
    let child = CapsuleId::random();
    // What makes it a machine of its own takes the room of what made its parent one.
    assert_eq!(host.fork(id, &[child]).await.unwrap()[0].reason, "");
    assert_ne!(host.sh(child, "cat /etc/machine-id").await, host.sh(id, "cat /etc/machine-id").await);
    host.sh(id, "rm /root/more /root/big; echo mine > /root/big; sync").await;
    let child = CapsuleId::random();
    assert_eq!(host.fork(id, &[child]).await.unwrap()[0].reason, "");
    host.sh(child, "md5sum -c /root/sum; echo other > /root/big; sync").await;
    assert_eq!(host.sh(id, "md5sum -c /root/sum > /dev/null; cat /root/big").await, "mine");
    host.close().await;
}
