//! The client and a real VMM: `firecracker-qemu`, or the one that `FIRECRACKER_BIN` names.

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use vmm::client::{Boot, Client, Error, Load, Memory, SnapshotKind, VmState};
use vmm::process::{Exit, Process};
use vmm::{CAPSULE_DIR, KERNEL, SCRATCH_DIR};

use crate::host::{Host, USER, ip};

const LIMIT: Duration = Duration::from_secs(60);
const MEMORY_MIB: u32 = 128;

fn vmm() -> PathBuf {
    let built = || std::env::current_exe().unwrap().parent().unwrap().with_file_name("firecracker-qemu");
    let path = std::env::var_os("FIRECRACKER_BIN").map_or_else(built, PathBuf::from);
    assert!(path.exists(), "{} is not there; `make test` builds it", path.display());
    path
}

/// The guest kernel that `make images` built.
fn kernel() -> PathBuf {
    let cache = std::env::var_os("WRENN_CACHE").map(PathBuf::from);
    let cache =
        cache.unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/wrenn")).join("images");
    let manifest = fs::read(cache.join("images.json")).expect("`make images` was run");
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    cache.join(manifest["kernel"].as_str().unwrap())
}

/// The path of what the VMM writes itself.
fn written(name: &str) -> PathBuf {
    Path::new(CAPSULE_DIR).join(SCRATCH_DIR).join(name)
}

/// A path as the VMM sees it.
fn inside(name: &str) -> PathBuf {
    Path::new(CAPSULE_DIR).join(name)
}

/// A host with all that a guest needs but a system on its disk: the kernel ends in a panic and stays there, which is as
/// alive as these tests need it.
fn host() -> Host {
    let host = Host::new();
    ip(&["-n", host.name(), "tuntap", "add", "tap0", "mode", "tap", "user", &USER.to_string()]);
    // Where the metadata service is.
    ip(&["-n", host.name(), "address", "add", "169.254.169.254/32", "dev", "tap0"]);
    ip(&["netns", "exec", host.name(), "sysctl", "-qw", "net.ipv4.ip_unprivileged_port_start=80"]);
    let disk = host.dir.join("rootfs.ext4");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    chown(&disk, Some(USER), None).unwrap();
    fs::remove_file(&host.kernel).unwrap();
    std::os::unix::fs::symlink(kernel(), &host.kernel).unwrap();
    host
}

async fn started(host: &Host, binary: &Path) -> (Process, Client) {
    let process = host.launch(binary).spawn().await.unwrap();
    let client = Client::connect(LIMIT, &process).await.unwrap();
    (process, client)
}

async fn configured(host: &Host, binary: &Path) -> (Process, Client) {
    let (process, client) = started(host, binary).await;
    let boot = Boot {
        kernel: Path::new(KERNEL),
        boot_args: "console=ttyS0 quiet panic=0 reboot=k pci=off",
        rootfs: &inside("rootfs.ext4"),
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        tap: "tap0",
        mac: "02:FC:00:00:00:05",
        mtu: None,
    };
    client.configure(&boot).await.unwrap();
    (process, client)
}

fn load<'a>(state: &'a Path, memory: &'a Path) -> Load<'a> {
    Load {
        state,
        memory: Memory::File(memory),
        resume: false,
        track_dirty_pages: true,
        tap: Some("tap0"),
        vsock: None,
        clock_realtime: false,
    }
}

#[tokio::test]
async fn what_is_sent_before_the_boot_is_understood() {
    let host = host();
    let (process, client) = configured(&host, &vmm()).await;
    client.put_mmds(&json!({"latest": {"capsule": "cl-test"}})).await.unwrap();
    let info = client.instance_info().await.unwrap();
    assert_eq!((info.id.as_str(), info.state), ("cl-test", VmState::NotStarted));
    assert_eq!(info.vmm_version.parse::<vmm::client::Version>().unwrap(), client.version());
    assert_eq!(process.kill().await.unwrap(), Exit::Signal(9));
    host.cgroup.remove().await.unwrap();
    host.cgroup.create().unwrap();

    // A load that names files which are not there is refused for that and for no word of it, and ends the VMM.
    let (process, client) = started(&host, &vmm()).await;
    match client.load_snapshot(&load(&inside("none"), &inside("none"))).await.unwrap_err() {
        Error::Fault { request, status, message } => {
            assert_eq!((request.as_str(), status.as_u16()), ("PUT /snapshot/load", 400));
            assert!(!message.contains("unknown field"), "{message}");
        }
        other => panic!("{other}"),
    }
    assert_eq!(process.exited().await, Exit::Code(1));
    host.cgroup.kill().await.unwrap();
    host.end().await;
}

#[tokio::test]
async fn a_guest_lives_pauses_and_goes_on_in_another_capsules_place() {
    let first = host();
    let (process, client) = configured(&first, &vmm()).await;
    match client.pause().await.unwrap_err() {
        Error::Fault { request, status, .. } => assert_eq!((request.as_str(), status.as_u16()), ("PATCH /vm", 400)),
        other => panic!("{other}"),
    }
    client.start().await.unwrap();
    assert_eq!(client.instance_info().await.unwrap().state, VmState::Running);
    client.pause().await.unwrap();
    assert_eq!(client.instance_info().await.unwrap().state, VmState::Paused);
    client.create_snapshot(SnapshotKind::Full, &written("state"), &written("memory"), MEMORY_MIB).await.unwrap();
    // Another directory, namespace and group; the same paths in the snapshot.
    let second = host();
    for name in ["state", "memory"] {
        let kept = second.dir.join(name);
        let mut file = process.scratch().unwrap().open(name).unwrap();
        std::io::copy(&mut file, &mut File::create(&kept).unwrap()).unwrap();
        process.scratch().unwrap().remove(name).unwrap();
    }
    client.resume().await.unwrap();
    assert_eq!(client.instance_info().await.unwrap().state, VmState::Running);
    client.pause().await.unwrap();
    client.create_snapshot(SnapshotKind::Diff, &written("state2"), &written("memory2"), MEMORY_MIB).await.unwrap();
    process.kill().await.unwrap();

    fs::rename(first.dir.join("rootfs.ext4"), second.dir.join("rootfs.ext4")).unwrap();
    first.end().await;
    let (process, client) = started(&second, &vmm()).await;
    client.load_snapshot(&load(&inside("state"), &inside("memory"))).await.unwrap();
    assert_eq!(client.instance_info().await.unwrap().state, VmState::Paused);
    client.put_mmds(&json!({"latest": {"capsule": "cl-other"}})).await.unwrap();
    client.resume().await.unwrap();
    assert_eq!(client.instance_info().await.unwrap().state, VmState::Running);

    // Whatever the VMM started besides itself goes with it.
    process.kill().await.unwrap();
    assert!(second.cgroup.pids().unwrap().is_empty());
    second.end().await;
}
