//! Capsules that hibernated: the object store has them, and nobody else.
//!
//! A file notes each, and is durable before anything of the capsule goes: whoever was to be told may be away for long, and
//! without a report a capsule is missing. It stays until the capsule is adopted here or destroyed. Where another host has
//! adopted it, that host's reports have higher generations, by which this one is known to be of the past.
//!
//! A note counts for nothing beside a capsule that is here: it did not hibernate after all, or has been adopted since.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use agent_api::CapsuleState;
use api::CapsuleId;
use api::egress::Policy;
use serde::{Deserialize, Serialize};
use tracing::error;

use crate::capsule::record::Record;
use crate::capsule::{Handle, Observed, Spec, files};
use crate::host::Host;

/// What is told of a capsule that hibernated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Note {
    spec: Spec,
    egress: Policy,
    /// The generation of its hibernation.
    generation: u64,
    versions: BTreeMap<String, String>,
}

impl Note {
    /// That the capsule of that record hibernated, which is said with `generation`.
    pub fn new(record: &Record, generation: u64) -> Self {
        let Record { spec, egress, versions, .. } = record.clone();
        Self { spec, egress, generation, versions }
    }

    /// Which capsule.
    pub fn id(&self) -> CapsuleId {
        self.spec.id
    }

    /// The capsule, as an agent that had it says of it.
    pub fn handle(self) -> Handle {
        let observed = Observed {
            state: CapsuleState::Hibernated,
            generation: self.generation,
            reason: String::new(),
            host_full: None,
            egress: self.egress.into(),
            host_ip: None,
            versions: self.versions,
            guest: None,
            is_uploaded: false,
        };
        Handle::of_ended(self.spec, observed)
    }
}

impl Host {
    /// Notes that a capsule hibernated. It is durable when this returns.
    pub fn note_hibernated(&self, note: &Note) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(note).expect("a note has only JSON types");
        let path = self.hibernated_note(note.id());
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(new, path)?;
        files::sync(&self.hibernated())
    }

    /// Drops that note, if there is one.
    pub fn drop_hibernated(&self, id: CapsuleId) -> io::Result<()> {
        match fs::remove_file(self.hibernated_note(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Every note. One that cannot be read stays, and the audit names it.
    pub fn hibernated_notes(&self) -> io::Result<Vec<Note>> {
        let mut notes = Vec::new();
        for entry in fs::read_dir(self.hibernated())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "new") {
                // Of a write that was not finished nobody was told.
                fs::remove_file(path)?;
                continue;
            }
            match read(&path) {
                Ok(note) => notes.push(note),
                Err(error) => error!(note = %path.display(), %error, "it is not known what hibernated here"),
            }
        }
        Ok(notes)
    }

    fn hibernated_note(&self, id: CapsuleId) -> PathBuf {
        self.hibernated().join(id.to_string())
    }
}

/// The note at `path`.
pub fn read(path: &Path) -> io::Result<Note> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}
