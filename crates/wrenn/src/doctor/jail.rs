//! The jail that VMMs run in: tried with a program that does nothing; and the users that they would be.

use std::fs;
use std::path::Path;

use anyhow::Result;
use vmm::cgroup::Cgroup;
use vmm::jail::Size;
use vmm::process::{Exit, Launch};

use super::Check;

/// The highest network slot.
const LAST_SLOT: u32 = 32_767;
/// Does nothing, and needs libraries as a VMM may.
const PROGRAM: &str = "/bin/true";
/// In the place of a guest kernel.
const NOTHING: &str = "/dev/null";

pub(super) async fn checks(users: u32) -> Vec<Check> {
    let last = users + LAST_SLOT;
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let subordinate = fs::read_to_string("/etc/subuid").unwrap_or_default();
    vec![accounts(users, last, &passwd, &subordinate), jail(last).await]
}

/// Who else has one of the numbers that VMMs have.
fn accounts(first: u32, last: u32, passwd: &str, subordinate: &str) -> Check {
    let number = |line: &str, field: usize| line.split(':').nth(field)?.parse::<u32>().ok();
    let account = passwd.lines().find(|line| number(line, 2).is_some_and(|uid| (first..=last).contains(&uid)));
    let range = subordinate.lines().find(|line| match (number(line, 1), number(line, 2)) {
        (Some(begin), Some(count)) => begin <= last && begin.saturating_add(count) > first,
        _ => false,
    });
    let found = format!("VMMs run as {first} to {last}");
    match account.or(range).and_then(|line| line.split(':').next()) {
        None => Check::ok("users", found),
        Some(name) => Check::warn(
            "users",
            format!("{found}, of which some are {name}'s"),
            "tell --vmm-users (WRENN_VMM_USERS) where 32768 numbers are that nobody has",
        ),
    }
}

async fn jail(user: u32) -> Check {
    let remedy = "it takes Linux 5.10, cgroup 2 and what is said of privileges; no unprivileged container has that";
    match shut_in(user).await {
        Ok(Exit::Code(0)) => Check::ok("jail", "a program runs in one"),
        Ok(exit) => Check::fail("jail", format!("a program in one {exit}"), remedy),
        Err(error) => Check::fail("jail", format!("{error:#}"), remedy),
    }
}

/// Runs a program in a jail, as the user of the last slot to be used.
async fn shut_in(user: u32) -> Result<Exit> {
    let dir = tempfile::tempdir()?;
    let group = Cgroup::root(&format!("doctor-{}", std::process::id()))?;
    group.create()?;
    let launch = Launch {
        binary: Path::new(PROGRAM),
        id: "doctor",
        dir: dir.path(),
        kernel: Path::new(NOTHING),
        netns: Path::new("/proc/self/ns/net"),
        cgroup: &group,
        log: &dir.path().join("log"),
        user,
        size: Size { vcpus: 1, memory_mib: 128, disk_mib: 128 },
    };
    let ended = match launch.spawn().await {
        Ok(process) => Ok(process.exited().await),
        Err(error) => Err(error),
    };
    group.remove().await?;
    Ok(ended?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn accounts_and_ranges_in_the_way_are_found() {
        let verdict = |passwd, subordinate| accounts(900_000, 932_767, passwd, subordinate).verdict;
        assert_eq!(verdict("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n", ""), Verdict::Ok);
        assert_eq!(verdict("", "me:100000:65536\nyou:932768:65536\n"), Verdict::Ok);
        assert_eq!(verdict("me:x:932767:1::/:/bin/sh\n", ""), Verdict::Warn);
        assert_eq!(verdict("", "me:899999:2\n"), Verdict::Warn);
        assert_eq!(verdict("nonsense\n::::\n", "me:x\n"), Verdict::Ok);
    }
}
