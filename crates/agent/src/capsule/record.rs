//! The record of a capsule: a small JSON file in its directory that names what it holds, written before it is acquired.
//!
//! Most of it is written to survive this process, not the machine: after a power cut no namespace, process or claim is
//! left, so what was recorded last is missed by nobody. What says that a capsule is paused, or no longer, is written with
//! [`Journal::commit`] and survives that too. Whatever is lost, some whole record is there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use api::egress::Policy;
use network::Claim;
use network::slot::Slot;
use serde::{Deserialize, Serialize};
use vmm::process::Identity;

use super::Spec;

/// The record's file in the capsule's directory.
pub const RECORD: &str = "record.json";

/// How far the capsule has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Being made; of no use to anyone if the agent dies now.
    Starting,
    /// The guest has answered; an agent that starts anew takes it over.
    Running,
    /// Being saved. It runs on unless what it is saved to turns out to be whole.
    Pausing,
    /// Saved, all of it durable; [`Record::base`] is what. Nothing of it needs to run.
    Paused,
    /// Being brought back. It is paused unless that succeeds.
    Resuming,
    /// Being given back.
    Stopping,
}

/// A snapshot of the capsule in its own directory; see [`super::files`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Which one.
    pub number: u32,
    /// SHA-256 of the VMM's state file, in hex.
    pub state: String,
}

/// What the VMM's record of written memory is relative to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// The empty memory of a boot.
    Boot,
    /// The memory of that snapshot, whose header is kept.
    Snapshot(Saved),
    /// A snapshot that was taken and not kept: only a full one helps.
    Lost,
}

/// All that a restarted agent must know of a capsule.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// What it was made from.
    pub spec: Spec,
    /// What it may reach outside.
    #[serde(default)]
    pub egress: Policy,
    /// The generation last published.
    pub generation: u64,
    /// How far it has come.
    pub phase: Phase,
    /// Its network slot, once claimed.
    pub slot: Option<Slot>,
    /// Its VMM process, once launched.
    pub vmm: Option<Identity>,
    /// The process that serves its memory, once launched.
    pub pager: Option<Identity>,
    /// The token that envd demands.
    pub token: String,
    /// Versions, once it runs.
    pub versions: BTreeMap<String, String>,
    /// The number last given to a snapshot of it.
    pub snapshots: u32,
    /// What the next snapshot adds to.
    pub base: Base,
    /// The file name of the image under its disk, whose name says its content.
    #[serde(default)]
    pub image: Option<String>,
    /// The snapshot of it that an object store has.
    #[serde(default)]
    pub uploaded: Option<u32>,
    /// Which object store that is, as [`objects::Config::identity`].
    #[serde(default)]
    pub uploaded_to: Option<String>,
    /// Some of its memory is still in the object store; see [`super::remote`].
    #[serde(default)]
    pub is_remote: bool,
}

impl Record {
    /// Whether the object store has what it is paused as.
    pub fn is_uploaded(&self) -> bool {
        matches!(&self.base, Base::Snapshot(saved) if self.uploaded == Some(saved.number))
    }
}

/// A record, the directory it lies in, and the claim to the slot that it names.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    record: Record,
    /// None of a slot that an earlier agent claimed, until that is taken over.
    claim: Option<Claim>,
}

impl Journal {
    /// Makes the capsule's directory and its first record. `AlreadyExists` when the directory is there.
    pub fn create(dir: PathBuf, spec: Spec, egress: Policy, token: String) -> io::Result<Self> {
        let record = Record {
            spec,
            egress,
            generation: 1,
            phase: Phase::Starting,
            slot: None,
            vmm: None,
            pager: None,
            token,
            versions: BTreeMap::new(),
            snapshots: 0,
            base: Base::Boot,
            image: None,
            uploaded: None,
            uploaded_to: None,
            is_remote: false,
        };
        Self::create_with(dir, record)
    }

    /// Makes the directory of a capsule that was elsewhere before. `AlreadyExists` when the directory is there. When it fails
    /// otherwise there is none.
    pub fn create_with(dir: PathBuf, record: Record) -> io::Result<Self> {
        std::fs::create_dir(&dir)?;
        let journal = Self { dir, record, claim: None };
        match journal.write(false) {
            Ok(()) => Ok(journal),
            Err(error) => {
                // Nobody could try again before the next start of the agent.
                std::fs::remove_dir_all(&journal.dir)?;
                Err(error)
            }
        }
    }

    /// Reads the record in `dir`; `None` when there is none. One that cannot be read may be of a capsule that is paused.
    pub fn open(dir: PathBuf) -> io::Result<Option<Self>> {
        let text = match std::fs::read(dir.join(RECORD)) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            text => text?,
        };
        let record = serde_json::from_slice(&text)?;
        Ok(Some(Self { dir, record, claim: None }))
    }

    /// The capsule's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is recorded.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The claim to the capsule's slot.
    pub fn claim(&self) -> Option<Claim> {
        self.claim
    }

    /// Keeps the claim to the slot that the record names, or is about to.
    pub fn hold(&mut self, claim: Claim) {
        self.claim = Some(claim);
    }

    /// Forgets what an object store has, unless that is `store`. To be written with what is written next.
    pub fn stored_in(&mut self, store: Option<&str>) {
        if self.record.uploaded_to.as_deref() != store {
            (self.record.uploaded, self.record.uploaded_to) = (None, None);
        }
    }

    /// Forgets the slot, which is given back: soon it is another's. To be written with what is written next.
    pub fn let_go(&mut self) {
        self.claim = None;
        self.record.slot = None;
    }

    /// Changes the record, on disk first: when that fails it is as it was.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        self.change(change, false)
    }

    /// As [`update`](Self::update), and durable when it returns. When it fails, either may be on disk.
    pub fn commit(&mut self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        self.change(change, true)
    }

    /// Changes the record here, and on disk if that can be: for what is so whether or not it is written. The next write
    /// says it too.
    pub fn note(&mut self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        change(&mut self.record);
        self.write(false)
    }

    fn change(&mut self, change: impl FnOnce(&mut Record), durable: bool) -> io::Result<()> {
        let before = self.record.clone();
        change(&mut self.record);
        self.write(durable).inspect_err(|_| self.record = before)
    }

    fn write(&self, durable: bool) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&self.record).expect("a record has only JSON types");
        let new = self.dir.join("record.json.new");
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        // Or the rename may survive a power cut, and what was written not: it takes the place of a record that was durable.
        file.sync_all()?;
        std::fs::rename(new, self.dir.join(RECORD))?;
        if durable { File::open(&self.dir)?.sync_all() } else { Ok(()) }
    }
}
