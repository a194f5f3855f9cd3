//! Starting a guest, what it finds, and the ways it ends.

use serde_json::json;

use crate::host::{Host, until};

#[test]
fn the_guest_finds_its_devices_in_order() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    // Declared last, it is the first all the same.
    vm.drive("data", &host.disk("data", 2 << 20), json!({}));
    vm.drive("more", &host.disk("more", 3 << 20), json!({ "cache_type": "Writeback" }));
    vm.drive("rootfs", &host.disk("rootfs", 1 << 20), json!({ "is_root_device": true }));
    vm.api.put("/entropy", json!({}));
    vm.boot();
    assert_eq!(vm.state(), "Running");
    let mut guest = vm.guest();
    for (device, mib) in [("vda", 1), ("vdb", 2), ("vdc", 3)] {
        assert_eq!(guest.run(&format!("disk-size /dev/{device}")), (mib * 2048).to_string(), "{device}");
    }
    assert_eq!(guest.run("cat /sys/class/net/eth0/address"), crate::host::vm::MAC);
    assert!(guest.run("cat /proc/cmdline").contains("root=/dev/vda rw"));
    assert!(guest.run("cat /sys/class/misc/hw_random/rng_available").contains("virtio"));
}

#[test]
fn the_guest_has_the_vcpus_and_memory_it_was_given() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    vm.api.patch("/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 192 }));
    vm.boot();
    let mut guest = vm.guest();
    assert_eq!(guest.run("cat /sys/devices/system/cpu/online"), "0-1");
    let total = guest.run("cat /proc/meminfo");
    let kib: u64 = total.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((128 << 10..192 << 10).contains(&kib), "{total}");
}

#[test]
fn disks_keep_what_the_guest_writes() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    let (disk, locked) = (host.disk("disk", 8 << 20), host.disk("locked", 1 << 20));
    vm.drive("disk", &disk, json!({ "cache_type": "Writeback", "io_engine": "Async" }));
    vm.drive("locked", &locked, json!({ "is_read_only": true }));
    vm.boot();
    let mut guest = vm.guest();
    guest.run("disk-write /dev/vda 1048576 7 2097152");
    let sum = guest.run("disk-sum /dev/vda 1048576 2097152");
    let written = std::fs::read(&disk).unwrap();
    assert!(written[..1 << 20].iter().all(|byte| *byte == 0));
    assert!(written[1 << 20..3 << 20].chunks(4096).all(|page| page.iter().any(|byte| *byte != 0)));
    assert_eq!(guest.run("disk-sum /dev/vda 1048576 2097152"), sum);

    let refused = guest.try_run("disk-write /dev/vdb 0 7 4096");
    assert!(refused.is_err(), "a read-only drive took a write");
    assert!(std::fs::read(&locked).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn a_guest_that_reboots_ends_the_process_with_success() {
    let host = Host::new();
    let mut vm = host.booted();
    vm.guest().ask("reboot");
    assert_eq!(vm.wait().code(), Some(0));
}

#[test]
fn ctrl_alt_del_reaches_the_guest() {
    let host = Host::new();
    let mut vm = host.booted();
    vm.api.put("/actions", json!({ "action_type": "SendCtrlAltDel" }));
    // No init here has asked to be told instead, so the kernel reboots at once.
    assert_eq!(vm.wait().code(), Some(0));
}

#[test]
fn a_terminated_process_takes_the_guest_along() {
    let host = Host::new();
    let mut vm = host.booted();
    let descendants = descendants(vm.pid());
    let pid = rustix::process::Pid::from_raw(vm.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(!vm.wait().success());
    assert!(descendants.into_iter().all(|pid| !alive(pid)));
}

#[test]
fn killing_the_process_kills_the_guest() {
    let host = Host::new();
    let mut vm = host.booted();
    let descendants = descendants(vm.pid());
    vm.kill();
    for pid in descendants {
        until("the descendants to end", || (!alive(pid)).then_some(()));
    }
}

#[test]
fn the_console_can_go_to_a_file() {
    let host = Host::new();
    let vm = host.vm();
    vm.configure();
    let console = host.path("console");
    if !vm.is_since(14) {
        vm.api.refused("PUT", "/serial", json!({ "serial_out_path": console }));
        return;
    }
    vm.api.put("/serial", json!({ "serial_out_path": console }));
    vm.api.put("/actions", json!({ "action_type": "InstanceStart" }));
    until("the guest's line in the file", || {
        std::fs::read_to_string(&console).ok().filter(|text| text.contains("GUEST READY"))
    });
}

fn descendants(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children: Vec<u32> = children.split_whitespace().map(|word| word.parse().unwrap()).collect();
    children.iter().copied().chain(children.iter().flat_map(|child| descendants(*child))).collect()
}

/// Whether it still runs; a zombie waits only for whoever inherited it.
fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}
