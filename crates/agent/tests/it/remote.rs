//! Two hosts and an S3 server: a capsule that was paused on one goes on on the other.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use agent_api::{
    Capsule, CapsuleSpec, CapsuleState, DeleteTemplateRequest, DestroyCapsuleRequest, SnapshotCapsuleRequest,
};
use api::CapsuleId;
use connectrpc::ErrorCode;
use objects::Objects;
use testkit::S3;

use crate::common::{Host, spec};
use crate::pause::{ASK, KEEPER};

/// Fills memory that nothing touches by itself, and remembers what is in it.
const FILL: &str = "head -c 96M /dev/urandom > /dev/shm/m; md5sum < /dev/shm/m > /dev/shm/sum; \
    echo kept > /root/file; md5sum /root/file > /root/sum; sync";
const CHECK: &str = "test \"$(md5sum < /dev/shm/m)\" = \"$(cat /dev/shm/sum)\" && md5sum -c /root/sum > /dev/null";

fn config(s3: &S3) -> objects::Config {
    objects::Config::parse(&s3.url("fleet"), s3.environment()).unwrap()
}

async fn host(s3: &S3) -> Host {
    Host::open(|config| config.objects = Some(self::config(s3))).await
}

/// A capsule that has a secret in its memory, paused and uploaded. Its id and the secret.
async fn uploaded(host: &Host) -> (CapsuleId, String) {
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    host.sh(id, FILL).await;
    host.pause(id).await.unwrap();
    until_uploaded(host, id).await;
    (id, secret)
}

