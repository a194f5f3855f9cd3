//! Records that cannot be read or written: no capsule is lost with its record.

use std::fs;

use agent::audit::{Kind, Verdict};
use agent_api::ListCapsulesRequest;
use api::CapsuleId;

use crate::common::{Host, root, spec};
use crate::pause::{ASK, KEEPER};

#[tokio::test]
async fn a_capsule_whose_record_cannot_be_read_is_left_alone() {
    let host = Host::open(|_| {}).await;
    let ids = [CapsuleId::random(), CapsuleId::random()];
    let mut secrets = Vec::new();
    for id in ids {
        host.create(spec(id)).await.unwrap();
        host.sh(id, KEEPER).await;
        secrets.push(host.sh(id, ASK).await);
        host.pause(id).await.unwrap();
    }
    let at = root(host.dir());
    let record = |id: CapsuleId| at.join("capsules").join(id.to_string()).join("record.json");
    let whole = ids.map(|id| fs::read(record(id)).unwrap());
    let mut dir = host.put_away().await;

    // As a power cut may leave it, and as one that was written by an agent of tomorrow.
    let tomorrow = String::from_utf8(whole[0].clone()).unwrap().replace("\"paused\"", "\"asleep\"");
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
    fs::write(record(ids[0]), &whole[0]).unwrap();
    view.close().unwrap();
    let host = Host::open_in(dir, |_| {}).await;
    for (id, secret) in ids.into_iter().zip(secrets) {
        host.resume(id).await.unwrap();
        assert_eq!(host.sh(id, ASK).await, secret);
    }
    host.close().await;
}
