//! The object store: what is where in it, and reading.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::{Path, PathPart};
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload};
use rustix::fs::FallocateFlags;

use crate::{CHUNK, Chunk, Config, Entry, Error, Hash, Manifest, Unreadable};

pub(crate) const CHUNKS: &str = "chunks";
pub(crate) const MANIFESTS: &str = "manifests";
/// Of what is done with chunks at the same time.
pub(crate) const AT_ONCE: usize = 8;
/// What a chunk may take, if compressing it made it longer.
const MAX_STORED: u64 = CHUNK + (CHUNK >> 6);

/// An object store. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Objects {
    pub(crate) client: Arc<dyn ObjectStore>,
    prefix: Path,
}

impl Objects {
    /// The object store that is configured. It is not asked anything yet.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let (client, prefix) = config.open()?;
        Ok(Self { client, prefix })
    }

    /// The manifest of the upload `name`, or `None` where there is no such upload.
    pub async fn manifest(&self, name: &str) -> Result<Option<Manifest>, Error> {
        let Some(bytes) = self.get(&self.manifest_path(name)?).await? else { return Ok(None) };
        let manifest = Manifest::decode(&bytes);
        Ok(Some(manifest.map_err(|source| Error::Manifest { name: name.to_owned(), source })?))
    }

    /// The names of all uploads in the directory `under`.
    pub async fn names(&self, under: &str) -> Result<Vec<String>, Error> {
        self.names_at(&self.manifest_path(under)?).await
    }

    pub(crate) async fn names_at(&self, directory: &Path) -> Result<Vec<String>, Error> {
        let all = self.directory(MANIFESTS);
        let name = |object: ObjectMeta| {
            let parts = object.location.prefix_match(&all)?;
            Some(parts.map(|part: PathPart<'_>| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"))
        };
        Ok(self.list(directory).await?.into_iter().filter_map(name).collect())
    }

    /// Removes an upload. Chunks that only it had are garbage then. One that is not there is removed already.
    pub async fn forget(&self, name: &str) -> Result<(), Error> {
        self.delete(&self.manifest_path(name)?).await
    }

    /// The content of a chunk.
    pub async fn chunk(&self, hash: Hash) -> Result<Bytes, Error> {
        let damaged = |why| Error::Damaged { hash, why };
        let path = self.chunk_path(hash);
        let answer = match self.client.get(&path).await {
            Err(error) if is_absent(&error) => return Err(Error::Missing(hash)),
            answer => answer.map_err(Error::ask("read", &path))?,
        };
        if answer.meta.size > MAX_STORED {
            return Err(damaged(Unreadable::TooLong(answer.meta.size)));
        }
        let stored = answer.bytes().await.map_err(Error::ask("read", &path))?;
        let checked = blocking(move || {
            let content = zstd::bulk::decompress(&stored, CHUNK as usize).map_err(Unreadable::Decompress)?;
            if Hash::of(&content) == hash { Ok(content) } else { Err(Unreadable::Hash) }
        });
        checked.await.map(Bytes::from).map_err(damaged)
    }

    /// Makes `file` what `entry` says. Where it says that a chunk is what the image underneath has, `file` has it already.
    /// It is not made durable.
    pub async fn download(&self, entry: &Entry, file: File) -> Result<(), Error> {
        let failed = Error::file("write", &entry.name);
        file.set_len(entry.size).map_err(failed)?;
        let file = Arc::new(file);
        let chunks = entry.chunks.iter().copied().enumerate().map(|(index, chunk)| {
            let (file, range) = (file.clone(), entry.range(index));
            async move {
                let failed = Error::file("write", &entry.name);
                match chunk {
                    Chunk::Base => Ok(()),
                    Chunk::Zero => blocking(move || {
                        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                        Ok(rustix::fs::fallocate(&*file, flags, range.start, range.end - range.start)?)
                    })
                    .await
                    .map_err(failed),
                    Chunk::Stored(hash) => {
                        let content = self.part(hash, range.end - range.start).await?;
                        blocking(move || file.write_all_at(&content, range.start)).await.map_err(failed)
                    }
                }
            }
        });
        futures::stream::iter(chunks).buffer_unordered(AT_ONCE).try_collect().await
    }

    /// The content of a chunk that has to have `expected` bytes.
    pub(crate) async fn part(&self, hash: Hash, expected: u64) -> Result<Bytes, Error> {
        let content = self.chunk(hash).await?;
        let len = content.len() as u64;
        if len == expected {
            Ok(content)
        } else {
            Err(Error::Damaged { hash, why: Unreadable::Length { len, expected } })
        }
    }

    pub(crate) fn directory(&self, name: &str) -> Path {
        self.prefix.clone().join(name)
    }

    pub(crate) fn chunk_path(&self, hash: Hash) -> Path {
        let text = hash.to_string();
        self.directory(CHUNKS).join(&text[..2]).join(text)
    }

    /// Where the manifest of an upload is. Names may have directories.
    pub(crate) fn manifest_path(&self, name: &str) -> Result<Path, Error> {
        let is_part = |part: &str| {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            !part.is_empty() && !part.starts_with('.') && part.bytes().all(is_plain)
        };
        if name.split('/').all(is_part) {
            Ok(name.split('/').fold(self.directory(MANIFESTS), |path, part| path.join(part)))
        } else {
            Err(Error::Name(name.to_owned()))
        }
    }

    /// What of an object the store knows, or `None` where there is none.
    pub(crate) async fn head(&self, path: &Path) -> Result<Option<ObjectMeta>, Error> {
        match self.client.head(path).await {
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            meta => Ok(Some(meta.map_err(Error::ask("look for", path))?)),
        }
    }

    pub(crate) async fn get(&self, path: &Path) -> Result<Option<Bytes>, Error> {
        match self.client.get(path).await {
            Err(error) if is_absent(&error) => Ok(None),
            answer => {
                let answer = answer.map_err(Error::ask("read", path))?;
                Ok(Some(answer.bytes().await.map_err(Error::ask("read", path))?))
            }
        }
    }

    /// Writes an object, in one step and durably.
    pub(crate) async fn put(&self, path: &Path, content: impl Into<PutPayload>) -> Result<(), Error> {
        self.client.put(path, content.into()).await.map(drop).map_err(Error::ask("write", path))
    }

    pub(crate) async fn delete(&self, path: &Path) -> Result<(), Error> {
        match self.client.delete(path).await {
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            deleted => deleted.map_err(Error::ask("remove", path)),
        }
    }

    pub(crate) async fn list(&self, below: &Path) -> Result<Vec<ObjectMeta>, Error> {
        let listed = self.client.list(Some(below)).try_collect().await;
        listed.map_err(Error::ask("list", below))
    }
}

/// Runs what blocks where it stops nobody else.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("the work does not panic, and nobody aborts it")
}

/// Whether an object is not there, and not the whole bucket.
fn is_absent(error: &object_store::Error) -> bool {
    match error {
        object_store::Error::NotFound { source, .. } => !source.to_string().contains("NoSuchBucket"),
        _ => false,
    }
}
