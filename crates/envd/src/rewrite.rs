//! Writing small files again and again.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Makes a file that everybody may read have this content. In place: a guest that wakes does so before anything else, and a
/// new file, or room taken anew, is a multiple of the work. Who reads meanwhile may see half of it.
pub fn rewrite(path: &Path, content: &str) -> io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(false).mode(0o644).open(path)?;
    file.write_all(content.as_bytes())?;
    if file.metadata()?.len() > content.len() as u64 { file.set_len(content.len() as u64) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_longer_content_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for content in ["one", "longer", "", "1"] {
            rewrite(&path, content).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
    }
}
