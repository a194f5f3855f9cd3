//! Taking snapshots: what is in their files.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::SeekFrom;
use serde_json::json;

use crate::host::Host;
use crate::host::vm::{MEMORY_MIB, Snapshot, Vm};

/// A booted guest whose written pages are tracked.
fn tracked(host: &Host) -> Vm {
    let mut vm = host.vm();
    vm.configure();
    vm.api.patch("/machine-config", json!({ "track_dirty_pages": true }));
    vm.boot();
    vm
}

/// Copies what `diff` holds over `base`, as `snapshot-editor edit-memory rebase` does.
fn rebase(base: &Path, diff: &Path) -> u64 {
    let (diff, base) = (File::open(diff).unwrap(), File::options().write(true).open(base).unwrap());
    let (mut at, mut copied) = (0, 0);
    while let Ok(start) = rustix::fs::seek(&diff, SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&diff, SeekFrom::Hole(start)).unwrap();
        let mut data = vec![0; (end - start) as usize];
        diff.read_exact_at(&mut data, start).unwrap();
        base.write_all_at(&data, start).unwrap();
        (at, copied) = (end, copied + end - start);
    }
    copied
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Memory written in many places, by the guest's programs and its kernel.
fn work(vm: &Vm) {
    let mut guest = vm.guest();
    guest.run("fill 1 12");
    guest.run("fill 2 6");
    for page in (0..1500).step_by(97) {
        guest.run(&format!("poke {page} {page}"));
    }
    guest.run("list /proc");
}

fn restored(host: &Host, snapshot: &Snapshot) -> Vm {
    let vm = host.vm();
    vm.load(snapshot, json!({ "resume_vm": true }));
    vm
}

#[test]
fn memory_files_are_sparse_and_as_long_as_memory() {
    let host = Host::new();
    let vm = tracked(&host);
    vm.guest().run("fill 1 8");
    vm.pause();
    let full = vm.snapshot(&host, "full", "Full");
    vm.resume();
    vm.guest().run("poke 3 9");
    vm.pause();
    let diff = vm.snapshot(&host, "diff", "Diff");
    for snapshot in [&full, &diff] {
        assert_eq!(fs::metadata(&snapshot.memory).unwrap().len(), MEMORY_MIB << 20);
        assert!(fs::metadata(&snapshot.state).unwrap().len() > 0);
    }
    let (full, diff) = (allocated(&full.memory), allocated(&diff.memory));
    assert!(full >= 8 << 20, "{full}");
    assert!(diff > 0 && diff < full / 4, "a diff of {diff} bytes after a snapshot of {full}");
}

#[test]
fn a_base_and_its_diffs_make_the_guest_again() {
    let host = Host::new();
    let vm = tracked(&host);
    let mut guest = vm.guest();
    guest.run("fill 1 16");
    let boot_id = guest.run("cat /proc/sys/kernel/random/boot_id");
    vm.pause();
    let base = vm.snapshot(&host, "base", "Full");
    vm.resume();
    for page in [0, 5, 100, 4000] {
        guest.run(&format!("poke {page} {}", page + 77));
    }
    vm.pause();
    let first = vm.snapshot(&host, "first", "Diff");
    vm.resume();
    // A page that becomes zero is data too.
    guest.run("zero 100");
    guest.run("poke 5 1234");
    let sum = guest.run("sum");
    vm.pause();
    let second = vm.snapshot(&host, "second", "Diff");
    drop(vm);

    assert!(rebase(&base.memory, &first.memory) > 0);
    assert!(rebase(&base.memory, &second.memory) > 0);
    let vm = restored(&host, &Snapshot { state: second.state, memory: base.memory });
    let mut guest = vm.guest();
    assert_eq!(guest.run("sum"), sum);
    assert_eq!(guest.run("cat /proc/sys/kernel/random/boot_id"), boot_id);
}

#[test]
fn a_base_and_its_diff_are_a_full_snapshot_byte_for_byte() {
    let host = Host::new();
    let mut vm = tracked(&host);
    work(&vm);
    vm.pause();
    let mut base = vm.snapshot(&host, "base", "Full");
    let merged = host.path("merged");
    fs::copy(&base.memory, &merged).unwrap();
    for round in 0..3 {
        if vm.is_since(14) {
            vm.resume();
        } else {
            // Only the first snapshot of a process has all of what the guest received.
            vm = host.vm();
            vm.load(&base, json!({ "resume_vm": true, "track_dirty_pages": true }));
        }
        work(&vm);
        vm.pause();
        let diff = vm.snapshot(&host, "diff", "Diff");
        base = vm.snapshot(&host, &format!("full-{round}"), "Full");
        rebase(&merged, &diff.memory);
        assert_eq!(differing(&merged, &base.memory), Vec::<String>::new(), "pages were missed in round {round}");
    }
}

