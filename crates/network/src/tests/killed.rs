//! A process that is killed at any step, as a whole and without notice.

use std::collections::HashSet;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::machine::{assert_same, inventory, network, on_own_machine, pooled};
use crate::Slot;
use crate::step::KILL_AT;

/// More steps than there are in what is killed.
const MOST: usize = 200;

/// What the process does that is killed. As a test of its own it shows that it comes to its end.
#[test]
fn everything_that_is_done_with_slots() {
    let all = || {
        let network = pooled(1);
        network.sweep(&HashSet::new()).unwrap();
        network.pool.settle();
        let (ready, made) = (network.claim().unwrap(), network.claim().unwrap());
        for claim in [ready, made] {
            network.create(claim.slot()).unwrap();
        }
        network.pool.settle();
        network.give_back(ready).unwrap();
        network.pool.settle();
        network.pool.slots.destroy(made.slot()).unwrap();
        network.close().unwrap();
    };
    // The process that is killed is on its parent's machine.
    if std::env::var_os(KILL_AT).is_some() { all() } else { on_own_machine(all) }
}

#[test]
fn a_killed_process_leaves_nothing_that_the_next_does_not_take() {
    on_own_machine(|| {
        network().close().unwrap();
        let before = inventory();
        for at in 1..MOST {
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "tests::killed::everything_that_is_done_with_slots"])
                .env(KILL_AT, at.to_string())
                .output()
                .unwrap()
                .status;
            if status.success() {
                assert!(at > 20, "it was killed only {at} times");
                assert_same(&before, "after a process that ended well");
                return;
            }
            assert_eq!(status.signal(), Some(libc::SIGKILL), "{status:?}");
            // One that takes it over, or one that removes it.
            let next = if at % 2 == 0 { pooled(2) } else { network() };
            next.sweep(&HashSet::new()).unwrap();
            if at % 2 == 0 {
                let numbers: Vec<u16> = next.pool.settle().into_iter().map(Slot::get).collect();
                assert_eq!(numbers.iter().sum::<u16>(), 3, "of all, the lowest are kept: {numbers:?}");
            }
            next.close().unwrap();
            assert_same(&before, &format!("killed at step {at}"));
        }
        panic!("it never came to its end");
    });
}
