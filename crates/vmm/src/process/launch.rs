//! From a description of a VMM to its process: everything that happens between `fork` and `exec`.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use tokio::sync::oneshot;

use super::{Error, Identity, Process};
use crate::cgroup::Cgroup;
use crate::{API_SOCKET, CAPSULE_DIR, DUMP_DIR};

/// All of the host's memory may go there: the VMM's control group is what bounds it.
const DUMP_OPTIONS: &CStr = c"mode=0700,size=100%";

/// Score added for the kernel's out-of-memory killer: a guest goes before the agent and the host's own services do.
const OOM_SCORE_ADJ: &[u8] = b"500";

/// What a VMM is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program. Gets `--api-sock {CAPSULE_DIR}/api.sock --id {id}`.
    pub binary: &'a Path,
    /// Firecracker's instance id: letters, digits and dashes.
    pub id: &'a str,
    /// The capsule's own directory on the host; the VMM sees it as [`CAPSULE_DIR`], and makes its socket there.
    pub dir: &'a Path,
    /// The file that holds its network namespace, in a directory of nothing else.
    pub netns: &'a Path,
    /// The group it joins; must exist.
    pub cgroup: &'a Cgroup,
    /// Gets what it prints, appended; begun anew whenever it has grown past 4 MiB.
    pub log: &'a Path,
}

/// A program that serves one VMM (its pager), and lives and dies with it: in the same cgroup, and like it not bound to the
/// agent. It stays in the host's own namespaces.
#[derive(Debug)]
pub struct Companion<'a> {
    /// The program.
    pub binary: &'a Path,
    /// What it is told.
    pub args: &'a [&'a OsStr],
    /// What it finds in its environment, besides what finds programs.
    pub environment: &'a [(&'a str, &'a str)],
    /// Where it is started.
    pub dir: &'a Path,
    /// The group it joins; must exist.
    pub cgroup: &'a Cgroup,
    /// Gets what it prints, appended; begun anew whenever it has grown past 4 MiB.
    pub log: &'a Path,
}

/// How far a child came on its way to being the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Making the child.
    Fork,
    /// Making sure that it cannot outlive the agent untracked.
    Guard,
    /// Joining its cgroup.
    Cgroup,
    /// Leaving the agent's session, signal handlers and limits behind.
    Detach,
    /// Making its mount namespace.
    MountNamespace,
    /// Mounting the capsule's directory at the fixed place, and memory for its dumps in it.
    CapsuleDir,
    /// Entering its network namespace.
    NetworkNamespace,
    /// Becoming the program.
    Exec,
}

impl Step {
    const ALL: [Self; 8] = [
        Self::Fork,
        Self::Guard,
        Self::Cgroup,
        Self::Detach,
        Self::MountNamespace,
        Self::CapsuleDir,
        Self::NetworkNamespace,
        Self::Exec,
    ];
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fork => "fork failed",
            Self::Guard => "the agent is ending",
            Self::Cgroup => "it could not join its control group",
            Self::Detach => "it could not detach from the agent",
            Self::MountNamespace => "it could not make a mount namespace",
            Self::CapsuleDir => "it could not mount the capsule's directory",
            Self::NetworkNamespace => "it could not enter the network namespace",
            Self::Exec => "it could not be executed",
        })
    }
}

impl Launch<'_> {
    /// Starts the VMM and returns once it is executed; its socket appears later.
    ///
    /// If the caller stops waiting, whatever was started meanwhile is killed again.
    pub async fn spawn(&self) -> Result<Process, Error> {
        let (command, child) = self.prepare()?;
        spawn(command, child, self.binary, self.cgroup).await
    }

    /// Everything that allocates or can fail on the host's side.
    fn prepare(&self) -> Result<(Command, Child), Error> {
        let dir = fs::canonicalize(self.dir).map_err(refused("find", self.dir))?;
        let dump = dir.join(DUMP_DIR);
        for made in [Path::new(CAPSULE_DIR), &dump] {
            fs::create_dir_all(made).map_err(refused("create", made))?;
        }
        let socket = dir.join(API_SOCKET);
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refused("remove", &socket)(error)),
            _ => {}
        }
        let room = Room {
            netns: File::open(self.netns).map_err(refused("open", self.netns))?,
            netns_dir: text(self.netns.parent().unwrap_or(Path::new("/")))?,
            dir: text(&dir)?,
            capsule_dir: text(Path::new(CAPSULE_DIR))?,
            dump_dir: text(&Path::new(CAPSULE_DIR).join(DUMP_DIR))?,
        };
        let mut command = command(self.binary, self.log)?;
        command.arg("--api-sock").arg(Path::new(CAPSULE_DIR).join(API_SOCKET)).args(["--id", self.id]);
        command.current_dir("/");
        Ok((command, Child::new(self.cgroup, Some(room))?))
    }
}

