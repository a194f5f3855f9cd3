//! One suite for every way to make disks, on real file systems and as root.

mod full;
mod power;
mod record;
mod suite;
mod world;

use disk::{Backend, Disks, Error};

/// Each of these is a test for each way.
macro_rules! on_every_backend {
    ($($module:ident :: $test:ident),* $(,)?) => {
        on_every_backend!(reflink, Reflink, $($module :: $test),*);
        on_every_backend!(copy, Copy, $($module :: $test),*);
        on_every_backend!(device_mapper, DeviceMapper, $($module :: $test),*);
    };
    ($name:ident, $backend:ident, $($module:ident :: $test:ident),*) => {
        mod $name {
            $(#[test] fn $test() { super::on(disk::Backend::$backend, super::$module::$test) })*
        }
    };
}

on_every_backend!(
    suite::a_disk_begins_as_its_image_and_is_nobody_else_s,
    suite::a_disk_may_be_larger_than_its_image,
    suite::a_copy_is_what_a_disk_was_then,
    suite::a_disk_that_is_in_use_survives_who_made_it,
    suite::a_disk_is_let_go_when_its_last_user_has,
    suite::what_is_written_is_there_however_often_it_is_copied_and_attached,
    suite::a_flat_disk_has_all_of_it_and_no_zeros,
    suite::what_cannot_be_made_says_why_and_leaves_nothing,
    suite::disks_of_different_kinds_live_in_one_directory,
    full::a_disk_that_does_not_fit_fails_in_its_own_writes_or_before,
    full::a_disk_that_was_attached_can_be_filled_though_nothing_else_fits,
    power::a_pause_that_was_acknowledged_survives_a_power_cut,
);

/// Runs the test, or sees that this machine says what it lacks: a kernel without device-mapper makes no such disks. The
/// emulated host has one (docs/vmm.md).
fn on(backend: Backend, test: fn(Backend)) {
    if backend != Backend::DeviceMapper || std::fs::exists("/dev/mapper/control").unwrap() {
        return test(backend);
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let refused = Disks::open(dir.path(), "test", Some(backend));
    assert!(matches!(refused, Err(Error::NoDeviceMapper(_))), "{refused:?}");
}
