//! What is in a data directory, and why: everything there is used by something, or garbage of which it is known who removes
//! it, or it should not be there. Nothing is changed, and whether an agent runs makes no difference.
//!
//! This follows what the agent does when it starts ([`crate::capsule::recover`], [`crate::point::open_all`],
//! [`Store`](snapshot::Store)); what those would take for whole must be whole here, and what they leave alone is foreign.

mod capsule;
mod point;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use api::CapsuleId;
use disk::{Disks, ImageName};
use serde::Serialize;
use snapshot::{Header, Id, Snapshot, TEMPORARY};

use crate::hibernated;
use crate::host::{BOOTS, CAPSULES, FORGOTTEN, HIBERNATED, PASSING, TEMPLATES, blocking};

/// Beside an agent that works, things are seen half-done. What is wrong is wrong when it is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// How often at most.
const LOOKS: usize = 20;

const GENERATIONS: &str = "generations";
pub(crate) const IMAGES: &str = "images";
/// What else is in a data directory: see the crate `disk`.
const VOLUME: [&str; 3] = ["volume", "volume.xfs", "volume.xfs.new"];

/// Why a data directory could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its disks.
    #[error("looking at the disks")]
    Disks(#[source] disk::Error),
    /// Something in it.
    #[error("looking at {}", .0.display())]
    Look(PathBuf, #[source] io::Error),
}

/// What something in a data directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A capsule's directory, and what in it is none of the others.
    Capsule,
    /// A template's, boot snapshot's or fork's directory, and what in it is none of the others.
    Point,
    /// A root disk. What it shares with others counts for each.
    Disk,
    /// A memory snapshot's header.
    Header,
    /// A memory snapshot's VMM state.
    State,
    /// A generation of memory.
    Generation,
    /// An image.
    Image,
    /// Anything else.
    Other,
}

/// What is the matter with something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing needs it, and it will be removed.
    Garbage,
    /// Nothing needs it, and nobody will remove it.
    Unreferenced,
    /// It is none of ours.
    Foreign,
    /// Something needs it, and it is not there or not whole.
    Broken,
}

/// One thing that is not simply in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which file or directory.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// What is the matter.
    pub verdict: Verdict,
    /// Why, or who removes it.
    pub why: String,
    /// Bytes that it takes.
    pub bytes: u64,
}

/// How much there is of something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// How many.
    pub count: u64,
    /// Bytes that they take on the disk.
    pub bytes: u64,
}

/// What is in a data directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// What is used, by kind.
    pub used: BTreeMap<Kind, Count>,
    /// All that is not.
    pub findings: Vec<Finding>,
}

impl Audit {
    /// Whether all that is there is in use or will be removed, and nothing is missing.
    pub fn is_clean(&self) -> bool {
        self.wrong().next().is_none()
    }

    /// What is wrong: all findings but garbage.
    pub fn wrong(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.verdict != Verdict::Garbage)
    }
}

/// Looks at the data directory `dir`, with its volume mounted for that time if it is not. `beside` are the names of what others
/// keep there too. What is seen to be wrong is looked at again, until it is certain.
pub async fn audit(dir: &Path, beside: &[&str]) -> Result<Audit, Error> {
    let dir = dir.canonicalize().map_err(failed(dir))?;
    let view = Disks::view(&dir).map_err(Error::Disks)?;
    let beside: BTreeSet<String> = beside.iter().map(|name| (*name).to_owned()).collect();
    let mut seen: HashSet<(PathBuf, Verdict)> = HashSet::new();
    let mut looks = 0;
    let audit = loop {
        let (dir, root, beside) = (dir.clone(), view.root().to_owned(), beside.clone());
        let mut audit = blocking(move || Walk::over(&dir, root, &beside)).await?;
        looks += 1;
        let wrong: HashSet<_> = audit.wrong().map(|finding| (finding.path.clone(), finding.verdict)).collect();
        if wrong.is_subset(&seen) || looks == LOOKS {
            // In the end what was seen only once was on its way.
            let is_certain = |finding: &Finding| {
                finding.verdict == Verdict::Garbage || seen.contains(&(finding.path.clone(), finding.verdict))
            };
            audit.findings.retain(is_certain);
            break audit;
        }
        seen = wrong;
        tokio::time::sleep(LOOK_AGAIN).await;
    };
    view.close().map_err(Error::Disks)?;
    Ok(audit)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    |source| Error::Look(path.to_owned(), source)
}

