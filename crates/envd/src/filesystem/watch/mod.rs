//! Watching a directory, and everything below it if wanted: what the kernel says, as what clients want to hear.
//!
//! One inotify descriptor per watch; dropping the [`Watch`] gives everything back. Three things are not as the kernel has
//! them:
//!
//! - A new directory gets a watch only after it exists, so what is in it by then was made unseen. It is read, and told of as
//!   if it had been seen, unless the kernel will tell of it too: everything the kernel has to say at that moment is pending,
//!   and can be asked. For names that is exact, since the kernel tells of them before it shows them; a file that is written
//!   to at that very moment may be told written twice.
//! - A directory that moves within the tree keeps its watches; they get its new name. One that leaves takes them off.
//! - A watched directory speaks for itself and is spoken of by its parent. Only the parent is heard, but for the root.
//!
//! Nothing is lost silently: what cannot be held or watched any more ends the watch with an [`Error`].

pub mod event;

use crate::filesystem::operations::{self, is_on_network, names};
use crate::sys::poll::Polled;
use event::Event;
use guest_api::filesystem::EventType;
use rustix::fs::OFlags;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use tokio::io::Interest;

/// How many events may wait in memory; the kernel holds as many again.
const MAX_PENDING: usize = 65_536;

/// How many changes are told at once, about: those a new directory brings come together.
const BATCH: usize = 1024;

/// How many changes a new directory may bring. Bounds memory.
const MAX_ADOPTED: usize = 262_144;

/// Bytes read from the kernel at once.
const READ_BYTES: usize = 16 * 1024;
const _: () = assert!(READ_BYTES >= event::MAX_BYTES);

/// What happens to names in a directory.
const NAMES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    // Whoever still writes to a file that is gone writes to no name.
    .union(WatchFlags::EXCL_UNLINK)
    .union(WatchFlags::ONLYDIR);

/// Why a watch could not begin, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Path(#[from] operations::Error),
    #[error("cannot watch path on network filesystem: {0}")]
    Network(String),
    #[error("events came faster than they were taken, and some are lost")]
    Overflow,
    #[error("the watched directory is gone: {0}")]
    Gone(String),
    /// The kernel's limits on inotify instances and watches.
    #[error("the guest's kernel allows no more watches")]
    Limit(#[source] io::Error),
    #[error("watching {path}")]
    Watch { path: String, source: io::Error },
    #[error("reading events")]
    Read(#[source] io::Error),
}

/// What to watch.
#[derive(Clone, Debug)]
pub struct Target {
    /// Absolute and clean.
    pub root: PathBuf,
    pub recursive: bool,
    pub allow_network_mounts: bool,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub kind: EventType,
    /// Relative to the root, which itself is `.`.
    pub path: PathBuf,
}

/// A directory that is watched.
pub struct Watch {
    target: Target,
    inotify: Polled,
    root: i32,
    /// The watched directories relative to the root, which is empty, by their watch.
    directories: HashMap<i32, PathBuf>,
    /// What the kernel said and nobody has looked at.
    pending: VecDeque<Event>,
    /// Directories on their way from one name to another, by the rename's cookie.
    moving: HashMap<u32, PathBuf>,
    ended: Option<Error>,
}

/// What the kernel has said about a name in a new directory.
#[derive(Default)]
struct Said {
    /// Whether the first that happened to the name is that it came; `None`: neither came nor went.
    came_first: Option<bool>,
    written: bool,
}

/// Whether a new directory's files were written here, or came with it from elsewhere.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The watch begins: nothing is told.
    Before,
    Made,
    Moved,
}

