//! Several guests from one snapshot.

use serde_json::json;

use crate::host::Host;
use crate::host::vm::load_request;

#[test]
fn two_clones_run_at_once_and_apart() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    vm.api.patch("/machine-config", json!({ "vcpu_count": 2 }));
    vm.boot();
    let mut guest = vm.guest();
    guest.run("fill 21 8");
    let sum = guest.run("sum");
    vm.pause();
    let snapshot = vm.snapshot(&host, "base", "Full");
    drop(vm);

    let (one, two) = (host.vm(), host.vm());
    let first_pager = one.load_lazily(&host, &snapshot, json!({ "resume_vm": true }));
    let second_pager = two.load_lazily(&host, &snapshot, json!({ "resume_vm": true }));
    let three = host.vm();
    three.load(&snapshot, json!({ "resume_vm": true }));
    let mut guests = [one.guest(), two.guest(), three.guest()];
    for (index, guest) in guests.iter_mut().enumerate() {
        guest.run(&format!("poke {index} {}", index + 500));
    }
    let sums = guests.each_mut().map(|guest| guest.run("sum"));
    assert!(sums.iter().all(|changed| *changed != sum));
    assert!(sums[0] != sums[1] && sums[1] != sums[2] && sums[0] != sums[2], "{sums:?}");
    assert!(first_pager.faults() > 0 && second_pager.faults() > 0);
}

#[test]
fn a_clone_can_have_another_tap() {
    let host = Host::new();
    let vm = host.booted();
    let boot_id = vm.guest().run("cat /proc/sys/kernel/random/boot_id");
    vm.pause();
    let snapshot = vm.snapshot(&host, "base", "Full");
    drop(vm);

    let vm = host.vm_on("tap7");
    let overrides = json!({
        "resume_vm": true,
        "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap7" }],
    });
    vm.load(&snapshot, overrides);
    assert_eq!(vm.guest().run("cat /proc/sys/kernel/random/boot_id"), boot_id);

    let mut vm = host.vm();
    let unknown = json!({ "network_overrides": [{ "iface_id": "eth9", "host_dev_name": "tap0" }] });
    vm.api.refused("PUT", "/snapshot/load", load_request(&snapshot, "File", &snapshot.memory, &unknown));
    assert_eq!(vm.wait().code(), Some(1));
}
