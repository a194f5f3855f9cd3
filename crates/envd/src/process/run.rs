//! The task that owns a process, from before its first instruction until its last output is handed over.

use super::log::{Log, Reader};
use super::plan::{Plan, Streams};
use super::stdio::{self, Output};
use super::{End, Outcome, Process, Processes, StartError};
use crate::cgroup::{Class, Leaf, SYSTEM_TAG};
use crate::reaper::Exit;
use crate::sys::spawn::{Identity, Spawn};
use rustix::process::{Pid, Signal, WaitStatus};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long output may follow the process's own end while a descendant holds its pipes: a `tee` behind a shell finishes well
/// within it, a daemon does not delay the end by more.
const GRACE: Duration = Duration::from_millis(100);
/// Sooner victims of memory shortage than anything of the system's; envd itself is exempt.
const OOM_SCORE_ADJ: &std::ffi::CStr = c"100";
/// The usual soft limit of open files; envd's own is higher.
const OPEN_FILES: u64 = 1024;

type Started = Result<(Arc<Process>, Reader<Outcome>), StartError>;

/// Starts the process, reports that, and stays until its end is recorded.
pub(super) async fn own(
    processes: Arc<Processes>,
    plan: Plan,
    deadline: Option<Instant>,
    report: oneshot::Sender<Started>,
) {
    let (process, outputs, leaf, exit) = match start(&processes, plan).await {
        Ok(started) => started,
        Err(error) => {
            let _ = report.send(Err(error));
            return;
        }
    };
    // A caller that has left is a reader that has left.
    let _ = report.send(Ok((Arc::clone(&process), process.subscribe())));

    let outcome = carry(&processes, &process, &outputs, leaf.as_ref(), exit, deadline).await;
    process.exited.store(true, Ordering::Release);
    process.exit.notify_waiters();
    drain(&process.log, outputs).await;
    *process.input.lock().await = None;
    drop(leaf);
    // Into the table of the ended first: who sees the end can rely on finding it there.
    processes.retire(&process);
    process.log.finish(outcome);
}

async fn start(
    processes: &Arc<Processes>,
    plan: Plan,
) -> Result<(Arc<Process>, Vec<Output>, Option<Leaf>, Exit), StartError> {
    let (child, ours) = stdio::open(plan.streams, plan.user.uid).map_err(StartError::Streams)?;
    let terminal = matches!(plan.streams, Streams::Terminal(_));
    let leaf = match plan.tag.as_deref() {
        Some(SYSTEM_TAG) => None,
        _ => processes.cgroups.leaf(if terminal { Class::Pty } else { Class::User }).map_err(StartError::Cgroup)?,
    };
    let reaper = Arc::clone(&processes.reaper);
    // The clone returns when the program is loaded, which may take a slow disk's time: not on a worker.
    let spawned = tokio::task::spawn_blocking(move || {
        let [stdin, stdout, stderr] = child.fds();
        let me = rustix::process::geteuid();
        let identity = Identity { uid: plan.user.uid, gid: plan.user.gid, groups: &plan.user.groups };
        let result = reaper.spawn(&Spawn {
            candidates: &plan.candidates,
            argv: &plan.argv,
            env: &plan.env,
            cwd: &plan.cwd,
            stdin,
            stdout,
            stderr,
            terminal,
            // Without root's rights envd can run processes as itself only; anything else fails in the child.
            identity: (me.is_root() || me.as_raw() != plan.user.uid).then_some(identity),
            cgroup: leaf.as_ref().map(rustix::fd::AsFd::as_fd),
            oom_score_adj: OOM_SCORE_ADJ,
            open_files: OPEN_FILES,
        });
        (result, plan, leaf)
    });
    let (result, plan, leaf) = spawned.await.map_err(|_| StartError::Gone)?;
    let (pid, exit) = result.map_err(StartError::Spawn)?;
    let process = Arc::new(Process {
        pid,
        config: plan.config,
        tag: plan.tag,
        started: Instant::now(),
        log: Arc::new(Log::default()),
        input: tokio::sync::Mutex::new(ours.input),
        terminal: ours.terminal.as_ref().map(Arc::downgrade),
        exited: AtomicBool::new(false),
        exit: tokio::sync::Notify::new(),
    });
    processes.enter(Arc::clone(&process));
    Ok((process, ours.outputs, leaf, exit))
}

/// Carries output until the process has exited, killing it and all its descendants at the deadline.
async fn carry(
    processes: &Processes,
    process: &Process,
    outputs: &[Output],
    leaf: Option<&Leaf>,
    mut exit: Exit,
    deadline: Option<Instant>,
) -> Outcome {
    let pumps = futures::future::join_all(outputs.iter().map(|output| pump(output, &process.log)));
    tokio::pin!(pumps);
    let mut pumping = true;
    let mut due = deadline;
    let status = loop {
        tokio::select! {
            biased;
            status = &mut exit => break status,
            () = wait_until(due) => {
                kill(processes, process.pid, leaf);
                due = None;
            }
            _ = &mut pumps, if pumping => pumping = false,
        }
    };
    // The reaper lives as long as the runtime.
    let end = status.map_or(End::Exited(-1), end_of);
    // It may have ended by itself in the very moment.
    let killed = matches!(end, End::Signaled { signal: libc::SIGKILL, .. });
    Outcome { end, timed_out: killed && deadline.is_some() && due.is_none() }
}

fn kill(processes: &Processes, pid: Pid, leaf: Option<&Leaf>) {
    processes.reaper.signal_group(pid, Signal::KILL);
    if let Some(leaf) = leaf
        && let Err(error) = leaf.kill()
    {
        tracing::warn!(%error, "cannot kill a control group");
    }
}

async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn end_of(status: WaitStatus) -> End {
    match status.terminating_signal() {
        Some(signal) => End::Signaled { signal, core: status.as_raw() & 0x80 != 0 },
        None => End::Exited(status.exit_status().unwrap_or(-1)),
    }
}

/// Carries one stream to its end, at the readers' pace.
async fn pump(output: &Output, log: &Arc<Log<Outcome>>) -> io::Result<()> {
    let mut buffer = vec![0; output.source.item_bytes()];
    loop {
        log.room().await;
        match output.read(&mut buffer).await? {
            0 => return Ok(()),
            read => log.append(output.source, &buffer[..read]),
        }
    }
}

/// Carries what an exited process has left in its pipes.
///
/// What it wrote is in there by now, so that much is carried without fail. Descendants that hold the pipes get [`GRACE`] to
/// finish; whoever still holds them then goes on undisturbed, its output read and dropped so that it neither blocks nor dies
/// of SIGPIPE.
async fn drain(log: &Arc<Log<Outcome>>, outputs: Vec<Output>) {
    for output in &outputs {
        carry_readable(log, output).await;
    }
    let finish = futures::future::join_all(outputs.iter().map(|output| pump(output, log)));
    if tokio::time::timeout(GRACE, finish).await.is_ok() {
        return;
    }
    for output in outputs {
        carry_readable(log, &output).await;
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while output.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        });
    }
}

/// Carries exactly what can be read now, however much is added meanwhile.
async fn carry_readable(log: &Arc<Log<Outcome>>, output: &Output) {
    let mut left = output.readable() as usize;
    let mut buffer = vec![0; left.min(output.source.item_bytes())];
    while left > 0 {
        log.room().await;
        let most = left.min(buffer.len());
        match output.read(&mut buffer[..most]).await {
            Ok(read) if read > 0 => {
                log.append(output.source, &buffer[..read]);
                left -= read;
            }
            _ => return,
        }
    }
}
