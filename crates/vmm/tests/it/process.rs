//! Process supervision, with plain programs in the VMM's place: what is tested here ends where the API begins.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use futures::FutureExt;
use futures::future::join_all;
use vmm::client::{self, Client};
use vmm::process::{Error, Exit, Identity, Launch, Process, Step};
use vmm::{CAPSULE_DIR, SCRATCH_DIR};

use crate::host::{Host, eventually};

/// Set in the environment of this same test program when it is to be the agent that gets killed.
const AGENT: &str = "WRENN_TEST_AGENT";

#[tokio::test]
async fn the_vmm_runs_where_it_should_and_nothing_shows_outside() {
    let host = Host::new();
    let vmm = host.program(
        r#"cd /run/wrenn/vm/scratch
        echo "$@" > args; env > env; umask > umask
        cat /proc/self/cgroup > cgroup; readlink /proc/self/ns/net > netns
        cat /proc/self/oom_score_adj > oom; ls -l /proc/$$/fd > fds; ulimit -c > core
        cut -d' ' -f1,6 /proc/$$/stat > session; cat /proc/self/status > status
        grep ' /run/wrenn/vm ' /proc/self/mountinfo > mount
        echo out; echo err >&2; pwd > /dev/null; stat -L -c %t:%T /proc/self/fd/0 > stdin
        > done; exec sleep 1000"#,
    );
    let process = host.launch(&vmm).spawn().await.unwrap();
    let scratch = process.scratch().unwrap().clone();
    eventually("it has said all", || scratch.open("done").is_ok()).await;
    process.kill().await.unwrap();

    // What it wrote is there for as long as somebody holds it.
    let said = |name: &str| std::io::read_to_string(scratch.open(name).unwrap()).unwrap();
    assert_eq!(said("args"), "--api-sock /run/wrenn/vm/scratch/api.sock --id cl-test\n");
    let names: Vec<_> = said("env").lines().map(|line| line.split('=').next().unwrap().to_owned()).collect();
    assert!(names.iter().all(|name| ["PATH", "PWD", "OLDPWD", "SHLVL", "_"].contains(&name.as_str())), "{names:?}");
    assert_eq!(said("umask").trim_start_matches('0'), "77\n");
    let group = host.cgroup.path().to_str().unwrap().to_owned();
    assert!(said("cgroup").lines().any(|line| line.strip_prefix("0::").is_some_and(|path| group.ends_with(path))));
    assert_eq!(said("netns"), format!("net:[{}]\n", fs::metadata(&host.netns).unwrap().ino()));
    assert_eq!((said("oom").as_str(), said("core").as_str(), said("stdin").as_str()), ("500\n", "0\n", "1:3\n"));
    // dash itself holds the script; anything of the agent's would be a socket, a pipe, an epoll or a pidfd.
    assert!(!["socket:", "pipe:", "anon_inode:"].iter().any(|kind| said("fds").contains(kind)), "{}", said("fds"));
    assert_eq!(said("session"), "1 1\n", "it is the first of its processes");
    for field in ["SigBlk", "SigIgn"] {
        let line = said("status").lines().find(|line| line.starts_with(field)).unwrap().to_owned();
        let signals = u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
        // 32 and 33 are the C library's own, which does not let them be set.
        assert_eq!(signals & !(0b11 << 31), 0, "{line}");
    }
    assert_eq!(said("mount").lines().count(), 1);
    assert_eq!(fs::read_to_string(&host.log).unwrap(), "out\nerr\n");

    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(CAPSULE_DIR));
    assert_eq!(fs::read_dir(CAPSULE_DIR).unwrap().count(), 0);
    assert_eq!(fs::read_dir(host.dir.join(SCRATCH_DIR)).unwrap().count(), 0);
    host.end().await;
}

