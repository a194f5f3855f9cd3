//! Connections: read whom they are for, and join them with it.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Shared, accept};
use crate::head::{self, Refused};

/// Connections of one capsule at the same time; more of them wait.
const CONNECTIONS: usize = 512;
/// For a guest to say whom its connection is for.
const HEAD: Duration = Duration::from_secs(10);
/// For a server to accept.
const DIAL: Duration = Duration::from_secs(10);
/// Bytes that wait in each direction of a connection.
const BUFFER: usize = 16 << 10;

/// Why a connection goes nowhere.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("it was not sent here by the firewall")]
    Astray,
    #[error("its address is not outside")]
    Inside,
    #[error(transparent)]
    Head(#[from] Refused),
    #[error("its guest did not say whom it is for")]
    Silent,
    #[error("it is for {0}, which is not allowed")]
    Name(String),
    #[error("it is for {0}, of which nobody told the guest that it is there")]
    Address(String),
    #[error("using a socket")]
    Io(#[from] io::Error),
    #[error("the server does not answer")]
    Dial,
}

/// Serves connections for as long as it is polled.
pub(super) async fn serve(listener: TcpListener, shared: &Arc<Shared>) {
    let serve = |guest| {
        let shared = shared.clone();
        async move {
            if let Err(error) = join(guest, &shared).await {
                tracing::debug!(error = &error as &dyn std::error::Error, "a connection was not let out");
            }
        }
    };
    accept(listener, CONNECTIONS, serve).await;
}

/// Joins a guest's connection with the server that it is for, until both have ended or the name is not allowed any more.
async fn join(mut guest: TcpStream, shared: &Shared) -> Result<(), Error> {
    // Whatever ends this early is to be seen at once, and not as an empty answer.
    guest.set_zero_linger()?;
    let server = rustix::net::sockopt::ip_original_dst(&guest).map_err(|_| Error::Astray)?;
    if guest.local_addr()? == server.into() {
        return Err(Error::Astray);
    }
    // Beyond the firewall's rules for what leaves the namespace: what would not leave it.
    if !is_outside(*server.ip()) {
        return Err(Error::Inside);
    }
    let mut policies = shared.policy.subscribe();
    let (name, said) = tokio::time::timeout(HEAD, said(&mut guest)).await.map_err(|_| Error::Silent)??;
    if !policies.borrow_and_update().allows_name(&name) {
        return Err(Error::Name(name));
    }
    if !shared.answers().knows(&name, *server.ip(), Instant::now()) {
        return Err(Error::Address(name));
    }
    let exchange = async {
        let mut server = dial(server).await?;
        server.write_all(&said).await?;
        drop(said);
        tokio::io::copy_bidirectional_with_sizes(&mut guest, &mut server, BUFFER, BUFFER).await?;
        // It ended as its two ends wanted it: what was sent is to arrive.
        rustix::net::sockopt::set_socket_linger(&guest, None).map_err(io::Error::from)?;
        Ok(())
    };
    tokio::select! {
        ended = exchange => ended,
        _ = policies.wait_for(|policy| !policy.allows_name(&name)) => Err(Error::Name(name.clone())),
    }
}

/// The name that the connection is for, and all that was read to find it.
async fn said(guest: &mut TcpStream) -> Result<(String, Vec<u8>), Error> {
    let mut said = Vec::with_capacity(2048);
    loop {
        if let Some(name) = head::name(&said)? {
            return Ok((name, said));
        }
        let room = (head::LIMIT - said.len()) as u64;
        if (&mut *guest).take(room).read_buf(&mut said).await? == 0 {
            return Err(Error::Silent);
        }
    }
}

async fn dial(server: SocketAddrV4) -> Result<TcpStream, Error> {
    let stream = tokio::time::timeout(DIAL, TcpStream::connect(server)).await.map_err(|_| Error::Dial)??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Whether a packet to the address would leave the namespace by its uplink.
fn is_outside(address: Ipv4Addr) -> bool {
    let is_slots = matches!(address.octets(), [10, 11 | 12, ..]);
    !(address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast()
        || address.octets()[0] == 0
        || is_slots)
}
