//! Pausing and resuming real capsules: what survives, what a failure leaves, and what a killed process does.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::common::{Host, spec};
use agent_api::{CapsuleState, TouchCapsuleRequest};
use api::CapsuleId;
use connectrpc::ErrorCode;
use futures::future::poll_immediate;

/// A program that keeps a secret in its memory and tells it to whoever asks by a file.
pub const KEEPER: &str = "mkdir -p /tmp/k; cat > /tmp/k/run <<'X'\n\
    secret=$(head -c 32 /dev/urandom | sha256sum); n=0\n\
    while true; do n=$((n+1)); echo $n > /tmp/k/n.new; mv /tmp/k/n.new /tmp/k/n; \
    if [ -e /tmp/k/ask ]; then rm /tmp/k/ask; echo $secret > /tmp/k/t; mv /tmp/k/t /tmp/k/told; fi; sleep 0.05; done\nX\n\
    setsid sh /tmp/k/run > /dev/null 2>&1 < /dev/null & while [ ! -e /tmp/k/n ]; do sleep 0.05; done";
/// Asks it.
pub const ASK: &str =
    "rm -f /tmp/k/told; touch /tmp/k/ask; while [ ! -e /tmp/k/told ]; do sleep 0.05; done; cat /tmp/k/told";

async fn created(host: &Host) -> CapsuleId {
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    id
}

#[tokio::test]
async fn processes_memory_and_files_survive_a_pause_and_nothing_runs_meanwhile() {
    let host = Host::open(|_| {}).await;
    let id = created(&host).await;
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    host.sh(id, "echo kept > /root/file; sync").await;
    let boot = host.sh(id, "cat /proc/sys/kernel/random/boot_id").await;
    let before = host.listed(id).await.generation;

    let paused = host.pause(id).await.unwrap();
    assert_eq!(paused.state, CapsuleState::Paused);
    assert!(paused.generation > before);
    // Its directory, and nothing else.
    assert_eq!((host.holds(), host.processes()), (1, 0));
    assert_eq!(host.pause(id).await.unwrap().generation, paused.generation, "a second pause changes nothing");
    assert_eq!(host.try_sh(id, "true").await.unwrap_err().code, ErrorCode::FailedPrecondition);
    host.lifecycle().touch_capsule(TouchCapsuleRequest { id: id.to_string(), ..Default::default() }).await.unwrap();

    let resumed = host.resume(id).await.unwrap();
    assert_eq!(resumed.state, CapsuleState::Running);
    assert!(resumed.generation > paused.generation && !resumed.host_ip.is_empty());
    assert_eq!(host.resume(id).await.unwrap().generation, resumed.generation, "a second resume changes nothing");
    assert_eq!(host.sh(id, ASK).await, secret);
    assert_eq!(host.sh(id, "cat /root/file; cat /proc/sys/kernel/random/boot_id").await, format!("kept\n{boot}"));
    host.is_in_time(id).await;
    host.destroy(id).await;
    assert_eq!(host.holds(), 0);
    host.until_generations(0).await;
    host.close().await;
}

#[tokio::test]
async fn twelve_pauses_lose_nothing_and_keep_few_generations() {
    let host = Host::open(|_| {}).await;
    let id = created(&host).await;
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    host.sh(id, "head -c 8M /dev/urandom > /dev/shm/m; md5sum < /dev/shm/m > /dev/shm/sum").await;
    for round in 0..12 {
        host.sh(id, &format!("head -c 1M /dev/urandom > /root/{round}; md5sum /root/{round} >> /root/sums")).await;
        host.pause(id).await.unwrap();
        host.resume(id).await.unwrap();
        assert_eq!(host.sh(id, ASK).await, secret, "round {round}");
        host.sh(id, "md5sum -c /root/sums > /dev/null; test \"$(md5sum < /dev/shm/m)\" = \"$(cat /dev/shm/sum)\"")
            .await;
    }
    host.pause(id).await.unwrap();
    // They are merged beside everything else.
    while host.generations() > 8 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    host.resume(id).await.unwrap();
    assert_eq!(host.sh(id, ASK).await, secret);
    host.sh(id, "md5sum -c /root/sums > /dev/null").await;
    host.destroy(id).await;
    host.until_generations(0).await;
    host.close().await;
}

