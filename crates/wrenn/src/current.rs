//! The `wrenn up` that runs on this machine for this user, written down so that other commands find it without being told.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// How to reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Current {
    /// Address of its API.
    pub url: String,
    /// A key for it.
    pub api_key: String,
    /// The authority to trust for it, in PEM, besides all others.
    pub ca: Option<String>,
    /// Its data directory, by which it knows its own note.
    dir: PathBuf,
}

impl Current {
    /// The one of that directory.
    pub fn new(dir: &Path, url: &str, api_key: &str, ca: Option<&str>) -> Self {
        let (url, api_key, ca) = (url.to_owned(), api_key.to_owned(), ca.map(str::to_owned));
        Self { url, api_key, ca, dir: dir.to_owned() }
    }
}

/// Notes it; of several on one machine, the last to start is the one that is found.
pub fn write(current: &Current) -> Result<()> {
    let path = path()?;
    write_to(&path, current).with_context(|| format!("writing {}", path.display()))
}

/// Takes the note away, unless another one wrote it since.
pub fn remove(dir: &Path) -> Result<()> {
    let path = path()?;
    remove_from(&path, dir).with_context(|| format!("removing {}", path.display()))
}

/// The note, if there is one that can be read.
pub fn read() -> Option<Current> {
    read_from(&path().ok()?)
}

fn path() -> Result<PathBuf> {
    let state = dirs::state_dir().context("no state directory: set HOME or XDG_STATE_HOME")?;
    Ok(state.join("wrenn/current.json"))
}

fn write_to(path: &Path, current: &Current) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent)?;
    // Readable by its user only, from the first byte: it has a key in it.
    let mut file = tempfile::NamedTempFile::new_in(parent)?;
    serde_json::to_writer(&mut file, current)?;
    file.flush()?;
    file.persist(path)?;
    Ok(())
}

fn remove_from(path: &Path, dir: &Path) -> io::Result<()> {
    if read_from(path).is_some_and(|current| current.dir == dir) { std::fs::remove_file(path) } else { Ok(()) }
}

fn read_from(path: &Path) -> Option<Current> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn current(dir: &str) -> Current {
        Current::new(Path::new(dir), "http://127.0.0.1:1", "wrn_1", None)
    }

    #[test]
    fn the_last_to_start_is_found_and_only_its_own_end_removes_it() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("state/wrenn/current.json");
        assert_eq!(read_from(&path), None);
        write_to(&path, &current("/a")).unwrap();
        write_to(&path, &current("/b")).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        remove_from(&path, Path::new("/a")).unwrap();
        assert_eq!(read_from(&path), Some(current("/b")));
        remove_from(&path, Path::new("/b")).unwrap();
        remove_from(&path, Path::new("/b")).unwrap();
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }
}
