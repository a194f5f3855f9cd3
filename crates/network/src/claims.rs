//! Which slots of the machine are taken, and by whom.
//!
//! A claim is a symbolic link `/run/wrenn/slots/{number}` whose target is the name of the instance: made in one system
//! call with its content, and only if nobody else has it, so that no claim is ever half made or without an owner. It
//! is the journal of the slot: made before anything else of it, removed after everything else is gone.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::slot::Slot;

const DIR: &str = "/run/wrenn/slots";

pub(crate) struct Claims {
    instance: String,
    /// No slot below this one is known to be free.
    hint: Mutex<u16>,
}

impl Claims {
    pub(crate) fn open(instance: &str) -> io::Result<Self> {
        fs::create_dir_all(DIR)?;
        let taken: BTreeSet<Slot> = numbers()?.collect();
        let free = taken.iter().zip(Slot::MIN.get()..).find(|(slot, number)| slot.get() != *number);
        let hint = free.map_or(Slot::MIN.get() + taken.len() as u16, |(_, number)| number);
        Ok(Self { instance: instance.to_owned(), hint: Mutex::new(hint) })
    }

    /// Whether a lower slot is free, as far as is known.
    pub(crate) fn is_lower_free(&self, slot: Slot) -> bool {
        *self.hint.lock().unwrap_or_else(PoisonError::into_inner) < slot.get()
    }

    /// Claims the lowest free slot, or none when all are taken. One that another instance gave back may be passed over
    /// until the end is reached once.
    pub(crate) fn claim(&self) -> io::Result<Option<Slot>> {
        let mut hint = self.hint.lock().unwrap_or_else(PoisonError::into_inner);
        for number in (*hint..=Slot::MAX.get()).chain(Slot::MIN.get()..*hint) {
            let Some(slot) = Slot::new(number) else { continue };
            match symlink(&self.instance, path(slot)) {
                Ok(()) => {
                    *hint = number + 1;
                    return Ok(Some(slot));
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Gives a slot back; nothing happens to one that is not ours.
    pub(crate) fn release(&self, slot: Slot) -> io::Result<()> {
        if !self.owns(slot)? {
            return Ok(());
        }
        fs::remove_file(path(slot))?;
        let mut hint = self.hint.lock().unwrap_or_else(PoisonError::into_inner);
        *hint = slot.get().min(*hint);
        Ok(())
    }

    /// Whether the slot is this instance's.
    pub(crate) fn owns(&self, slot: Slot) -> io::Result<bool> {
        match fs::read_link(path(slot)) {
            Ok(owner) => Ok(owner == Path::new(&self.instance)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// All slots of this instance, in order.
    pub(crate) fn all(&self) -> io::Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for slot in numbers()? {
            if self.owns(slot)? {
                slots.push(slot);
            }
        }
        slots.sort();
        Ok(slots)
    }
}

/// Every slot that somebody has claimed.
fn numbers() -> io::Result<impl Iterator<Item = Slot>> {
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok().and_then(Slot::new);
    Ok(fs::read_dir(DIR)?.filter_map(Result::ok).filter_map(number))
}

fn path(slot: Slot) -> PathBuf {
    Path::new(DIR).join(slot.to_string())
}
