//! Whole directories, as a tar that is made and taken apart at both ends: modes, times and links survive, and many small
//! files cost one exchange.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use api::CapsuleId;
use bytes::Bytes;
use futures::{TryStreamExt, stream};
use reqwest::Body;
use tokio::sync::mpsc;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::{counted, progress, run};
use crate::rest::Client;

/// Pieces of a tar that may wait to be sent.
const PIECES: usize = 4;

/// Copies the directory `from` to be the capsule's directory `to`.
pub(super) async fn upload(client: &Client, from: &Path, id: CapsuleId, to: &str) -> Result<()> {
    let archive = Remote::new(client, id);
    let (pieces, mut received) = mpsc::channel(PIECES);
    let received = stream::poll_fn(move |cx| received.poll_recv(cx));
    let directory = from.to_owned();
    let packing = tokio::task::spawn_blocking(move || pack(&directory, pieces));
    let bar = progress(None);
    let sent = client.upload(id, &archive.path, Body::wrap_stream(counted(received, &bar))).await;
    // What could not be read here is the cause of what the server says.
    packing.await?.with_context(|| format!("cannot read {}", from.display()))?;
    let unpacked = async {
        sent.with_context(|| format!("cannot copy to {id}"))?;
        run(client, id, &["mkdir", "-p", "--", to]).await?;
        run(client, id, &["tar", "-xp", "--no-same-owner", "-f", &archive.path, "-C", to]).await
    };
    let unpacked = unpacked.await;
    bar.finish_and_clear();
    archive.remove().await?;
    unpacked
}

/// Copies the capsule's directory `from` to be the directory `to` here.
pub(super) async fn download(client: &Client, id: CapsuleId, from: &str, to: &Path) -> Result<()> {
    let archive = Remote::new(client, id);
    let copied = async {
        run(client, id, &["tar", "-c", "-f", &archive.path, "-C", from, "."]).await?;
        let answer = client.download(id, &archive.path).await?;
        let bar = progress(answer.content_length());
        let pieces = StreamReader::new(counted(answer.bytes_stream().map_err(io::Error::other), &bar));
        let (pieces, directory) = (SyncIoBridge::new(pieces), to.to_owned());
        let unpacked = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&directory)?;
            // It keeps out of everything outside the directory, whatever the archive says.
            tar::Archive::new(pieces).unpack(&directory)
        });
        unpacked.await?.with_context(|| format!("cannot write {}", to.display()))?;
        bar.finish_and_clear();
        Ok(())
    };
    let copied = copied.await;
    archive.remove().await?;
    copied
}

/// The archive in the capsule: on its disk, where there is more room than in memory.
struct Remote<'a> {
    client: &'a Client,
    id: CapsuleId,
    path: String,
}

impl<'a> Remote<'a> {
    fn new(client: &'a Client, id: CapsuleId) -> Self {
        let unique = tokio_tungstenite::tungstenite::handshake::client::generate_key();
        let unique: String = unique.chars().filter(char::is_ascii_alphanumeric).collect();
        Self { client, id, path: format!("/var/tmp/.wrenn-cp-{unique}.tar") }
    }

    async fn remove(self) -> Result<()> {
        run(self.client, self.id, &["rm", "-f", "--", &self.path]).await
    }
}

fn pack(directory: &Path, pieces: mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    // A directory that is not there must not become an empty one.
    File::open(directory)?;
    let failed = pieces.clone();
    let mut archive = tar::Builder::new(io::BufWriter::with_capacity(super::PIECE, Pieces(pieces)));
    archive.follow_symlinks(false);
    let packed =
        archive.append_dir_all(".", directory).and_then(|()| archive.into_inner()).and_then(|mut out| out.flush());
    match packed {
        // The server refused, and says why itself.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => {
            // The upload must break, or the server would take half an archive for a whole one.
            let _ = failed.blocking_send(Err(io::Error::from(error.kind())));
            Err(error)
        }
        Ok(()) => Ok(()),
    }
}

/// Sends what is written.
struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
