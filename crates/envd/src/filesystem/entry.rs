//! What there is to say about one file, as clients want to hear it.

use crate::metadata;
use buffa_types::google::protobuf::Timestamp;
use guest_api::filesystem::{EntryInfo, FileType};
use std::collections::HashMap;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

/// The bits of a mode that are not the file's type.
const MODE_BITS: u32 = 0o7777;

/// The names of users and groups, read once for as many entries as a request has.
pub struct Owners {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Owners {
    /// Reads `/etc/passwd` and `/etc/group`. What cannot be read names nobody: owners are then numbers.
    pub fn load() -> Owners {
        let read = |path: &str| names(&String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()));
        Owners { users: read("/etc/passwd"), groups: read("/etc/group") }
    }
}

/// Names by number, from lines of `name:password:number`. The first name of a number counts, as for `ls`.
pub fn names(text: &str) -> HashMap<u32, String> {
    let mut names = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        let (Some(name), _, Some(number)) = (fields.next(), fields.next(), fields.next()) else { continue };
        if let Ok(number) = number.parse() {
            names.entry(number).or_insert_with(|| name.to_owned());
        }
    }
    names
}

/// Describes what is at `path`. Of a link: itself, but with the type and mode of what it leads to.
pub fn entry(path: &Path, owners: &Owners) -> io::Result<EntryInfo> {
    let own = std::fs::symlink_metadata(path)?;
    let is_symlink = own.is_symlink();
    // A link that leads nowhere has no mode, and is but a link: clients leave out of a list what has no type.
    let led_to = if is_symlink { std::fs::metadata(path).ok() } else { Some(own.clone()) };
    let describable = led_to.as_ref().is_some_and(|metadata| metadata.is_file() || metadata.is_dir());
    let owner = |names: &HashMap<u32, String>, id: u32| names.get(&id).cloned().unwrap_or_else(|| id.to_string());
    Ok(EntryInfo {
        r#type: led_to.as_ref().map_or(FileType::FILE_TYPE_SYMLINK, kind).into(),
        size: i64::try_from(own.size()).unwrap_or(i64::MAX),
        mode: led_to.map_or(0, |metadata| metadata.mode() & MODE_BITS),
        permissions: permissions(&own),
        owner: owner(&owners.users, own.uid()),
        group: owner(&owners.groups, own.gid()),
        modified_time: Timestamp {
            seconds: own.mtime(),
            nanos: i32::try_from(own.mtime_nsec()).unwrap_or(0),
            ..Default::default()
        }
        .into(),
        symlink_target: if is_symlink { Some(target(path)?.to_string_lossy().into_owned()) } else { None },
        // Others hold none; and what is said about a file must not keep it from being seen.
        metadata: if describable {
            metadata::read(path).unwrap_or_default().into_iter().collect()
        } else {
            Default::default()
        },
        is_symlink,
        ..bare(path)
    })
}

/// The entry of something that exists but does not let itself be described.
pub fn bare(path: &Path) -> EntryInfo {
    EntryInfo {
        name: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
        path: path.to_string_lossy().into_owned(),
        permissions: "?---------".to_owned(),
        ..Default::default()
    }
}

/// The absolute path without `.`, `..` and doubled slashes, by the text alone.
pub fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Where a link leads in the end; if that is nowhere, what it says itself.
fn target(link: &Path) -> io::Result<PathBuf> {
    if let Ok(target) = std::fs::canonicalize(link) {
        return Ok(target);
    }
    let says = std::fs::read_link(link)?;
    Ok(clean(&link.parent().unwrap_or(Path::new("/")).join(says)))
}

fn kind(metadata: &Metadata) -> FileType {
    if metadata.is_dir() {
        FileType::FILE_TYPE_DIRECTORY
    } else if metadata.is_file() {
        FileType::FILE_TYPE_FILE
    } else {
        FileType::FILE_TYPE_UNSPECIFIED
    }
}

/// Ten characters. The first is what both ancestors of this wire say (`L` for a link, `S` for a socket), the rest are as `ls`
/// has them.
fn permissions(metadata: &Metadata) -> String {
    let kind = metadata.file_type();
    let first = match () {
        () if kind.is_file() => '-',
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'L',
        () if kind.is_fifo() => 'p',
        () if kind.is_socket() => 'S',
        () if kind.is_char_device() => 'c',
        () if kind.is_block_device() => 'b',
        () => '?',
    };
    let mode = metadata.mode();
    let mut text = String::with_capacity(10);
    text.push(first);
    for (shift, special, marks) in [(6, 0o4000, "sS"), (3, 0o2000, "sS"), (0, 0o1000, "tT")] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        let (with, without) = marks.split_at(1);
        text.push_str(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => with,
            (false, true) => without,
            (true, false) => "x",
            (false, false) => "-",
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_first_of_their_number() {
        let names = names("root:x:0:0:root:/root:/bin/sh\ntoor:x:0:\n#\nbad:x:y:\nshort:x\nuser:x:1000:\n");
        assert_eq!(names, HashMap::from([(0, "root".to_owned()), (1000, "user".to_owned())]));
    }

    #[test]
    fn clean_paths() {
        for (given, expected) in [
            ("/", "/"),
            ("/a//b/", "/a/b"),
            ("/a/./b/..", "/a"),
            ("/../../a", "/a"),
            ("/a/../..", "/"),
            ("relative", "/relative"),
        ] {
            assert_eq!(clean(Path::new(given)), Path::new(expected), "{given}");
        }
    }

    #[test]
    fn a_root_and_a_device_have_entries() {
        let owners = Owners { users: names("root:x:0"), groups: HashMap::new() };
        let root = entry(Path::new("/"), &owners).unwrap();
        assert_eq!(
            (root.name.as_str(), root.path.as_str(), root.owner.as_str(), root.group.as_str()),
            ("/", "/", "root", "0")
        );
        let null = entry(Path::new("/dev/null"), &owners).unwrap();
        assert_eq!((null.permissions.as_str(), null.mode), ("crw-rw-rw-", 0o666));
        assert_eq!(null.r#type, FileType::FILE_TYPE_UNSPECIFIED);
    }
}
