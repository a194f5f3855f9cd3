//! What the audit of a data directory says of one that is as it should be, and of one that is not.

use std::fs;
use std::path::Path;

use crate::common::{Host, root, spec};
use agent::audit::{Audit, Kind, Verdict};
use agent_api::SnapshotCapsuleRequest;
use api::CapsuleId;

async fn audit(dir: &Path) -> Audit {
    agent::audit::audit(dir, &["agent.sock"]).await.unwrap()
}

/// What was found, with the paths below the disks' root.
fn findings(audit: &Audit, root: &Path) -> Vec<(String, Kind, Verdict)> {
    let below = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_str().unwrap().to_owned();
    audit.findings.iter().map(|finding| (below(&finding.path), finding.kind, finding.verdict)).collect()
}

/// The path of the only file in `dir` whose name begins with that.
fn only(dir: &Path, prefix: &str) -> String {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names = names.filter(|name| name.starts_with(prefix));
    let name = names.next().unwrap();
    assert_eq!(names.next(), None);
    name
}

#[tokio::test]
async fn everything_in_a_data_directory_is_accounted_for() {
    let host = Host::open(|_| {}).await;
    let ids = [CapsuleId::random(), CapsuleId::random(), CapsuleId::random()];
    host.create(spec(ids[0])).await.unwrap();
    let snapshot = SnapshotCapsuleRequest { id: ids[0].to_string(), name: "mine".into(), ..Default::default() };
    host.lifecycle().snapshot_capsule(snapshot).await.unwrap();
    for child in host.fork(ids[0], &ids[1..]).await.unwrap() {
        assert_eq!(child.reason, "");
    }
    host.pause(ids[1]).await.unwrap();
    let dir = host.dir().to_owned();

    // Beside an agent that runs: a capsule that runs and was forked, one that is paused, one that is a fork, and a template.
    let healthy = audit(&dir).await;
    assert!(healthy.is_clean(), "{:#?}", healthy.findings);
    assert_eq!(healthy.used[&Kind::Header].count, 4);
    assert_eq!(healthy.used[&Kind::State].count, 4);
    assert_eq!(healthy.used[&Kind::Disk].count, 4);
    assert_eq!(healthy.used[&Kind::Image].count, 1);
    assert!(healthy.used[&Kind::Generation].bytes > 1 << 20);
    // While the agent works.
    let (audits, ()) = tokio::join!(
        async {
            for _ in 0..10 {
                let audit = audit(&dir).await;
                assert!(audit.is_clean(), "{:#?}", audit.findings);
            }
        },
        async {
            for _ in 0..2 {
                host.pause(ids[0]).await.unwrap();
                host.resume(ids[0]).await.unwrap();
            }
        }
    );
    let () = audits;
    for id in [ids[0], ids[2]] {
        host.pause(id).await.unwrap();
    }
    host.until_generations_are_settled().await;
    let at = root(&dir);
    let volume = at != dir;
    let dir = host.put_away().await;

    // Nothing runs, and where there is a volume it is not mounted. It is not afterwards either.
    let stopped = audit(dir.path()).await;
    assert_eq!(findings(&stopped, &at), []);
    assert_eq!(stopped.used[&Kind::Header].count, 4);
    assert_eq!(at.join("generations").exists(), !volume);

    // Planted while somebody has it open.
    let view = disk::Disks::view(dir.path()).unwrap();
    let capsule = |id: CapsuleId| at.join("capsules").join(id.to_string());
    let generation = only_new_generation(&at, &capsule(ids[0]));
    let lost = CapsuleId::random();
    let digest = "0".repeat(64);
    for (path, content) in [
        (dir.path().join("notes"), "mine"),
        (at.join("capsules/notes"), "mine"),
        (at.join("generations/notes"), "mine"),
        (at.join("generations/0123456789abcdef0123456789abcdef"), "nobody's"),
        (at.join("generations/.tmp-0123456789abcdef0123456789abcdef"), "half"),
        (at.join(format!("images/minimal-{digest}.img")), "old"),
        (at.join("images/notes"), "mine"),
        (at.join("hibernated/notes"), "mine"),
        (at.join(format!("hibernated/{lost}.new")), "half"),
        (at.join("templates/notes"), "mine"),
        (capsule(ids[1]).join("notes"), "mine"),
        (capsule(ids[1]).join("disk-99"), "old"),
        (capsule(ids[1]).join("state-99"), "old"),
        (capsule(ids[1]).join("memory-99.tmp-0123456789abcdef0123456789abcdef"), "half"),
        (capsule(ids[1]).join("record.json.new"), "half"),
    ] {
        fs::write(&path, content).unwrap();
    }
    let old = fs::File::options().write(true).open(at.join(format!("images/minimal-{digest}.img"))).unwrap();
    old.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    drop(old);
    for made in ["passing/some", "boots/some"] {
        fs::create_dir(at.join(made)).unwrap();
    }
    fs::create_dir(capsule(lost)).unwrap();
    let (capsules, kind) = (|id: CapsuleId, name: &str| format!("capsules/{id}/{name}"), Verdict::Garbage);
    let mut expected = vec![
        (
            if volume { dir.path().join("notes").to_str().unwrap().to_owned() } else { "notes".into() },
            Kind::Other,
            Verdict::Foreign,
        ),
        ("boots/some".into(), Kind::Point, kind),
        ("capsules/notes".into(), Kind::Capsule, Verdict::Foreign),
        (format!("capsules/{lost}"), Kind::Capsule, kind),
        (capsules(ids[1], "notes"), Kind::Capsule, Verdict::Foreign),
        (capsules(ids[1], "disk-99"), Kind::Disk, kind),
        (capsules(ids[1], "state-99"), Kind::State, kind),
        (capsules(ids[1], "memory-99.tmp-0123456789abcdef0123456789abcdef"), Kind::Header, kind),
        (capsules(ids[1], "record.json.new"), Kind::Capsule, kind),
        ("generations/notes".into(), Kind::Generation, Verdict::Foreign),
        ("generations/0123456789abcdef0123456789abcdef".into(), Kind::Generation, kind),
        ("generations/.tmp-0123456789abcdef0123456789abcdef".into(), Kind::Generation, kind),
        (format!("images/minimal-{digest}.img"), Kind::Image, kind),
        ("images/notes".into(), Kind::Image, Verdict::Foreign),
        ("hibernated/notes".into(), Kind::Other, Verdict::Foreign),
        (format!("hibernated/{lost}.new"), Kind::Other, kind),
        ("passing/some".into(), Kind::Point, kind),
        ("templates/notes".into(), Kind::Point, Verdict::Foreign),
    ];
    expected.sort();
    let mut found = findings(&audit(dir.path()).await, &at);
    found.sort();
    assert_eq!(found, expected);

    // Damage, each undone before the next.
    let header = only(&capsule(ids[2]), "memory-");
    let state = only(&capsule(ids[2]), "state-");
    for (path, kind, damaged) in [
        (capsule(ids[2]).join(&header), Kind::Header, true),
        (capsule(ids[2]).join(&header), Kind::Header, false),
        (capsule(ids[2]).join(&state), Kind::State, true),
        (capsule(ids[2]).join(&state), Kind::State, false),
        (capsule(ids[2]).join("rootfs.ext4"), Kind::Disk, false),
        (capsule(ids[2]).join("record.json"), Kind::Capsule, true),
        (at.join("templates").join(only(&at.join("templates"), "mine@")).join("point.json"), Kind::Point, true),
        (at.join("templates").join(only(&at.join("templates"), "mine@")).join("memory"), Kind::Header, true),
    ] {
        let aside = at.join("boots/aside");
        fs::rename(&path, &aside).unwrap();
        if damaged {
            fs::write(&path, &fs::read(&aside).unwrap()[..20]).unwrap();
        }
        let broken = audit(dir.path()).await;
        let broken: Vec<_> = broken.wrong().filter(|finding| finding.verdict == Verdict::Broken).cloned().collect();
        assert_eq!(broken.iter().map(|finding| (&finding.path, finding.kind)).collect::<Vec<_>>(), [(&path, kind)]);
        assert!(!broken[0].why.is_empty());
        fs::rename(&aside, &path).unwrap();
    }
    // A generation that is needed names the header that needs it.
    let aside = at.join("boots/aside");
    fs::rename(at.join("generations").join(&generation), &aside).unwrap();
    let broken = audit(dir.path()).await;
    let broken: Vec<_> = broken.wrong().filter(|finding| finding.verdict == Verdict::Broken).collect();
    let header = capsule(ids[0]).join(only(&capsule(ids[0]), "memory-"));
    assert_eq!(broken.iter().map(|finding| &finding.path).collect::<Vec<_>>(), [&header]);
    assert!(broken[0].why.contains("generation"), "{}", broken[0].why);
    fs::rename(aside, at.join("generations").join(generation)).unwrap();
    // A header that cannot be read keeps everything that may be its own.
    let text = fs::read(&header).unwrap();
    fs::write(&header, "x").unwrap();
    let kept = audit(dir.path()).await;
    let unreferenced = kept.findings.iter().filter(|finding| finding.verdict == Verdict::Unreferenced);
    assert!(unreferenced.count() >= 2);
    fs::write(&header, text).unwrap();
    view.close().unwrap();

    // The next agent removes what is garbage, and nothing else.
    let host = Host::open_in(dir, |_| {}).await;
    host.until_generations_are_settled().await;
    let mut found = findings(&audit(host.dir()).await, &at);
    found.sort();
    expected.retain(|(_, _, verdict)| *verdict == Verdict::Foreign);
    assert_eq!(found, expected);
    for (path, _, _) in expected {
        fs::remove_file(at.join(path)).unwrap();
    }
    for id in ids {
        host.resume(id).await.unwrap();
    }
    host.close().await;
}

/// The generation that only that capsule's last pause has.
fn only_new_generation(root: &Path, capsule: &Path) -> String {
    let header = capsule.join(only(capsule, "memory-"));
    let snapshot = snapshot::Snapshot::open(&root.join("generations"), &header).unwrap();
    snapshot.header().generations().last().unwrap().id.to_string()
}
