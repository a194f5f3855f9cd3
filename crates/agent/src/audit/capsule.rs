//! Capsules' directories.

use std::fs;
use std::path::Path;

use api::CapsuleId;
use snapshot::{Header, Id, TEMPORARY};

use super::{Error, Kind, Verdict, Walk, entries, metadata, name};
use crate::capsule::files;
use crate::capsule::record::{Base, Journal, Phase, RECORD, Record, Saved};

/// Files of a capsule that are of no use without it, and are made anew when it is resumed.
const PASSING: [&str; 4] = [files::VM, files::VMM_LOG, files::PAGER_LOG, files::WORKING_SET];

impl Walk {
    /// The directory of a capsule.
    pub(super) fn capsule(&mut self, dir: &Path) -> Result<(), Error> {
        let Some(is_dir) = metadata(dir)?.map(|metadata| metadata.is_dir()) else { return Ok(()) };
        if !is_dir || name(dir).parse::<CapsuleId>().is_err() {
            return self.find(dir, Kind::Capsule, Verdict::Foreign, "no capsule has this name");
        }
        let journal = match Journal::open(dir.to_owned()) {
            Ok(Some(journal)) => journal,
            Ok(None) => {
                self.refer_all(dir);
                return self.garbage(dir);
            }
            Err(error) => {
                self.refer_all(dir);
                let why =
                    format!("the capsule's record cannot be read ({error}); the agent leaves its directory alone");
                return self.find(&dir.join(RECORD), Kind::Capsule, Verdict::Broken, why);
            }
        };
        match journal.record().phase {
            Phase::Starting | Phase::Stopping => {
                self.refer_all(dir);
                self.garbage(dir)
            }
            Phase::Running | Phase::Pausing | Phase::Paused | Phase::Resuming => {
                self.used(Kind::Capsule, dir)?;
                self.parts(dir, journal.record())
            }
        }
    }

    fn garbage(&mut self, dir: &Path) -> Result<(), Error> {
        let why = "a capsule that is being made or ended, or was when its agent ended; the next start of the agent removes that";
        self.find(dir, Kind::Capsule, Verdict::Garbage, why)
    }

    /// What a capsule has, which must be all there.
    fn parts(&mut self, dir: &Path, record: &Record) -> Result<(), Error> {
        let saved = match &record.base {
            Base::Snapshot(saved) => Some(saved),
            Base::Boot | Base::Lost => None,
        };
        self.disk(&dir.join(files::DISK))?;
        if let Some(Saved { number, state }) = saved {
            match record.is_remote {
                false => self.header(&dir.join(files::memory(*number)))?,
                true => self.remote(&dir.join(files::REMOTE))?,
            }
            self.state(&dir.join(files::state(*number)), state)?;
        }
        for path in entries(dir)? {
            let name = name(&path);
            match part(name) {
                Part::Seen => {}
                Part::Remote if record.is_remote => {}
                Part::Remote => {
                    let why = "of a memory that has all come; the next start of the agent removes it";
                    self.find(&path, Kind::Capsule, Verdict::Garbage, why)?;
                }
                Part::Own => self.used(Kind::Capsule, &path)?,
                Part::Unfinished(kind) => {
                    let why =
                        "a write that was not finished; it goes with the next one, or with the next start of the agent";
                    self.find(&path, kind, Verdict::Garbage, why)?;
                }
                // Done above.
                Part::Snapshot(Kind::Header | Kind::State, number)
                    if saved.is_some_and(|saved| saved.number == number) => {}
                Part::Snapshot(Kind::Disk, number)
                    if record.phase == Phase::Resuming && saved.is_some_and(|saved| saved.number == number) =>
                {
                    self.used(Kind::Disk, &path)?;
                }
                Part::Snapshot(kind, _) => {
                    if kind == Kind::Header {
                        self.refer(&path);
                    }
                    let why = "of no snapshot that the capsule has; the next pause or start of the agent removes it";
                    self.find(&path, kind, Verdict::Garbage, why)?;
                }
                Part::Foreign => {
                    self.find(&path, Kind::Capsule, Verdict::Foreign, "nothing of a capsule has this name")?;
                }
            }
        }
        Ok(())
    }

    /// A memory that has not all come: its header, what is still to come, and the generations that are here.
    fn remote(&mut self, dir: &Path) -> Result<(), Error> {
        for path in entries(dir)? {
            let kind = match name(&path) {
                files::MEMORY => Kind::Header,
                files::REMOTE_FILES => Kind::Capsule,
                name if Id::parse(name).is_some() => Kind::Generation,
                _ => {
                    self.find(&path, Kind::Capsule, Verdict::Foreign, "nothing of a memory has this name")?;
                    continue;
                }
            };
            self.used(kind, &path)?;
        }
        let header = dir.join(files::MEMORY);
        match fs::read(&header).map(|bytes| Header::decode(&bytes)) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => self.find(&header, Kind::Header, Verdict::Broken, crate::chain(&error)),
            Err(error) => self.find(&header, Kind::Header, Verdict::Broken, error.to_string()),
        }
    }

    /// What is given back has its headers until then.
    pub(super) fn refer_all(&mut self, dir: &Path) {
        for header in files::headers(dir) {
            self.refer(&header);
        }
    }
}

/// What a file of a capsule is, by its name.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    /// Looked at by itself.
    Seen,
    /// The capsule's, as long as that is there.
    Own,
    /// Of the snapshot of that number.
    Snapshot(Kind, u32),
    Unfinished(Kind),
    /// What has come of a memory that is in the object store.
    Remote,
    Foreign,
}

fn part(name: &str) -> Part {
    if name == files::DISK {
        return Part::Seen;
    }
    if name == RECORD || PASSING.contains(&name) {
        return Part::Own;
    }
    if name == files::REMOTE {
        return Part::Remote;
    }
    if name.strip_suffix(".new") == Some(RECORD) {
        return Part::Unfinished(Kind::Capsule);
    }
    let (of, is_finished) = name.split_once(TEMPORARY).map_or((name, true), |(of, _)| (of, false));
    let Some((kind, number)) = of.split_once('-') else { return Part::Foreign };
    let (kind, number) = match (kind, number.parse()) {
        ("memory", Ok(number)) => (Kind::Header, number),
        ("state", Ok(number)) => (Kind::State, number),
        ("disk", Ok(number)) => (Kind::Disk, number),
        _ => return Part::Foreign,
    };
    match (is_finished, kind) {
        (true, kind) => Part::Snapshot(kind, number),
        (false, Kind::Header) => Part::Unfinished(kind),
        // Nobody writes those like that.
        (false, _) => Part::Foreign,
    }
}
