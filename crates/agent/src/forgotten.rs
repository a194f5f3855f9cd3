//! Uploads that the object store is to forget.
//!
//! A file notes each, and is there before the capsule goes: nobody asks again for what is gone. It stays when the object
//! store has forgotten the upload, because a manifest that was on its way may still come. When none can come any more, the
//! upload is forgotten a second time, and so is the note.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

use tracing::warn;

use crate::host::Host;

/// In the note of what the object store has forgotten once.
const ONCE: &[u8] = b"once";

impl Host {
    /// Notes that the object store is to forget an upload, which happens sooner or later.
    pub fn note_forgotten(&self, name: &str) -> io::Result<()> {
        match self.objects {
            Some(_) => fs::write(self.note(name), b""),
            None => Ok(()),
        }
    }

    /// The same, and tries to do so now.
    pub async fn forget_upload(&self, name: &str) -> io::Result<()> {
        self.note_forgotten(name)?;
        self.forget_noted(name, false).await;
        Ok(())
    }

    /// Has the object store forget what it still has to.
    pub async fn forget_uploads(&self) {
        for entry in fs::read_dir(self.forgotten()).into_iter().flatten().flatten() {
            let Ok(note) = entry.metadata() else { continue };
            let age = note.modified().ok().and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
            let is_again = note.len() > 0;
            if !is_again || age >= objects::STALE {
                let name = entry.file_name().to_string_lossy().replace('@', "/");
                self.forget_noted(&name, is_again).await;
            }
        }
    }

    /// Drops the note: there is something new of that name.
    pub fn drop_note(&self, name: &str) {
        if let Err(error) = fs::remove_file(self.note(name))
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(name, %error, "the object store forgets it once more");
        }
    }

    async fn forget_noted(&self, name: &str, is_again: bool) {
        let Some(objects) = &self.objects else { return };
        match objects.forget(name).await {
            Ok(()) if !is_again => {
                // If this fails it is forgotten once more than it has to be.
                let note = File::options().write(true).open(self.note(name));
                let _ = note.and_then(|mut note| note.write_all(ONCE));
            }
            // There is none of a name that none can have.
            Ok(()) | Err(objects::Error::Name(_)) => self.drop_note(name),
            Err(error) => warn!(name, error = crate::chain(&error), "the object store forgets it later"),
        }
    }

    fn note(&self, name: &str) -> PathBuf {
        self.forgotten().join(name.replace('/', "@"))
    }
}