impl Companion<'_> {
    /// Starts the program and returns once it is executed.
    ///
    /// If the caller stops waiting, whatever was started meanwhile is killed again.
    pub async fn spawn(&self) -> Result<Process, Error> {
        let mut command = command(self.binary, self.log)?;
        command.args(self.args).envs(self.environment.iter().copied()).current_dir(self.dir);
        spawn(command, Child::new(self.cgroup, None)?, self.binary, self.cgroup).await
    }
}

/// A command without arguments yet. The agent's environment has its secrets; it gets only what finds programs.
fn command(binary: &Path, log: &Path) -> Result<Command, Error> {
    let mut command = Command::new(fs::canonicalize(binary).map_err(refused("find", binary))?);
    let out = OpenOptions::new().create(true).append(true).mode(0o600).open(log).map_err(refused("open", log))?;
    let errors = out.try_clone().map_err(refused("open", log))?;
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command.stdin(Stdio::null()).stdout(out).stderr(errors);
    Ok(command)
}

async fn spawn(command: Command, child: Child, binary: &Path, cgroup: &Cgroup) -> Result<Process, Error> {
    let (sender, receiver) = oneshot::channel();
    let program = binary.to_owned();
    // Forking and mounting take milliseconds, and the agent has other capsules to attend to.
    tokio::task::spawn_blocking(move || {
        if let Err(Ok((_, pidfd))) = sender.send(start(command, child, &program)) {
            // The process ends by this and not by its cgroup, which may be gone or be another's by now.
            let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
            super::reap(&pidfd);
        }
    });
    let (identity, pidfd) = receiver.await.map_err(|_| Error::Start {
        binary: binary.to_owned(),
        step: Step::Fork,
        source: io::Error::other("the runtime is shutting down"),
    })??;
    Process::watch(identity, cgroup.clone(), pidfd)
}

fn text(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::Nul(path.display().to_string()))
}

fn refused<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::File { doing, path: path.to_owned(), source }
}

/// Forks and executes. Returns only after both, so that the calling thread, which the child's guard is bound to, is there
/// for as long as the guard is.
fn start(mut command: Command, child: Child, binary: &Path) -> Result<(Identity, OwnedFd), Error> {
    let failed = |step, source| Error::Start { binary: binary.to_owned(), step, source };
    let (progress, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(Step::Fork, error.into()))?;
    // SAFETY: the closure runs in the forked child, where other threads of the agent do not exist and their locks may be
    // held for ever. `Child::become_program` and the write below make system calls only: they neither allocate nor lock, and all
    // that they use was made before the fork.
    unsafe {
        command.pre_exec(move || {
            let mut reached = Step::Guard;
            child.become_program(&mut reached).inspect_err(|_| {
                let _ = rustix::io::write(&writer, &[reached as u8]);
            })
        });
    }
    let spawned = command.spawn();
    // The closure owns the writing end; without it the read below ends.
    drop(command);
    let spawned = spawned.map_err(|source| {
        let mut reached = [Step::Exec as u8];
        let told = File::from(progress).read(&mut reached);
        let step = if told.is_ok() { Step::ALL.get(usize::from(reached[0])) } else { None };
        failed(step.copied().unwrap_or(Step::Exec), source)
    })?;
    // Nobody reaped it, so its pid is still its own, even if it has ended already.
    let pid = spawned.id();
    let unwatched = |source| Error::Watch { pid, source };
    let pidfd = super::open(pid)?.ok_or_else(|| unwatched(io::ErrorKind::NotFound.into()))?;
    let identity = Identity::of(pid).ok_or_else(|| unwatched(io::ErrorKind::NotFound.into()))?;
    Ok((identity, pidfd))
}

