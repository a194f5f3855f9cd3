//! A point: what a running capsule was at one moment, from which others begin. Forks, templates and boot snapshots are
//! points that differ in who keeps them.
//!
//! A point is a directory with a header, a VMM state and a disk ([`crate::capsule::files`]), and `point.json`, which is
//! written last: a directory without it is garbage. What begins from a point takes its own references first, so a point
//! can go at any time: it is removed when nobody holds it any more.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use snapshot::Store;
use tracing::warn;

use crate::capsule::Spec;
use crate::capsule::files;
use crate::capsule::record::Record;
use crate::host::{self, blocking};

/// What says that a point is whole.
pub(crate) const META: &str = "point.json";

/// What is known of a point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Meta {
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Size of the root disk in MiB.
    pub disk_mib: u32,
    /// The token that its envd demands.
    pub token: String,
    /// Versions of what runs in it.
    pub versions: BTreeMap<String, String>,
    /// SHA-256 of the VMM's state file, in hex.
    pub state: String,
    /// Milliseconds since 1970.
    pub created_unix_ms: i64,
    /// The file name of the image under its disk, whose name says its content.
    #[serde(default)]
    pub image: Option<String>,
}

impl Meta {
    /// That of the point in `dir`, if it can be read.
    pub(crate) fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.join(META)).ok()?).ok()
    }

    /// That of a point that was captured from the capsule of `record`, whose state file has the digest `state`.
    pub fn of(record: &Record, state: String) -> Self {
        let Spec { vcpus, memory_mib, disk_mib, .. } = record.spec;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64);
        let (token, versions, image) = (record.token.clone(), record.versions.clone(), record.image.clone());
        Self { vcpus, memory_mib, disk_mib, token, versions, state, created_unix_ms: now, image }
    }
}

/// A point that can be begun from. It is removed from disk when it is dropped, if it was [doomed](Point::doom).
pub struct Point {
    /// Where it is.
    pub dir: PathBuf,
    /// What it is.
    pub meta: Meta,
    memory: Store,
    is_doomed: AtomicBool,
}

impl Point {
    /// The point in `dir`, or `None` when that is not whole.
    pub fn open(memory: &Store, dir: PathBuf) -> Option<Arc<Self>> {
        let meta = Meta::read(&dir)?;
        Some(Arc::new(Self { dir, meta, memory: memory.clone(), is_doomed: AtomicBool::new(false) }))
    }

    /// Finishes the point that was captured into `dir`. It is doomed from the start, so that only what decides to
    /// [keep](Point::keep) it makes it last.
    pub fn made(memory: &Store, dir: PathBuf, meta: Meta) -> Arc<Self> {
        Arc::new(Self { dir, meta, memory: memory.clone(), is_doomed: AtomicBool::new(true) })
    }

    /// Makes it durable: it is there when the host is next opened.
    pub async fn keep(self: &Arc<Self>) -> io::Result<()> {
        let point = self.clone();
        let write = move || {
            files::sync_all_in(&point.dir)?;
            let text = serde_json::to_vec_pretty(&point.meta).expect("a point's data has only JSON types");
            let new = point.dir.join("point.json.new");
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(new, point.dir.join(META))?;
            files::sync(&point.dir)?;
            point.dir.parent().map_or(Ok(()), files::sync)
        };
        blocking(write).await?;
        self.is_doomed.store(false, Ordering::Release);
        Ok(())
    }

    /// Has it removed once nobody holds it. From now on it is garbage, also for the next agent, and after a power cut.
    pub fn doom(&self) {
        self.is_doomed.store(true, Ordering::Release);
        match fs::remove_file(self.dir.join(META)).and_then(|()| files::sync(&self.dir)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(dir = %self.dir.display(), %error, "a point stays");
            }
            _ => {}
        }
    }
}

impl Point {
    /// Whether it goes when nobody holds it.
    pub fn is_doomed(&self) -> bool {
        self.is_doomed.load(Ordering::Acquire)
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        if !*self.is_doomed.get_mut() {
            return;
        }
        discard(&self.memory, &self.dir);
    }
}

/// Removes what may or may not be a point.
pub fn discard(memory: &Store, dir: &Path) {
    if let Err(error) = files::remove_all(memory, dir) {
        warn!(dir = %dir.display(), %error, "a point's directory stays for now");
    }
    host::collect(memory);
}

/// The whole points in `dir`, by the names of their directories; what is none is removed.
pub fn open_all(memory: &Store, dir: &Path) -> io::Result<BTreeMap<String, Arc<Point>>> {
    let mut points = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        match Point::open(memory, path.clone()) {
            Some(point) => {
                points.insert(name, point);
            }
            None => discard(memory, &path),
        }
    }
    Ok(points)
}
