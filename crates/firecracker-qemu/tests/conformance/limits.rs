//! Rate limiters, of a fraction of what was measured without them: a machine of any speed takes as many times as long.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::host::Host;

fn bandwidth(per_second: u64) -> Value {
    json!({ "bandwidth": { "size": per_second / 10, "refill_time": 100 } })
}

/// How long `bytes` take that took `free`, and the limit by which they do.
fn slowed(bytes: usize, free: Duration) -> (Duration, Value) {
    let takes = (free * 5).max(Duration::from_secs(5));
    (takes, bandwidth((bytes as f64 / takes.as_secs_f64()) as u64))
}

/// As Firecracker has it: without a rate.
fn unlimited() -> Value {
    json!({ "bandwidth": { "size": 0, "refill_time": 100 } })
}

fn timed(work: impl FnOnce()) -> Duration {
    let started = Instant::now();
    work();
    started.elapsed()
}

#[test]
fn drives_are_limited() {
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    let (slow, fast) = (host.disk("slow", 8 << 20), host.disk("fast", 8 << 20));
    // An emulated processor's guest writes at twenty times this rate.
    vm.drive("slow", &slow, json!({ "rate_limiter": bandwidth(256 << 10) }));
    vm.drive("fast", &fast, json!({ "rate_limiter": bandwidth(200 << 20) }));
    vm.boot();
    let mut guest = vm.guest();
    let slow = timed(|| drop(guest.run("disk-write /dev/vda 0 1 1048576")));
    let fast = timed(|| drop(guest.run("disk-write /dev/vdb 0 1 1048576")));
    assert!(slow > fast * 2, "limited {slow:?}, hardly limited {fast:?}");

    vm.api.patch("/drives/slow", json!({ "drive_id": "slow", "rate_limiter": unlimited() }));
    let freed = timed(|| drop(guest.run("disk-write /dev/vda 0 2 1048576")));
    assert!(slow > freed * 2, "limited {slow:?}, freed {freed:?}");
}

#[test]
fn limits_end_with_their_guest() {
    const BYTES: usize = 6 << 20;
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    vm.boot();
    let free = timed(|| vm.guest().upload(BYTES));
    let (limited, limit) = slowed(BYTES, free);
    vm.api.patch("/network-interfaces/eth0", json!({ "iface_id": "eth0", "rx_rate_limiter": limit }));
    vm.kill();

    let mut successor = vm.successor(&host);
    successor.configure();
    successor.boot();
    let again = timed(|| successor.guest().upload(BYTES));
    assert!(again < limited / 2, "free {free:?}, after a guest limited to {limited:?}: {again:?}");
}

#[test]
fn interfaces_are_limited_both_ways() {
    const BYTES: usize = 4 << 20;
    let host = Host::new();
    let mut vm = host.vm();
    vm.configure();
    vm.boot();
    let mut guest = vm.guest();
    let up = timed(|| guest.upload(BYTES));
    let down = timed(|| guest.download(BYTES as u64));

    let limit = |direction: &str, rate: Value| {
        let mut patch = json!({ "iface_id": "eth0" });
        patch[direction] = rate;
        vm.api.patch("/network-interfaces/eth0", patch);
    };
    limit("rx_rate_limiter", slowed(BYTES, up).1);
    let limited_up = timed(|| guest.upload(BYTES));
    assert!(limited_up > up * 2, "to the guest: limited {limited_up:?}, free {up:?}");
    limit("rx_rate_limiter", unlimited());
    limit("tx_rate_limiter", slowed(BYTES, down).1);
    let limited_down = timed(|| guest.download(BYTES as u64));
    assert!(limited_down > down * 2, "from the guest: limited {limited_down:?}, free {down:?}");
}
