//! The host's resolver, asked in the host's own network namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::runtime::Handle;

use crate::dns::{Answer, Question};

/// For one server to answer; then the next is asked.
const PATIENCE: Duration = Duration::from_secs(2);
/// Servers that are asked, as other resolvers do it.
const SERVERS: usize = 3;
/// Datagrams that are no answer before a server is given up: whoever guesses has so many tries.
const STRANGERS: usize = 32;
const PORT: u16 = 53;

/// Asks the host's resolvers. Clones ask the same.
#[derive(Debug, Clone)]
pub struct Resolver {
    source: Arc<Source>,
    /// Of the host: what runs on it is in the host's network namespace.
    runtime: Handle,
}

#[derive(Debug)]
enum Source {
    /// A file such as `/etc/resolv.conf`, read for each question, as hosts change their networks.
    File(PathBuf),
    Servers(Vec<SocketAddr>),
}

impl Resolver {
    /// Asks whom `/etc/resolv.conf` names. To be called on a runtime of the host's own namespace.
    pub fn system() -> Self {
        Self { source: Arc::new(Source::File("/etc/resolv.conf".into())), runtime: Handle::current() }
    }

    /// Asks these servers, from the namespace of the runtime that this is called on.
    pub fn of(servers: Vec<SocketAddr>) -> Self {
        Self { source: Arc::new(Source::Servers(servers)), runtime: Handle::current() }
    }

    fn servers(&self) -> Vec<SocketAddr> {
        match &*self.source {
            Source::Servers(servers) => servers.clone(),
            Source::File(path) => nameservers(&std::fs::read_to_string(path).unwrap_or_default()),
        }
    }

    /// What comes of the question; nothing when nobody answers it.
    pub(crate) async fn ask(&self, question: Box<Question>, over_udp: bool) -> Option<Answer> {
        let servers = self.servers();
        // From here the sockets are the host's.
        let asked = self.runtime.spawn(async move {
            for server in servers {
                let Ok(id) = getrandom::u32() else { return None };
                let id = id as u16;
                match tokio::time::timeout(PATIENCE, ask(server, &question, id)).await {
                    Ok(Ok(bytes)) => return question.answer(&bytes, id, over_udp).ok(),
                    Ok(Err(error)) => tracing::debug!(%server, %error, "a resolver does not answer"),
                    Err(_) => tracing::debug!(%server, "a resolver does not answer in time"),
                }
            }
            question.failed().map(|bytes| Answer { bytes, name: String::new(), addresses: Vec::new() })
        });
        asked.await.ok().flatten()
    }
}

/// The first servers that a file in the manner of `resolv.conf` names; the machine's own if it names none.
fn nameservers(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let address: IpAddr = words.next().filter(|word| *word == "nameserver").and(words.next())?.parse().ok()?;
        Some(SocketAddr::new(address, PORT))
    };
    let servers: Vec<_> = text.lines().filter_map(address).take(SERVERS).collect();
    if servers.is_empty() { vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT)] } else { servers }
}

/// The server's answer: by a datagram, and by a connection if that is too small.
async fn ask(server: SocketAddr, question: &Question, id: u16) -> io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // A port of its own for each question, chosen by the kernel, so that it has to be guessed too.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let message = question.upstream(id);
    socket.send(&message).await?;
    let mut bytes = vec![0; 64 << 10];
    for _ in 0..STRANGERS {
        let length = socket.recv(&mut bytes).await?;
        let received = &bytes[..length];
        if question.is_answered_by(received, id) {
            const TRUNCATED: u8 = 0x02;
            return if received[2] & TRUNCATED == 0 { Ok(received.to_vec()) } else { connect(server, &message).await };
        }
    }
    Err(io::Error::other("it sends what is no answer"))
}

async fn connect(server: SocketAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_says_whom_to_ask() {
        let text =
            "# mine\nsearch example.com\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 \nnameserver no\noptions edns0";
        let port = |address: &str| SocketAddr::new(address.parse().unwrap(), 53);
        assert_eq!(nameservers(text), [port("192.0.2.1"), port("2001:db8::1")]);
        assert_eq!(nameservers(&"nameserver 192.0.2.1\n".repeat(9)).len(), SERVERS);
        assert_eq!(nameservers(""), [port("127.0.0.1")]);
    }
}
