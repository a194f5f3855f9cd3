//! What callers say about a file, kept with the file: text values under text keys, in the extended attributes `user.e2b.KEY`.
//!
//! It owns where they are kept. Which keys and values callers may send is for whoever takes them in.

use rustix::fd::AsFd;
use rustix::fs::XattrFlags;
use rustix::io::{Errno, Result};
use std::collections::BTreeMap;
use std::path::Path;

const PREFIX: &str = "user.e2b.";

/// Everything said about the file or directory at `path`, links followed. Where a file system keeps no attributes that is
/// nothing. A value that is not UTF-8 (not one of ours, then) is shown with U+FFFD.
pub fn read(path: &Path) -> Result<BTreeMap<String, String>> {
    let query = || rustix::fs::listxattr_query(path);
    let list = match whole(query, |buffer| rustix::fs::listxattr(path, buffer)) {
        Err(Errno::NOTSUP) => return Ok(BTreeMap::new()),
        list => list?,
    };
    let mut metadata = BTreeMap::new();
    for key in keys(&list) {
        let name = format!("{PREFIX}{key}");
        let query = || rustix::fs::getxattr_query(path, &name);
        match whole(query, |buffer| rustix::fs::getxattr(path, &name, buffer)) {
            Ok(value) => metadata.insert(key.to_owned(), String::from_utf8_lossy(&value).into_owned()),
            // Taken back since the listing.
            Err(Errno::NODATA) => continue,
            Err(error) => return Err(error),
        };
    }
    Ok(metadata)
}

/// Makes `metadata` all that is said about `file`. Attributes that need not change are not touched, since a watcher would
/// see that: nothing happens at all when there is nothing before and after.
///
/// Fails with `NOTSUP` where the file system keeps no attributes, and with `NOSPC`, `DQUOT` or `2BIG` where they are too
/// many; what was there before may then be gone in part.
pub fn replace(file: impl AsFd, metadata: &BTreeMap<String, String>) -> Result<()> {
    let query = || rustix::fs::flistxattr_query(&file);
    let list = match whole(query, |buffer| rustix::fs::flistxattr(&file, buffer)) {
        Err(Errno::NOTSUP) => Vec::new(),
        list => list?,
    };
    // First out, then in: room is scarce.
    for key in keys(&list).filter(|key| !metadata.contains_key(*key)) {
        match rustix::fs::fremovexattr(&file, format!("{PREFIX}{key}")) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    for (key, value) in metadata {
        let name = format!("{PREFIX}{key}");
        let query = || rustix::fs::fgetxattr_query(&file, &name);
        let stored = whole(query, |buffer| rustix::fs::fgetxattr(&file, &name, buffer));
        if stored.as_deref() != Ok(value.as_bytes()) {
            rustix::fs::fsetxattr(&file, &name, value.as_bytes(), XattrFlags::empty())?;
        }
    }
    Ok(())
}

/// Our keys in a list of attribute names as the kernel gives it, each ended by a NUL. What is not UTF-8 is not ours.
fn keys(list: &[u8]) -> impl Iterator<Item = &str> {
    let names = list.split(|byte| *byte == 0).filter_map(|name| std::str::from_utf8(name).ok());
    names.filter_map(|name| name.strip_prefix(PREFIX)).filter(|key| !key.is_empty())
}

/// Reads something whose size is known only by asking, and may grow in between.
fn whole(query: impl Fn() -> Result<usize>, fill: impl Fn(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
    loop {
        let mut buffer = vec![0; query()?];
        if buffer.is_empty() {
            return Ok(buffer);
        }
        match fill(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn replaces_all_of_ours_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = File::create(&path).unwrap();
        rustix::fs::fsetxattr(&file, "user.other", b"stays", XattrFlags::CREATE).unwrap();
        for metadata in [map(&[]), map(&[("a", "1"), ("b", "")]), map(&[("b", "2"), ("c", "\u{fc}")]), map(&[])] {
            replace(&file, &metadata).unwrap();
            assert_eq!(read(&path).unwrap(), metadata);
        }
        let mut value = [0; 5];
        assert_eq!(rustix::fs::fgetxattr(&file, "user.other", &mut value[..]), Ok(5));

        let long = map(&[(&"k".repeat(246), &"v".repeat(3000))]);
        replace(&file, &long).unwrap();
        assert_eq!(read(&path).unwrap(), long);
        assert_eq!(replace(&file, &map(&[(&"k".repeat(247), "v")])), Err(Errno::RANGE));
    }

    #[test]
    fn follows_links_and_takes_directories() {
        let directory = tempfile::tempdir().unwrap();
        let metadata = map(&[("k", "v")]);
        replace(File::open(directory.path()).unwrap(), &metadata).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path(), &link).unwrap();
        assert_eq!(read(&link).unwrap(), metadata);
        assert_eq!(read(&directory.path().join("absent")), Err(Errno::NOENT));
        assert_eq!(read(Path::new("/proc/version")), Ok(map(&[])));
    }

    #[test]
    fn foreign_and_broken_names_are_not_keys() {
        let list = b"user.e2b.a\0security.x\0user.e2b.\0user.e2b.\xff\0user.e2bb\0user.e2b.b.c";
        assert_eq!(keys(list).collect::<Vec<_>>(), ["a", "b.c"]);
        assert_eq!(keys(b"").count(), 0);
    }
}
