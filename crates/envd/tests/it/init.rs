//! envd as pid 1, in namespaces of its own on a root of its own: this machine stays as it is. Needs root.

use crate::harness::*;
use connectrpc::ErrorCode;
use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use guest_api::process::ProcessClient;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A guest without a kernel: new namespaces, this machine's `/usr` read-only below a fresh root, and a control group of its
/// own to be the root of what it sees.
pub struct Guest {
    outer: Child,
    pub init: u32,
    pub cgroup: PathBuf,
    _root: tempfile::TempDir,
}

impl Guest {
    pub async fn boot() -> Guest {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().display();
        let envd = env!("CARGO_BIN_EXE_envd");
        let script = format!(
            "set -e; mount --make-rprivate /; mount -t tmpfs root {at}; cd {at}
             mkdir -p proc sys dev run tmp etc root usr old; touch usr/envd
             mount --rbind -o ro /usr usr; for l in bin sbin lib lib64; do ln -s usr/$l $l; done
             cp /etc/passwd /etc/group etc/; echo '127.0.0.1 localhost' > etc/hosts
             cp {envd} envd; mount -t proc proc proc; pivot_root . old; cd /; umount -l /old; umount /proc; exec /envd"
        );
        let cgroup = cgroup2().join(format!("envd-test-{}", root.path().file_name().unwrap().to_str().unwrap()));
        std::fs::create_dir(&cgroup).unwrap();
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", cgroup.display());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &enter, "enter", "unshare", "--pid", "--mount", "--net", "--uts", "--cgroup", "--fork"]);
        command.args(["--kill-child", "/bin/sh", "-c", &script]);
        let outer = command.stdin(Stdio::null()).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", outer.id());
        let init = || std::fs::read_to_string(&children).ok()?.split_whitespace().next()?.parse().ok();
        eventually("a first process", || init().is_some()).await;
        let guest = Guest { init: init().expect("the first process has not failed"), outer, cgroup, _root: root };
        eventually("the network namespace's listener", || {
            assert!(is_alive(guest.init), "init has failed");
            // 0xC33F is 49983; state 0A is LISTEN.
            std::fs::read_to_string(format!("/proc/{}/net/tcp", guest.init))
                .is_ok_and(|table| table.lines().any(|line| line.contains(":C33F 00000000:0000 0A")))
        })
        .await;
        guest
    }

    /// Runs a future's client inside the guest's network: a thread of its own enters the namespace.
    pub fn inside<T: Send + 'static>(&self, work: impl AsyncFnOnce(Client) -> T + Send + 'static) -> T {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.init)).unwrap();
        let thread = std::thread::spawn(move || {
            use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
            move_into_link_name_space(rustix::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network)).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let config = ClientConfig::new(format!("http://127.0.0.1:{}", guest_api::PORT).parse().unwrap());
            runtime.block_on(work(ProcessClient::new(HttpClient::plaintext(), config)))
        });
        thread.join().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // With init everything in its pid namespace dies.
        std::fs::write(self.cgroup.join("cgroup.kill"), "1").unwrap();
        self.outer.wait().unwrap();
        remove_cgroup(&self.cgroup);
    }
}

/// Where this machine has its cgroup2 hierarchy.
fn cgroup2() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup2 hierarchy");
    PathBuf::from(line.split(' ').nth(1).unwrap())
}

