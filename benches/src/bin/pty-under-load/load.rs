//! A port that always has more to say, and those who read it: both as processes of their own, so that the one that measures
//! does nothing else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

/// How often a reader that holds back takes what is its due.
const TICK: Duration = Duration::from_millis(10);

/// What this program does when it is its own child.
#[derive(Debug, Parser)]
pub enum Role {
    /// Serves every connection an answer without an end.
    Source {
        /// Where.
        address: SocketAddr,
    },
    /// Reads such answers until standard input ends, and then says how many bytes it read.
    Readers {
        /// Where.
        address: SocketAddr,
        /// Of which host.
        host: String,
        /// How many.
        count: u32,
        /// What each takes, MiB a second; all it can if this is 0.
        rate: u32,
    },
}

impl Role {
    /// Does it, to its end.
    pub fn play(self) -> Result<()> {
        match self {
            Self::Source { address } => source(address),
            Self::Readers { address, host, count, rate } => readers(address, &host, count, rate),
        }
    }
}

fn source(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address)?;
    writeln!(std::io::stdout(), "listening")?;
    loop {
        let (mut stream, _) = listener.accept()?;
        std::thread::spawn(move || {
            let body = vec![b'x'; 64 << 10];
            let _ = stream.read(&mut [0; 4096]);
            let mut sent = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
            // Until the reader leaves.
            while sent.is_ok() {
                sent = stream.write_all(&body);
            }
        });
    }
}

fn readers(address: SocketAddr, host: &str, count: u32, rate: u32) -> Result<()> {
    let total = Arc::new(AtomicU64::new(0));
    for _ in 0..count {
        let (total, request) = (total.clone(), format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        // One that fails shows in what was read.
        std::thread::spawn(move || read(address, &request, rate, &total));
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    writeln!(std::io::stdout(), "{}", total.load(Ordering::Relaxed))?;
    Ok(())
}

fn read(address: SocketAddr, request: &str, rate: u32, total: &AtomicU64) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(request.as_bytes())?;
    let mut buffer = vec![0; 256 << 10];
    let mut take = |most: usize| -> Result<usize> {
        let length = stream.read(&mut buffer[..most])?;
        anyhow::ensure!(length > 0, "the answer ended");
        total.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    };
    let due = ((rate as usize) << 20) / 100;
    let mut next = Instant::now();
    loop {
        if rate == 0 {
            take(256 << 10)?;
            continue;
        }
        let mut left = due;
        while left > 0 {
            left -= take(left.min(256 << 10))?;
        }
        next += TICK;
        // Nothing to wait for but the clock.
        std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
    }
}

/// A source in a network namespace, until it is dropped.
pub struct Source(Child);

impl Source {
    pub fn start(netns: &Path, port: u16) -> Result<Self> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", netns.display())).arg(std::env::current_exe()?);
        command.args(["source", &format!("0.0.0.0:{port}")]).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting the source")?;
        let mut line = [0; 10];
        child.stdout.as_mut().context("it is piped")?.read_exact(&mut line).context("the source does not listen")?;
        Ok(Self(child))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Readers, until they are stopped.
pub struct Load {
    child: Child,
    since: Instant,
}

impl Load {
    /// `count` readers at `address`, each of which takes `rate` MiB a second, or all it can if that is 0.
    pub fn start(address: SocketAddr, host: &str, count: u32, rate: u32) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["readers", &address.to_string(), host, &count.to_string(), &rate.to_string()]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("starting the readers")?;
        Ok(Self { child, since: Instant::now() })
    }

    /// Has all of them leave; what they read together, MiB a second.
    pub fn stop(mut self) -> Result<f64> {
        drop(self.child.stdin.take());
        let mut said = String::new();
        self.child.stdout.take().context("it is piped")?.read_to_string(&mut said)?;
        self.child.wait()?;
        let bytes: u64 = said.trim().parse().context("the readers do not say what they read")?;
        Ok(bytes as f64 / (1 << 20) as f64 / self.since.elapsed().as_secs_f64())
    }
}