/// One look at everything.
struct Walk {
    root: PathBuf,
    audit: Audit,
    /// Generations that headers refer to.
    generations: HashSet<Id>,
    /// A header of which nobody knows what it needs.
    unreadable: Option<PathBuf>,
}

impl Walk {
    fn over(dir: &Path, root: PathBuf, beside: &BTreeSet<String>) -> Result<Audit, Error> {
        let mut walk = Self { root, audit: Audit::default(), generations: HashSet::new(), unreadable: None };
        walk.top(dir, beside)?;
        for path in entries(&walk.root.join(CAPSULES))? {
            walk.capsule(&path)?;
        }
        for dir in [TEMPLATES, BOOTS] {
            for path in entries(&walk.root.join(dir))? {
                walk.point(&path)?;
            }
        }
        for path in entries(&walk.root.join(PASSING))? {
            walk.passing(&path)?;
        }
        for path in entries(&walk.root.join(FORGOTTEN))? {
            walk.used(Kind::Other, &path)?;
        }
        for path in entries(&walk.root.join(HIBERNATED))? {
            walk.hibernated(&path)?;
        }
        walk.images()?;
        // Last, because only now is it known what they are needed for.
        walk.generations()?;
        walk.audit.findings.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(walk.audit)
    }

    /// The data directory, and that of the disks where it is another.
    fn top(&mut self, dir: &Path, beside: &BTreeSet<String>) -> Result<(), Error> {
        let ours = [CAPSULES, TEMPLATES, PASSING, BOOTS, FORGOTTEN, HIBERNATED, IMAGES, GENERATIONS];
        let root = self.root.clone();
        for path in entries(dir)?.into_iter().chain(if root == dir { Vec::new() } else { entries(&root)? }) {
            let name = name(&path);
            let is_root = path.parent() == Some(&root);
            if ours.contains(&name) && is_root || VOLUME.contains(&name) && path.parent() == Some(dir) {
                continue;
            }
            if beside.contains(name) && path.parent() == Some(dir) {
                self.used(Kind::Other, &path)?;
            } else {
                self.find(&path, Kind::Other, Verdict::Foreign, "nothing of ours has this name")?;
            }
        }
        Ok(())
    }

