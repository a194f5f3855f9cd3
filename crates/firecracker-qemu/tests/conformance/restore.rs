//! Loading snapshots, from a file and through a page-fault handler.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::host::Host;
use crate::host::vm::{MEMORY_MIB, Snapshot, load_request};

/// A snapshot of a guest with a filled memory, and what the guest says its sum is.
fn filled(host: &Host) -> (Snapshot, String) {
    let vm = host.booted();
    let mut guest = vm.guest();
    guest.run("fill 11 24");
    let sum = guest.run("sum");
    vm.pause();
    (vm.snapshot(host, "base", "Full"), sum)
}

/// Pages that a restore may renew: those of the generation id, of the clock, and of the queues of devices.
const RENEWED: usize = 2;

/// Pages in which two memory files differ.
fn differing_pages(one: &Path, other: &Path) -> usize {
    let (one, other) = (fs::read(one).unwrap(), fs::read(other).unwrap());
    assert_eq!(one.len(), other.len());
    one.chunks(4096).zip(other.chunks(4096)).filter(|(a, b)| a != b).count()
}

#[test]
fn memory_comes_back_from_a_file() {
    let host = Host::new();
    let (snapshot, sum) = filled(&host);
    let vm = host.vm();
    vm.load(&snapshot, json!({}));
    assert_eq!(vm.state(), "Paused");
    let copy = vm.snapshot(&host, "copy", "Full");
    let differing = differing_pages(&snapshot.memory, &copy.memory);
    assert!(differing <= RENEWED, "{differing} pages are not what they were");
    vm.resume();
    assert_eq!(vm.state(), "Running");
    assert_eq!(vm.guest().run("sum"), sum);
}

#[test]
fn memory_comes_back_through_a_page_fault_handler() {
    let host = Host::new();
    let (snapshot, sum) = filled(&host);
    let vm = host.vm();
    let pager = vm.load_lazily(&host, &snapshot, json!({ "resume_vm": true }));
    let handshake = pager.handshake();
    let regions = handshake.as_array().unwrap();
    let size: u64 = regions.iter().map(|region| region["size"].as_u64().unwrap()).sum();
    assert_eq!(size, MEMORY_MIB << 20);
    assert!(regions.iter().all(|region| region["page_size"] == 4096), "{handshake}");

    let mut guest = vm.guest();
    assert_eq!(guest.run("cat /proc/sys/kernel/ostype"), "Linux");
    let early = pager.faults();
    assert!(early < 24 << 8, "all of memory was fetched before the guest asked for it: {early} pages");
    assert_eq!(guest.run("sum"), sum);
    assert!(pager.faults() > early);
}

#[test]
fn pages_a_lazily_restored_guest_only_reads_are_not_in_its_diff() {
    let host = Host::new();
    let (snapshot, sum) = filled(&host);
    let vm = host.vm();
    let pager = vm.load_lazily(&host, &snapshot, json!({ "resume_vm": true, "track_dirty_pages": true }));
    assert_eq!(vm.guest().run("sum"), sum);
    assert!(pager.faults() > 24 << 8);
    vm.pause();
    let diff = vm.snapshot(&host, "diff", "Diff");
    let saved = fs::metadata(&diff.memory).unwrap().blocks() * 512;
    assert!(saved < 12 << 20, "{saved} bytes");
}

#[test]
fn a_lazily_restored_guest_can_be_saved_whole() {
    let host = Host::new();
    let (snapshot, sum) = filled(&host);
    let vm = host.vm();
    let pager = vm.load_lazily(&host, &snapshot, json!({}));
    let copy = vm.snapshot(&host, "copy", "Full");
    let differing = differing_pages(&snapshot.memory, &copy.memory);
    assert!(differing <= RENEWED, "{differing} pages are not what they were");
    assert!(pager.faults() > 0);
    drop(vm);
    let vm = host.vm();
    vm.load(&copy, json!({ "resume_vm": true }));
    assert_eq!(vm.guest().run("sum"), sum);
}

#[test]
fn a_restored_guest_is_tracked_and_saved_again() {
    let host = Host::new();
    let (snapshot, _) = filled(&host);
    for lazily in [false, true] {
        let vm = host.vm();
        let options = json!({ "resume_vm": true, "track_dirty_pages": true });
        let pager = if lazily {
            Some(vm.load_lazily(&host, &snapshot, options))
        } else {
            vm.load(&snapshot, options);
            None
        };
        let mut guest = vm.guest();
        guest.run("poke 17 4711");
        let sum = guest.run("sum");
        vm.pause();
        let diff = vm.snapshot(&host, "diff", "Diff");
        drop((vm, pager));

        let merged = host.path("merged");
        fs::copy(&snapshot.memory, &merged).unwrap();
        let copied = std::process::Command::new("dd")
            .args(["conv=notrunc,sparse", "bs=4096", "status=none"])
            .arg(format!("if={}", diff.memory.display()))
            .arg(format!("of={}", merged.display()))
            .status();
        assert!(copied.unwrap().success());
        let vm = host.vm();
        vm.load(&Snapshot { state: diff.state, memory: merged }, json!({ "resume_vm": true }));
        assert_eq!(vm.guest().run("sum"), sum, "lazily: {lazily}");
    }
}

