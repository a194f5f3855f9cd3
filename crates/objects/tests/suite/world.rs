//! Object stores of both kinds, and files to put in them.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

use objects::{Base, CHUNK, Config, Objects, Source};
use tempfile::TempDir;
use testkit::S3;

/// An object store whose objects are files below `folder`.
pub struct World {
    pub objects: Objects,
    pub folder: PathBuf,
    pub dir: TempDir,
    pub s3: Option<S3>,
}

impl World {
    pub fn folder() -> Self {
        let dir = TempDir::with_prefix("objects-test-").unwrap();
        let folder = dir.path().join("made/for/it");
        let config = Config::parse(&format!("file://{}", folder.display()), []).unwrap();
        Self { objects: Objects::open(&config).unwrap(), folder, dir, s3: None }
    }

    pub async fn s3() -> Self {
        let s3 = S3::start().await;
        let config = Config::parse(&s3.url("some/prefix"), s3.environment()).unwrap();
        let folder = s3.folder().join("some/prefix");
        let dir = TempDir::with_prefix("objects-test-").unwrap();
        Self { objects: Objects::open(&config).unwrap(), folder, dir, s3: Some(s3) }
    }

    /// One of each kind.
    pub async fn both() -> [Self; 2] {
        [Self::folder(), Self::s3().await]
    }

    pub fn s3_mut(&mut self) -> &mut S3 {
        self.s3.as_mut().unwrap()
    }

    /// Writes a local file.
    pub fn file(&self, name: &str, content: &[u8]) -> Source {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        self.source(name)
    }

    /// The local file of that name, to upload.
    pub fn source(&self, name: &str) -> Source {
        let file = File::open(self.dir.path().join(name)).unwrap();
        Source { name: name.into(), file, base: None, is_named_by_content: false }
    }

    /// The local file of that name, to be below another, with the ranges in which they are known to be the same.
    pub fn base(&self, name: &str, same: Vec<Range<u64>>) -> Base {
        Base { file: File::open(self.dir.path().join(name)).unwrap(), same }
    }

    /// What is downloaded of a file of an upload, to where nothing was.
    pub async fn downloaded(&self, upload: &str, name: &str) -> Result<Vec<u8>, objects::Error> {
        let manifest = self.objects.manifest(upload).await?.unwrap();
        let path = self.dir.path().join(format!("{name}.back"));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        self.objects.download(manifest.file(name).unwrap(), file).await?;
        Ok(fs::read(path).unwrap())
    }

    /// The files of all stored chunks.
    pub fn chunks(&self) -> Vec<PathBuf> {
        let below = |dir: &Path| -> Vec<PathBuf> {
            fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
        };
        below(&self.folder.join("chunks")).iter().flat_map(|dir| below(dir)).collect()
    }
}

/// Bytes that are in no other chunk: `chunks` chunks and `more` bytes.
pub fn content(seed: u8, chunks: u64, more: usize) -> Vec<u8> {
    let words = 0..(CHUNK * chunks).div_ceil(8) + more.div_ceil(8) as u64;
    let mut content: Vec<u8> = words
        .flat_map(|word| word.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(u64::from(seed)).to_le_bytes())
        .collect();
    content.truncate((CHUNK * chunks) as usize + more);
    content
}
