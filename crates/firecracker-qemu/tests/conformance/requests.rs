//! What is refused, with which status, and what the API says about itself.

use serde_json::{Value, json};

use crate::host::Host;
use crate::host::guest;
use crate::host::vm::load_request;

#[test]
fn describes_itself() {
    let host = Host::new();
    let vm = host.vm();
    let description = vm.api.get("/");
    assert_eq!(description["id"], vm.namespace);
    assert_eq!(description["state"], "Not started");
    assert_eq!(description["app_name"], "Firecracker");
    let version = vm.api.get("/version")["firecracker_version"].as_str().unwrap().to_owned();
    let numbers: Vec<u32> = version.split('.').map(|part| part.parse().unwrap()).collect();
    assert!(numbers.len() == 3 && numbers >= vec![1, 12, 0], "{version}");
    assert!(description["vmm_version"].as_str().unwrap().starts_with(&version));
}

#[test]
fn machine_configuration_is_kept_and_patched() {
    let host = Host::new();
    let vm = host.vm();
    let defaults = vm.api.get("/machine-config");
    assert_eq!((&defaults["vcpu_count"], &defaults["mem_size_mib"]), (&json!(1), &json!(128)));
    vm.api.put("/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 256 }));
    vm.api.patch("/machine-config", json!({ "track_dirty_pages": true }));
    let config = vm.api.get("/machine-config");
    assert_eq!(config["vcpu_count"], 2);
    assert_eq!(config["mem_size_mib"], 256);
    assert_eq!(config["track_dirty_pages"], true);
    for bad in [
        json!({ "vcpu_count": 0, "mem_size_mib": 128 }),
        json!({ "vcpu_count": 33, "mem_size_mib": 128 }),
        json!({ "vcpu_count": 1, "mem_size_mib": 0 }),
        json!({ "vcpu_count": 1 }),
        json!({ "mem_size_mib": 128 }),
        json!({ "vcpu_count": -1, "mem_size_mib": 128 }),
    ] {
        vm.api.refused("PUT", "/machine-config", bad);
    }
    assert_eq!(vm.api.get("/machine-config"), config, "a refused request changes nothing");
}

#[test]
fn the_whole_configuration_can_be_read_back() {
    let host = Host::new();
    let vm = host.vm();
    vm.configure();
    let disk = host.disk("disk", 1 << 20);
    vm.drive("rootfs", &disk, json!({ "is_root_device": true, "is_read_only": true }));
    let config = vm.api.get("/vm/config");
    assert_eq!(config["machine-config"]["mem_size_mib"], 128);
    assert_eq!(config["boot-source"]["kernel_image_path"], json!(guest::kernel()));
    assert_eq!(config["drives"][0]["drive_id"], "rootfs");
    assert_eq!(config["drives"][0]["path_on_host"], json!(disk));
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], "tap0");
}

