//! What the kernel says about watched directories, out of the bytes it says it in.

use rustix::fs::inotify::ReadFlags;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// The fixed part: watch, mask, cookie, length of the name.
const HEAD: usize = 16;

/// The most one event takes: a name has 255 bytes and is padded.
pub const MAX_BYTES: usize = HEAD + 256;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The watch it is about.
    pub watch: i32,
    pub mask: ReadFlags,
    /// The same for both halves of a rename.
    pub cookie: u32,
    /// In the watched directory; `None`: the directory itself.
    pub name: Option<OsString>,
}

/// The events in what one read returned. The kernel gives whole ones; anything else ends the list.
pub fn parse(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(HEAD) {
        let field = |at: usize| [head[at], head[at + 1], head[at + 2], head[at + 3]];
        let Some((name, rest)) = rest.split_at_checked(u32::from_ne_bytes(field(12)) as usize) else { break };
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        events.push(Event {
            watch: i32::from_ne_bytes(field(0)),
            mask: ReadFlags::from_bits_retain(u32::from_ne_bytes(field(4))),
            cookie: u32::from_ne_bytes(field(8)),
            name: if name.is_empty() { None } else { Some(OsStr::from_bytes(name).to_owned()) },
        });
        bytes = rest;
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(watch: i32, mask: ReadFlags, name: &[u8]) -> Vec<u8> {
        let fields = [watch.to_ne_bytes(), mask.bits().to_ne_bytes(), 7u32.to_ne_bytes()];
        [fields.concat(), (name.len() as u32).to_ne_bytes().to_vec(), name.to_vec()].concat()
    }

    #[test]
    fn reads_what_the_kernel_writes() {
        let wire = [bytes(1, ReadFlags::CREATE, b"a\xff\0\0"), bytes(2, ReadFlags::DELETE_SELF, b"")].concat();
        let named =
            Event { watch: 1, mask: ReadFlags::CREATE, cookie: 7, name: Some(OsStr::from_bytes(b"a\xff").to_owned()) };
        let nameless = Event { watch: 2, mask: ReadFlags::DELETE_SELF, cookie: 7, name: None };
        assert_eq!(parse(&wire), [named.clone(), nameless]);
        // A part of an event is none.
        assert_eq!(parse(&wire[..wire.len() - 1]), std::slice::from_ref(&named));
        assert_eq!(parse(&wire[..HEAD + 3]), []);
        assert_eq!(parse(b""), []);
    }
}
