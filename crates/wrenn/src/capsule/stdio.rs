//! This process's own ends: what it reads, what it writes, and the signals that end it.

use std::io::{self, Read, Write};

use anyhow::Result;
use bytes::Bytes;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

/// Bytes read from standard input at once, and how many such pieces may wait.
const PIECE: usize = 16 * 1024;
const PIECES: usize = 16;

/// Standard input, piece by piece; closed at its end. A thread, not a task: nothing could cancel its read, and the runtime
/// would wait for it at the end.
pub(super) fn input() -> mpsc::Receiver<Vec<u8>> {
    let (to, typed) = mpsc::channel(PIECES);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            match io::stdin().read(&mut buffer) {
                Ok(read) if read > 0 => {
                    if to.blocking_send(buffer[..read].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return,
            }
        }
    });
    typed
}

/// Standard output or standard error, in a thread for the same reason.
pub(super) struct Output(mpsc::Sender<(Bytes, oneshot::Sender<io::Result<()>>)>);

impl Output {
    pub(super) fn stdout() -> Self {
        Self::of(io::stdout())
    }

    pub(super) fn stderr() -> Self {
        Self::of(io::stderr())
    }

    fn of(mut stream: impl Write + Send + 'static) -> Self {
        let (to, mut from) = mpsc::channel::<(Bytes, oneshot::Sender<_>)>(1);
        std::thread::spawn(move || {
            while let Some((bytes, written)) = from.blocking_recv() {
                // Nobody waits for it any more if the command was interrupted.
                let _ = written.send(stream.write_all(&bytes).and_then(|()| stream.flush()));
            }
        });
        Self(to)
    }

    /// Writes, at the reader's pace.
    pub(super) async fn write(&self, bytes: Bytes) -> io::Result<()> {
        let (written, done) = oneshot::channel();
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.send((bytes, written)).await.map_err(|_| gone())?;
        done.await.map_err(|_| gone())?
    }
}

/// The signals that end this command, which has something to put in order first.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The number of the next one.
    pub(super) async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hang_up.recv() => 1,
        }
    }
}
