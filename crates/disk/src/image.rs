use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::backend::{name as give_name, unnamed_beside};
use crate::{Backend, Error, sparse};

/// Longest image name, in characters.
const MAX_NAME: usize = 64;
/// Unit in which an image is read and zeros are recognised, in bytes.
const BLOCK: usize = 64 << 10;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// What an image is called: 1 to 64 of `a-z 0-9 . _ -`, beginning with a letter or digit, so that it is always one
/// harmless path component.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageName(String);

/// Why a text is not an [`ImageName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an image name is 1 to {MAX_NAME} of a-z, 0-9, `.`, `_` and `-`, beginning with a letter or digit")]
pub struct InvalidName;

impl FromStr for ImageName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let fits = text.len() <= MAX_NAME
            && text.bytes().next().is_some_and(plain)
            && text.bytes().all(|byte| plain(byte) || b"._-".contains(&byte));
        fits.then(|| Self(text.to_owned())).ok_or(InvalidName)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(crate) fn import(
    src: &Path,
    name: &ImageName,
    expected: Option<&str>,
    images: &Path,
    backend: Backend,
) -> Result<PathBuf, Error> {
    let file = File::open(src).map_err(Error::read(src))?;
    let digest = digest(&file).map_err(Error::read(src))?;
    if expected.is_some_and(|expected| expected != digest) {
        return Err(Error::ImageChanged(src.to_owned()));
    }
    let path = images.join(format!("{name}-{digest}.img"));
    if fs::exists(&path).map_err(Error::write(&path))? {
        return Ok(path);
    }
    let new = unnamed_beside(&path)?;
    // Reflink works only when `src` happens to be on the same file system.
    if backend != Backend::Reflink || backend.fill(&file, &new).is_err() {
        sparse::copy(&file, &new).map_err(Error::write(&path))?;
    }
    if self::digest(&new).map_err(Error::write(&path))? != digest {
        return Err(Error::ImageChanged(src.to_owned()));
    }
    new.sync_all().map_err(Error::write(&path))?;
    match give_name(&new, &path) {
        // Somebody else imported the same content meanwhile.
        Err(Errno::EXIST) => {}
        named => named.map_err(Error::write(&path))?,
    }
    File::open(images).and_then(|dir| dir.sync_all()).map_err(Error::write(&path))?;
    Ok(path)
}

/// SHA-256 over the length and every block that is not all zeros with its position, in hex. Unlike a plain checksum
/// of the file it does not cost time for holes, and like one it does not depend on where they are.
fn digest(file: &File) -> io::Result<String> {
    let len = file.metadata()?.len();
    let mut hasher = Sha256::new();
    hasher.update(len.to_le_bytes());
    let mut block = vec![0; BLOCK];
    let mut next = 0;
    for range in sparse::data_ranges(file, len) {
        let range = range?;
        for index in next.max(range.start / BLOCK as u64)..range.end.div_ceil(BLOCK as u64) {
            let at = index * BLOCK as u64;
            let part = &mut block[..BLOCK.min(usize::try_from(len - at).unwrap_or(BLOCK))];
            file.read_exact_at(part, at)?;
            if *part != ZEROS[..part.len()] {
                hasher.update(index.to_le_bytes());
                hasher.update(&*part);
            }
            next = index + 1;
        }
    }
    Ok(hex::encode(hasher.finalize()))
}
