//! A machine for one test: a thread in its own network and mount namespaces, with an empty `/run`.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;
use serde_json::Value;

use crate::{Config, Network};

/// Runs `test` on a machine without links but `lo`, and without a default route.
pub(crate) fn on_own_machine(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let result = scope
            .spawn(|| {
                // SAFETY: descriptors stay shared.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
                rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
                rustix::mount::mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
                sh("ip link set lo up");
                test();
            })
            .join();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// The first of a machine's instances.
pub(super) fn network() -> Network {
    instance("0123abcd")
}

/// The same, with slots made ahead.
pub(super) fn pooled(ready: usize) -> Network {
    Network::open(&Config { ready, ..config("0123abcd") }).unwrap()
}

pub(super) fn instance(name: &str) -> Network {
    Network::open(&config(name)).unwrap()
}

/// Without slots made ahead, and with the floor as it is.
pub(super) fn config(name: &str) -> Config {
    Config { instance: name.to_owned(), allow: Vec::new(), deny: Vec::new(), ready: 0, users: 900_000 }
}

/// Runs a command line on this thread's machine and returns what it prints.
pub(crate) fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(super) fn json(line: &str) -> Value {
    let text = sh(line);
    // `ip -j` prints nothing where there is nothing.
    if text.trim().is_empty() { Value::Array(Vec::new()) } else { serde_json::from_str(&text).unwrap() }
}

/// Everything that a slot may leave, in words.
pub(super) fn inventory() -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let mut add = |kind: &str, text: String| all.extend(text.lines().map(|line| format!("{kind}: {line}")));
    add("link", sh("ip -br link | awk '{ print $1, $3 }'"));
    add("address", sh("ip -o addr | sed 's/^[0-9]*: //'"));
    add("route", sh("ip route show table all"));
    add("neighbour", sh("ip neigh show nud all"));
    add("rule", sh("nft list ruleset"));
    for (kind, dir) in [("claim", "/run/wrenn/slots"), ("netns", "/run/netns")] {
        add(kind, sh(&format!("ls {dir} 2>/dev/null || true")));
    }
    // Fields from the root of the mount on; ids before it differ from time to time.
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    add("mount", mounts.lines().map(|line| line.splitn(4, ' ').last().unwrap().to_owned() + "\n").collect());
    all
}

/// Asserts that the machine is as it was.
#[track_caller]
pub(super) fn assert_same(before: &BTreeSet<String>, when: &str) {
    let now = inventory();
    let new: Vec<_> = now.difference(before).collect();
    let gone: Vec<_> = before.difference(&now).collect();
    assert!(new.is_empty() && gone.is_empty(), "{when}: new {new:#?}, gone {gone:#?}");
}
