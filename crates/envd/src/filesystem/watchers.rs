//! Watches for callers that would rather ask now and then than keep a stream: what happened waits here, within bounds.

use crate::filesystem::watch::{Change, Error, Target, Watch};
use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How many there may be. The kernel's usual limit is 128 for everything root does.
pub const MAX_WATCHERS: usize = 64;

/// How many changes wait for one caller; as many as the kernel would keep.
pub const MAX_WAITING: usize = 16_384;

/// A caller that has not asked for so long makes room for a new one, if there is none else.
const FORGOTTEN: Duration = Duration::from_secs(60 * 60);

/// There are as many watchers as may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {MAX_WATCHERS} watchers already: remove one")]
pub struct Full;

/// All of them.
#[derive(Default)]
pub struct Watchers {
    table: Mutex<HashMap<String, Watcher>>,
    made: AtomicU64,
}

struct Watcher {
    root: PathBuf,
    include_entry: bool,
    waiting: Arc<Mutex<Waiting>>,
    task: JoinHandle<()>,
    asked: Instant,
}

#[derive(Default)]
struct Waiting {
    changes: VecDeque<Change>,
    /// Why there will be no more.
    ended: Option<Arc<Error>>,
}

/// What a caller gets.
#[derive(Debug)]
pub struct Taken {
    pub root: PathBuf,
    pub include_entry: bool,
    pub changes: Vec<Change>,
}

impl Watchers {
    /// Begins to watch, and names the watcher. Called within a runtime, blocking allowed.
    pub fn create(&self, target: Target, include_entry: bool) -> Result<Result<String, Full>, Error> {
        if !self.has_room() {
            return Ok(Err(Full));
        }
        let root = target.root.clone();
        let watch = Watch::new(target)?;
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let task = tokio::spawn(gather(watch, Arc::clone(&waiting)));
        let watcher = Watcher { root, include_entry, waiting, task, asked: Instant::now() };
        // Unlike those of an earlier envd, whose callers may still be there.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let id = format!("w-{now:x}-{:x}", self.made.fetch_add(1, Ordering::Relaxed));
        let mut table = self.table();
        // Others may have come meanwhile.
        if table.len() >= MAX_WATCHERS {
            return Ok(Err(Full));
        }
        table.insert(id.clone(), watcher);
        Ok(Ok(id))
    }

    /// Takes what happened since the last call. `None`: there is no such watcher. The error comes after the last change, and
    /// again from then on.
    pub fn take(&self, id: &str) -> Option<Result<Taken, Arc<Error>>> {
        let mut table = self.table();
        let watcher = table.get_mut(id)?;
        watcher.asked = Instant::now();
        let mut waiting = lock(&watcher.waiting);
        let changes: Vec<Change> = std::mem::take(&mut waiting.changes).into();
        Some(match &waiting.ended {
            Some(error) if changes.is_empty() => Err(Arc::clone(error)),
            _ => Ok(Taken { root: watcher.root.clone(), include_entry: watcher.include_entry, changes }),
        })
    }

    /// Ends a watcher. `false`: there is none.
    pub fn remove(&self, id: &str) -> bool {
        self.table().remove(id).is_some()
    }

    /// Whether another may come, if need be instead of the one whose caller has forgotten it.
    fn has_room(&self) -> bool {
        let mut table = self.table();
        if table.len() < MAX_WATCHERS {
            return true;
        }
        let oldest = table.iter().min_by_key(|(_, watcher)| watcher.asked);
        let forgotten = oldest.filter(|(_, watcher)| watcher.asked.elapsed() > FORGOTTEN).map(|(id, _)| id.clone());
        forgotten.is_some_and(|id| table.remove(&id).is_some())
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Watcher>> {
        lock(&self.table)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Carries what happens to where it waits, until there is no more or no more room.
async fn gather(mut watch: Watch, waiting: Arc<Mutex<Waiting>>) {
    loop {
        watch.ready().await;
        let result = tokio::task::spawn_blocking(move || {
            let changes = watch.changes();
            (watch, changes)
        });
        // It fails only where everything ends.
        let Ok((back, changes)) = result.await else { return };
        watch = back;
        let mut waiting = lock(&waiting);
        match changes {
            Ok(changes) if waiting.changes.len() + changes.len() <= MAX_WAITING => waiting.changes.extend(changes),
            Ok(_) => waiting.ended = Some(Arc::new(Error::Overflow)),
            Err(error) => waiting.ended = Some(Arc::new(error)),
        }
        if waiting.ended.is_some() {
            return;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