/// What the child has in hand after the fork.
struct Child {
    agent: Pid,
    cgroup: File,
    /// Where a VMM is shut in; a companion is not.
    room: Option<Room>,
}

/// The namespaces of a VMM, and what is in them.
struct Room {
    netns: File,
    netns_dir: CString,
    dir: CString,
    capsule_dir: CString,
    dump_dir: CString,
}

impl Child {
    fn new(cgroup: &Cgroup, room: Option<Room>) -> Result<Self, Error> {
        let procs = cgroup.path().join("cgroup.procs");
        let cgroup = OpenOptions::new().write(true).open(&procs).map_err(refused("open", &procs))?;
        Ok(Self { agent: rustix::process::getpid(), cgroup, room })
    }

    /// Turns the forked child into the process that the program is executed in. Runs after `fork`: system calls only.
    fn become_program(&self, reached: &mut Step) -> io::Result<()> {
        // Until it is in its cgroup, nobody who comes after the agent could find it: it must die with the agent.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(self.agent) {
            // The agent died before the guard was up.
            return Err(Errno::CANCELED.into());
        }
        *reached = Step::Cgroup;
        rustix::io::write(&self.cgroup, b"0")?;
        rustix::process::set_parent_process_death_signal(None)?;
        *reached = Step::Detach;
        detach()?;
        if let Some(room) = &self.room {
            room.enter(reached)?;
        }
        *reached = Step::Exec;
        close_all_on_exec()
    }
}

impl Room {
    /// Makes the mount namespace and enters the network namespace. Runs after `fork`: system calls only.
    fn enter(&self, reached: &mut Step) -> io::Result<()> {
        *reached = Step::MountNamespace;
        // SAFETY: a new mount namespace shares no memory or descriptors differently; this child has one thread.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
        // Unmounting on the host still reaches this namespace, but nothing mounted here reaches the host.
        rustix::mount::mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        // Where the directory of network namespaces is a mount of its own, this namespace must not keep alive every
        // namespace that existed when it was made.
        match rustix::mount::unmount(self.netns_dir.as_c_str(), UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        *reached = Step::CapsuleDir;
        rustix::mount::mount_bind(self.dir.as_c_str(), self.capsule_dir.as_c_str())?;
        // What the guest had in memory goes here and never to a disk as it is; it is gone with the VMM.
        let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
        rustix::mount::mount(c"tmpfs", self.dump_dir.as_c_str(), c"tmpfs", flags, Some(DUMP_OPTIONS))?;
        *reached = Step::NetworkNamespace;
        rustix::thread::move_into_link_name_space(self.netns.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(())
    }
}

/// Own session, default signals, private files, no core dumps (they would hold the guest's memory).
fn detach() -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let score = rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    // Lowering it is a privilege of its own, which an agent that runs with a higher score may lack: then that one stays.
    let _ = rustix::io::write(&score, OOM_SCORE_ADJ);
    // SAFETY: `default` and `none` are plain data for which all zeroes is valid (SIG_DFL, no flags; the empty set), both live
    // across the calls, and the calls are async-signal-safe. Signals that cannot be set answer EINVAL, which is fine.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        for signal in 1..=libc::SIGRTMAX() {
            libc::sigaction(signal, &default, std::ptr::null_mut());
        }
        let none: libc::sigset_t = std::mem::zeroed();
        if libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Marks every descriptor above the standard three, also those that some library forgot to mark. Kernels before 5.11
/// cannot; there it is left to those who open descriptors, who all mark them.
fn close_all_on_exec() -> io::Result<()> {
    // SAFETY: the call takes three numbers and touches no memory. It closes nothing now, so descriptors owned by values in
    // this process stay valid until the image is replaced.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) { Ok(()) } else { Err(error) }
}
