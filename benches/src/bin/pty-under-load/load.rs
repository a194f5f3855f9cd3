//! A port that always has more to say, and those who read it through the capsule's host name.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// How often a reader that holds back takes what is its due.
const TICK: Duration = Duration::from_millis(10);

/// Serves every connection an answer without an end. Answers the port.
pub async fn serve() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        let body = vec![b'x'; 64 << 10];
        while let Ok((mut stream, _)) = listener.accept().await {
            let body = body.clone();
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4096]).await;
                let head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
                let mut sent = stream.write_all(head).await;
                // Until the reader leaves.
                while sent.is_ok() {
                    sent = stream.write_all(&body).await;
                }
            });
        }
    });
    Ok(port)
}

/// Readers, until they are stopped.
pub struct Load(JoinSet<()>);

impl Load {
    /// `readers` of the port of a capsule, each of which takes `rate` MiB a second, or all it can if that is the most.
    pub fn start(control: SocketAddr, capsule: &str, port: u16, readers: u32, rate: u32) -> Self {
        let mut tasks = JoinSet::new();
        for _ in 0..readers {
            let request = format!("GET / HTTP/1.1\r\nHost: {port}-{capsule}.localhost\r\n\r\n");
            tasks.spawn(async move {
                // One that fails shows as a load that is none, which the warm-up's figures would tell.
                let _ = read(control, &request, rate).await;
            });
        }
        Self(tasks)
    }

    /// Has all of them leave.
    pub async fn stop(mut self) {
        self.0.shutdown().await;
    }
}

async fn read(control: SocketAddr, request: &str, rate: u32) -> Result<()> {
    let mut stream = TcpStream::connect(control).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut buffer = vec![0; 256 << 10];
    if rate == u32::MAX {
        while stream.read(&mut buffer).await? > 0 {}
        return Ok(());
    }
    let due = (rate as usize) << 20;
    let due = due / 100;
    let mut ticks = tokio::time::interval(TICK);
    loop {
        ticks.tick().await;
        let mut left = due;
        while left > 0 {
            let most = left.min(buffer.len());
            left -= stream.read(&mut buffer[..most]).await?;
        }
    }
}
