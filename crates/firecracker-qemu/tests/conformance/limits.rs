//! Rate limiters: two rates in one run, compared with each other.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::host::Host;

fn bandwidth(per_second: u64) -> Value {
    json!({ "bandwidth": { "size": per_second / 10, "refill_time": 100 } })
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
    vm.drive("slow", &slow, json!({ "rate_limiter": bandwidth(2 << 20) }));
    vm.drive("fast", &fast, json!({ "rate_limiter": bandwidth(200 << 20) }));
    vm.boot();
    let mut guest = vm.guest();
    let slow = timed(|| drop(guest.run("disk-write /dev/vda 0 1 6291456")));
    let fast = timed(|| drop(guest.run("disk-write /dev/vdb 0 1 6291456")));
    assert!(slow > fast * 2, "limited {slow:?}, hardly limited {fast:?}");

    vm.api.patch("/drives/slow", json!({ "drive_id": "slow", "rate_limiter": bandwidth(200 << 20) }));
    let freed = timed(|| drop(guest.run("disk-write /dev/vda 0 2 6291456")));
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
    let patch = json!({ "iface_id": "eth0", "rx_rate_limiter": bandwidth(1 << 20) });
    vm.api.patch("/network-interfaces/eth0", patch);
    vm.kill();

    let mut successor = vm.successor(&host);
    successor.configure();
    successor.boot();
    let limited = Duration::from_secs((BYTES >> 20) as u64);
    let again = timed(|| successor.guest().upload(BYTES));
    assert!(again < limited / 2 || again < free * 3, "free {free:?}, after a limited guest {again:?}");
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

    let limit = |direction: &str, rate: u64| {
        let mut patch = json!({ "iface_id": "eth0" });
        patch[direction] = bandwidth(rate);
        vm.api.patch("/network-interfaces/eth0", patch);
    };
    limit("rx_rate_limiter", 512 << 10);
    let limited_up = timed(|| guest.upload(BYTES));
    assert!(limited_up > up * 2, "to the guest: limited {limited_up:?}, free {up:?}");
    limit("rx_rate_limiter", 0);
    limit("tx_rate_limiter", 512 << 10);
    let limited_down = timed(|| guest.download(BYTES as u64));
    assert!(limited_down > down * 2, "from the guest: limited {limited_down:?}, free {down:?}");
}