async fn until_uploaded(host: &Host, id: CapsuleId) -> Capsule {
    loop {
        let capsule = host.listed(id).await;
        assert_eq!(capsule.state, CapsuleState::Paused);
        if capsule.uploaded {
            return capsule;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn until_failed(host: &Host, id: CapsuleId) -> String {
    loop {
        let capsule = host.listed(id).await;
        if capsule.state == CapsuleState::Failed {
            return capsule.reason;
        }
        assert_ne!(capsule.state, CapsuleState::Stopped);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether some of its memory is still in the object store, as its record says.
fn is_remote(host: &Host, id: CapsuleId) -> bool {
    host.record(id)["is_remote"].as_bool().unwrap()
}

async fn until_here(host: &Host, id: CapsuleId) {
    while is_remote(host, id) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    while host.capsule(id).join("remote").exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Bytes of files that this process, which is the agent's and the server's, has read.
fn bytes_read() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

/// Where the server has the manifest of a capsule.
fn manifest(s3: &S3, id: CapsuleId) -> PathBuf {
    s3.folder().join(format!("fleet/manifests/capsules/{id}"))
}

/// Makes a note one of long ago.
fn make_old(note: &Path) {
    let long_ago = SystemTime::now() - 2 * objects::STALE;
    fs::File::options().write(true).open(note).unwrap().set_modified(long_ago).unwrap();
}

/// Lets the agent do what it does beside everything else until something has come of it.
async fn until(host: &Host, is_done: impl Fn() -> bool) {
    let done = async {
        while !is_done() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    host.agent.clone().forget_ended(done).await;
}

/// That the object store has nothing any more.
async fn nothing_is_left(s3: &S3) {
    let objects = Objects::open(&config(s3)).unwrap();
    let (images, patience) = (agent::images::DIRECTORY, Duration::from_secs(60));
    objects.collect_unneeded(images, Duration::ZERO, patience, agent::images::needed).await.unwrap();
    objects.collect(Duration::ZERO, patience).await.unwrap();
    let audit = objects.audit().await.unwrap();
    assert!(audit.uploads.is_empty() && audit.used.objects == 0 && audit.garbage.objects == 0, "{audit:?}");
}

#[tokio::test]
async fn a_capsule_that_was_paused_here_goes_on_elsewhere() {
    let s3 = S3::start().await;
    let (one, two) = (host(&s3).await, host(&s3).await);
    let (id, secret) = uploaded(&one).await;
    let before = one.listed(id).await;

    let adopted = two.adopt(id).await.unwrap();
    assert_eq!((adopted.state.as_known(), &adopted.spec), (Some(CapsuleState::Running), &before.spec));
    assert!(adopted.generation > before.generation);
    assert_eq!(two.sh(id, ASK).await, secret);
    two.sh(id, CHECK).await;
    until_here(&two, id).await;
    assert!(fs::exists(two.capsule(id).join(format!("memory-{}", two.record(id)["snapshots"]))).unwrap());

    // From here on it is like any other: also where it was uploaded from.
    two.sh(id, "echo more >> /root/file; md5sum /root/file > /root/sum").await;
    two.pause(id).await.unwrap();
    two.resume(id).await.unwrap();
    assert_eq!(two.sh(id, ASK).await, secret);
    two.pause(id).await.unwrap();
    until_uploaded(&two, id).await;
    // What lies here is older, and goes without harm to the other.
    one.destroy(id).await;
    assert_eq!(one.holds(), 0);
    one.adopt(id).await.unwrap();
    one.sh(id, CHECK).await;
    assert_eq!(one.sh(id, "tail -n 1 /root/file").await, "more");

    two.destroy(id).await;
    one.forget(id).await;
    for host in [one, two] {
        assert_eq!((host.holds(), host.processes()), (0, 0));
        host.until_generations(0).await;
        host.close().await;
    }
    nothing_is_left(&s3).await;
}

#[tokio::test]
async fn an_upload_reads_what_the_capsule_wrote_and_not_its_image() {
    let s3 = S3::start().await;
    let host = host(&s3).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    host.sh(id, "head -c 8M /dev/urandom > /root/file; sync").await;
    let image = host.root().join("images").join(host.record(id)["image"].as_str().unwrap());
    let image = fs::metadata(image).unwrap().blocks() * 512;
    // Which is uploaded once.
    let other = CapsuleId::random();
    host.create(spec(other)).await.unwrap();
    host.pause(other).await.unwrap();
    until_uploaded(&host, other).await;
    let before = bytes_read();
    host.pause(id).await.unwrap();
    until_uploaded(&host, id).await;
    let read = bytes_read() - before;
    assert!(read < image, "{read} bytes read, the image is {image}");
    host.forget(id).await;
    host.close().await;
}

#[tokio::test]
async fn what_hibernates_takes_nothing_here_and_comes_back() {
    let s3 = S3::start().await;
    let host = host(&s3).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    assert_eq!(host.hibernate(id).await.unwrap_err().code, ErrorCode::FailedPrecondition);
    for _ in 0..2 {
        host.pause(id).await.unwrap();
        assert_eq!(host.hibernate(id).await.unwrap().state, CapsuleState::Hibernated);
        assert_eq!((host.holds(), host.processes()), (0, 0));
        host.until_generations(0).await;
        assert_eq!(host.resume(id).await.unwrap_err().code, ErrorCode::NotFound);
        host.adopt(id).await.unwrap();
        assert_eq!(host.sh(id, ASK).await, secret);
    }
    // Without an object store in reach it stays paused, and is told why.
    host.pause(id).await.unwrap();
    until_uploaded(&host, id).await;
    host.resume(id).await.unwrap();
    let mut s3 = s3;
    s3.stop().await;
    host.pause(id).await.unwrap();
    let error = host.hibernate(id).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert_eq!(host.listed(id).await.state, CapsuleState::Paused);
    host.resume(id).await.unwrap();
    assert_eq!(host.sh(id, ASK).await, secret);
    // It is forgotten as soon as that is possible.
    host.forget(id).await;
    assert_eq!(host.holds(), 0);
    s3.restart().await;
    let manifest = manifest(&s3, id);
    until(&host, || !manifest.exists()).await;
    nothing_is_left(&s3).await;
    host.close().await;
}

#[tokio::test]
async fn what_is_gone_is_forgotten_whatever_comes_in_between() {
    let mut s3 = S3::start().await;
    let host = host(&s3).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    host.pause(id).await.unwrap();
    until_uploaded(&host, id).await;
    let manifest = manifest(&s3, id);
    let late = fs::read(&manifest).unwrap();

    // Without a note nothing goes: nobody would ask again.
    let (notes, away) = (host.root().join("forgotten"), host.root().join("away"));
    fs::rename(&notes, &away).unwrap();
    let request = DestroyCapsuleRequest { id: id.to_string(), forget: true, ..Default::default() };
    assert_eq!(host.lifecycle().destroy_capsule(request).await.unwrap_err().code, ErrorCode::Internal);
    assert_eq!(host.listed(id).await.state, CapsuleState::Paused);
    fs::rename(&away, &notes).unwrap();

    // The agent ends before it can reach the object store.
    s3.stop().await;
    host.forget(id).await;
    assert_eq!(host.holds(), 0);
    let dir = host.leave().await;
    s3.restart().await;
    assert!(manifest.exists());
    let host = Host::open_in(dir, |config| config.objects = Some(self::config(&s3))).await;
    let note = notes.join(format!("capsules@{id}"));
    let is_noted = || fs::read(&note).is_ok_and(|note| !note.is_empty());
    until(&host, || !manifest.exists() && is_noted()).await;

    // Its manifest was still on the way.
    fs::create_dir_all(manifest.parent().unwrap()).unwrap();
    fs::write(&manifest, late).unwrap();
    make_old(&note);
    until(&host, || !manifest.exists() && !note.exists()).await;
    nothing_is_left(&s3).await;
    host.close().await;
}

#[tokio::test]
async fn a_template_that_goes_while_it_is_uploaded_is_forgotten_after_that() {
    let mut s3 = S3::start().await;
    let host = host(&s3).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    // Its lease is written, and then nothing.
    s3.let_write(Some(1));
    let request = SnapshotCapsuleRequest { id: id.to_string(), name: "ready".into(), ..Default::default() };
    host.lifecycle().snapshot_capsule(request).await.unwrap();
    s3.until_written(2).await;
    let request = DeleteTemplateRequest { name: "ready".into(), ..Default::default() };
    host.lifecycle().delete_template(request).await.unwrap();
    let note = host.root().join("forgotten/templates@ready");
    make_old(&note);
    until(&host, || !note.exists()).await;

    // It ends in an error, and its manifest comes all the same.
    s3.stop().await;
    until(&host, || note.exists()).await;
    let manifest = s3.folder().join("fleet/manifests/templates/ready");
    fs::create_dir_all(manifest.parent().unwrap()).unwrap();
    fs::write(&manifest, b"it was on its way").unwrap();
    s3.let_write(None);
    s3.restart().await;
    until(&host, || !manifest.exists()).await;
    host.close().await;
}

#[tokio::test]
async fn a_template_that_was_made_here_is_begun_from_elsewhere() {
    let s3 = S3::start().await;
    let (one, two) = (host(&s3).await, host(&s3).await);
    let id = CapsuleId::random();
    one.create(spec(id)).await.unwrap();
    one.sh(id, KEEPER).await;
    let secret = one.sh(id, ASK).await;
    let request = SnapshotCapsuleRequest { id: id.to_string(), name: "ready".into(), ..Default::default() };
    one.lifecycle().snapshot_capsule(request).await.unwrap();
    one.destroy(id).await;
    let objects = Objects::open(&config(&s3)).unwrap();
    while objects.manifest("templates/ready").await.unwrap().is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let child = CapsuleSpec { image: "ready".into(), ..spec(CapsuleId::random()) };
    let id = child.id.parse().unwrap();
    assert_eq!(
        two.create(CapsuleSpec { image: "unheard-of".into(), ..child.clone() }).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    two.create(child).await.unwrap();
    assert_eq!(two.sh(id, ASK).await, secret);
    two.destroy(id).await;
    for host in [&one, &two] {
        let request = DeleteTemplateRequest { name: "ready".into(), ..Default::default() };
        host.lifecycle().delete_template(request).await.unwrap();
        host.until_generations(0).await;
    }
    nothing_is_left(&s3).await;
    for host in [one, two] {
        assert_eq!((host.holds(), host.processes()), (0, 0));
        host.close().await;
    }
}

#[tokio::test]
async fn an_upload_that_the_agent_did_not_survive_is_made_by_the_next() {
    let s3 = S3::start().await;
    let one = host(&s3).await;
    let id = CapsuleId::random();
    one.create(spec(id)).await.unwrap();
    one.sh(id, KEEPER).await;
    let secret = one.sh(id, ASK).await;
    s3.let_write(Some(5));
    one.pause(id).await.unwrap();
    s3.until_written(6).await;
    // A resume in the middle of it does no harm, and neither does the next pause.
    one.resume(id).await.unwrap();
    assert_eq!(one.sh(id, ASK).await, secret);
    one.pause(id).await.unwrap();
    let dir = one.leave().await;
    s3.let_write(None);
    let one = Host::open_in(dir, |config| config.objects = Some(self::config(&s3))).await;
    until_uploaded(&one, id).await;
    let two = host(&s3).await;
    two.adopt(id).await.unwrap();
    assert_eq!(two.sh(id, ASK).await, secret);
    two.forget(id).await;
    one.destroy(id).await;
    for host in [one, two] {
        assert_eq!((host.holds(), host.processes()), (0, 0));
        host.close().await;
    }
}

#[tokio::test]
async fn while_memory_comes_nothing_that_happens_leaves_a_capsule_hanging() {
    let mut s3 = S3::start().await;
    let one = host(&s3).await;
    let (id, secret) = uploaded(&one).await;
    one.hibernate(id).await.unwrap();
    one.close().await;
    let two = Host::open(|config| {
        config.objects = Some(self::config(&s3));
        config.pager.1.extend(["--fetch-seconds".into(), "5".into()]);
    })
    .await;

    // The pager dies.
    s3.delay_reads(Duration::from_millis(400));
    two.adopt(id).await.unwrap();
    s3.let_read(Some(0));
    assert!(is_remote(&two, id), "all has come before anything could happen");
    two.kill(id, "pager");
    let reason = until_failed(&two, id).await;
    assert!(reason.contains("serves its memory"), "{reason}");
    assert_eq!((two.holds(), two.processes()), (0, 0));
    s3.let_read(None);

    // The object store goes away: what is here goes on, what is not is not waited for for ever.
    two.adopt(id).await.unwrap();
    s3.stop().await;
    assert!(is_remote(&two, id), "all has come before anything could happen");
    // Whether or not the command itself is there.
    let _ = two.try_sh(id, CHECK).await;
    let reason = until_failed(&two, id).await;
    assert!(reason.contains("object store"), "{reason}");
    assert_eq!((two.holds(), two.processes()), (0, 0));
    let error = two.adopt(id).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert_eq!(two.holds(), 0);
    s3.restart().await;

    // The agent goes away: the memory comes all the same, and the next agent finds it.
    two.adopt(id).await.unwrap();
    let dir = two.leave().await;
    let two = Host::open_in(dir, |config| config.objects = Some(self::config(&s3))).await;
    s3.delay_reads(Duration::ZERO);
    // A pause waits for the rest.
    two.pause(id).await.unwrap();
    assert!(!is_remote(&two, id));
    two.resume(id).await.unwrap();
    assert_eq!(two.sh(id, ASK).await, secret);
    two.sh(id, CHECK).await;
    two.forget(id).await;
    assert_eq!((two.holds(), two.processes()), (0, 0));
    two.until_generations(0).await;
    two.close().await;
    nothing_is_left(&s3).await;
}

#[tokio::test]
async fn what_cannot_be_adopted_is_told_and_leaves_nothing() {
    let s3 = S3::start().await;
    let (one, two) = (host(&s3).await, host(&s3).await);
    assert_eq!(two.adopt(CapsuleId::random()).await.unwrap_err().code, ErrorCode::NotFound);
    let (id, _) = uploaded(&one).await;
    let manifest = manifest(&s3, id);
    let good = fs::read(&manifest).unwrap();
    for bad in [&good[..good.len() / 2], b"", b"something else that is no manifest"] {
        fs::write(&manifest, bad).unwrap();
        let error = two.adopt(id).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::DataLoss, "{error}");
        assert_eq!((two.holds(), two.generations()), (0, 0));
    }
    fs::write(&manifest, good).unwrap();
    // A disk over an image that is neither here nor there.
    let images = two.root().join("images");
    for image in fs::read_dir(&images).unwrap() {
        let path = image.unwrap().path();
        fs::rename(&path, path.with_extension("away")).unwrap();
    }
    fs::remove_dir_all(s3.folder().join("fleet/manifests/images")).unwrap();
    let error = two.adopt(id).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition, "{error}");
    assert_eq!(two.holds(), 0);
    let none = Host::open(|_| {}).await;
    assert_eq!(none.adopt(id).await.unwrap_err().code, ErrorCode::FailedPrecondition);
    none.close().await;
    one.forget(id).await;
    one.close().await;
    two.close().await;
}
