//! `wrenn capsule cp`.

mod archive;

use std::fs::Metadata;
use std::io::{self, IsTerminal};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use api::{CapsuleId, ErrorCode, Exec, FileKind};
use bytes::Bytes;
use clap::Args;
use futures::{Stream, StreamExt, TryStreamExt};
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Body;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::rest::{Client, Refused};

/// Bytes read from a file at once.
const PIECE: usize = 256 * 1024;

/// Copies files and directories into a capsule and out of it.
///
/// One side is a path on this machine, the other `CAPSULE:PATH`; a relative path in a capsule begins at root's home. A
/// directory is copied with all that is in it, with modes, times and links. A target that is a directory gets the source put
/// into it. A file appears under its name when all of it is there.
#[derive(Debug, Args)]
pub(super) struct Cp {
    /// What to copy.
    #[arg(value_name = "SOURCE")]
    from: Place,
    /// Where to.
    #[arg(value_name = "TARGET")]
    to: Place,
}

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    There(CapsuleId, String),
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a path must not be empty".to_owned());
        }
        match text.split_once(':') {
            Some((id, path)) if id.starts_with("cl-") => {
                let id = id.parse().map_err(|error| format!("{error}"))?;
                // What is not said is home.
                Ok(Self::There(id, if path.is_empty() { "~".to_owned() } else { path.to_owned() }))
            }
            _ => Ok(Self::Here(PathBuf::from(text))),
        }
    }
}

impl Cp {
    pub(super) async fn run(self, client: &Client) -> Result<ExitCode> {
        match (self.from, self.to) {
            (Place::Here(from), Place::There(id, to)) => upload(client, &from, id, to).await?,
            (Place::There(id, from), Place::Here(to)) => download(client, id, &from, to).await?,
            (Place::Here(_), Place::Here(_)) => bail!("one side must be in a capsule: CAPSULE:PATH"),
            (Place::There(..), Place::There(..)) => bail!("one side must be on this machine"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn upload(client: &Client, from: &Path, id: CapsuleId, mut to: String) -> Result<()> {
    let metadata = tokio::fs::metadata(from).await.with_context(|| format!("cannot read {}", from.display()))?;
    if is_directory(client, id, &to).await? {
        let name = from.canonicalize()?;
        let name = name.file_name().with_context(|| format!("{} has no name to keep", from.display()))?;
        to = format!("{}/{}", to.trim_end_matches('/'), name.to_string_lossy());
    }
    if metadata.is_dir() {
        return archive::upload(client, from, id, &to).await;
    }
    let file = File::open(from).await.with_context(|| format!("cannot read {}", from.display()))?;
    let bar = progress(Some(metadata.len()));
    let pieces = counted(ReaderStream::with_capacity(file, PIECE), &bar);
    client.upload(id, &to, Body::wrap_stream(pieces)).await.with_context(|| format!("cannot copy to {id}:{to}"))?;
    bar.finish_and_clear();
    keep_executable(client, id, &metadata, &to).await
}

/// A program that was copied should run.
async fn keep_executable(client: &Client, id: CapsuleId, metadata: &Metadata, path: &str) -> Result<()> {
    if metadata.permissions().mode() & 0o111 == 0 {
        return Ok(());
    }
    run(client, id, &["chmod", "+x", "--", path]).await
}

async fn download(client: &Client, id: CapsuleId, from: &str, to: PathBuf) -> Result<()> {
    let name = from.trim_end_matches('/').rsplit('/').next().filter(|name| !matches!(*name, "" | "." | ".." | "~"));
    let into = tokio::fs::metadata(&to).await.is_ok_and(|metadata| metadata.is_dir());
    let to = match (into, name) {
        (true, Some(name)) => to.join(name),
        (true, None) => bail!("{from} has no name to keep; give the target one"),
        (false, _) => to,
    };
    if is_directory(client, id, from).await? {
        return archive::download(client, id, from, &to).await;
    }
    let answer = client.download(id, from).await.with_context(|| format!("cannot copy {id}:{from}"))?;
    let bar = progress(answer.content_length());
    let directory = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Under its own name only when all of it is there.
    let temporary = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .with_context(|| format!("cannot write to {}", directory.display()))?;
    let mut file = File::from_std(temporary.as_file().try_clone()?);
    let mut pieces = StreamReader::new(counted(answer.bytes_stream().map_err(io::Error::other), &bar));
    tokio::io::copy_buf(&mut pieces, &mut file).await.with_context(|| format!("cannot copy {id}:{from}"))?;
    file.flush().await?;
    temporary.persist(&to).with_context(|| format!("cannot write {}", to.display()))?;
    bar.finish_and_clear();
    Ok(())
}

/// Whether there is a directory in the capsule.
async fn is_directory(client: &Client, id: CapsuleId, path: &str) -> Result<bool> {
    let trimmed = path.trim_end_matches('/');
    let (parent, name) = match trimmed.rsplit_once('/') {
        _ if matches!(trimmed, "" | "~" | "." | "..") => return Ok(true),
        Some(("", name)) => ("/", name),
        Some((parent, name)) => (parent, name),
        None => ("", trimmed),
    };
    match client.list_directory(id, parent).await {
        Ok(listing) => Ok(listing.entries.iter().any(|entry| entry.name == name && entry.kind == FileKind::Directory)),
        // A parent that is not there is made, or refused, by the copy itself.
        Err(error) if error.downcast_ref::<Refused>().is_some_and(|refused| refused.code == ErrorCode::NotFound) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Runs a command in the capsule, which must succeed.
async fn run(client: &Client, id: CapsuleId, words: &[&str]) -> Result<()> {
    let exec = Exec {
        cmd: words[0].to_owned(),
        args: Some(words[1..].iter().map(|word| (*word).to_owned()).collect()),
        timeout_sec: Some(LIMIT.as_secs() as i64),
        ..Exec::default()
    };
    let result = client.exec(id, &exec, LIMIT).await?;
    if result.exit_code != 0 {
        bail!("{} failed in the capsule: {}", words[0], result.stderr.trim());
    }
    Ok(())
}

/// For one helper command in the capsule. Packing a large directory takes a while.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(3600);

/// A bar on a terminal, nothing elsewhere. Without a length it counts.
fn progress(length: Option<u64>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match length {
        Some(length) => {
            (ProgressBar::new(length), "{wide_bar} {bytes:>10} / {total_bytes} {bytes_per_sec:>12} {eta:>4}")
        }
        None => (ProgressBar::no_length(), "{spinner} {bytes:>10} {bytes_per_sec:>12}"),
    };
    // The templates are constants that are known to be good.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn counted<S>(pieces: S, bar: &ProgressBar) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static + use<S>
where
    S: Stream<Item = io::Result<Bytes>> + Send + 'static,
{
    let bar = bar.clone();
    pieces.inspect(move |piece| {
        if let Ok(piece) = piece {
            bar.inc(piece.len() as u64);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let id = "cl-0000000000000000000000001";
        let there = |path: &str| Ok(Place::There(id.parse().unwrap(), path.to_owned()));
        assert_eq!(format!("{id}:/a b:c").parse(), there("/a b:c"));
        assert_eq!(format!("{id}:").parse(), there("~"));
        for here in ["/a", "a:b", "./cl-1:x", "cl-1"] {
            assert_eq!(here.parse(), Ok(Place::Here(PathBuf::from(here))));
        }
        assert!("cl-1:/x".parse::<Place>().is_err() && "".parse::<Place>().is_err());
    }
}
