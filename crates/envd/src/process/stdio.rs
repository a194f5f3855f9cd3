//! The streams between envd and one process: what the child gets, and the ends we keep.

use super::log::Source;
use super::plan::Streams;
use crate::sys::poll::Polled;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, OptionalActions, Winsize};
use std::io;
use std::sync::Arc;
use tokio::io::Interest;

/// The child's standard streams; a terminal is one for all three.
pub struct Child {
    stdin: OwnedFd,
    output: Option<(OwnedFd, OwnedFd)>,
}

/// Our ends.
pub struct Ours {
    pub input: Option<Input>,
    pub outputs: Vec<Output>,
    pub terminal: Option<Arc<Polled>>,
}

/// Something the process writes to.
pub struct Output {
    pub source: Source,
    fd: Arc<Polled>,
}

/// What the process reads from.
pub struct Input(Arc<Polled>);

/// Opens what `streams` asks for. A terminal belongs to `owner`, so that the process may open it by name.
pub fn open(streams: Streams, owner: u32) -> io::Result<(Child, Ours)> {
    match streams {
        Streams::Pipes { stdin } => pipes(stdin),
        Streams::Terminal(size) => terminal(size, owner),
    }
}

fn pipes(stdin: bool) -> io::Result<(Child, Ours)> {
    let output = |source| -> io::Result<(Output, OwnedFd)> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        Ok((Output { source, fd: Arc::new(Polled::new(read, Interest::READABLE)?) }, write))
    };
    let (stdout, child_stdout) = output(Source::Stdout)?;
    let (stderr, child_stderr) = output(Source::Stderr)?;
    let (child_stdin, input) = if stdin {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        (read, Some(Input(Arc::new(Polled::new(write, Interest::WRITABLE)?))))
    } else {
        (rustix::fs::open(c"/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?, None)
    };
    let child = Child { stdin: child_stdin, output: Some((child_stdout, child_stderr)) };
    Ok((child, Ours { input, outputs: vec![stdout, stderr], terminal: None }))
}

fn terminal(size: Winsize, owner: u32) -> io::Result<(Child, Ours)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::termios::tcsetwinsize(&master, size)?;
    let mut modes = rustix::termios::tcgetattr(&slave)?;
    modes.input_modes |= InputModes::IUTF8;
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &modes)?;
    if rustix::process::geteuid().is_root() {
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(owner)), None)?;
    }
    let master = Arc::new(Polled::new(master, Interest::READABLE | Interest::WRITABLE)?);
    let input = Some(Input(Arc::clone(&master)));
    let outputs = vec![Output { source: Source::Terminal, fd: Arc::clone(&master) }];
    Ok((Child { stdin: slave, output: None }, Ours { input, outputs, terminal: Some(master) }))
}

impl Child {
    /// Standard input, output and error.
    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        let stdin = self.stdin.as_fd();
        match &self.output {
            Some((stdout, stderr)) => [stdin, stdout.as_fd(), stderr.as_fd()],
            None => [stdin; 3],
        }
    }
}

impl Output {
    /// Reads once, waiting for data; 0 is the end. A terminal's end is EIO. Dropping the future loses nothing.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.fd.read(buffer).await {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
            other => other,
        }
    }

    /// Bytes that can be read at once.
    pub fn readable(&self) -> u64 {
        rustix::io::ioctl_fionread(self.fd.get()).unwrap_or(0)
    }
}

impl Input {
    /// Writes everything, at the pace of the reader.
    pub async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let written = self.0.write(data).await?;
            data = &data[written..];
        }
        Ok(())
    }
}
