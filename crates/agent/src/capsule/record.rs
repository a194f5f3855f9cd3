//! The record of a capsule: a small JSON file in its directory that names what it holds, written before it is acquired.
//!
//! It is written to survive this process, not the machine: after a power cut no namespace, process or claim is left, so
//! a record that was lost with it is missed by nobody.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use network::slot::Slot;
use serde::{Deserialize, Serialize};
use vmm::process::Identity;

use super::Spec;

/// How far the capsule has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Being made; of no use to anyone if the agent dies now.
    Starting,
    /// The guest has answered; an agent that starts anew takes it over.
    Running,
    /// Being given back.
    Stopping,
}

/// All that a restarted agent must know of a capsule.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// What it was made from.
    pub spec: Spec,
    /// The generation last published.
    pub generation: u64,
    /// How far it has come.
    pub phase: Phase,
    /// Its network slot, once claimed.
    pub slot: Option<Slot>,
    /// Its VMM process, once launched.
    pub vmm: Option<Identity>,
    /// The token that envd demands.
    pub token: String,
    /// Versions, once it runs.
    pub versions: BTreeMap<String, String>,
}

/// A record and the directory it lies in.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    record: Record,
}

impl Journal {
    /// Makes the capsule's directory and its first record. `AlreadyExists` when the directory is there.
    pub fn create(dir: PathBuf, spec: Spec, token: String) -> io::Result<Self> {
        std::fs::create_dir(&dir)?;
        let record = Record {
            spec,
            generation: 1,
            phase: Phase::Starting,
            slot: None,
            vmm: None,
            token,
            versions: BTreeMap::new(),
        };
        let journal = Self { dir, record };
        journal.write()?;
        Ok(journal)
    }

    /// Reads the record in `dir`; `None` when there is none that can be read.
    pub fn open(dir: PathBuf) -> Option<Self> {
        let text = std::fs::read(dir.join("record.json")).ok()?;
        let record = serde_json::from_slice(&text).ok()?;
        Some(Self { dir, record })
    }

    /// The capsule's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is recorded.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes the record, on disk first.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        change(&mut self.record);
        self.write()
    }

    fn write(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&self.record).expect("a record has only JSON types");
        let new = self.dir.join("record.json.new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, self.dir.join("record.json"))
    }
}
