//! `POST /files/compose`: one file from several, which are gone afterwards.

use super::Error;
use super::place::{Owner, Target, open, regular};
use super::upload::written;
use super::write::Replacement;
use crate::settings::Settings;
use guest_api::{Compose, WrittenFile};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Joins the sources in their order. They are there until the destination is; only then are they removed.
pub fn compose(settings: &Settings, request: Compose) -> Result<WrittenFile, Error> {
    if request.source_paths.is_empty() {
        return Err(Error::NoSources);
    }
    if request.destination.is_empty() {
        return Err(Error::NoDestination);
    }
    let owner = Owner::find(settings, request.username.as_deref())?;
    let mut sources = Vec::with_capacity(request.source_paths.len());
    for source in &request.source_paths {
        let path = owner.path(source)?;
        let found = std::fs::metadata(&path).map_err(Error::io("finding", &path))?;
        regular(&path, &found)?;
        sources.push((path, found.dev(), found.ino()));
    }
    let path = owner.path(&request.destination)?;
    let target = Target::find(&path, owner.ids())?;
    if let Some(existing) = target.existing {
        let same = sources.iter().position(|(_, device, inode)| (*device, *inode) == (existing.device, existing.inode));
        if let Some(index) = same {
            return Err(Error::SourceIsDestination(request.source_paths[index].clone()));
        }
    }

    let mut file = Replacement::open(&target)?;
    for (source, ..) in &sources {
        let (mut opened, _) = open(source)?;
        file.append(&mut opened).map_err(Error::io("copying", source))?;
    }
    file.commit(&BTreeMap::new())?;
    let mut removed: Vec<PathBuf> = sources.into_iter().map(|(source, ..)| source).collect();
    removed.sort();
    removed.dedup();
    for source in &removed {
        std::fs::remove_file(source).map_err(Error::io("removing", source))?;
    }
    Ok(written(&path, None))
}
