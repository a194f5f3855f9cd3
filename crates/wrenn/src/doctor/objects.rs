//! What is in the object store, and whether all of it is needed, and all that is needed there. Chunks are counted, not read.

use std::collections::BTreeMap;

use ::objects::{Config, Count, Error, Objects};
use serde::Serialize;

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Stored {
    /// Uploads: capsules and templates.
    pub(super) uploads: usize,
    /// Chunks that uploads need.
    pub(super) used: Count,
    /// Chunks that none needs. An agent removes them.
    pub(super) garbage: Count,
    /// What should not be as it is: why, by object or upload.
    pub(super) wrong: BTreeMap<String, String>,
}

impl Stored {
    /// Looks twice if something is wrong: beside an agent that works, things are seen half-done.
    pub(super) async fn look(config: &Config) -> Result<Self, Error> {
        let objects = Objects::open(config)?;
        let mut stored = Self::look_once(&objects).await?;
        if !stored.wrong.is_empty() {
            let again = Self::look_once(&objects).await?;
            let before = std::mem::replace(&mut stored, again).wrong;
            stored.wrong.retain(|name, _| before.contains_key(name));
        }
        Ok(stored)
    }

    async fn look_once(objects: &Objects) -> Result<Self, Error> {
        let audit = objects.audit().await?;
        let foreign = audit.foreign.into_iter().map(|path| (path, "no chunk has this name".to_owned()));
        let broken =
            audit.broken.into_iter().map(|(upload, error)| (upload, format!("{:#}", anyhow::Error::from(error))));
        let missing =
            audit.missing.into_iter().map(|(hash, upload)| (hash.to_string(), format!("lost; {upload} needs it")));
        Ok(Self {
            uploads: audit.uploads.len(),
            used: audit.used,
            garbage: audit.garbage,
            wrong: foreign.chain(broken).chain(missing).collect(),
        })
    }
}
