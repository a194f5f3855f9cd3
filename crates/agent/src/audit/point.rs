//! Templates', boot snapshots' and forks' directories.

use std::path::Path;

use snapshot::TEMPORARY;

use super::{Error, Kind, Verdict, Walk, entries, metadata, name};
use crate::capsule::files;
use crate::point::{META, Meta};
use crate::templates::remote;

impl Walk {
    /// The directory of a point that is kept.
    pub(super) fn point(&mut self, dir: &Path) -> Result<(), Error> {
        let Some(is_dir) = metadata(dir)?.map(|metadata| metadata.is_dir()) else { return Ok(()) };
        if !is_dir {
            return self.find(dir, Kind::Point, Verdict::Foreign, "a point is a directory");
        }
        let file = dir.join(META);
        let Some(meta) = Meta::read(dir) else {
            self.refer_all(dir);
            return match metadata(&file)? {
                Some(_) => self.find(&file, Kind::Point, Verdict::Broken, "this does not describe a point"),
                None => self.passing_point(dir),
            };
        };
        self.used(Kind::Point, dir)?;
        self.header(&dir.join(files::MEMORY))?;
        self.state(&dir.join(files::STATE), &meta.state)?;
        self.disk(&dir.join(files::DISK))?;
        for path in entries(dir)? {
            match name(&path) {
                META | files::MEMORY | files::STATE | files::DISK | files::WORKING_SET | remote::UPLOADED => {}
                name if name.split_once(TEMPORARY).is_some_and(|(of, _)| of == files::MEMORY) => {
                    let why = "a write that was not finished; the next start of the agent removes it";
                    self.find(&path, Kind::Header, Verdict::Garbage, why)?;
                }
                _ => self.find(&path, Kind::Point, Verdict::Foreign, "nothing of a point has this name")?,
            }
        }
        Ok(())
    }

    /// Something that nobody will find again.
    pub(super) fn passing(&mut self, dir: &Path) -> Result<(), Error> {
        match metadata(dir)? {
            Some(metadata) if metadata.is_dir() => {
                self.refer_all(dir);
                self.passing_point(dir)
            }
            Some(_) => self.find(dir, Kind::Point, Verdict::Foreign, "a point is a directory"),
            None => Ok(()),
        }
    }

    fn passing_point(&mut self, dir: &Path) -> Result<(), Error> {
        let why = "a point that is being made or begun from, or was when its agent ended; the next start of the agent removes that";
        self.find(dir, Kind::Point, Verdict::Garbage, why)
    }
}
