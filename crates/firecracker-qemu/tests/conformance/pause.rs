//! Pausing and resuming.

use std::time::{Duration, Instant};

use crate::host::Host;
use crate::host::guest::Guest;

fn uptime(guest: &mut Guest) -> f64 {
    guest.run("cat /proc/uptime").split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_paused_guest_does_not_run() {
    let host = Host::new();
    let vm = host.booted();
    let mut guest = vm.guest();
    let boot_id = guest.run("cat /proc/sys/kernel/random/boot_id");
    vm.pause();
    assert_eq!(vm.state(), "Paused");
    vm.pause();
    assert_eq!(vm.state(), "Paused", "pausing twice is no error");

    // What it is asked while paused it can only answer after.
    guest.ask("cat /proc/sys/kernel/random/boot_id");
    assert!(guest.silent_for(Duration::from_millis(1500)), "a paused guest answered");
    vm.resume();
    assert_eq!(vm.state(), "Running");
    vm.resume();
    assert_eq!(vm.state(), "Running", "resuming twice is no error");
    assert_eq!(guest.answer(), Ok(boot_id));
}

#[test]
fn pausing_stops_the_guests_clock() {
    let host = Host::new();
    let vm = host.booted();
    let mut guest = vm.guest();
    let (before, started) = (uptime(&mut guest), Instant::now());
    vm.pause();
    let paused = Instant::now();
    std::thread::park_timeout(Duration::from_secs(2));
    let paused = paused.elapsed();
    vm.resume();
    let after = uptime(&mut guest);
    let outside = started.elapsed();
    let missing = outside.as_secs_f64() - (after - before);
    assert!(missing > paused.as_secs_f64() * 0.5, "the guest saw {} s of {outside:?}", after - before);
}
