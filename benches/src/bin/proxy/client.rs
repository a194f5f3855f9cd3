//! The clients: sockets and no more, in as few threads as there are processors, so that they cost the least.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::task::JoinSet;

/// The host that is asked for.
pub const HOST: &str = "8000-cl-0000000000000000000000001.localhost";
/// The size of the large answer.
pub const LARGE_MIB: u32 = 64;

/// What small requests took.
pub struct Small {
    pub latencies: Vec<Duration>,
    pub time: Duration,
}

/// Asks for the small answer on `connections` connections, each again as soon as it has it, for that long.
pub fn small(address: SocketAddr, connections: u32, time: Duration) -> Result<Small> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let begun = Instant::now();
        let mut clients = JoinSet::new();
        for _ in 0..connections {
            clients.spawn(async move {
                let mut connection = Connection::open(address).await?;
                let mut latencies = Vec::new();
                while begun.elapsed() < time {
                    let before = Instant::now();
                    ensure!(connection.get("/small").await? == 1024, "the answer is not the small one");
                    latencies.push(before.elapsed());
                }
                Ok(latencies)
            });
        }
        let mut latencies = Vec::new();
        while let Some(client) = clients.join_next().await {
            latencies.extend(client??);
        }
        Ok(Small { latencies, time: begun.elapsed() })
    })
}

/// Asks for the large answer that many times; how long all took.
pub fn large(address: SocketAddr, count: u32) -> Result<Duration> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut connection = Connection::open(address).await?;
        let begun = Instant::now();
        for _ in 0..count {
            let length = connection.get("/large").await?;
            ensure!(length == (LARGE_MIB as usize) << 20, "the answer is not the large one");
        }
        Ok(begun.elapsed())
    })
}

/// Has the connection upgraded, and a few bytes come back that many times.
pub fn echoes(address: SocketAddr, count: u32) -> Result<Vec<Duration>> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut connection = Connection::open(address).await?;
        let request = format!(
            "GET /socket HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        connection.stream.write_all(request.as_bytes()).await?;
        let head = connection.head().await?;
        ensure!(connection.buffer[..head].starts_with(b"HTTP/1.1 101 "), "the connection is not upgraded");
        // As a client sends a short text: masked.
        let message = *b"\x81\x86\x00\x00\x00\x00hello!";
        let mut times = Vec::new();
        for _ in 0..count {
            let before = Instant::now();
            connection.stream.write_all(&message).await?;
            let mut answer = [0; 12];
            connection.stream.read_exact(&mut answer).await?;
            times.push(before.elapsed());
            ensure!(answer == message, "another answer comes back");
        }
        Ok(times)
    })
}

struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
}

impl Connection {
    async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; 256 << 10], filled: 0 })
    }

    /// The length of the answer's body.
    async fn get(&mut self, path: &str) -> Result<usize> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\nAccept: */*\r\nUser-Agent: bench\r\n\r\n");
        self.stream.write_all(request.as_bytes()).await?;
        let head = self.head().await?;
        let text = std::str::from_utf8(&self.buffer[..head])?;
        ensure!(text.starts_with("HTTP/1.1 200 "), "{text}");
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let length = lines.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length: usize = length.context("an answer without a length")?.1.trim().parse()?;
        let mut read = self.filled - head;
        while read < length {
            let most = self.buffer.len().min(length - read);
            let more = self.stream.read(&mut self.buffer[..most]).await?;
            ensure!(more > 0, "the answer ends early");
            read += more;
        }
        Ok(read)
    }

    /// Reads until the head is whole; its length.
    async fn head(&mut self) -> Result<usize> {
        self.filled = 0;
        loop {
            let more = self.stream.read(&mut self.buffer[self.filled..]).await?;
            ensure!(more > 0, "no answer");
            self.filled += more;
            let end = self.buffer[..self.filled].windows(4).position(|end| end == b"\r\n\r\n");
            if let Some(end) = end {
                return Ok(end + 4);
            }
        }
    }
}