#[tokio::test]
async fn an_idle_capsule_is_paused_by_itself_and_an_open_exchange_keeps_it() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(agent_api::CapsuleSpec { timeout_sec: 3, ..spec(id) }).await.unwrap();
    // Twice the timeout without a byte.
    let mut exchange = Box::pin(host.sh(id, "sleep 6"));
    while poll_immediate(exchange.as_mut()).await.is_none() {
        assert_eq!(host.listed(id).await.state, CapsuleState::Running);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(exchange);
    let paused = host.until(id, CapsuleState::Paused).await;
    assert!(paused.reason.contains("nothing happened for 3 s"), "{}", paused.reason);
    assert_eq!(host.processes(), 0);
    assert_eq!(host.resume(id).await.unwrap().reason, "");
    host.close().await;
}

#[tokio::test]
async fn a_pause_waits_for_short_exchanges_and_cuts_long_ones() {
    let host = Host::open(|_| {}).await;
    let id = created(&host).await;
    let (short, long, paused) = tokio::join!(
        host.try_sh(id, "touch /root/short; sleep 0.5; echo whole"),
        host.try_sh(id, "touch /root/long; sleep 600"),
        async {
            host.sh(id, "while [ ! -e /root/short ] || [ ! -e /root/long ]; do sleep 0.05; done").await;
            host.pause(id).await
        }
    );
    paused.unwrap();
    assert_eq!(short.unwrap(), "whole");
    assert!(long.is_err(), "{long:?}");
    host.resume(id).await.unwrap();
    // Its process was not cut.
    host.sh(id, "pgrep -f 'sleep 600' > /dev/null || ps | grep -q 'sleep 60[0]'").await;
    host.close().await;
}

#[tokio::test]
async fn what_a_resume_needed_first_is_fetched_ahead_the_next_time() {
    let host = Host::open(|_| {}).await;
    let id = created(&host).await;
    let record = host.capsule(id).join("working-set");
    host.pause(id).await.unwrap();
    assert!(!record.exists(), "nothing was resumed yet");
    host.resume(id).await.unwrap();
    // For some seconds it is noted what is needed.
    let recorded = async |before: &[u8]| loop {
        match fs::read(&record) {
            Ok(recorded) if recorded != before => break recorded,
            _ => host.sh(id, "sleep 0.1").await,
        };
    };
    let first = recorded(b"").await;
    // A header and a checksum are 28 bytes.
    assert!(first.starts_with(b"WRENNWSS") && first.len() > 28, "{} bytes", first.len());
    host.pause(id).await.unwrap();

    // One that is damaged is not used, and not needed.
    let damaged = &first[..first.len() - 1];
    fs::write(&record, damaged).unwrap();
    host.resume(id).await.unwrap();
    let complaints =
        |id| fs::read_to_string(host.capsule(id).join("pager.log")).unwrap().matches("no prefetch").count();
    assert_eq!(complaints(id), 1);
    recorded(damaged).await;
    host.pause(id).await.unwrap();
    host.resume(id).await.unwrap();
    assert_eq!(complaints(id), 0);
    host.destroy(id).await;
    host.close().await;
}

#[tokio::test]
async fn damage_is_told_and_leaves_the_capsule_paused() {
    let host = Host::open(|_| {}).await;
    let id = created(&host).await;
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    host.pause(id).await.unwrap();
    let file = |kind: &str| {
        let entries = fs::read_dir(host.capsule(id)).unwrap().flatten();
        let mut found = entries.filter(|entry| entry.file_name().to_str().unwrap().starts_with(kind));
        found.next().unwrap().path()
    };
    for kind in ["memory-", "state-"] {
        let path = file(kind);
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 0x10;
        for bad in [flipped, good[..good.len() / 2].to_vec(), Vec::new(), vec![0x55; 4096]] {
            fs::write(&path, bad).unwrap();
            let error = host.resume(id).await.unwrap_err();
            assert_eq!(error.code, ErrorCode::DataLoss, "{kind}: {error}");
            let listed = host.listed(id).await;
            assert_eq!(listed.state, CapsuleState::Paused);
            assert!(!listed.reason.is_empty());
            assert_eq!((host.holds(), host.processes()), (1, 0));
        }
        fs::write(&path, good).unwrap();
    }
    host.resume(id).await.unwrap();
    assert_eq!(host.sh(id, ASK).await, secret);
    host.close().await;
}

