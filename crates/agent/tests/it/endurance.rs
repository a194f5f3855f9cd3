//! Fifty pauses of a guest that checks its own memory against what it wrote there, and twenty forks of it at the end.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::common::{Host, spec};
use agent_api::CapsuleSpec;
use api::CapsuleId;

/// Rounds of pause and resume: many times what a snapshot keeps generations.
const ROUNDS: usize = 50;
const FORKS: usize = 20;

/// Writes and zeroes pages of 256 MiB in an order that nobody else knows, with a checksum of each beside it, and a line
/// into a file for every step. When asked it reads all of both again and says whether it is what it wrote, and how far
/// it is.
const PROGRAM: &str = r#"
import mmap, os, random, sys, time, zlib
PAGE, PAGES = 4096, 256 << 8
memory = mmap.mmap(-1, PAGE * PAGES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
noise, zeros = os.urandom(PAGE * 64), bytes(PAGE)
sums, step, told = [zlib.crc32(zeros)] * PAGES, 0, 0
log = open("/root/steps", "a+b")
def write(page, bytes):
    memory[page * PAGE:(page + 1) * PAGE] = bytes
    sums[page] = zlib.crc32(bytes)
for page in range(PAGES):
    at = random.randrange(PAGE * 63)
    write(page, noise[at:at + PAGE])
def check():
    for page in range(PAGES):
        if zlib.crc32(memory[page * PAGE:(page + 1) * PAGE]) != sums[page]:
            return "page %d is not what was written" % page
    log.seek(0)
    if zlib.crc32(log.read()) != told:
        return "the file is not what was written"
    return "whole %d %d %d" % (step, told, zlib.crc32(repr(sums).encode()))
while True:
    if os.path.exists("/tmp/ask"):
        os.remove("/tmp/ask")
        with open("/tmp/told.new", "w") as file:
            file.write(check())
        os.rename("/tmp/told.new", "/tmp/told")
    if os.path.exists("/tmp/still"):
        time.sleep(0.05)
        continue
    step += 1
    for _ in range(64):
        page, kind, at = random.randrange(PAGES), random.randrange(4), random.randrange(PAGE * 63)
        if kind == 0:
            write(page, zeros)
        elif kind == 1:
            memory.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
            sums[page] = zlib.crc32(zeros)
        else:
            write(page, noise[at:at + PAGE])
    line = b"%d %d\n" % (step, random.getrandbits(64))
    log.write(line)
    log.flush()
    told = zlib.crc32(line, told)
    time.sleep(0.01)
"#;

/// Asks the program, and waits for what it says.
const ASK: &str = "rm -f /tmp/told; touch /tmp/ask; while [ ! -e /tmp/told ]; do sleep 0.05; done; cat /tmp/told";

async fn ask(host: &Host, id: CapsuleId) -> (u64, String) {
    let told = host.sh(id, ASK).await;
    let step = told.strip_prefix("whole ").unwrap_or_else(|| panic!("{id}: {told}"));
    (step.split(' ').next().unwrap().parse().unwrap(), told)
}

#[tokio::test]
async fn fifty_pauses_and_twenty_forks_lose_and_share_nothing() {
    let host = Host::open(|_| {}).await;
    let parent = CapsuleId::random();
    host.create(CapsuleSpec { memory_mib: 512, ..spec(parent) }).await.unwrap();
    let run = format!(
        "cat > /root/program.py <<'X'\n{PROGRAM}\nX\nsetsid python3 /root/program.py > /root/out 2>&1 < /dev/null &"
    );
    host.sh(parent, &run).await;
    let mut steps = ask(&host, parent).await.0;
    for round in 0..ROUNDS {
        host.pause(parent).await.unwrap();
        host.resume(parent).await.unwrap();
        host.is_in_time(parent).await;
        // Reading all of it takes longer than the rest of the round: what is wrong is still so a few rounds later.
        if round % 5 == 4 {
            let (step, _) = ask(&host, parent).await;
            assert!(step > steps, "it stands still after pause {round}");
            steps = step;
        }
        // At most what a snapshot keeps, and what a merge replaces meanwhile.
        while host.generations() > 2 * snapshot::MERGE_AT {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    host.sh(parent, "touch /tmp/still; sleep 0.2").await;
    let (_, told) = ask(&host, parent).await;
    let ids: Vec<CapsuleId> = (0..FORKS).map(|_| CapsuleId::random()).collect();
    for child in host.fork(parent, &ids).await.unwrap() {
        assert!(child.reason.is_empty(), "{}", child.reason);
    }
    let mut own = BTreeSet::new();
    for id in ids.iter().chain([&parent]) {
        host.is_in_time(*id).await;
        assert_eq!(ask(&host, *id).await.1, told, "{id}");
        let lines = host.sh(*id, "cat /etc/machine-id; head -c 16 /dev/urandom | md5sum; hostname").await;
        own.extend(lines.lines().map(str::to_owned));
    }
    assert_eq!(own.len(), 3 * (FORKS + 1), "{own:#?}");
    for id in ids {
        host.destroy(id).await;
    }
    assert_eq!(ask(&host, parent).await.1, told);
    host.destroy(parent).await;
    assert_eq!((host.holds(), host.processes()), (0, 0));
    host.until_generations(0).await;
    host.close().await;
}