#[tokio::test]
async fn its_end_is_told_to_all_who_ask_and_at_any_time() {
    let host = Host::new();
    assert!(Command::new("mkfifo").arg(host.dir.join("fifo")).status().unwrap().success());
    let process = host.launch(&host.program("read line < /run/wrenn/vm/fifo; exit 7")).spawn().await.unwrap();
    let waiting = join_all((0..20).map(|_| {
        let process = process.clone();
        tokio::spawn(async move { process.exited().await })
    }));
    assert_eq!(process.exit(), None);
    fs::write(host.dir.join("fifo"), "\n").unwrap();
    assert!(waiting.await.into_iter().all(|exit| exit.unwrap() == Exit::Code(7)));
    assert_eq!((process.exited().await, process.exit()), (Exit::Code(7), Some(Exit::Code(7))));
    assert_eq!(Identity::of(process.identity().pid), None, "it was not reaped");

    let killed = host.launch(&host.program("exec sleep 1000")).spawn().await.unwrap();
    let pid = rustix::process::Pid::from_raw(killed.identity().pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(killed.exited().await, Exit::Signal(9));
    host.end().await;
}

#[tokio::test]
async fn a_guest_that_never_stops_talking_does_not_fill_the_disk() {
    let host = Host::new();
    let vmm = host.program("head -c 9000000 /dev/zero >&2; echo done; exec sleep 1000");
    let process = host.launch(&vmm).spawn().await.unwrap();
    eventually("the log is begun anew", || fs::read(&host.log).is_ok_and(|log| log.starts_with(b"[earlier"))).await;
    eventually("it is small", || fs::metadata(&host.log).unwrap().len() <= 4 << 20).await;
    process.kill().await.unwrap();
    host.end().await;
}

#[tokio::test]
async fn nobody_has_to_wait_for_an_end_to_be_reaped() {
    let host = Host::new();
    let process = host.launch(&host.program("exit 0")).spawn().await.unwrap();
    let pid = process.identity().pid;
    drop(process);
    eventually("the zombie is gone", || Identity::of(pid).is_none()).await;
    host.end().await;
}

#[tokio::test]
async fn kill_takes_the_whole_tree_and_can_be_repeated() {
    let host = Host::new();
    let vmm = host.program("setsid sleep 1000 & sh -c 'sleep 1000 & wait' & exec sleep 1000");
    let process = host.launch(&vmm).spawn().await.unwrap();
    eventually("all have started", || host.cgroup.pids().unwrap().len() == 4).await;
    let family = host.cgroup.pids().unwrap();
    assert_eq!(process.kill().await.unwrap(), Exit::Signal(9));
    assert!(host.cgroup.pids().unwrap().is_empty());
    // Zombies of others may stay for as long as their new parent likes; they run nothing.
    for pid in family {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or("(gone) Z".to_owned());
        assert!(stat.contains(") Z") || stat.contains(") X"), "{stat}");
    }
    assert_eq!(process.kill().await.unwrap(), Exit::Signal(9));
    host.cgroup.remove().await.unwrap();
    assert_eq!(process.kill().await.unwrap(), Exit::Signal(9));
    host.cgroup.remove().await.unwrap();
    host.end().await;
}

#[tokio::test]
async fn a_group_with_processes_is_not_removed() {
    let host = Host::new();
    let process = host.launch(&host.program("exec sleep 1000")).spawn().await.unwrap();
    assert_eq!(host.root.list().unwrap(), ["cl-test"]);
    assert!(host.root.remove().await.is_err());
    assert_eq!(host.cgroup.pids().unwrap(), [process.identity().pid]);
    process.kill().await.unwrap();
    host.end().await;
}

#[tokio::test]
async fn a_failed_launch_says_how_far_it_came_and_leaves_nothing() {
    let host = Host::new();
    let vmm = host.program("exec sleep 1000");
    let plain = host.dir.join("plain");
    fs::write(&plain, "not a program").unwrap();
    let failure = async |launch: Launch<'_>| match launch.spawn().await.unwrap_err() {
        Error::Start { step, .. } => Some(step),
        _ => None,
    };
    assert_eq!(failure(Launch { netns: &plain, ..host.launch(&vmm) }).await, Some(Step::NetworkNamespace));
    assert_eq!(failure(host.launch(&plain)).await, Some(Step::Exec));
    assert_eq!(failure(Launch { dir: &plain, ..host.launch(&vmm) }).await, None);
    assert_eq!(failure(host.launch(Path::new("/nowhere"))).await, None);
    assert_eq!(failure(Launch { cgroup: &host.root.child("none"), ..host.launch(&vmm) }).await, None);
    assert_eq!(failure(Launch { log: Path::new("/nowhere/log"), ..host.launch(&vmm) }).await, None);
    assert!(host.cgroup.pids().unwrap().is_empty());
    host.end().await;
}

#[tokio::test]
async fn a_launch_nobody_waits_for_is_undone() {
    let host = Host::new();
    let vmm = host.program("touch /run/wrenn/vm/scratch/ran; exec sleep 1000");
    let launch = host.launch(&vmm);
    assert!(launch.spawn().now_or_never().is_none());
    // Either it never comes into being or it is killed; a removable group proves that nobody is left.
    host.cgroup.remove().await.unwrap();
    host.end().await;
}

#[tokio::test]
async fn connecting_ends_with_the_process_and_with_the_limit() {
    let host = Host::new();
    let process = host.launch(&host.program("exit 3")).spawn().await.unwrap();
    let result = Client::connect(Duration::from_secs(600), &process).await;
    assert!(matches!(result, Err(client::Error::Died(Exit::Code(3)))), "{result:?}");

    let process = host.launch(&host.program("exec sleep 1000")).spawn().await.unwrap();
    let result = Client::connect(Duration::from_millis(50), &process).await;
    assert!(matches!(result, Err(client::Error::NotListening { .. })), "{result:?}");
    process.kill().await.unwrap();
    host.end().await;
}

