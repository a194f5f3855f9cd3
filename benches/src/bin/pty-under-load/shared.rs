//! One connection in place of many: what is between a control plane and an agent that share a transport for everything, as a
//! single HTTP/2 connection does. Every connection to the near end becomes a stream, whose bytes travel in frames; what one
//! stream's reader does not take, all others wait behind.
//!
//! ```text
//!   frame: stream (4 bytes) · length (4 bytes; 0 ends the stream) · bytes
//! ```

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

const PIECE: usize = 16 << 10;

type Trunk = Arc<Mutex<OwnedWriteHalf>>;
type Streams = HashMap<u32, OwnedWriteHalf>;

/// Both ends, in front of the agent at `agent`. Answers the address of the near one.
pub async fn start(agent: SocketAddr) -> Result<SocketAddr> {
    let near = TcpListener::bind("127.0.0.1:0").await?;
    let address = near.local_addr()?;
    let trunk = TcpListener::bind("127.0.0.1:0").await?;
    let (here, there) = tokio::join!(TcpStream::connect(trunk.local_addr()?), trunk.accept());
    let (here, (there, _)) = (here?, there?);
    here.set_nodelay(true)?;
    there.set_nodelay(true)?;
    tokio::spawn(far(there, agent));
    let (frames, to_far) = here.into_split();
    let to_far: Trunk = Arc::new(Mutex::new(to_far));
    let streams = Arc::new(Mutex::new(Streams::new()));
    tokio::spawn(deliver(frames, streams.clone()));
    tokio::spawn(async move {
        let mut next = 0;
        while let Ok((stream, _)) = near.accept().await {
            next += 1;
            let _ = stream.set_nodelay(true);
            let (from, to) = stream.into_split();
            streams.lock().await.insert(next, to);
            tokio::spawn(carry(next, from, to_far.clone()));
        }
    });
    Ok(address)
}

/// The near end's other half: what comes of the agent goes to the stream it is for, and everything waits for that.
async fn deliver(mut frames: OwnedReadHalf, streams: Arc<Mutex<Streams>>) {
    while let Ok((stream, bytes)) = frame(&mut frames).await {
        let mut streams = streams.lock().await;
        let done = match streams.get_mut(&stream) {
            Some(to) if !bytes.is_empty() => to.write_all(&bytes).await.is_err(),
            _ => true,
        };
        if done {
            streams.remove(&stream);
        }
    }
}

/// The far end: a connection to the agent for every stream.
async fn far(trunk: TcpStream, agent: SocketAddr) {
    let (mut frames, to_near) = trunk.into_split();
    let to_near: Trunk = Arc::new(Mutex::new(to_near));
    let mut streams = Streams::new();
    while let Ok((stream, bytes)) = frame(&mut frames).await {
        if bytes.is_empty() {
            streams.remove(&stream);
            continue;
        }
        if let Entry::Vacant(new) = streams.entry(stream) {
            let Ok(connection) = TcpStream::connect(agent).await else { return };
            let _ = connection.set_nodelay(true);
            let (from, to) = connection.into_split();
            new.insert(to);
            tokio::spawn(carry(stream, from, to_near.clone()));
        }
        if let Some(to) = streams.get_mut(&stream)
            && to.write_all(&bytes).await.is_err()
        {
            streams.remove(&stream);
        }
    }
}

/// Puts what comes of a stream into frames, to its end.
async fn carry(stream: u32, mut from: impl AsyncRead + Unpin, trunk: Trunk) {
    let mut buffer = vec![0; PIECE];
    loop {
        let length = from.read(&mut buffer).await.unwrap_or(0);
        let mut trunk = trunk.lock().await;
        if put(&mut *trunk, stream, &buffer[..length]).await.is_err() || length == 0 {
            return;
        }
    }
}

async fn put(trunk: &mut (impl AsyncWrite + Unpin), stream: u32, bytes: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(8 + bytes.len());
    frame.extend(stream.to_be_bytes());
    frame.extend((bytes.len() as u32).to_be_bytes());
    frame.extend(bytes);
    trunk.write_all(&frame).await
}

async fn frame(trunk: &mut (impl AsyncRead + Unpin)) -> io::Result<(u32, Vec<u8>)> {
    let stream = trunk.read_u32().await?;
    let mut bytes = vec![0; trunk.read_u32().await? as usize];
    trunk.read_exact(&mut bytes).await?;
    Ok((stream, bytes))
}
