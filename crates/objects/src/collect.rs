//! Garbage: chunks that no manifest names, and uploads that are there only for others.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use object_store::ObjectMeta;
use object_store::path::{Path, PathPart};

use crate::lease::{Lease, Work};
use crate::store::{CHUNKS, MANIFESTS};
use crate::{Error, Hash, Manifest, Objects};

/// Objects, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Count {
    /// How many.
    pub objects: u64,
    /// Their length together.
    pub bytes: u64,
}

impl Count {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// What is in an object store.
#[derive(Debug, Default)]
pub struct Audit {
    /// The uploads.
    pub uploads: Vec<String>,
    /// Chunks that a manifest names.
    pub used: Count,
    /// Chunks that none names: what [`Objects::collect`] removes.
    pub garbage: Count,
    /// Objects that are no chunk though they lie among them.
    pub foreign: Vec<String>,
    /// Chunks that are not there, with an upload that needs each.
    pub missing: BTreeMap<Hash, String>,
    /// Uploads whose manifests cannot be read.
    pub broken: Vec<(String, Error)>,
}

impl Objects {
    /// Removes every chunk that no manifest names and that is older than `grace`: somebody may still be reading what an
    /// upload that was replaced had. Waits up to `patience` for uploads that are under way; those that come meanwhile
    /// wait. A manifest that cannot be read is an error, and everything stays, as nobody knows what it needs.
    pub async fn collect(&self, grace: Duration, patience: Duration) -> Result<Count, Error> {
        self.alone(patience, |now| self.sweep(grace, now)).await
    }

    /// Removes the uploads in the directory `under` that none of the others needs and that are older than `grace`, and says
    /// how many. `needs` says what an upload needs; where that is not known of one, `None`, all stay. Waits as
    /// [`collect`](Self::collect), which removes what only they had.
    pub async fn collect_unneeded(
        &self,
        under: &str,
        grace: Duration,
        patience: Duration,
        needs: impl Fn(&Manifest) -> Option<Vec<String>>,
    ) -> Result<usize, Error> {
        let directory = self.manifest_path(under)?;
        self.alone(patience, |now| async move {
            let shared = self.list(&directory).await?;
            let mut needed = HashSet::new();
            for name in self.upload_names().await? {
                let Some(manifest) = self.manifest(&name).await? else { continue };
                match needs(&manifest) {
                    Some(names) => needed.extend(names),
                    None => return Ok(0),
                }
            }
            let needed = needed.iter().map(|name| self.manifest_path(name)).collect::<Result<HashSet<_>, _>>()?;
            let mut collected = 0;
            for object in shared {
                let age = (now.last_modified - object.last_modified).to_std().unwrap_or_default();
                if !needed.contains(&object.location) && age >= grace {
                    self.delete(&object.location).await?;
                    collected += 1;
                }
            }
            Ok(collected)
        })
        .await
    }

    /// Does `work`, which is told of something that was written just now, while nobody uploads.
    async fn alone<T, F: Future<Output = Result<T, Error>>>(
        &self,
        patience: Duration,
        work: impl FnOnce(ObjectMeta) -> F,
    ) -> Result<T, Error> {
        let mut lease = Lease::take(self, Work::Collection, patience).await?;
        let now = lease.meta().await;
        let done = match now {
            Ok(now) => lease.during(work(now)).await,
            Err(error) => Err(error),
        };
        lease.give_back().await;
        done
    }

    async fn sweep(&self, grace: Duration, now: ObjectMeta) -> Result<Count, Error> {
        let chunks = self.list(&self.directory(CHUNKS)).await?;
        let mut named = HashSet::new();
        for name in self.upload_names().await? {
            // One that is gone by now names nothing.
            named.extend(self.manifest(&name).await?.iter().flat_map(|manifest| manifest.stored()));
        }
        let mut collected = Count::default();
        for object in chunks {
            let is_garbage = self.chunk_at(&object.location).is_some_and(|hash| !named.contains(&hash));
            let age = (now.last_modified - object.last_modified).to_std().unwrap_or_default();
            if is_garbage && age >= grace {
                self.delete(&object.location).await?;
                collected.add(object.size);
            }
        }
        Ok(collected)
    }

    /// Compares what is there with what the manifests name. Chunks are not read.
    pub async fn audit(&self) -> Result<Audit, Error> {
        let mut audit = Audit { uploads: self.upload_names().await?, ..Audit::default() };
        let mut named = BTreeMap::new();
        for name in &audit.uploads {
            match self.manifest(name).await {
                Ok(manifest) => {
                    let hashes = manifest.iter().flat_map(|manifest| manifest.stored());
                    named.extend(hashes.map(|hash| (hash, name.clone())));
                }
                Err(error @ Error::Manifest { .. }) => audit.broken.push((name.clone(), error)),
                Err(error) => return Err(error),
            }
        }
        let mut there = BTreeSet::new();
        for object in self.list(&self.directory(CHUNKS)).await? {
            match self.chunk_at(&object.location) {
                None => audit.foreign.push(object.location.to_string()),
                Some(hash) => {
                    there.insert(hash);
                    if named.contains_key(&hash) { &mut audit.used } else { &mut audit.garbage }.add(object.size);
                }
            }
        }
        audit.missing = named.into_iter().filter(|(hash, _)| !there.contains(hash)).collect();
        Ok(audit)
    }

    async fn upload_names(&self) -> Result<Vec<String>, Error> {
        self.names_at(&self.directory(MANIFESTS)).await
    }

    /// The chunk that an object is, by where it lies.
    fn chunk_at(&self, path: &Path) -> Option<Hash> {
        let directory = self.directory(CHUNKS);
        let parts: Vec<PathPart<'_>> = path.prefix_match(&directory)?.collect();
        let hash = Hash::parse(parts.last()?.as_ref())?;
        (self.chunk_path(hash) == *path).then_some(hash)
    }
}
