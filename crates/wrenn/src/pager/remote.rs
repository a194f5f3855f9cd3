//! Memory that comes from the object store while it is served.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use objects::{Config, Lazy, Manifest, Objects};
use pager::{Fetch, FetchError};
use snapshot::{DataFile, Id};

/// The generations that are not here yet.
#[derive(Debug)]
pub struct Remote {
    lazy: Lazy,
    files: HashMap<Id, usize>,
    patience: Duration,
    /// What the requests run on, for as long as there are any.
    _runtime: tokio::runtime::Runtime,
}

/// Opens the generations that the manifest `to_come` lists, beside it, and fetches what is read of them at once.
pub fn open(address: &str, to_come: &Path, patience: Duration) -> Result<Arc<Remote>> {
    let config = Config::parse(address, std::env::vars()).context("understanding the object store")?;
    let manifest = fs::read(to_come).with_context(|| format!("reading {}", to_come.display()))?;
    let manifest = Manifest::decode(&manifest).with_context(|| format!("reading {}", to_come.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let objects = Objects::open(&config)?;
    let dir = to_come.parent().unwrap_or(Path::new("."));
    let sizes: Vec<u64> = manifest.files.iter().map(|file| file.size).collect();
    let ids = manifest.files.iter().enumerate().filter_map(|(index, file)| Some((Id::parse(&file.name)?, index)));
    let files = ids.collect();
    let lazy = Lazy::open(objects, runtime.handle().clone(), dir, manifest.files)?;
    for (file, size) in sizes.into_iter().enumerate() {
        for bytes in DataFile::read_at_open(size) {
            let fetched = lazy.fetch(file, bytes, patience);
            fetched.map_err(|source| pager::Error::Fetch { offset: 0, source: source.into() })?;
        }
    }
    Ok(Arc::new(Remote { lazy, files, patience, _runtime: runtime }))
}

impl Remote {
    /// Fetches all that nobody has asked for.
    pub fn fill(&self) -> Result<(), objects::Error> {
        self.lazy.fill()
    }
}

impl Fetch for Remote {
    fn is_present(&self, generation: Id, bytes: Range<u64>) -> bool {
        // The others were here before.
        self.files.get(&generation).is_none_or(|file| self.lazy.is_present(*file, bytes))
    }

    fn fetch(&self, generation: Id, bytes: Range<u64>) -> Result<(), FetchError> {
        match self.files.get(&generation) {
            Some(file) => Ok(self.lazy.fetch(*file, bytes, self.patience)?),
            None => Ok(()),
        }
    }
}
