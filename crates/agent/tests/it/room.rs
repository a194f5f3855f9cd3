//! What a host holds and what it does not, and what it sees its capsules use.

use agent::admission::Limits;
use agent_api::*;
use api::CapsuleId;
use connectrpc::client::full_body;
use connectrpc::{ConnectError, ErrorCode};
use guest_api::process::__buffa::oneof::process_selector::Selector;
use guest_api::process::{ConnectRequest, ProcessConfig, ProcessSelector, StartRequest};
use hyper::Request;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::common::{Host, spec};

const MIB: u64 = 1 << 20;

/// An agent whose host has memory for that many capsules of [`spec`].
async fn host_for(dir: TempDir, capsules: u64) -> Host {
    let memory = rustix::system::sysinfo();
    let mib = u64::from(memory.mem_unit) * memory.totalram / MIB;
    let memory_reserve_mib = Some(mib - capsules * 256 - 100);
    Host::open_in(dir, |config| config.limits = Limits { memory_reserve_mib, ..Limits::default() }).await
}

fn dir() -> TempDir {
    TempDir::with_prefix("wrenn-agent-").unwrap()
}

/// What there was not enough of.
fn lack<T: std::fmt::Debug>(refused: Result<T, ConnectError>) -> HostFull {
    let error = refused.unwrap_err();
    assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
    full::of(&error).unwrap()
}

#[tokio::test]
async fn a_guest_has_so_many_calls_at_once_and_no_more() {
    // As `wrenn` does: a call is two connections, and both ends of one are here.
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files }).unwrap();
    let host = Host::open(|_| {}).await;
    let [busy, other] = [(); 2].map(|()| CapsuleId::random());
    for id in [busy, other] {
        host.create(spec(id)).await.unwrap();
    }
    let processes = Transport::new(host.endpoint()).guest(busy);
    let sleep = ProcessConfig { cmd: "/bin/sleep".into(), args: vec!["1000".into()], ..Default::default() };
    let request = StartRequest { process: sleep.into(), tag: Some("one".into()), ..Default::default() };
    let mut first = processes.start(request).await.unwrap();
    first.message().await.unwrap();
    let followed = || async {
        let selector = ProcessSelector { selector: Some(Selector::Tag("one".into())), ..Default::default() };
        let mut stream = processes.connect(ConnectRequest { process: selector.into(), ..Default::default() }).await?;
        stream.message().await.map(|_| stream)
    };
    let mut followers = Vec::new();
    for _ in 1..CALLS {
        followers.push(followed().await.unwrap());
    }
    let refused = followed().await.err().unwrap();
    assert_eq!(refused.code, ErrorCode::ResourceExhausted, "{refused}");
    assert!(refused.response_headers().contains_key(REFUSAL_HEADER));
    // Others have theirs.
    host.sh(other, "true").await;
    drop(followers);
    while host.try_sh(busy, "true").await.is_err_and(|error| error.code == ErrorCode::ResourceExhausted) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    host.sh(busy, "true").await;
    for id in [busy, other] {
        host.destroy(id).await;
    }
    host.close().await;
}

