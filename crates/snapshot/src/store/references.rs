//! What is in use: derived from the headers, never stored.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Header, Id};

/// Generations by how many headers and pins refer to them.
#[derive(Debug, Default)]
pub(super) struct References {
    /// Every header of the data directory, by its path.
    headers: HashMap<PathBuf, Referrer>,
    uses: HashMap<Id, usize>,
    /// Counts what was ever committed, so that each commit can be told from the next.
    commits: u64,
}

/// What a header refers to.
#[derive(Debug)]
pub(super) struct Referrer {
    /// Which commit put it there.
    pub(super) commit: u64,
    /// `None` when it cannot be read: then it may be anything.
    pub(super) generations: Option<Vec<Id>>,
}

impl References {
    pub(super) fn get(&self, path: &Path) -> Option<&Referrer> {
        self.headers.get(path)
    }

    /// Notes what the header at `path` refers to, in place of what was there.
    pub(super) fn put(&mut self, path: &Path, generations: Option<Vec<Id>>) {
        self.acquire(generations.iter().flatten());
        self.commits += 1;
        let referrer = Referrer { commit: self.commits, generations };
        if let Some(before) = self.headers.insert(path.to_owned(), referrer) {
            self.release(before.generations.iter().flatten());
        }
    }

    pub(super) fn remove(&mut self, path: &Path) {
        if let Some(before) = self.headers.remove(path) {
            self.release(before.generations.iter().flatten());
        }
    }

    pub(super) fn is_used(&self, id: Id) -> bool {
        self.uses.contains_key(&id)
    }

    /// Every header, readable or not.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.headers.keys().cloned().collect()
    }

    /// A header that nobody knows the references of.
    pub(super) fn unreadable(&self) -> Option<&Path> {
        self.headers.iter().find(|(_, referrer)| referrer.generations.is_none()).map(|(path, _)| path.as_path())
    }

    fn acquire<'a>(&mut self, ids: impl IntoIterator<Item = &'a Id>) {
        for id in ids {
            *self.uses.entry(*id).or_default() += 1;
        }
    }

    fn release<'a>(&mut self, ids: impl IntoIterator<Item = &'a Id>) {
        for id in ids {
            if let Entry::Occupied(mut count) = self.uses.entry(*id) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
    }
}

pub(super) fn ids(header: &Header) -> Vec<Id> {
    header.generations().iter().map(|generation| generation.id).collect()
}

pub(super) fn lock(references: &Mutex<References>) -> MutexGuard<'_, References> {
    // Nothing here panics half-way, so what a panic elsewhere leaves is whole.
    references.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps generations from being collected while it lives: those that are read, and those that no header has yet.
#[derive(Debug)]
pub(super) struct Pin {
    references: Arc<Mutex<References>>,
    ids: Vec<Id>,
}

impl Pin {
    /// Pins `ids`, under the lock that also decided on them.
    pub(super) fn new(references: &Arc<Mutex<References>>, locked: &mut References, ids: Vec<Id>) -> Self {
        locked.acquire(&ids);
        Self { references: references.clone(), ids }
    }

    /// Never collects what is pinned, until the store is opened again.
    pub(super) fn keep(mut self) {
        self.ids.clear();
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        lock(&self.references).release(&self.ids);
    }
}