#[tokio::test]
async fn a_capsule_whose_pager_is_never_ready_can_be_destroyed() {
    // As one whose object store does not answer.
    let never = ["-c", "exec sleep 1000"].map(Into::into).to_vec();
    let host = Host::open(|config| config.pager = ("/bin/sh".into(), never)).await;
    let id = created(&host).await;
    host.pause(id).await.unwrap();
    let (resumed, ()) = tokio::join!(host.resume(id), async {
        while host.processes() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::timeout(Duration::from_secs(30), host.destroy(id)).await.expect("it is destroyed");
    });
    resumed.unwrap_err();
    assert_eq!((host.holds(), host.processes()), (0, 0));
    host.close().await;
}

#[tokio::test]
async fn a_pager_or_vmm_that_dies_ends_the_capsule_with_a_reason() {
    let host = Host::open(|_| {}).await;
    for (process, word) in [("pager", "memory"), ("vmm", "VMM")] {
        let id = created(&host).await;
        host.pause(id).await.unwrap();
        host.resume(id).await.unwrap();
        // It may have served everything by now, and be gone in peace.
        if process == "pager" && !host.stop_pager(id) {
            host.destroy(id).await;
            continue;
        }
        host.kill(id, process);
        let ended = loop {
            let capsule = host.listed(id).await;
            if capsule.state == CapsuleState::Failed {
                break capsule;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(ended.reason.contains(word), "{}", ended.reason);
        assert_eq!((host.holds(), host.processes()), (0, 0));
    }
    host.until_generations(0).await;
    host.close().await;
}

#[tokio::test]
async fn a_pause_that_cannot_be_kept_lets_the_capsule_run_on() {
    let host = Host::open(|_| {}).await;
    let id = created(&host).await;
    host.sh(id, KEEPER).await;
    let secret = host.sh(id, ASK).await;
    let generations = host.root().join("generations");
    for _ in 0..2 {
        fs::rename(&generations, host.root().join("elsewhere")).unwrap();
        let error = host.pause(id).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Internal, "{error}");
        fs::rename(host.root().join("elsewhere"), &generations).unwrap();
        assert_eq!(host.listed(id).await.state, CapsuleState::Running);
        assert!(!dump(&host, id).exists(), "what was dumped still takes memory");
        assert_eq!(host.sh(id, ASK).await, secret);
        // What the failed pause would have held is in this one.
        host.pause(id).await.unwrap();
        host.resume(id).await.unwrap();
        assert_eq!(host.sh(id, ASK).await, secret);
    }
    host.close().await;
}

#[tokio::test]
async fn an_agent_that_ends_leaves_paused_capsules_paused_and_running_ones_running() {
    let host = Host::open(|_| {}).await;
    let ids = [created(&host).await, created(&host).await];
    for id in ids {
        host.sh(id, KEEPER).await;
    }
    let secrets = [host.sh(ids[0], ASK).await, host.sh(ids[1], ASK).await];
    host.pause(ids[0]).await.unwrap();
    host.pause(ids[1]).await.unwrap();
    host.resume(ids[1]).await.unwrap();
    let before = [host.listed(ids[0]).await, host.listed(ids[1]).await];
    let dir = host.leave().await;
    let host = Host::open_in(dir, |_| {}).await;
    for (id, before) in ids.into_iter().zip(before) {
        let after = host.listed(id).await;
        assert_eq!((after.state, after.generation >= before.generation), (before.state, true));
    }
    assert_eq!(host.sh(ids[1], ASK).await, secrets[1]);
    host.resume(ids[0]).await.unwrap();
    assert_eq!(host.sh(ids[0], ASK).await, secrets[0]);
    assert!(host.agent.pause_all().await.is_empty());
    assert_eq!(host.processes(), 0);
    // From then on nothing starts.
    for refused in [host.resume(ids[0]).await, host.create(spec(CapsuleId::random())).await] {
        let error = refused.unwrap_err();
        assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
        assert!(error.message.as_deref().unwrap().contains("being stopped"), "{error}");
    }
    let dir = host.put_away().await;
    let host = Host::open_in(dir, |_| {}).await;
    for (id, secret) in ids.into_iter().zip(secrets) {
        assert_eq!(host.listed(id).await.state, CapsuleState::Paused);
        host.resume(id).await.unwrap();
        assert_eq!(host.sh(id, ASK).await, secret);
    }
    host.close().await;
}

#[tokio::test]
async fn a_pager_that_dies_under_a_pause_ends_the_capsule_with_a_reason() {
    let host = Host::open(|_| {}).await;
    for attempt in 0.. {
        let id = created(&host).await;
        host.sh(id, "head -c 96M /dev/urandom > /dev/shm/m").await;
        host.pause(id).await.unwrap();
        host.resume(id).await.unwrap();
        if !host.stop_pager(id) {
            // It was faster, and nothing can be missing any more.
            assert!(attempt < 10, "it always is");
            host.destroy(id).await;
            continue;
        }
        let (paused, ()) = tokio::join!(host.pause(id), async {
            while host.listed(id).await.state == CapsuleState::Running {}
            if host.listed(id).await.state == CapsuleState::Pausing {
                host.kill(id, "pager");
            }
        });
        match paused {
            // All that had to be saved had come.
            Ok(paused) => assert_eq!(paused.state, CapsuleState::Paused),
            Err(_) => {
                while host.listed(id).await.state != CapsuleState::Failed {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let reason = host.listed(id).await.reason;
                assert!(reason.contains("serves its memory"), "{reason}");
            }
        }
        host.destroy(id).await;
        break;
    }
    assert_eq!((host.holds(), host.processes()), (0, 0));
    host.until_generations(0).await;
    host.close().await;
}

/// What the capsule's VMM writes of its memory, while it does.
fn dump(host: &Host, id: CapsuleId) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{}/root", host.record(id)["vmm"]["pid"]));
    root.join(vmm::CAPSULE_DIR.trim_start_matches('/')).join(vmm::SCRATCH_DIR).join("memory")
}

/// What a pause of a capsule of that much memory in MiB writes after the guest has written 32 MiB: bytes of the new
/// generation, the header and the VMM's state; and bytes that the VMM dumped for that.
async fn written_by_a_pause(host: &Host, memory_mib: u32) -> (u64, u64) {
    let id = CapsuleId::random();
    host.create(agent_api::CapsuleSpec { memory_mib, ..spec(id) }).await.unwrap();
    // Its pages are there already, so that what is written next is what is written, and no bookkeeping.
    host.sh(id, "head -c 32M /dev/urandom > /dev/shm/m").await;
    host.pause(id).await.unwrap();
    host.resume(id).await.unwrap();
    let before = files(&host.root().join("generations"));
    host.sh(id, "dd if=/dev/urandom of=/dev/shm/m bs=1M count=32 conv=notrunc 2> /dev/null").await;
    let (dump, mut dumped) = (dump(host, id), 0);
    let mut pause = Box::pin(host.pause(id));
    while tokio::time::timeout(Duration::from_millis(1), &mut pause).await.map(Result::unwrap).is_err() {
        dumped = fs::metadata(&dump).map_or(0, |file| file.blocks() * 512).max(dumped);
    }
    drop(pause);
    let is_new = |name: &&(String, u64)| !before.iter().any(|(other, _)| *other == name.0);
    let generations = files(&host.root().join("generations"));
    let (new, of_capsule) = (generations.iter().filter(is_new), files(&host.capsule(id)));
    let parts = of_capsule.iter().filter(|(name, _)| name.starts_with("memory-") || name.starts_with("state-"));
    let bytes = new.chain(parts).map(|(_, bytes)| bytes).sum();
    host.destroy(id).await;
    (bytes, dumped)
}

/// Names and lengths of the files in a directory.
fn files(dir: &std::path::Path) -> Vec<(String, u64)> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len())).collect()
}

#[tokio::test]
async fn a_pause_writes_what_was_written_and_little_more_whatever_the_size_of_the_memory() {
    const DIRTY: u64 = 32 << 20;
    let host = Host::open(|_| {}).await;
    let half = written_by_a_pause(&host, 512).await;
    let whole = written_by_a_pause(&host, 1024).await;
    for (bytes, dumped) in [half, whole] {
        assert!((DIRTY..=DIRTY / 4 * 5).contains(&bytes), "{bytes} bytes for {DIRTY}");
        // And nothing else was looked at: who reads all memory writes no less than that, where nobody sees it afterwards.
        assert!((DIRTY..=DIRTY / 2 * 3).contains(&dumped), "{dumped} bytes were dumped for {DIRTY}");
    }
    assert!(half.0.abs_diff(whole.0) < DIRTY / 16, "{half:?} bytes of 512 MiB, {whole:?} of 1024");
    host.close().await;
}