/// Removes a control group and all below it, once they are empty.
fn remove_cgroup(path: &Path) {
    for entry in std::fs::read_dir(path).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroup(&entry.path());
    }
    while let Err(error) = std::fs::remove_dir(path) {
        assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{}", path.display());
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn init_makes_the_guest_habitable() {
    let guest = Guest::boot().await;
    let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", guest.init)).unwrap();
    for (target, kind) in [
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/dev", "devtmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/run", "tmpfs"),
        ("/tmp", "tmpfs"),
        ("/sys/fs/cgroup", "cgroup2"),
    ] {
        let mounted = mounts.lines().filter(|line| {
            let mut fields = line.split(' ').skip(1);
            fields.next() == Some(target) && fields.next() == Some(kind)
        });
        assert_eq!(mounted.count(), 1, "{target}: {kind} once in\n{mounts}");
    }
    let run = guest.inside(async |client| {
        let script = "hostname; cat /etc/hosts /etc/resolv.conf; cat /sys/class/net/lo/flags; stat -c %a /tmp /run /dev/shm; \
            readlink /dev/fd; echo $$; tty; nice";
        run(&client, sh(script)).await
    });
    let out = run.out();
    let expected = "capsule\n127.0.0.1 localhost\n127.0.1.1 capsule\nnameserver 8.8.8.8\nnameserver 8.8.4.4\n0x9\n1777\n755\n1777\n\
        /proc/self/fd\n";
    assert!(out.starts_with(expected), "{out}");
    let rest: Vec<&str> = out[expected.len()..].lines().collect();
    assert_eq!(rest, [run.pid.to_string().as_str(), "not a tty", "0"]);
    assert_eq!(run.end.exit_code, 0);
}

#[tokio::test]
async fn orphans_are_reaped_and_no_status_is_lost() {
    let guest = Guest::boot().await;
    guest.inside(async |client| {
        for number in 0..100 {
            // An orphan that ends while its parent's status is on the way, and one that ends later.
            let run = run(&client, sh(&format!("(sh -c 'exit 9' & sleep 0.0{} &) ; exit {number}", number % 10))).await;
            assert_eq!(run.end.exit_code, number);
        }
    });
    let tasks = || std::fs::read_dir(format!("/proc/{}/task", guest.init)).unwrap().flatten();
    eventually("no zombies", || {
        tasks()
            .all(|task| std::fs::read_to_string(task.path().join("children")).is_ok_and(|list| list.trim().is_empty()))
    })
    .await;
}

#[tokio::test]
async fn a_timeout_reaches_those_who_left_the_session_and_no_group_stays() {
    let guest = Guest::boot().await;
    let (error, left) = guest.inside(async |client| {
        let options = CallOptions::default().with_timeout(Duration::from_millis(1500));
        // Out of the session, the group and the family, but not out of the control group.
        let script = "setsid sh -c 'sleep 1000 & sleep 1000' & sleep 1000";
        let error = run_with(&client, sh(script), options).await.unwrap_err();
        let mut left = usize::MAX;
        while left != 0 {
            let run = run(&client, sh("ls /proc/*/exe >/dev/null 2>&1; grep -l sleep /proc/*/comm | wc -l")).await;
            left = run.out().trim().parse().unwrap();
        }
        (error, left)
    });
    assert_eq!((error.code, left), (ErrorCode::DeadlineExceeded, 0));
    let groups =
        || std::fs::read_dir(guest.cgroup.join("work/user")).unwrap().flatten().filter(|e| e.path().is_dir()).count();
    // One may stay until the next process ends: its members were still dying.
    eventually("the leaves' end", || groups() <= 1).await;
    guest.inside(async |client| run(&client, sh("exit 0")).await);
    eventually("the leaves' end", || groups() == 0).await;
}

#[tokio::test]
async fn init_stops_the_machine_when_told_to() {
    let mut guest = Guest::boot().await;
    let client_saw = guest.inside(async |client| {
        let mut stream = start(
            &client,
            sh("trap 'echo stopping; exit 0' TERM; echo ready; while :; do sleep 0.05; done"),
            CallOptions::default(),
        )
        .await
        .unwrap();
        stream.started().await;
        stream.until("ready\n").await;
        run(&client, sh("kill -TERM 1")).await;
        stream.until("stopping\n").await
    });
    assert!(client_saw.ends_with(b"stopping\n"), "{}", String::from_utf8_lossy(&client_saw));
    // In a pid namespace the reset is the end of init, as SIGHUP.
    guest.outer.wait().unwrap();
    assert!(!is_alive(guest.init));
}

#[tokio::test]
async fn terminals_work_in_a_fresh_guest() {
    let guest = Guest::boot().await;
    let run = guest.inside(async |client| {
        let mut request = sh("tty; stty size; echo $TERM");
        request.pty = guest_api::process::PTY::default().into();
        run(&client, request).await
    });
    assert_eq!(String::from_utf8(run.pty).unwrap(), "/dev/pts/0\r\n24 80\r\nxterm-256color\r\n");
}
