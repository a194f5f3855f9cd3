//! TLS in front of a listener. The handshake is part of the connection and not of taking it, so that nobody waits for another's.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{Accept, TlsAcceptor};

use crate::dial::Io;
use crate::serve::{Accepted, Listener, Secure};

/// A listener whose connections speak TLS first. HTTP/1.1 is what is spoken then: in HTTP/2 a browser would put its terminal and
/// a busy port, which have hosts of the same certificate, onto one connection.
pub struct Tls<L> {
    listener: L,
    acceptor: TlsAcceptor,
}

impl<L> Tls<L> {
    /// By `config`, whose protocols are replaced.
    pub fn new(listener: L, mut config: ServerConfig) -> Self {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self { listener, acceptor: Arc::new(config).into() }
    }
}

impl<L: Listener> Listener for Tls<L> {
    async fn accept(&mut self) -> io::Result<Accepted> {
        let Accepted { stream, peer, .. } = self.listener.accept().await?;
        let secure = Secure::default();
        let stream = Box::new(Stream::Begins(self.acceptor.accept(stream).into(), secure.clone()));
        Ok(Accepted { stream, peer, secure: Some(secure) })
    }
}

enum Stream {
    Begins(Box<Accept<Box<dyn Io>>>, Secure),
    Stands(Box<Standing>),
    /// The handshake failed, and may not be asked again.
    Failed,
}

type Standing = TlsStream<Box<dyn Io>>;

impl Stream {
    /// The stream behind the handshake, once that is done.
    fn standing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut Standing>>> {
        if let Self::Begins(handshake, secure) = self {
            let shaken = ready!(Pin::new(handshake.as_mut()).poll(cx));
            if let Some(name) = shaken.as_ref().ok().and_then(|stream| stream.get_ref().1.server_name()) {
                secure.wants(name);
            }
            *self = Self::Failed;
            *self = Self::Stands(shaken?.into());
        }
        match self {
            Self::Stands(stream) => Poll::Ready(Ok(Pin::new(stream.as_mut()))),
            Self::Begins(..) | Self::Failed => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.standing(cx))?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.standing(cx))?.poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.standing(cx))?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Stands(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
            // Nothing was said that would have to be ended.
            Self::Begins(..) | Self::Failed => Poll::Ready(Ok(())),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.standing(cx))?.poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}
