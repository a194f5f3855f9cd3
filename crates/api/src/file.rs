//! Files in a capsule.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::{self, Invalid};

/// What is at a path. Clients fail on any other word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// Also sockets, pipes and devices.
    File,
    Directory,
    /// A link that leads nowhere; other links are of the kind they lead to.
    Symlink,
}

/// A file, directory or link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    pub name: String,
    /// Absolute.
    #[schema(example = "/root/notes.txt")]
    pub path: String,
    /// For a link, that of what it leads to.
    #[serde(rename = "type")]
    pub kind: FileKind,
    /// Bytes.
    pub size: i64,
    /// The permission bits, as a number.
    #[schema(example = 420)]
    pub mode: u32,
    #[schema(example = "-rw-r--r--")]
    pub permissions: String,
    pub owner: String,
    pub group: String,
    /// Seconds since 1970.
    pub modified_at: i64,
    /// Where a link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// Names a file. Relative paths, and those that begin with `~/`, are taken from root's home.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct FilePath {
    #[schema(example = "/root/notes.txt")]
    pub path: String,
}

impl FilePath {
    /// The path, if it can be one.
    pub fn validate(self) -> Result<String, Invalid> {
        limits::path(&self.path)?;
        Ok(self.path)
    }
}

/// The parts of an upload. `path` comes first.
#[derive(Debug, Clone, ToSchema)]
pub struct FileForm {
    /// Where the file goes.
    pub path: String,
    /// What is to be in it.
    #[schema(value_type = String, format = Binary)]
    pub file: Vec<u8>,
}

/// Names a directory, and how far to look into it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Depth {
    /// The default directory when empty.
    #[schema(example = "/root")]
    pub path: String,
    /// Levels below it; 0 and absent mean 1.
    #[schema(minimum = 0, maximum = 64)]
    pub depth: Option<i64>,
}

impl Depth {
    /// The path and the levels, at least 1.
    pub fn validate(self) -> Result<(String, u32), Invalid> {
        limits::process_string("path", &self.path, limits::PATH_BYTES)?;
        let depth = limits::number("depth", self.depth, limits::LIST_DEPTH, 1)?;
        Ok((self.path, depth.max(1)))
    }
}

/// What is in a directory: parents before their children, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirectoryEntries {
    pub entries: Vec<FileEntry>,
}

/// A directory that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MadeDirectory {
    pub entry: FileEntry,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_depths_are_bounded() {
        let list = |path: &str, depth| Depth { path: path.into(), depth }.validate();
        assert_eq!(list("", None), Ok((String::new(), 1)));
        assert_eq!(list("a/", Some(0)), Ok(("a/".into(), 1)));
        assert_eq!(list("/", Some(64)), Ok(("/".into(), 64)));
        for (path, depth, field) in [
            ("/", Some(65), "depth"),
            ("/", Some(-1), "depth"),
            ("a\0", None, "path"),
            (&"x".repeat(4096), None, "path"),
        ] {
            assert_eq!(list(path, depth).unwrap_err().field, field);
        }
        assert_eq!(FilePath { path: String::new() }.validate().unwrap_err().field, "path");
        assert_eq!(FilePath { path: "~/a".into() }.validate(), Ok("~/a".into()));
    }
}
