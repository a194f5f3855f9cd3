//! The QEMU process: started with what it inherits, never outliving this one.

pub mod argv;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::timeout;

use crate::api::types::Serial;
use crate::machine::config::VmConfig;
use crate::memory::Memory;
use crate::qmp::{self, Event, Qmp};
use argv::{Inherited, Origin, Userfault};

const PROGRAM: &str = "qemu-system-x86_64";

/// The file name of the plugin, which lies beside this executable.
const PLUGIN: &str = "libfirecracker_qemu_uffd.so";

/// Lines of QEMU's standard error kept for a fault message.
const KEPT_LINES: usize = 8;

/// How long a migration may take; a restore waits for a page-fault handler it does not control.
const MIGRATION: Duration = Duration::from_secs(60);

/// A killed process is gone in milliseconds, unless its files are on a device that hangs.
const REAPED: Duration = Duration::from_secs(2);

/// Why QEMU did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot start {PROGRAM}")]
    Spawn(#[source] io::Error),
    #[error("cannot find {PLUGIN} beside {0}")]
    NoPlugin(PathBuf),
    #[error("cannot make a socket for QEMU")]
    Socket(#[source] io::Error),
    #[error("cannot open the serial port's output {path}")]
    Serial { path: PathBuf, source: io::Error },
    #[error("QEMU ended: {0}")]
    Ended(String),
    #[error(transparent)]
    Monitor(#[from] qmp::Error),
    #[error("QEMU could not {what} its device state: {status}")]
    Migration { what: &'static str, status: String },
    #[error("cannot pass the device state")]
    DeviceState(#[source] io::Error),
}

/// A started QEMU whose vCPUs do not run yet, or whatever it was told since. Dropping it kills it.
pub struct Qemu {
    qmp: Qmp,
    pid: u32,
    /// The plugin's socket, where there is a plugin.
    pub handshake: Option<UnixStream>,
    errors: Arc<Mutex<VecDeque<String>>>,
    exit: watch::Receiver<Option<ExitStatus>>,
    /// Closing it tells the supervisor to kill.
    _alive: mpsc::Sender<()>,
}

impl Qemu {
    /// Starts QEMU for `config` and waits until its monitor answers.
    pub async fn start(
        config: &VmConfig,
        origin: Origin<'_>,
        memory: &Memory,
        userfault: Option<Userfault>,
    ) -> Result<Self, Error> {
        let plugin = userfault.map(|userfault| Ok::<_, Error>((find_plugin()?, userfault))).transpose()?;
        let (monitor, their_monitor) = socket_pair()?;
        let (handshake, their_handshake) = match plugin {
            Some(_) => socket_pair().map(|(ours, theirs)| (Some(ours), Some(theirs)))?,
            None => (None, None),
        };
        let fds = Inherited {
            memory: memory.file().as_raw_fd(),
            monitor: their_monitor.as_raw_fd(),
            handshake: their_handshake.as_ref().map(|socket| socket.as_raw_fd()),
        };
        let plugin = plugin.as_ref().map(|(path, userfault)| (path.as_path(), *userfault));
        let arguments = argv::arguments(config, origin, fds, plugin);
        tracing::debug!(?arguments, "starting QEMU");
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env_clear().stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.stdout(console(config.serial.as_ref())?);
        let inherited = [Some(fds.memory), Some(fds.monitor), fds.handshake];
        bind_to_this_process(&mut command, inherited);
        let mut child = command.spawn().map_err(Error::Spawn)?;
        drop((their_monitor, their_handshake));

        let pid = child.id().unwrap_or_default();
        let errors = Arc::new(Mutex::new(VecDeque::new()));
        let drained = child.stderr.take().map(|stderr| tokio::spawn(keep_errors(stderr, Arc::clone(&errors))));
        let (alive, dropped) = mpsc::channel(1);
        let (exited, exit) = watch::channel(None);
        tokio::spawn(supervise(child, drained, dropped, exited));
        match Qmp::connect(monitor).await {
            Ok(qmp) => Ok(Self { qmp, pid, handshake, errors, exit, _alive: alive }),
            Err(qmp::Error::Closed) => Err(Error::Ended(last_words(exit, &errors).await)),
            Err(error) => Err(error.into()),
        }
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// `major.minor.micro`.
    pub fn version(&self) -> &str {
        &self.qmp.version
    }

    /// Runs one monitor command.
    pub async fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        match self.qmp.execute(command, arguments).await {
            Err(qmp::Error::Closed) => Err(self.ended().await),
            answer => Ok(answer?),
        }
    }

    /// QEMU's device state; its vCPUs must be stopped. After this they must run before the state can be taken again.
    pub async fn save_devices(&self) -> Result<Vec<u8>, Error> {
        let state = self.migrate_through("save", "migrate", Vec::new()).await?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut &state, &mut bytes).map_err(Error::DeviceState)?;
        Ok(bytes)
    }

    /// Loads device state into a QEMU started with [`Origin::Snapshot`].
    pub async fn load_devices(&self, state: Vec<u8>) -> Result<(), Error> {
        self.migrate_through("load", "migrate-incoming", state).await.map(drop)
    }

    /// Resolves when QEMU has ended, with whether the guest shut itself down and what QEMU's last words were.
    pub fn finished(&self) -> impl Future<Output = (bool, String)> + Send + use<> {
        let (ended, exit, errors) = (self.qmp.ended(), self.exit.clone(), Arc::clone(&self.errors));
        async move {
            let guest_shut_down = ended.await;
            (guest_shut_down, last_words(exit, &errors).await)
        }
    }

    /// Kills QEMU and waits until it is reaped.
    pub async fn kill(self) {
        let Self { mut exit, _alive: alive, .. } = self;
        drop(alive);
        // The supervisor reports the exit before it goes; an unkillable QEMU is left to the kernel.
        let _ = timeout(REAPED, exit.wait_for(Option::is_some)).await;
    }

    /// A memfd is both ends' file: QEMU has no other way to write where this process may not name a path.
    async fn migrate_through(
        &self,
        what: &'static str,
        command: &'static str,
        contents: Vec<u8>,
    ) -> Result<std::fs::File, Error> {
        let fd = rustix::fs::memfd_create("device-state", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| Error::DeviceState(e.into()))?;
        let mut file = std::fs::File::from(fd);
        io::Write::write_all(&mut file, &contents).map_err(Error::DeviceState)?;
        io::Seek::rewind(&mut file).map_err(Error::DeviceState)?;

        let on = |capability| json!({ "capability": capability, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        self.execute("migrate-set-capabilities", capabilities).await?;
        // The guest stays at its place in the network: it need not announce itself, five times, to nobody.
        let parameters = json!({ "max-bandwidth": 1_u64 << 40, "announce-rounds": 0 });
        self.execute("migrate-set-parameters", parameters).await?;
        self.qmp.give("device-state", file.as_fd()).await?;
        let mut events = self.qmp.events()?;
        self.execute(command, json!({ "uri": "fd:device-state" })).await?;
        match timeout(MIGRATION, migrated(&mut events)).await {
            Ok(Ok(status)) if status == "completed" => {}
            Ok(Ok(status)) => return Err(Error::Migration { what, status }),
            Ok(Err(())) => return Err(self.ended().await),
            Err(_) => return Err(Error::Migration { what, status: "not done in time".to_owned() }),
        }
        io::Seek::rewind(&mut file).map_err(Error::DeviceState)?;
        Ok(file)
    }

    async fn ended(&self) -> Error {
        Error::Ended(last_words(self.exit.clone(), &self.errors).await)
    }
}

/// The end of a migration, or an error when QEMU is gone.
async fn migrated(events: &mut broadcast::Receiver<Event>) -> Result<String, ()> {
    loop {
        match events.recv().await {
            Ok(Event::Migration { status }) if ["completed", "failed", "cancelled"].contains(&status.as_str()) => {
                return Ok(status);
            }
            Ok(Event::Migration { .. }) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return Err(()),
        }
    }
}

/// Leaves exactly `inherited` open across the exec, and makes the kernel kill QEMU when this process dies.
fn bind_to_this_process(command: &mut Command, inherited: [Option<i32>; 3]) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            // The parent died before the line above; nobody would end us.
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for number in inherited.into_iter().flatten() {
            // SAFETY: the descriptor is open: it was made before the fork and the parent closes it after the exec.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the child between fork and exec and makes only async-signal-safe system calls; it
    // allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// The guest's console is QEMU's standard output, wherever that goes.
fn console(serial: Option<&Serial>) -> Result<Stdio, Error> {
    let Some(path) = serial.and_then(|serial| serial.serial_out_path.as_ref()) else {
        return Ok(Stdio::inherit());
    };
    let file = open_console(path).map_err(|source| Error::Serial { path: path.clone(), source })?;
    Ok(file.into())
}

/// Opens a serial output file: an existing FIFO must not block for want of a reader.
pub fn open_console(path: &Path) -> io::Result<std::fs::File> {
    std::fs::File::options().read(true).append(true).create(true).open(path)
}

fn socket_pair() -> Result<(UnixStream, std::os::unix::net::UnixStream), Error> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(Error::Socket)?;
    ours.set_nonblocking(true).map_err(Error::Socket)?;
    Ok((UnixStream::from_std(ours).map_err(Error::Socket)?, theirs))
}

/// The plugin is installed beside the executable; cargo leaves it in `deps` where only a test builds it.
fn find_plugin() -> Result<PathBuf, Error> {
    let executable = std::env::current_exe().unwrap_or_default();
    let directory = executable.parent().unwrap_or(Path::new("/"));
    let candidates = [directory.join(PLUGIN), directory.join("deps").join(PLUGIN)];
    candidates.into_iter().find(|path| path.exists()).ok_or(Error::NoPlugin(executable))
}

/// Owns the child: reaps it when it ends, ends it when its [`Qemu`] is dropped.
async fn supervise(
    mut child: Child,
    drained: Option<tokio::task::JoinHandle<()>>,
    mut dropped: mpsc::Receiver<()>,
    exited: watch::Sender<Option<ExitStatus>>,
) {
    let status = tokio::select! {
        status = child.wait() => status,
        _ = dropped.recv() => {
            // An error means that it has just ended by itself.
            let _ = child.start_kill();
            child.wait().await
        }
    };
    if let Some(drained) = drained {
        // Its last words come before the news of its death.
        let _ = drained.await;
    }
    exited.send_replace(status.ok());
}

async fn keep_errors(stderr: ChildStderr, errors: Arc<Mutex<VecDeque<String>>>) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::warn!("QEMU: {line}");
        let mut errors = errors.lock().unwrap_or_else(|poison| poison.into_inner());
        if errors.len() == KEPT_LINES {
            errors.pop_front();
        }
        errors.push_back(line);
    }
}

async fn last_words(mut exit: watch::Receiver<Option<ExitStatus>>, errors: &Mutex<VecDeque<String>>) -> String {
    // The monitor closes just before the process ends; a QEMU that closes it and lingers is not waited for.
    let status = match timeout(Duration::from_secs(5), exit.wait_for(Option::is_some)).await {
        Ok(Ok(status)) => status.map_or_else(String::new, |status| status.to_string()),
        Ok(Err(_)) | Err(_) => "its monitor closed".to_owned(),
    };
    let errors = errors.lock().unwrap_or_else(|poison| poison.into_inner());
    errors.iter().fold(status, |text, line| format!("{text}; {line}"))
}
