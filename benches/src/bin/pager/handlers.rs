//! The processes that supply pages, each a child of the benchmark and this same program.

use std::io::{BufRead as _, BufReader, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;
use pager::{Config, PAGE, Pager};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{WaitId, WaitIdOptions};

use crate::Files;
use crate::memory::{Memory, copy_page};

/// What a child is.
#[derive(Debug, Subcommand)]
pub enum Role {
    #[command(hide = true)]
    Ours {
        directory: PathBuf,
        #[arg(long)]
        prefetch: Option<PathBuf>,
        #[arg(long)]
        record: Option<PathBuf>,
    },
    #[command(hide = true)]
    Minimal { directory: PathBuf, size: u64 },
}

/// A child that has the memory of this process.
pub struct Handler {
    child: Child,
    /// Kept open, as VMMs do.
    _stream: UnixStream,
}

impl Handler {
    /// The pager; with a working set to record (`true`) or to fetch.
    pub fn ours(files: &Files, memory: &Memory, set: Option<(&Path, bool)>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("ours").arg(files.directory.path());
        if let Some((path, record)) = set {
            command.arg(if record { "--record" } else { "--prefetch" }).arg(path);
        }
        Self::start(command, files, memory)
    }

    /// One page per fault.
    pub fn minimal(files: &Files, memory: &Memory) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("minimal").arg(files.directory.path()).arg(files.size.to_string());
        Self::start(command, files, memory)
    }

    fn start(mut command: Command, files: &Files, memory: &Memory) -> Result<Self> {
        let mut child = command.stdout(Stdio::piped()).spawn().context("starting a handler")?;
        let mut ready = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut ready)?;
        ensure!(ready == "ready\n", "the handler is not ready");
        let stream = UnixStream::connect(files.socket())?;
        memory.hand_over(&stream)?;
        Files::remove_socket(&files.socket());
        Ok(Self { child, _stream: stream })
    }

    /// Bytes that belong to the handler alone.
    pub fn private_bytes(&self) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id())).ok()?;
        let dirty = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:"))?;
        Some(dirty.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
    }

    /// The processor time it has used.
    pub fn processor_time(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let (_, fields) = stat.rsplit_once(')').context("no stat")?;
        let ticks = fields.split_ascii_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
        Ok(Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second())?)
    }

    /// Waits until it ends by itself. The processor time it has used.
    pub fn wait(mut self) -> Result<Duration> {
        let pid = rustix::process::Pid::from_child(&self.child);
        // So that it can be looked at once more.
        rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
        let used = self.processor_time()?;
        ensure!(self.child.wait()?.success(), "the handler failed");
        Ok(used)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A child's whole life.
pub fn run(role: Role) -> Result<()> {
    match role {
        Role::Ours { directory, prefetch, record } => ours(&directory, prefetch, record),
        Role::Minimal { directory, size } => minimal(&directory, size),
    }
}

fn ready() -> Result<()> {
    let mut out = std::io::stdout();
    Ok(out.write_all(b"ready\n").and_then(|()| out.flush())?)
}

fn ours(directory: &Path, prefetch: Option<PathBuf>, record: Option<PathBuf>) -> Result<()> {
    let never = eventfd(0, EventfdFlags::CLOEXEC)?;
    let pager = Pager::listen(Config {
        socket: directory.join("socket"),
        header: directory.join("header"),
        generations: directory.join("generations"),
        vmm_uid: None,
        prefetch,
        record,
        record_for: Duration::from_secs(600),
        patience: Duration::from_secs(60),
    })?;
    ready()?;
    pager.serve(never.as_fd())?;
    Ok(())
}

/// Reads one event, copies one page, as Firecracker's example handler does.
fn minimal(directory: &Path, size: u64) -> Result<()> {
    let file = Memory::of_file(&directory.join("flat"), size)?;
    let listener = UnixListener::bind(directory.join("socket"))?;
    ready()?;
    let (stream, _) = listener.accept()?;
    let (uffd, base) = receive(&stream)?;
    loop {
        let mut ready = [PollFd::new(&uffd, PollFlags::IN), PollFd::new(&stream, PollFlags::IN)];
        poll(&mut ready, None)?;
        if !ready[1].revents().is_empty() {
            return Ok(());
        }
        let mut event = [0; 32];
        match rustix::io::read(&uffd, &mut event) {
            Err(rustix::io::Errno::AGAIN) => continue,
            read => read?,
        };
        let word: [u8; 8] = event[16..24].try_into()?;
        let address = u64::from_ne_bytes(word) / PAGE * PAGE;
        copy_page(&uffd, address, &file, (address - base) / PAGE)?;
    }
}

fn receive(stream: &UnixStream) -> Result<(OwnedFd, u64)> {
    let mut json = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut json)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let regions: serde_json::Value = serde_json::from_slice(&json[..got.bytes])?;
    let base = regions[0]["base_host_virt_addr"].as_u64().context("no address")?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            return Ok((fds.next().context("no descriptor")?, base));
        }
    }
    bail!("no descriptor")
}