/// The pages in which two memory files differ, each with what they have there.
fn differing(one: &Path, other: &Path) -> Vec<String> {
    let (one, other) = (fs::read(one).unwrap(), fs::read(other).unwrap());
    let pages = one.chunks(4096).zip(other.chunks(4096)).enumerate().filter(|(_, (one, other))| one != other);
    let told = pages.map(|(page, (one, other))| {
        let at = one.iter().zip(other).position(|(one, other)| one != other).unwrap();
        let some = |page: &[u8]| hex::encode(&page[at..4096.min(at + 64)]);
        format!("page {page:#x} from {at:#x}: {} / {}", some(one), some(other))
    });
    told.collect()
}

#[test]
fn a_client_that_hangs_up_loses_only_the_answer() {
    let host = Host::new();
    let vm = host.booted();
    let sum = vm.guest().run("sum");
    vm.pause();
    let request = json!({ "snapshot_path": host.path("lost.state"), "mem_file_path": host.path("lost.mem") });
    vm.api.send_and_hang_up("PUT", "/snapshot/create", &request);
    let snapshot = vm.snapshot(&host, "base", "Full");
    drop(vm);
    let vm = restored(&host, &snapshot);
    assert_eq!(vm.guest().run("sum"), sum);
}

#[test]
fn without_tracking_a_diff_is_whole_and_loads_alone() {
    let host = Host::new();
    let vm = host.booted();
    if !vm.is_since(13) {
        vm.pause();
        let request =
            json!({ "snapshot_type": "Diff", "snapshot_path": host.path("s"), "mem_file_path": host.path("m") });
        vm.api.refused("PUT", "/snapshot/create", request);
        return;
    }
    let mut guest = vm.guest();
    guest.run("fill 3 4");
    let sum = guest.run("sum");
    vm.pause();
    let diff = vm.snapshot(&host, "diff", "Diff");
    drop(vm);
    let vm = restored(&host, &diff);
    assert_eq!(vm.guest().run("sum"), sum);
}

#[test]
fn one_pause_gives_several_snapshots() {
    let host = Host::new();
    let vm = tracked(&host);
    let mut guest = vm.guest();
    guest.run("fill 1 4");
    let sum = guest.run("sum");
    vm.pause();
    let first = vm.snapshot(&host, "first", "Full");
    let second = vm.snapshot(&host, "second", "Full");
    let nothing = vm.snapshot(&host, "nothing", "Diff");
    assert!(fs::read(&first.memory).unwrap() == fs::read(&second.memory).unwrap(), "memory changed in a pause");
    assert!(allocated(&nothing.memory) < 64 << 10, "{} bytes were written in a pause", allocated(&nothing.memory));
    vm.resume();
    assert_eq!(guest.run("sum"), sum);
    vm.pause();
    let third = vm.snapshot(&host, "third", "Full");
    drop(vm);
    for snapshot in [second, third] {
        let vm = restored(&host, &snapshot);
        assert_eq!(vm.guest().run("sum"), sum);
    }
}

#[test]
fn snapshots_overwrite_older_files() {
    let host = Host::new();
    let vm = host.booted();
    for name in ["again.state", "again.mem"] {
        fs::write(host.path(name), vec![0xff; 512 << 10]).unwrap();
    }
    let sum = vm.guest().run("sum");
    vm.pause();
    let snapshot = vm.snapshot(&host, "again", "Full");
    drop(vm);
    let vm = restored(&host, &snapshot);
    assert_eq!(vm.guest().run("sum"), sum);
}

#[test]
fn a_snapshot_that_cannot_be_written_is_refused_and_loses_nothing() {
    let host = Host::new();
    let vm = tracked(&host);
    let mut guest = vm.guest();
    guest.run("fill 1 4");
    vm.pause();
    let base = vm.snapshot(&host, "base", "Full");
    vm.resume();
    guest.run("poke 7 99");
    let sum = guest.run("sum");
    vm.pause();
    let nowhere = host.path("no/such/directory");
    let request = json!({ "snapshot_type": "Diff", "snapshot_path": nowhere, "mem_file_path": nowhere });
    vm.api.refused("PUT", "/snapshot/create", request);
    // The pages the refused Diff would have held are in the next one.
    let diff = vm.snapshot(&host, "diff", "Diff");
    drop(vm);
    rebase(&base.memory, &diff.memory);
    let vm = restored(&host, &Snapshot { state: diff.state, memory: base.memory });
    assert_eq!(vm.guest().run("sum"), sum);
}