#[test]
fn a_disk_is_found_again_at_its_path() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    vm.drive("rootfs", &host.disk("disk", 4 << 20), json!({ "is_root_device": true, "cache_type": "Writeback" }));
    vm.boot();
    let mut guest = vm.guest();
    guest.run("disk-write /dev/vda 65536 5 65536");
    let sum = guest.run("disk-sum /dev/vda 65536 65536");
    vm.pause();
    let snapshot = vm.snapshot(&host, "base", "Full");
    drop(vm);

    let vm = host.vm();
    vm.load(&snapshot, json!({ "resume_vm": true }));
    let mut guest = vm.guest();
    assert_eq!(guest.run("disk-sum /dev/vda 65536 65536"), sum);
    guest.run("disk-write /dev/vda 0 6 4096");
    drop(vm);

    fs::remove_file(host.path("disk")).unwrap();
    let mut vm = host.vm();
    vm.api.refused("PUT", "/snapshot/load", load_request(&snapshot, "File", &snapshot.memory, &json!({})));
    assert_eq!(vm.wait().code(), Some(1));
}

#[test]
fn a_drive_can_be_given_another_file() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    let (one, two) = (host.disk("one", 1 << 20), host.disk("two", 1 << 20));
    vm.drive("data", &one, json!({ "cache_type": "Writeback" }));
    vm.boot();
    let mut guest = vm.guest();
    guest.run("disk-write /dev/vda 0 5 4096");
    vm.api.patch("/drives/data", json!({ "drive_id": "data", "path_on_host": two }));
    guest.run("disk-write /dev/vda 8192 6 4096");
    let (one, two) = (fs::read(one).unwrap(), fs::read(two).unwrap());
    let used = |file: &[u8], page: usize| file[page * 4096..][..4096].iter().any(|byte| *byte != 0);
    assert!(used(&one, 0) && !used(&one, 2), "the first file is left alone");
    assert!(used(&two, 2), "the second file is written");
}

#[test]
fn a_drive_may_be_a_block_device() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    let file = host.disk("device", 1 << 20);
    // Gone once nobody has it open.
    let attached = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().unwrap();
    let device = PathBuf::from(String::from_utf8(attached.stdout).unwrap().trim());
    let open = fs::File::open(&device).unwrap();
    assert!(Command::new("losetup").arg("--detach").arg(&device).status().unwrap().success());
    vm.drive("data", &device, json!({ "cache_type": "Writeback" }));
    vm.boot();
    vm.guest().run("disk-write /dev/vda 4096 5 4096");
    open.sync_all().unwrap();
    let written = fs::read(file).unwrap();
    let used = |page: usize| written[page * 4096..][..4096].iter().any(|byte| *byte != 0);
    assert!(!used(0) && used(1) && !used(2));
}

#[test]
fn damaged_snapshots_are_refused_and_end_the_process() {
    let host = Host::new();
    let (snapshot, _) = filled(&host);
    let state = fs::read(&snapshot.state).unwrap();
    let truncated = host.path("truncated");
    fs::write(&truncated, &state[..state.len() / 2]).unwrap();
    let flipped = host.path("flipped");
    let mut bytes = state.clone();
    bytes[state.len() / 2] ^= 0x40;
    fs::write(&flipped, bytes).unwrap();
    let short = host.path("short");
    fs::File::create(&short).unwrap().set_len(1 << 20).unwrap();
    let missing = host.path("missing");

    let good = || (snapshot.state.clone(), snapshot.memory.clone());
    for (what, (state, memory), kind) in [
        ("a truncated state", (truncated, good().1), "File"),
        ("a changed state", (flipped, good().1), "File"),
        ("no state", (missing.clone(), good().1), "File"),
        ("a short memory file", (good().0, short), "File"),
        ("no memory file", (good().0, missing.clone()), "File"),
        ("no page-fault handler", (good().0, missing), "Uffd"),
    ] {
        let mut vm = host.vm();
        let bad = Snapshot { state, memory: memory.clone() };
        let message = vm.api.refused("PUT", "/snapshot/load", load_request(&bad, kind, &memory, &json!({})));
        assert!(!message.is_empty(), "{what}");
        assert_eq!(vm.wait().code(), Some(1), "{what}");
    }
}

#[test]
fn a_configured_process_does_not_load() {
    let host = Host::new();
    let (snapshot, _) = filled(&host);
    let vm = host.vm();
    vm.configure();
    vm.api.refused("PUT", "/snapshot/load", load_request(&snapshot, "File", &snapshot.memory, &json!({})));
}