#[test]
fn malformed_requests_are_refused() {
    let host = Host::new();
    let vm = host.vm();
    let disk = host.disk("disk", 1 << 20);

    let unknown_path = vm.api.refused("PUT", "/nonsense", json!({}));
    assert!(unknown_path.contains("Invalid request method and/or path"), "{unknown_path}");
    vm.api.refused("GET", "/actions", Value::Null);
    vm.api.refused("DELETE", "/machine-config", Value::Null);

    let unknown_field = vm.api.refused("PUT", "/boot-source", json!({ "kernel_image_path": guest::kernel(), "x": 1 }));
    assert!(unknown_field.contains("unknown field"), "{unknown_field}");
    vm.api.refused("PUT", "/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128, "x": 1 }));
    vm.api.refused("PUT", "/snapshot/load", json!({ "snapshot_path": "/a", "x": 1 }));

    let drive =
        |id: &str| json!({ "drive_id": id, "path_on_host": disk, "is_root_device": false, "is_read_only": false });
    vm.api.refused("PUT", "/drives/one", drive("two"));
    vm.api.refused("PUT", "/drives/o-n-e", drive("o-n-e"));
    vm.api.refused("PUT", "/network-interfaces/a", json!({ "iface_id": "b", "host_dev_name": "tap0" }));
    vm.api.refused("PUT", "/actions", json!({ "action_type": "Explode" }));
    vm.api.refused("PUT", "/drives/one", {
        let mut drive = drive("one");
        drive["cache_type"] = json!("WriteThrough");
        drive
    });
    let mac = json!({ "iface_id": "a", "host_dev_name": "tap0", "guest_mac": "02:fc:00:00:00" });
    vm.api.refused("PUT", "/network-interfaces/a", mac);

    assert_eq!(vm.api.raw("PUT", "/machine-config", "").status, 400);
    assert_eq!(vm.api.raw("PUT", "/machine-config", "{").status, 400);
    assert_eq!(vm.api.raw("PUT", "/machine-config", "[]").status, 400);
    let endless = format!("{{\"boot_args\": \"{}\"}}", "x".repeat(60_000));
    // Firecracker goes on to refuse the body, piece by piece as a request each. Version 1.12 may end when it is hung up on
    // meanwhile: by its own filter of system calls, after a signal for the closed socket.
    let (refused, _stays) = vm.api.raw_and_stay("PUT", "/boot-source", &endless);
    assert!([400, 413].contains(&refused.status), "{refused:?}");
    assert_eq!(vm.state(), "Not started", "and it is still there");
}

#[test]
fn files_that_do_not_exist_are_refused() {
    let host = Host::new();
    let vm = host.vm();
    let missing = host.path("missing");
    vm.api.refused("PUT", "/boot-source", json!({ "kernel_image_path": missing }));
    let initrd = json!({ "kernel_image_path": guest::kernel(), "initrd_path": missing });
    vm.api.refused("PUT", "/boot-source", initrd);
    let drive = json!({ "drive_id": "a", "path_on_host": missing, "is_root_device": false, "is_read_only": false });
    vm.api.refused("PUT", "/drives/a", drive);
    vm.api.refused("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
}

#[test]
fn a_start_that_fails_can_be_tried_again() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    let kernel = vm.api.get("/vm/config")["boot-source"].clone();
    vm.api.put("/boot-source", json!({ "kernel_image_path": host.disk("kernel", 1 << 20) }));
    vm.api.refused("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    assert_eq!(vm.state(), "Not started");
    vm.api.put("/boot-source", kernel);
    vm.boot();
}

#[test]
fn what_comes_after_the_start_is_refused_before_it() {
    let host = Host::new();
    let vm = host.vm();
    vm.configure();
    let snapshot = json!({ "snapshot_path": host.path("s"), "mem_file_path": host.path("m") });
    for (method, path, body) in [
        ("PATCH", "/vm", json!({ "state": "Paused" })),
        ("PUT", "/snapshot/create", snapshot),
        ("PATCH", "/network-interfaces/eth0", json!({ "iface_id": "eth0" })),
        ("PATCH", "/balloon", json!({ "amount_mib": 1 })),
        ("PUT", "/actions", json!({ "action_type": "SendCtrlAltDel" })),
    ] {
        let message = vm.api.refused(method, path, body);
        let expected = "The requested operation is not supported before starting the microVM.";
        assert!(message.contains(expected), "{method} {path}: {message}");
    }
}

#[test]
fn what_comes_before_the_start_is_refused_after_it() {
    let host = Host::new();
    let vm = host.booted();
    let disk = host.disk("disk", 1 << 20);
    for (path, body) in [
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })),
        ("/boot-source", json!({ "kernel_image_path": guest::kernel() })),
        ("/mmds/config", json!({ "network_interfaces": ["eth0"] })),
        ("/metrics", json!({ "metrics_path": host.path("metrics") })),
        ("/actions", json!({ "action_type": "InstanceStart" })),
        (
            "/snapshot/load",
            json!({
                "snapshot_path": disk, "mem_backend": { "backend_type": "File", "backend_path": disk },
            }),
        ),
    ] {
        let message = vm.api.refused("PUT", path, body);
        let expected = "The requested operation is not supported after starting the microVM.";
        assert!(message.contains(expected), "{path}: {message}");
    }
    let snapshot = json!({ "snapshot_path": host.path("s"), "mem_file_path": host.path("m") });
    vm.api.refused("PUT", "/snapshot/create", snapshot);
    vm.api.refused("PATCH", "/vm", json!({ "state": "Sleeping" }));
    vm.api.refused("PATCH", "/drives/none", json!({ "drive_id": "none" }));
    assert_eq!(vm.state(), "Running");
    assert_eq!(vm.guest().run("cat /proc/sys/kernel/ostype"), "Linux", "and the guest did not notice");
}

#[test]
fn a_failed_load_ends_the_process() {
    let host = Host::new();
    let foreign = host.disk("foreign", 64 << 10);
    let mut vm = host.vm();
    let snapshot = crate::host::vm::Snapshot { state: foreign.clone(), memory: foreign.clone() };
    vm.api.refused("PUT", "/snapshot/load", load_request(&snapshot, "File", &foreign, &json!({})));
    assert_eq!(vm.wait().code(), Some(1));
}

#[test]
fn metrics_are_written_when_flushed() {
    let host = Host::new();
    let mut vm = host.vm();
    // Versions before 1.14 want both files to be there.
    let (metrics, log) = (host.disk("metrics", 0), host.disk("log", 0));
    vm.api.put("/logger", json!({ "log_path": log, "level": "Debug" }));
    vm.api.put("/metrics", json!({ "metrics_path": metrics }));
    vm.configure();
    vm.boot();
    vm.api.put("/actions", json!({ "action_type": "FlushMetrics" }));
    let written = std::fs::read_to_string(&metrics).unwrap();
    let line: Value = serde_json::from_str(written.lines().last().expect("a line was written")).unwrap();
    assert!(line["utc_timestamp_ms"].is_u64(), "{line}");
    assert!(!std::fs::read_to_string(log).unwrap().is_empty());
}
