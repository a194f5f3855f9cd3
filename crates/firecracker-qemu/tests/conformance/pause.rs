//! Pausing and resuming.

use std::time::Duration;

use crate::host::Host;

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