    /// The note of a capsule that hibernated.
    fn hibernated(&mut self, path: &Path) -> Result<(), Error> {
        if path.extension().is_some_and(|extension| extension == "new") {
            let why = "a write that was not finished; the next start of the agent removes it";
            return self.find(path, Kind::Other, Verdict::Garbage, why);
        }
        let Ok(id) = name(path).parse::<CapsuleId>() else {
            return self.find(path, Kind::Other, Verdict::Foreign, "no capsule has this name");
        };
        match hibernated::read(path) {
            Ok(note) if note.id() == id => self.used(Kind::Other, path),
            Ok(_) => self.find(path, Kind::Other, Verdict::Broken, "it is of another capsule"),
            // It was adopted or forgotten just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                let why = format!("it cannot be read ({error}), so nobody is told that this capsule hibernated");
                self.find(path, Kind::Other, Verdict::Broken, why)
            }
        }
    }

    /// The host removes what it was not told of when it is opened, so of several of one name at most the last stays.
    fn images(&mut self) -> Result<(), Error> {
        let mut by_name: BTreeMap<String, Vec<(SystemTime, PathBuf)>> = BTreeMap::new();
        for path in entries(&self.root.join(IMAGES))? {
            let Some((image, _)) = image_name(name(&path)) else {
                self.find(&path, Kind::Image, Verdict::Foreign, "no image has this name")?;
                continue;
            };
            let Some(metadata) = metadata(&path)? else { continue };
            let time = metadata.modified().map_err(failed(&path))?;
            by_name.entry(image.to_owned()).or_default().push((time, path));
        }
        for mut images in by_name.into_values() {
            images.sort();
            let newest = images.pop();
            for (_, path) in images {
                let why = "an older one of its name; the next start of an agent without an object store removes it if nothing names it";
                self.find(&path, Kind::Image, Verdict::Garbage, why)?;
            }
            if let Some((_, path)) = newest {
                self.used(Kind::Image, &path)?;
            }
        }
        Ok(())
    }

    fn generations(&mut self) -> Result<(), Error> {
        for path in entries(&self.root.join(GENERATIONS))? {
            let name = name(&path);
            let kind = Kind::Generation;
            match (Id::parse(name), name.strip_prefix(TEMPORARY).and_then(Id::parse)) {
                (Some(id), _) if self.generations.contains(&id) => self.used(kind, &path)?,
                (None, None) => self.find(&path, kind, Verdict::Foreign, "no generation has this name")?,
                _ => match &self.unreadable {
                    Some(header) => {
                        let why = format!("nobody knows whether {} needs it", header.display());
                        self.find(&path, kind, Verdict::Unreferenced, why)?;
                    }
                    None => {
                        let why = "no header refers to it; the agent removes it with its next pause or start";
                        self.find(&path, kind, Verdict::Garbage, why)?;
                    }
                },
            }
        }
        Ok(())
    }

    /// A header that something needs: it and all that it refers to must be whole.
    fn header(&mut self, path: &Path) -> Result<(), Error> {
        if !self.refer(path) {
            self.unreadable = Some(path.to_owned());
        }
        match Snapshot::open(&self.root.join(GENERATIONS), path) {
            Ok(_) => self.used(Kind::Header, path),
            Err(error) => self.find(path, Kind::Header, Verdict::Broken, crate::chain(&error)),
        }
    }

    /// Notes what the header at `path` refers to. False when it cannot be read.
    fn refer(&mut self, path: &Path) -> bool {
        let header = match fs::read(path) {
            Ok(bytes) => Header::decode(&bytes).ok(),
            Err(error) => return error.kind() == io::ErrorKind::NotFound,
        };
        let is_readable = header.is_some();
        self.generations.extend(header.iter().flat_map(Header::generations).map(|generation| generation.id));
        is_readable
    }

    /// A VMM's state that something needs: it must be the one that was saved.
    fn state(&mut self, path: &Path, digest: &str) -> Result<(), Error> {
        match crate::capsule::files::digest(path) {
            Ok(found) if found == digest => self.used(Kind::State, path),
            Ok(_) => self.find(path, Kind::State, Verdict::Broken, "this is not the state that was saved"),
            Err(error) => self.find(path, Kind::State, Verdict::Broken, error.to_string()),
        }
    }

    /// A disk that something needs.
    fn disk(&mut self, path: &Path) -> Result<(), Error> {
        match metadata(path)? {
            Some(metadata) if metadata.is_file() => match disk::image_under(path) {
                Ok(None) if metadata.len() > 0 => self.used(Kind::Disk, path),
                Ok(Some(image)) if self.root.join(IMAGES).join(&image).exists() => self.used(Kind::Disk, path),
                Ok(Some(image)) => {
                    self.find(path, Kind::Disk, Verdict::Broken, format!("its image {image} is not there"))
                }
                Ok(None) | Err(_) => self.find(path, Kind::Disk, Verdict::Broken, "this is no disk"),
            },
            Some(_) => self.find(path, Kind::Disk, Verdict::Broken, "this is no disk"),
            None => self.find(path, Kind::Disk, Verdict::Broken, "it is not there"),
        }
    }

    fn used(&mut self, kind: Kind, path: &Path) -> Result<(), Error> {
        let Some(metadata) = metadata(path)? else { return Ok(()) };
        let count = self.audit.used.entry(kind).or_default();
        count.count += 1;
        count.bytes += metadata.blocks() * 512;
        Ok(())
    }

    fn find(&mut self, path: &Path, kind: Kind, verdict: Verdict, why: impl Into<String>) -> Result<(), Error> {
        let bytes = bytes(path)?;
        self.audit.findings.push(Finding { path: path.to_owned(), kind, verdict, why: why.into(), bytes });
        Ok(())
    }
}

/// The template's name and the digest in the file name of an image.
pub(crate) fn image_name(file: &str) -> Option<(&str, &str)> {
    let (name, digest) = file.strip_suffix(".img")?.rsplit_once('-')?;
    let is_digest = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_digest && name.parse::<ImageName>().is_ok()).then_some((name, digest))
}

/// What is in a directory; nothing if that is not there.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => {
            let paths = entries.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
            paths.map_err(failed(dir))
        }
    }
}

/// The last part of a path; empty where that is no text, which none of ours is.
fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// `None` for what has gone meanwhile.
fn metadata(path: &Path) -> Result<Option<Metadata>, Error> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        metadata => metadata.map(Some).map_err(failed(path)),
    }
}

/// Bytes on the disk of a file, or of all files below a directory.
fn bytes(path: &Path) -> Result<u64, Error> {
    let Some(metadata) = metadata(path)? else { return Ok(0) };
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in entries(path)? {
            bytes += self::bytes(&entry)?;
        }
    }
    Ok(bytes)
}
