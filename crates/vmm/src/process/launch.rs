//! What a VMM, or its pager, is started with.

use std::ffi::{CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use tokio::sync::oneshot;

use super::child::{Child, Step, start};
use super::{Error, Process};
use crate::cgroup::{Cgroup, Limits};
use crate::jail::{Plan, Size, text};
use crate::{API_SOCKET, CAPSULE_DIR, SCRATCH_DIR};

/// What a VMM is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program. Gets `--api-sock {CAPSULE_DIR}/{SCRATCH_DIR}/api.sock --id {id}`.
    pub binary: &'a Path,
    /// Firecracker's instance id: letters, digits and dashes.
    pub id: &'a str,
    /// A directory on the host with what the VMM is given, that no user but the agent's may change; the VMM sees it as
    /// [`CAPSULE_DIR`], and reads and writes the files in it that are its user's.
    pub dir: &'a Path,
    /// The guest kernel, which anybody may read; the VMM sees it as [`KERNEL`](crate::KERNEL).
    pub kernel: &'a Path,
    /// The file that holds its network namespace.
    pub netns: &'a Path,
    /// The group it is born in, which gets the limits that follow from its size; must exist. Nobody may have been killed by it
    /// before: the kernel (6.18) then ends whoever is born in it, too.
    pub cgroup: &'a Cgroup,
    /// Gets what it prints, appended; begun anew whenever it has grown past 4 MiB.
    pub log: &'a Path,
    /// The user, and group, that it runs as: nobody else on this machine may be that.
    pub user: u32,
    /// What its guest has.
    pub size: Size,
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
    /// The group it is born in; must exist.
    pub cgroup: &'a Cgroup,
    /// Gets what it prints, appended; begun anew whenever it has grown past 4 MiB.
    pub log: &'a Path,
}

impl Launch<'_> {
    /// Starts the VMM and returns once it is executed; its socket appears later.
    ///
    /// If the caller stops waiting, whatever was started meanwhile is killed again.
    pub async fn spawn(&self) -> Result<Process, Error> {
        spawn(self.prepare()?, self.binary, self.cgroup, self.log).await
    }

    /// Everything that allocates or can fail on the host's side.
    fn prepare(&self) -> Result<Child, Error> {
        let found = |path| fs::canonicalize(path).map_err(refused("find", path));
        let (program, dir, kernel) = (found(self.binary)?, found(self.dir)?, found(self.kernel)?);
        self.cgroup.set_limits(&Limits::of(&self.size, &dir))?;
        let (netns, user, size) = (self.netns, self.user, self.size);
        let plan = Plan { program: &program, dir: &dir, kernel: &kernel, netns, user, size };
        let socket = Path::new(CAPSULE_DIR).join(SCRATCH_DIR).join(API_SOCKET);
        let args = ["--api-sock".as_ref(), socket.as_os_str(), "--id".as_ref(), self.id.as_ref()];
        let (jail, inside) = (plan.jail()?, plan.program());
        child(&inside, &args, &[], Path::new("/"), self.log, self.cgroup)
            .map(|child| Child { jail: Some(jail), ..child })
    }
}

impl Companion<'_> {
    /// Starts the program and returns once it is executed.
    ///
    /// If the caller stops waiting, whatever was started meanwhile is killed again.
    pub async fn spawn(&self) -> Result<Process, Error> {
        let program = fs::canonicalize(self.binary).map_err(refused("find", self.binary))?;
        let child = child(&program, self.args, self.environment, self.dir, self.log, self.cgroup)?;
        spawn(child, self.binary, self.cgroup, self.log).await
    }
}

/// The agent's environment has its secrets; a child gets only what finds programs, and what it is given.
fn child(
    program: &Path,
    args: &[&OsStr],
    environment: &[(&str, &str)],
    dir: &Path,
    log: &Path,
    cgroup: &Cgroup,
) -> Result<Child, Error> {
    let c_string = |bytes: &[u8]| {
        CString::new(bytes).map_err(|error| Error::Nul(String::from_utf8_lossy(&error.into_vec()).into_owned()))
    };
    let words = [program.as_os_str()].into_iter().chain(args.iter().copied());
    let path = std::env::var_os("PATH").map(|path| [b"PATH=", path.as_bytes()].concat());
    let given = environment.iter().map(|(name, value)| format!("{name}={value}").into_bytes());
    let null = Path::new("/dev/null");
    Ok(Child {
        program: text(program)?,
        args: words.map(|word| c_string(word.as_bytes())).collect::<Result<_, _>>()?,
        environment: path.into_iter().chain(given).map(|pair| c_string(&pair)).collect::<Result<_, _>>()?,
        dir: text(dir)?,
        input: File::open(null).map_err(refused("open", null))?,
        output: open_log(log).map_err(refused("open", log))?,
        cgroup: open_directory(cgroup.path()).map_err(refused("open", cgroup.path()))?,
        jail: None,
    })
}

fn open_log(log: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(log)
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

async fn spawn(child: Child, binary: &Path, cgroup: &Cgroup, log: &Path) -> Result<Process, Error> {
    let (sender, receiver) = oneshot::channel();
    let program = binary.to_owned();
    // Forking and mounting take milliseconds, and the agent has other capsules to attend to.
    tokio::task::spawn_blocking(move || {
        if let Err(Ok((_, pidfd))) = sender.send(start(&child, &program)) {
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
    Process::watch(identity, cgroup.clone(), pidfd, log)
}

fn refused<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::File { doing, path: path.to_owned(), source }
}
