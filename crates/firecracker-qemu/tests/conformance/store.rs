//! Snapshots that go through the store and come back through the pager, as the agent has them.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use serde_json::json;
use snapshot::Store;

use crate::host::vm::{Snapshot, Vm, load_request};
use crate::host::{DEADLINE, Host};

/// The store of a host, and what the capsule's last snapshot is called there.
struct Kept<'a> {
    host: &'a Host,
    store: Store,
}

/// A pager on a thread of this process.
struct Serving {
    thread: JoinHandle<Result<pager::Ended, pager::Error>>,
    stop: OwnedFd,
}

impl<'a> Kept<'a> {
    fn new(host: &'a Host) -> Self {
        let (store, broken) = Store::open(&host.path("store"), []).unwrap();
        assert!(broken.is_empty());
        Self { host, store }
    }

    fn header(&self) -> PathBuf {
        self.host.path("header")
    }

    /// Packs what `snapshot` has in its memory file over what is kept already.
    fn keep(&self, snapshot: &Snapshot) {
        let header = self.header();
        let parent = header.exists().then_some(header.as_path());
        let packed = self.store.pack(&File::open(&snapshot.memory).unwrap(), parent).unwrap();
        self.store.commit(&packed, &header).unwrap();
        // Nothing may come from there any more.
        fs::remove_file(&snapshot.memory).unwrap();
    }

    /// Resumes in a new process, with memory out of the store. The last working set is fetched and the next recorded.
    fn resume(&self, state: PathBuf) -> (Vm, Serving) {
        let vm = self.host.vm();
        let set = self.host.path("working-set");
        let socket = self.host.path(&format!("{}.pager", vm.namespace));
        let pager = pager::Pager::listen(pager::Config {
            socket: socket.clone(),
            header: self.header(),
            generations: self.store.generations().to_owned(),
            vmm_uid: Some(0),
            prefetch: Some(set.clone()),
            record: Some(set),
            record_for: DEADLINE,
            patience: DEADLINE,
        });
        let (pager, stop) = (pager.unwrap(), eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let stops = stop.try_clone().unwrap();
        let serving = Serving { thread: std::thread::spawn(move || pager.serve(stops.as_fd())), stop };
        let options = vm.in_its_words(json!({ "resume_vm": true, "track_dirty_pages": true }));
        let snapshot = Snapshot { state, memory: PathBuf::new() };
        vm.api.put("/snapshot/load", load_request(&snapshot, "Uffd", &socket, &options));
        (vm, serving)
    }
}

impl Serving {
    /// The VMM is gone: so is its pager, without being told.
    fn end(self) {
        assert_eq!(self.thread.join().unwrap().unwrap(), pager::Ended::VmmGone);
        drop(self.stop);
    }
}

#[test]
fn a_guest_goes_through_the_store_and_the_pager_again_and_again() {
    let host = Host::new();
    let kept = Kept::new(&host);
    let mut vm = host.vm();
    vm.configure();
    vm.api.patch("/machine-config", json!({ "track_dirty_pages": true }));
    vm.boot();
    let mut guest = vm.guest();
    guest.run("fill 1 24");
    let boot_id = guest.run("cat /proc/sys/kernel/random/boot_id");
    let mut sum = guest.run("sum");
    vm.pause();
    let mut snapshot = vm.snapshot(&host, "first", "Full");
    kept.keep(&snapshot);
    drop(vm);
    for round in 1..6 {
        let (vm, serving) = kept.resume(snapshot.state);
        let mut guest = vm.guest();
        assert_eq!(guest.run("cat /proc/sys/kernel/random/boot_id"), boot_id);
        assert_eq!(guest.run("sum"), sum, "round {round}");
        for page in (round..6000).step_by(331) {
            guest.run(&format!("poke {page} {}", page * round));
        }
        // Zeros that were written are zeros, not what was there before.
        guest.run(&format!("zero {}", round * 7));
        sum = guest.run("sum");
        vm.pause();
        snapshot = vm.snapshot(&host, &format!("round-{round}"), "Diff");
        kept.keep(&snapshot);
        let fresh = fs::read_dir(kept.store.generations()).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
        let newest = fresh.max_by_key(|data| data.modified().unwrap()).unwrap();
        // The guest read 24 MiB and wrote little of it; what was only read may be there too.
        assert!(newest.len() < 48 << 20, "{} bytes were written in round {round}", newest.len());
        drop(vm);
        serving.end();
    }
    assert!(host.path("working-set").exists());
}

#[test]
fn a_balloon_takes_and_gives_while_the_pager_serves() {
    let host = Host::new();
    let kept = Kept::new(&host);
    let mut vm = host.vm();
    vm.configure();
    vm.api.put("/balloon", json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 }));
    vm.boot();
    vm.guest().run("fill 5 16");
    let sum = vm.guest().run("sum");
    vm.pause();
    let snapshot = vm.snapshot(&host, "base", "Full");
    kept.keep(&snapshot);
    drop(vm);

    let (vm, serving) = kept.resume(snapshot.state);
    for mib in [40, 0] {
        vm.api.patch("/balloon", json!({ "amount_mib": mib }));
        crate::balloon::wait_for(&vm, mib);
    }
    let mut guest = vm.guest();
    assert_eq!(guest.run("sum"), sum, "what the guest kept is untouched");
    guest.run("fill 6 48");
    guest.run("fill 5 16");
    assert_eq!(guest.run("sum"), sum);
    drop(vm);
    serving.end();
}