impl Watch {
    /// Watches from now on. Blocks, within a runtime.
    pub fn new(target: Target) -> Result<Watch, Error> {
        let root = &target.root;
        let shown = || root.display().to_string();
        let failed = |error: Errno| Error::Watch { path: shown(), source: error.into() };
        // First, since a dead server would keep everything else waiting.
        let on_network = is_on_network(root).map_err(|error| operations::Error::new("watch", root, error.into()))?;
        if on_network && !target.allow_network_mounts {
            return Err(Error::Network(shown()));
        }
        let metadata = std::fs::metadata(root).map_err(|error| operations::Error::new("watch", root, error))?;
        if !metadata.is_dir() {
            return Err(operations::Error::NotDirectory(shown()).into());
        }
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|error| match error {
            Errno::MFILE => Error::Limit(error.into()),
            error => failed(error),
        })?;
        let own = NAMES | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        let wd = inotify::add_watch(&inotify, root, own).map_err(|error| match error {
            Errno::NOSPC => Error::Limit(error.into()),
            error => failed(error),
        })?;
        let inotify = Polled::new(inotify, Interest::READABLE).map_err(Error::Read)?;
        let mut watch = Watch {
            inotify,
            root: wd,
            directories: HashMap::from([(wd, PathBuf::new())]),
            pending: VecDeque::new(),
            moving: HashMap::new(),
            ended: None,
            target,
        };
        if watch.target.recursive {
            watch.look_into(wd, PathBuf::new(), Origin::Before, &mut Vec::new());
        }
        match watch.ended.take() {
            Some(error) => Err(error),
            None => Ok(watch),
        }
    }

    /// The directory that is watched.
    pub fn root(&self) -> &Path {
        &self.target.root
    }

    /// Waits until [`Watch::changes`] has something to do. May be dropped at any time without loss.
    pub async fn ready(&mut self) {
        if !self.pending.is_empty() || self.ended.is_some() {
            return;
        }
        let mut buffer = vec![0; READ_BYTES];
        match self.inotify.read(&mut buffer).await {
            Ok(length) => self.pending.extend(event::parse(&buffer[..length])),
            Err(error) => self.ended = Some(Error::Read(error)),
        }
    }

    /// What happened; perhaps nothing of interest. After an error the watch is over. Blocks, but does not wait.
    pub fn changes(&mut self) -> Result<Vec<Change>, Error> {
        let mut changes = Vec::new();
        while changes.len() < BATCH && self.ended.is_none() {
            let Some(event) = self.pending.pop_front() else { break };
            self.apply(event, &mut changes);
        }
        // What came before the end is told before it.
        if changes.is_empty()
            && let Some(error) = self.ended.take()
        {
            return Err(error);
        }
        Ok(changes)
    }

    fn apply(&mut self, event: Event, changes: &mut Vec<Change>) {
        let Event { watch, mask, cookie, name } = event;
        if mask.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.ended = Some(Error::Overflow);
            return;
        }
        let Some(directory) = self.directories.get(&watch) else {
            // A directory moves to where nobody looks any more.
            if let Some(from) = self.moving.remove(&cookie) {
                self.forget(&from);
            }
            return;
        };
        let Some(name) = name else {
            self.apply_to_itself(watch, mask, changes);
            return;
        };
        let path = directory.join(name);
        let mut tell = |kind| changes.push(Change { kind, path: path.clone() });
        let tree = self.target.recursive && mask.contains(ReadFlags::ISDIR);
        if mask.contains(ReadFlags::CREATE) {
            tell(EventType::EVENT_TYPE_CREATE);
            if tree {
                self.adopt(path, Origin::Made, changes);
            }
        } else if mask.contains(ReadFlags::MOVED_TO) {
            tell(EventType::EVENT_TYPE_CREATE);
            if let Some(from) = self.moving.remove(&cookie) {
                self.rename(&from, &path);
            }
            if tree {
                self.adopt(path, Origin::Moved, changes);
            }
        } else if mask.contains(ReadFlags::MOVED_FROM) {
            tell(EventType::EVENT_TYPE_RENAME);
            if tree {
                self.depart(path, cookie);
            }
        } else if mask.contains(ReadFlags::DELETE) {
            tell(EventType::EVENT_TYPE_REMOVE);
        } else if mask.contains(ReadFlags::MODIFY) {
            tell(EventType::EVENT_TYPE_WRITE);
        } else if mask.contains(ReadFlags::ATTRIB) {
            tell(EventType::EVENT_TYPE_CHMOD);
        }
    }

    /// What a directory says of itself.
    fn apply_to_itself(&mut self, watch: i32, mask: ReadFlags, changes: &mut Vec<Change>) {
        let over = mask.intersects(ReadFlags::IGNORED | ReadFlags::UNMOUNT);
        if watch != self.root {
            if over {
                self.directories.remove(&watch);
            }
            return;
        }
        let kind = match () {
            () if mask.contains(ReadFlags::DELETE_SELF) => Some(EventType::EVENT_TYPE_REMOVE),
            () if mask.contains(ReadFlags::MOVE_SELF) => Some(EventType::EVENT_TYPE_RENAME),
            () if mask.contains(ReadFlags::ATTRIB) => Some(EventType::EVENT_TYPE_CHMOD),
            () => None,
        };
        changes.extend(kind.map(|kind| Change { kind, path: PathBuf::from(".") }));
        if over || mask.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF) {
            self.ended = Some(Error::Gone(self.target.root.display().to_string()));
        }
    }

    /// Watches a directory that has just come, and what it holds.
    fn adopt(&mut self, path: PathBuf, origin: Origin, changes: &mut Vec<Change>) {
        if let Some(watch) = self.add(&path) {
            self.look_into(watch, path, origin, changes);
        }
    }

    /// Watches a directory below the root, unless it is watched already, or no longer there, or not to be watched.
    fn add(&mut self, path: &Path) -> Option<i32> {
        let full = self.target.root.join(path);
        let skip = !self.target.allow_network_mounts && is_on_network(&full).unwrap_or(false);
        if skip {
            return None;
        }
        match inotify::add_watch(self.inotify.get(), &full, NAMES | WatchFlags::DONT_FOLLOW) {
            Ok(watch) => match self.directories.insert(watch, path.to_owned()) {
                None => Some(watch),
                Some(_) => None,
            },
            // Not there any more, or closed even to root (a user's FUSE mount).
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS | Errno::PERM) => None,
            Err(error @ (Errno::NOSPC | Errno::NOMEM)) => {
                self.ended = Some(Error::Limit(error.into()));
                None
            }
            Err(error) => {
                self.ended = Some(Error::Watch { path: full.display().to_string(), source: error.into() });
                None
            }
        }
    }

    /// Tells of what is in a directory that is watched since a moment ago, and does the same with the directories in it.
    fn look_into(&mut self, watch: i32, path: PathBuf, origin: Origin, changes: &mut Vec<Change>) {
        let most = changes.len() + MAX_ADOPTED;
        let mut todo = vec![(watch, path)];
        while let Some((watch, path)) = todo.pop() {
            let full = self.target.root.join(&path);
            let follow = if path.as_os_str().is_empty() { OFlags::empty() } else { OFlags::NOFOLLOW };
            let described = |name: OsString| (std::fs::symlink_metadata(full.join(&name)).ok(), name);
            let found: Vec<_> = names(&full, follow).unwrap_or_default().into_iter().map(described).collect();
            // Only now: what was found and comes from after the watch began has been told by the kernel.
            self.drain();
            let mut said = if origin == Origin::Before { HashMap::new() } else { self.said(watch) };
            let mut below = Vec::new();
            for (metadata, name) in found {
                let said = said.remove(&name).unwrap_or_default();
                // The kernel will tell of it, and of all that follows from it.
                if said.came_first == Some(true) {
                    continue;
                }
                let path = path.join(name);
                if origin != Origin::Before {
                    changes.push(Change { kind: EventType::EVENT_TYPE_CREATE, path: path.clone() });
                    let written = metadata.as_ref().is_some_and(|metadata| metadata.is_file() && metadata.len() > 0);
                    if origin == Origin::Made && written && !said.written {
                        changes.push(Change { kind: EventType::EVENT_TYPE_WRITE, path: path.clone() });
                    }
                }
                if metadata.is_some_and(|metadata| metadata.is_dir()) {
                    below.push(path);
                }
            }
            // What came unseen and was seen to go.
            for (name, _) in said.into_iter().filter(|(_, said)| said.came_first == Some(false)) {
                changes.push(Change { kind: EventType::EVENT_TYPE_CREATE, path: path.join(name) });
            }
            for path in below.into_iter().rev() {
                todo.extend(self.add(&path).map(|watch| (watch, path)));
            }
            if changes.len() > most {
                self.ended = Some(Error::Overflow);
            }
            if self.ended.is_some() {
                return;
            }
        }
    }

    /// What the kernel has said about the names in a directory that nobody has looked at.
    fn said(&self, watch: i32) -> HashMap<OsString, Said> {
        let mut said: HashMap<OsString, Said> = HashMap::new();
        let named = |event: &'_ Event| event.watch == watch && event.name.is_some();
        for event in self.pending.iter().filter(|event| named(event)) {
            let name: &OsStr = event.name.as_deref().unwrap_or_default();
            let said = said.entry(name.to_owned()).or_default();
            if event.mask.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
                said.came_first.get_or_insert(true);
            } else if event.mask.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
                said.came_first.get_or_insert(false);
            } else if event.mask.contains(ReadFlags::MODIFY) {
                said.written = true;
            }
        }
        said
    }

    /// Takes what the kernel has at this moment.
    fn drain(&mut self) {
        let mut left = match rustix::io::ioctl_fionread(self.inotify.get()) {
            Ok(left) => usize::try_from(left).unwrap_or(usize::MAX),
            Err(error) => return self.ended = Some(Error::Read(error.into())),
        };
        let mut buffer = vec![0; READ_BYTES.min(left.max(event::MAX_BYTES))];
        while left > 0 {
            match rustix::io::read(self.inotify.get(), &mut buffer) {
                Ok(length) => {
                    self.pending.extend(event::parse(&buffer[..length]));
                    left = left.saturating_sub(length);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return self.ended = Some(Error::Read(error.into())),
            }
            if self.pending.len() > MAX_PENDING {
                return self.ended = Some(Error::Overflow);
            }
        }
    }

    /// A directory goes: to another name of the tree, as the kernel then says next, or away.
    fn depart(&mut self, path: PathBuf, cookie: u32) {
        self.drain();
        let arrives = |event: &Event| event.cookie == cookie && event.mask.contains(ReadFlags::MOVED_TO);
        if self.pending.iter().any(arrives) {
            self.moving.insert(cookie, path);
        } else {
            self.forget(&path);
        }
    }

    /// Gives the watches at and below `from` their new names.
    fn rename(&mut self, from: &Path, to: &Path) {
        for path in self.directories.values_mut() {
            match path.strip_prefix(from) {
                Ok(rest) if rest.as_os_str().is_empty() => *path = to.to_owned(),
                Ok(rest) => *path = to.join(rest),
                Err(_) => {}
            }
        }
    }

    /// Takes off the watches at and below `gone`.
    fn forget(&mut self, gone: &Path) {
        let inotify = self.inotify.get();
        self.directories.retain(|watch, path| {
            let stays = !path.starts_with(gone);
            if !stays {
                // It fails for one that was deleted, which has none any more.
                let _ = inotify::remove_watch(inotify, *watch);
            }
            stays
        });
    }
}
