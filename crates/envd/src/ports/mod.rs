//! Makes what listens on 127.0.0.1 or ::1 in the guest reachable from outside, under the same port of `eth0`.
//!
//! Nobody looks out for listeners. A packet rule ([`redirect`]) hands every new connection whose port has no listener on
//! `eth0`'s address to one socket of ours; only then the loopback is tried, first IPv4, then IPv6. So a service is reachable
//! from the moment it listens and no longer than that, an idle guest costs nothing, and services that listen on all addresses
//! never pass through here.
//!
//! The price: where nothing listens at all, a client sees its connection reset after it was established rather than refused.
//! A service that is starting is therefore waited for here ([`RETRIES`]), where nothing has been sent yet.

mod redirect;

use crate::sys;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// The interface that outside is behind.
const INTERFACE: &str = "eth0";
/// Pauses before a port that nobody listens on is tried again.
const RETRIES: [Duration; 3] = [Duration::from_millis(20), Duration::from_millis(80), Duration::from_millis(200)];
/// For each direction of a connection. Bytes.
const BUFFER: usize = 16 * 1024;
const BACKLOG: u32 = 1024;
/// After a failure to accept that says nothing about the next one, such as too many open files.
const BREATH: Duration = Duration::from_millis(100);

/// Forwards until the machine ends. A kernel that cannot is said so once.
pub async fn forward() {
    match open() {
        Ok(listener) => serve(listener).await,
        Err(error) => tracing::warn!(%error, "listeners on the loopback stay there: this kernel cannot redirect"),
    }
}

/// The socket, and the rule that leads to it.
fn open() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    sys::net::set_transparent(&socket)?;
    // Its connections bear the ports of services, which must not keep those from being listened on again.
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    let listener = socket.listen(BACKLOG)?;
    redirect::install(INTERFACE, listener.local_addr()?.port())?;
    Ok(listener)
}

async fn serve(listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                let own = listener.local_addr();
                tokio::spawn(async move {
                    if let Err(error) = carry(client, own?).await {
                        tracing::debug!(%error, "a forwarded connection ended early");
                    }
                    io::Result::Ok(())
                });
            }
            Err(error) => {
                tracing::debug!(%error, "cannot accept");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

/// Carries one connection to its end, each direction closing by itself.
async fn carry(mut client: TcpStream, own: SocketAddr) -> io::Result<()> {
    let port = client.local_addr()?.port();
    // Whoever calls our own port would have us call ourselves.
    let service = if port == own.port() { Err(io::ErrorKind::ConnectionRefused.into()) } else { dial(port).await };
    match service {
        Ok(mut service) => {
            client.set_nodelay(true)?;
            service.set_nodelay(true)?;
            copy_bidirectional_with_sizes(&mut client, &mut service, BUFFER, BUFFER).await?;
            Ok(())
        }
        Err(error) => {
            // Not an orderly end: there was nobody.
            client.set_zero_linger()?;
            Err(error)
        }
    }
}

/// Finds the listener, waiting a moment for one that is starting.
async fn dial(port: u16) -> io::Result<TcpStream> {
    let mut retries = RETRIES.iter();
    loop {
        let mut refused = None;
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            match TcpStream::connect((address, port)).await {
                Ok(service) => return Ok(service),
                Err(error) => refused = Some(error),
            }
        }
        match retries.next() {
            Some(pause) => tokio::time::sleep(*pause).await,
            None => return Err(refused.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into())),
        }
    }
}

#[cfg(test)]
mod tests;