#[tokio::test]
async fn the_vmm_survives_its_agent_and_is_adopted_by_the_next() {
    let host = Host::new();
    let vmm = host.program("sleep 1000 & read line < /run/wrenn/vm/fifo; head -c 9000000 /dev/zero; exec sleep 1000");
    assert!(Command::new("mkfifo").arg(host.dir.join("fifo")).status().unwrap().success());
    let mut agent = host.agent("process::be_the_agent", &vmm);
    let mut said = BufReader::new(agent.stdout.take().unwrap()).lines().map(Result::unwrap);
    let identity = said.find_map(|line| line.strip_prefix("identity ").map(str::to_owned)).unwrap();
    let identity: Identity = serde_json::from_str(&identity).unwrap();
    agent.kill().unwrap();
    agent.wait().unwrap();

    let stranger = Identity { start_ticks: identity.start_ticks + 1, ..identity };
    assert!(
        Process::adopt(&stranger, &host.cgroup, &host.log).unwrap().is_none(),
        "a recycled pid was taken for the VMM"
    );
    let outside = Identity::of(std::process::id()).unwrap();
    assert!(
        Process::adopt(&outside, &host.cgroup, &host.log).unwrap().is_none(),
        "a process of another group was adopted"
    );

    let process = Process::adopt(&identity, &host.cgroup, &host.log).unwrap().expect("it survived");
    assert_eq!((process.exit(), process.identity()), (None, identity));
    assert!(process.scratch().is_some());
    assert!(host.cgroup.pids().unwrap().contains(&identity.pid));
    fs::write(host.dir.join("fifo"), "\n").unwrap();
    eventually("its log is bounded as before", || fs::read(&host.log).is_ok_and(|log| log.starts_with(b"[earlier")))
        .await;
    let waiting = tokio::spawn({
        let process = process.clone();
        async move { process.exited().await }
    });
    assert_eq!(process.kill().await.unwrap(), Exit::Unknown);
    assert_eq!(waiting.await.unwrap(), Exit::Unknown);
    assert!(Process::adopt(&identity, &host.cgroup, &host.log).unwrap().is_none());
    host.end().await;
}

#[tokio::test]
async fn an_agent_killed_while_it_launches_leaves_nothing_untracked() {
    let host = Host::new();
    // A number of seconds that no other process sleeps is how the VMMs are recognised.
    let seconds = format!("4{}", std::process::id());
    let vmm = host.program(&format!("exec sleep {seconds}"));
    for round in 0..12 {
        let mut agent = host.agent("process::be_an_agent_that_launches_for_ever", &vmm);
        let mut first = [0];
        agent.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        tokio::time::sleep(Duration::from_micros(round * 700)).await;
        agent.kill().unwrap();
        agent.wait().unwrap();
        let tracked = || host.cgroup.pids().unwrap();
        // A child met by the guard's signal needs a moment to be gone.
        eventually("all that runs is tracked", || sleepers(&seconds).iter().all(|pid| tracked().contains(pid))).await;
        let guarded = format!("--exact\0{}", "process::be_an_agent_that_launches_for_ever");
        eventually("no half-made child is left", || {
            processes(|cmdline| cmdline.contains(&guarded)).iter().all(|pid| tracked().contains(pid))
        })
        .await;
        host.cgroup.kill().await.unwrap();
        assert!(sleepers(&seconds).is_empty());
    }
    host.end().await;
}

fn sleepers(seconds: &str) -> Vec<u32> {
    processes(|cmdline| cmdline == format!("sleep\0{seconds}\0"))
}

fn processes(matches: impl Fn(&str) -> bool) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|cmdline| matches(&cmdline)))
        .collect()
}

/// Not a test by itself: what the test above runs in another process, to kill it.
#[tokio::test]
#[expect(clippy::print_stdout, reason = "this is how it speaks to the test that started it")]
async fn be_the_agent() {
    let Some(host) = Host::inherited(AGENT) else { return };
    let process = host.launch(&host.program).spawn().await.unwrap();
    println!("\nidentity {}", serde_json::to_string(&process.identity()).unwrap());
    std::future::pending::<()>().await;
}

/// Not a test by itself either.
#[tokio::test]
#[expect(clippy::print_stdout, reason = "this is how it speaks to the test that started it")]
async fn be_an_agent_that_launches_for_ever() {
    let Some(host) = Host::inherited(AGENT) else { return };
    loop {
        println!("launching");
        host.launch(&host.program).spawn().await.unwrap();
    }
}

impl Host {
    fn agent(&self, test: &str, vmm: &Path) -> std::process::Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(AGENT, self.inheritance(vmm))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }
}
