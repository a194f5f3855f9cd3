//! Connections that stop being HTTP: WebSocket, and whatever else both ends agree upon.

use std::io;

use bytes::BytesMut;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{HeaderMap, Version, request};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes under way in each direction.
const BUFFER: usize = 16 * 1024;

/// What the request wants the connection to become, if it wants that and may. A request with a body may not: its end would be
/// looked for in the other protocol. Nor does HTTP/2 come about this way: what is inside it, nobody on the way would see.
pub fn wanted(head: &request::Parts, has_body: bool) -> Option<HeaderValue> {
    let asks = head.version == Version::HTTP_11 && !has_body && names_upgrade(&head.headers);
    let mut protocols = head.headers.get_all(UPGRADE).iter();
    match (protocols.next(), protocols.next()) {
        (Some(protocol), None) if asks && !is_http(protocol) => Some(protocol.clone()),
        _ => None,
    }
}

fn names_upgrade(headers: &HeaderMap) -> bool {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|name| name.trim().eq_ignore_ascii_case("upgrade"))
}

fn is_http(protocol: &HeaderValue) -> bool {
    let text = protocol.to_str().unwrap_or_default();
    text.split(',').any(|protocol| {
        let protocol = protocol.trim().to_ascii_lowercase();
        protocol.is_empty()
            || protocol.starts_with("h2")
            || protocol.starts_with("http/")
            || protocol.starts_with("tls/")
    })
}

/// Two ends that have both left HTTP, or are about to.
pub struct Tunnel {
    /// Resolves once our 101 has been sent.
    pub(crate) client: OnUpgrade,
    pub(crate) destination: OnUpgrade,
}

impl Tunnel {
    /// Carries bytes both ways until both directions have ended, each by itself. `moved` is told of everything that passes.
    pub async fn carry(self, moved: impl Fn() + Sync) -> io::Result<()> {
        let client = TokioIo::new(established(self.client).await?);
        carry(client, TokioIo::new(established(self.destination).await?), moved).await
    }

    /// The same towards a connection that never was HTTP.
    pub async fn carry_to<S>(client: OnUpgrade, destination: S, moved: impl Fn() + Sync) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite,
    {
        carry(TokioIo::new(established(client).await?), destination, moved).await
    }
}

async fn established(upgrade: OnUpgrade) -> io::Result<Upgraded> {
    upgrade.await.map_err(io::Error::other)
}

async fn carry<A, B>(a: A, b: B, moved: impl Fn() + Sync) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let (mut from_a, mut to_a) = tokio::io::split(a);
    let (mut from_b, mut to_b) = tokio::io::split(b);
    tokio::try_join!(one_way(&mut from_a, &mut to_b, &moved), one_way(&mut from_b, &mut to_a, &moved))?;
    Ok(())
}

async fn one_way(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    moved: &(impl Fn() + Sync),
) -> io::Result<()> {
    let mut buffer = BytesMut::with_capacity(BUFFER);
    loop {
        buffer.clear();
        if from.read_buf(&mut buffer).await? == 0 {
            return to.shutdown().await;
        }
        moved();
        to.write_all(&buffer).await?;
        to.flush().await?;
    }
}

/// The head of a 101 with what the destination said, and what HTTP itself needs there.
pub fn restore(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol);
}
