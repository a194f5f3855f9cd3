//! The balloon: it takes memory, gives it back, and is honoured by a page-fault handler.

use std::time::Duration;

use serde_json::json;

use crate::host::vm::Vm;
use crate::host::{Host, until_every};

/// Waits until the guest has given up so much.
pub fn wait_for(vm: &Vm, mib: u64) {
    // The VMM answers on the thread that takes the pages.
    until_every(Duration::from_millis(100), "the balloon", || {
        (vm.api.get("/balloon/statistics")["actual_mib"] == json!(mib)).then_some(())
    });
}

#[test]
fn the_balloon_inflates_and_deflates() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 });
    vm.api.put("/balloon", balloon);
    vm.boot();
    vm.api.patch("/balloon", json!({ "amount_mib": 32 }));
    wait_for(&vm, 32);
    assert_eq!(vm.api.get("/balloon")["amount_mib"], 32);
    vm.api.refused("PATCH", "/balloon", json!({ "amount_mib": 100_000 }));
    vm.api.patch("/balloon", json!({ "amount_mib": 8 }));
    wait_for(&vm, 8);
    assert_eq!(vm.guest().run("cat /proc/sys/kernel/ostype"), "Linux");
}

#[test]
fn pages_given_away_after_a_lazy_restore_come_back_as_zeros() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 });
    vm.api.put("/balloon", balloon);
    vm.boot();
    let mut guest = vm.guest();
    guest.run("fill 5 16");
    let sum = guest.run("sum");
    vm.pause();
    let snapshot = vm.snapshot(&host, "base", "Full");
    drop(vm);

    let vm = host.vm();
    let _pager = vm.load_lazily(&host, &snapshot, json!({ "resume_vm": true, "track_dirty_pages": true }));
    vm.api.patch("/balloon", json!({ "amount_mib": 40 }));
    wait_for(&vm, 40);
    vm.api.patch("/balloon", json!({ "amount_mib": 0 }));
    wait_for(&vm, 0);
    let mut guest = vm.guest();
    assert_eq!(guest.run("sum"), sum, "what the guest kept is untouched");
    // Fresh memory is zeroed by the guest, whatever it finds there; it must find something.
    guest.run("fill 6 48");
    guest.run("fill 5 16");
    assert_eq!(guest.run("sum"), sum);
}
