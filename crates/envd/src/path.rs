//! What callers write as a path: absolute, `~`, or relative to the user's home.

use std::path::{Path, PathBuf};

/// Why a text is not a path here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("path '{0}': only '~' and '~/' are expanded")]
    ForeignHome(String),
    #[error("path '{0}' holds a NUL byte")]
    Nul(String),
}

/// The path that `given` names: nothing at all is the default directory or else home, `~` is home, and what is relative
/// starts at home. Nothing is looked up.
pub fn resolve(given: &str, default: Option<&str>, home: &str) -> Result<PathBuf, Error> {
    let given = if given.is_empty() { default.unwrap_or(home) } else { given };
    if given.contains('\0') {
        return Err(Error::Nul(given.to_owned()));
    }
    match given.strip_prefix('~') {
        Some("") => Ok(PathBuf::from(home)),
        Some(rest) => match rest.strip_prefix('/') {
            Some(rest) => Ok(Path::new(home).join(rest.trim_start_matches('/'))),
            None => Err(Error::ForeignHome(given.to_owned())),
        },
        None => Ok(Path::new(home).join(given)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let of = |given, default| resolve(given, default, "/home/u").unwrap();
        assert_eq!(of("", None), Path::new("/home/u"));
        assert_eq!(of("", Some("/w")), Path::new("/w"));
        assert_eq!(of("", Some("w")), Path::new("/home/u/w"));
        assert_eq!(of("a/b", Some("/w")), Path::new("/home/u/a/b"));
        assert_eq!(of("~", Some("/w")), Path::new("/home/u"));
        for same in ["~/a", "~//a", "a", "/home/u/a"] {
            assert_eq!(of(same, None), Path::new("/home/u/a"), "{same}");
        }
        assert_eq!(resolve("~root", None, "/"), Err(Error::ForeignHome("~root".to_owned())));
        assert_eq!(resolve("a\0b", None, "/"), Err(Error::Nul("a\0b".to_owned())));
    }
}