#[tokio::test]
async fn a_host_holds_what_it_has_memory_for_and_says_so() {
    let host = host_for(dir(), 2).await;
    // All at once, of which there is room for two.
    let ids: Vec<CapsuleId> = (0..5).map(|_| CapsuleId::random()).collect();
    let created = futures::future::join_all(ids.iter().map(|id| host.create(spec(*id)))).await;
    let (mut run, mut refused) = (Vec::new(), Vec::new());
    for (id, created) in ids.into_iter().zip(created) {
        if created.is_ok() { run.push(id) } else { refused.push(lack(created)) }
    }
    assert_eq!((run.len(), refused.len()), (2, 3));
    for full in refused {
        assert_eq!((&*full.resource, full.asked, full.used, full.limit), ("memory", 256, 512, 612));
    }
    let told = host.lifecycle().list_capsules(ListCapsulesRequest::default()).await.unwrap().into_owned();
    assert_eq!(told.capsules.len(), 2, "what was refused was never there");

    // A fork is held as a whole, and the parent does not even stand still for it.
    assert_eq!(lack(host.fork(run[0], &[CapsuleId::random()]).await).asked, 256);
    // Asked again for what is there already, it is there.
    host.create(spec(run[0])).await.unwrap();

    // A pause makes room, and what is paused waits for it.
    host.pause(run[0]).await.unwrap();
    let third = CapsuleId::random();
    host.create(spec(third)).await.unwrap();
    let before = host.listed(run[0]).await;
    assert_eq!(lack(host.resume(run[0]).await).resource, "memory");
    assert_eq!(host.listed(run[0]).await, before);

    // The next agent takes over what runs, and counts it.
    let host = host_for(host.leave().await, 2).await;
    assert_eq!(lack(host.create(spec(CapsuleId::random())).await).used, 512);
    assert_eq!(lack(host.resume(run[0]).await).used, 512);
    // A host that was made smaller lets run what runs.
    let host = host_for(host.leave().await, 1).await;
    host.sh(third, "true").await;
    assert_eq!(lack(host.create(spec(CapsuleId::random())).await).limit, 356);
    host.destroy(third).await;
    host.destroy(run[1]).await;
    host.resume(run[0]).await.unwrap();
    let room = host.lifecycle().get_host(GetHostRequest::default()).await.unwrap().into_owned();
    assert_eq!(room.memory_promised_mib.as_option().unwrap().used, 256);
    assert_eq!(room.vcpus_promised.as_option().unwrap().used, 1);

    // What fails or ends by itself is promised nothing.
    host.kill(run[0], "vmm");
    let nothing_runs = async || {
        let room = host.lifecycle().get_host(GetHostRequest::default()).await.unwrap().into_owned();
        room.memory_promised_mib.into_option().unwrap().used == 0
    };
    while !nothing_runs().await {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!((host.holds(), host.processes()), (0, 0));
    host.close().await;
}

#[tokio::test]
async fn a_host_holds_no_more_processors_or_disk_than_it_may() {
    let cpus = std::thread::available_parallelism().unwrap().get() as u64;
    let limits = Limits { vcpu_factor: 2.0, ..Limits::default() };
    let host = Host::open(|config| config.limits = limits).await;
    let big = CapsuleSpec { vcpus: 2 * cpus as u32 + 1, ..spec(CapsuleId::random()) };
    let full = lack(host.create(big).await);
    assert_eq!((&*full.resource, full.asked, full.used, full.limit), ("vcpus", 2 * cpus + 1, 0, 2 * cpus));
    host.close().await;

    let limits = Limits { disk_reserve_mib: u64::MAX >> 20, ..Limits::default() };
    let host = Host::open(|config| config.limits = limits).await;
    let full = lack(host.create(spec(CapsuleId::random())).await);
    assert_eq!((&*full.resource, full.limit), ("disk", 0));
    assert_eq!(host.holds(), 0);
    host.close().await;
}

async fn points(host: &Host, id: CapsuleId) -> Vec<MetricsPoint> {
    let request = GetMetricsRequest { id: id.to_string(), seconds: 600, ..Default::default() };
    host.lifecycle().get_metrics(request).await.unwrap().into_owned().points
}

/// What was seen after now.
async fn latest(host: &Host, id: CapsuleId) -> MetricsPoint {
    // A look that is newer than a second is not taken again.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    points(host, id).await.pop().unwrap()
}

/// Whether something grew by an amount: by all of it, and not by much more.
#[track_caller]
fn grew(what: &str, before: u64, now: u64, amount: u64) {
    let grown = now.saturating_sub(before);
    assert!((amount * 9 / 10..amount * 2).contains(&grown), "{what} grew by {grown} when {amount} was used");
}

#[tokio::test]
async fn each_figure_grows_by_about_what_was_used() {
    let host = Host::open(|_| {}).await;
    let (busy, idle) = (CapsuleId::random(), CapsuleId::random());
    host.create(spec(busy)).await.unwrap();
    host.create(spec(idle)).await.unwrap();
    let (first, other) = (latest(&host, busy).await, latest(&host, idle).await);
    assert!(first.memory_bytes > 20 * MIB && first.memory_bytes < 512 * MIB, "{first:?}");
    assert!(first.disk_bytes > 0 && first.disk_bytes < 256 * MIB, "{first:?}");

    // Memory that stays. What the guest has not touched before is new to its host too.
    host.sh(busy, "head -c 48M /dev/zero | tr '\\0' x > /dev/shm/much").await;
    let now = latest(&host, busy).await;
    grew("memory", first.memory_bytes, now.memory_bytes, 48 * MIB);

    let before = now;
    host.sh(busy, "head -c 32M /dev/zero > /root/much; sync").await;
    let now = latest(&host, busy).await;
    grew("disk", before.disk_bytes, now.disk_bytes, 32 * MIB);

    let before = now;
    host.sh(busy, "head -c 8M /dev/zero | tr '\\0' x").await;
    let now = latest(&host, busy).await;
    grew("sent", before.sent_bytes, now.sent_bytes, 8 * MIB);

    let before = now;
    let body = full_body(vec![b'x'; 8 << 20].into());
    let put = Request::post("/files?path=/root/up&username=root").header("content-type", "application/octet-stream");
    Transport::new(host.endpoint()).send_to_guest(busy, put.body(body).unwrap()).await.unwrap();
    let now = latest(&host, busy).await;
    grew("received", before.received_bytes, now.received_bytes, 8 * MIB);

    // A guest that does nothing but count, with one processor: what that took is what the guest says, if not more.
    let idled = latest(&host, idle).await.cpu_usec;
    let before = latest(&host, busy).await;
    let begun = std::time::Instant::now();
    host.sh(busy, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done").await;
    let now = latest(&host, busy).await;
    let (used, passed) = (now.cpu_usec - before.cpu_usec, begun.elapsed().as_micros() as u64);
    assert!(used > 100_000 && used < 3 * passed, "{used} us of processor time in {passed} us");
    assert!(now.cpu_percent > 0.0 && now.cpu_percent <= 100.0, "{now:?}");

    // None of it is the other's.
    let now = latest(&host, idle).await;
    assert!(now.cpu_usec - idled < used, "{} us by one that is idle", now.cpu_usec - idled);
    for (what, before, now) in [
        ("memory", other.memory_bytes, now.memory_bytes),
        ("disk", other.disk_bytes, now.disk_bytes),
        ("sent", other.sent_bytes, now.sent_bytes),
        ("received", other.received_bytes, now.received_bytes),
    ] {
        assert!(now.saturating_sub(before) < 4 * MIB, "{what} of one that is idle grew by {}", now - before);
    }

    // What Prometheus is told is what was seen last.
    let text = prometheus(&host).await;
    assert!(text.contains("wrenn_capsules{state=\"running\"} 2"), "{text}");
    assert!(text.contains(&format!("wrenn_capsule_disk_bytes{{capsule=\"{idle}\"}} {}", now.disk_bytes)), "{text}");

    // What is paused is not looked at, and what was seen stays; what ends is forgotten.
    host.pause(busy).await.unwrap();
    let seen = points(&host, busy).await;
    assert!(seen.len() > 4 && seen.is_sorted_by_key(|point| point.unix_ms), "{seen:?}");
    assert_eq!(points(&host, busy).await, seen);
    host.resume(busy).await.unwrap();
    let now = latest(&host, busy).await;
    assert!(now.sent_bytes < 8 * MIB && now.memory_bytes > 0, "it counts anew: {now:?}");
    host.destroy(busy).await;
    let request = GetMetricsRequest { id: busy.to_string(), seconds: 600, ..Default::default() };
    assert_eq!(host.lifecycle().get_metrics(request).await.unwrap_err().code, ErrorCode::NotFound);
    host.destroy(idle).await;
    assert_eq!((host.holds(), host.processes()), (0, 0));
    host.close().await;
}

async fn prometheus(host: &Host) -> String {
    let mut stream = UnixStream::connect(host.dir().join("agent.sock")).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.0 200 OK"), "{text}");
    text
}
