//! Guests that were stopped and go on without a restore: what stood still goes on, and clocks are right.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use agent_api::{CapsuleState, SnapshotCapsuleRequest};
use api::CapsuleId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::common::{Host, spec};
use crate::record::as_if_pausing;

/// How long a command may take in a guest that goes on.
const LIMIT: Duration = Duration::from_secs(60);

/// Sends a request to a socket file, which is to succeed.
async fn ask(socket: &Path, request: &str, body: &str) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    let length = body.len();
    let head = format!("{request} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n");
    stream.write_all(format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 2"), "{request}: {}", String::from_utf8_lossy(&answer));
}

/// Stops users' processes, as before a save.
async fn freeze(host: &Host, id: CapsuleId) {
    ask(&host.dir().join("agent.sock"), &format!("POST /guest/{id}/freeze"), "").await;
}

/// Stops the virtual processors, as during a save, and the clock with them.
async fn stop(host: &Host, id: CapsuleId) {
    let pid = host.record(id)["vmm"]["pid"].as_i64().unwrap();
    let socket = format!("/proc/{pid}/root{}/{}/{}", vmm::CAPSULE_DIR, vmm::SCRATCH_DIR, vmm::API_SOCKET);
    ask(socket.as_ref(), "PATCH /vm", r#"{"state": "Paused"}"#).await;
}

async fn snapshot(host: &Host, id: CapsuleId) {
    let request = SnapshotCapsuleRequest { id: id.to_string(), name: "mine".into(), ..Default::default() };
    host.lifecycle().snapshot_capsule(request).await.unwrap();
}

async fn goes_on_in_time(host: &Host, id: CapsuleId) {
    assert_eq!(host.listed(id).await.state, CapsuleState::Running);
    tokio::time::timeout(LIMIT, host.sh(id, "true")).await.expect("its processes go on");
    host.is_in_time(id).await;
}

#[tokio::test]
async fn a_guest_whose_agent_ends_in_the_middle_of_a_pause_goes_on_in_time() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    freeze(&host, id).await;
    stop(&host, id).await;
    let capsule = host.capsule(id);
    let dir = host.leave().await;
    as_if_pausing(&capsule);
    // What it is behind then.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let host = Host::open_in(dir, |_| {}).await;
    goes_on_in_time(&host, id).await;
    host.close().await;
}

#[tokio::test]
async fn the_parent_of_a_template_goes_on_in_time_however_long_it_stood_still() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    // It does not answer when it is asked to hold still, and does so when it goes on.
    stop(&host, id).await;
    snapshot(&host, id).await;
    goes_on_in_time(&host, id).await;
    host.close().await;
}

#[tokio::test]
async fn a_guest_that_could_not_be_told_to_go_on_is_told_when_it_can_be() {
    let host = Host::open(|_| {}).await;
    let id = CapsuleId::random();
    host.create(spec(id)).await.unwrap();
    freeze(&host, id).await;
    let tap = |state: &str| {
        let namespace = format!("wrenn-ns-{}", host.record(id)["slot"]);
        let set = Command::new("ip").args(["-n", &namespace, "link", "set", "tap0", state]).status().unwrap();
        assert!(set.success());
    };
    tap("down");
    snapshot(&host, id).await;
    tap("up");
    goes_on_in_time(&host, id).await;
    host.close().await;
}
