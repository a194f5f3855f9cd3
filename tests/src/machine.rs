//! What a machine holds of the kinds that capsules use. Equal before and after means that nothing was left.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// How long what was given back may take to be gone.
const SETTLED: Duration = Duration::from_secs(60);

/// For how long nothing changes on a machine at rest.
const REST: Duration = Duration::from_secs(3);

/// Names of everything, by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    namespaces: BTreeSet<String>,
    links: BTreeSet<String>,
    routes: BTreeSet<String>,
    rules: BTreeSet<String>,
    mounts: BTreeSet<String>,
    loops: BTreeSet<String>,
    processes: BTreeSet<String>,
    claims: BTreeSet<String>,
    cgroups: BTreeSet<String>,
}

impl Machine {
    /// Looks at the machine. Only what bears our names counts among links, rules, mounts and processes: other tests
    /// and the machine's own services come and go.
    pub fn now() -> Self {
        let ours = |line: &String| line.contains("wrenn");
        Self {
            namespaces: names("/run/netns").into_iter().filter(ours).collect(),
            links: names("/sys/class/net").into_iter().filter(ours).collect(),
            routes: lines("ip", &["route"]).into_iter().filter(ours).collect(),
            rules: lines("nft", &["-n", "list", "ruleset"]).into_iter().filter(ours).collect(),
            mounts: lines("cat", &["/proc/self/mountinfo"]).into_iter().filter(ours).map(mount_point).collect(),
            loops: lines("losetup", &["--noheadings", "--output", "BACK-FILE"]).into_iter().filter(ours).collect(),
            processes: processes(),
            claims: names("/run/wrenn/slots"),
            cgroups: cgroups(),
        }
    }

    /// Looks at the machine when it has come to rest: an agent makes network slots ahead, beside everything else.
    pub async fn at_rest() -> Self {
        let mut before = Self::now();
        loop {
            tokio::time::sleep(REST).await;
            let now = Self::now();
            if now == before {
                return now;
            }
            before = now;
        }
    }

    /// Fails unless the machine comes to hold no more than it does in `self`. The kernel takes a moment to let go of the
    /// loop device under a mount that the last VMM's namespace had a copy of.
    pub async fn is_back(&self) {
        let limit = tokio::time::Instant::now() + SETTLED;
        loop {
            let left = Self::now().more_than(self);
            if left.is_empty() {
                return;
            }
            assert!(tokio::time::Instant::now() < limit, "left behind: {left:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What is there that was not there in `before`, one line each; empty when nothing is.
    fn more_than(&self, before: &Self) -> Vec<String> {
        let kinds = [
            ("namespace", &self.namespaces, &before.namespaces),
            ("link", &self.links, &before.links),
            ("route", &self.routes, &before.routes),
            ("rule", &self.rules, &before.rules),
            ("mount", &self.mounts, &before.mounts),
            ("loop device", &self.loops, &before.loops),
            ("process", &self.processes, &before.processes),
            ("slot claim", &self.claims, &before.claims),
            ("cgroup", &self.cgroups, &before.cgroups),
        ];
        let more = kinds
            .into_iter()
            .flat_map(|(kind, now, before)| now.difference(before).map(move |name| format!("{kind} {name}")));
        more.collect()
    }
}

fn names(dir: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn lines(program: &str, args: &[&str]) -> Vec<String> {
    let out = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect()
}

/// Mount ids differ from run to run; the place does not.
fn mount_point(line: String) -> String {
    line.split(' ').nth(4).unwrap_or_default().to_owned()
}

/// Everything that runs in a control group of an agent: VMMs and what they started.
fn processes() -> BTreeSet<String> {
    let pids = names("/proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    pids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|groups| groups.contains("/wrenn-")))
        // One that has ended holds nothing any more; the machine's init collects it when it gets to it.
        .filter(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")))
        .map(|pid| format!("{} {pid}", fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim()))
        .collect()
}

/// The cgroups of all agents, wherever cgroup2 is mounted.
fn cgroups() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        for agent in names(root).iter().filter(|name| name.starts_with("wrenn-")) {
            let agent = Path::new(root).join(agent);
            let children = fs::read_dir(&agent).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
            found.extend(children.map(|entry| entry.path().display().to_string()));
            found.insert(agent.display().to_string());
        }
    }
    found
}
