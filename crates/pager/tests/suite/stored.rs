//! A stored snapshot, a pager that serves it, and what is in it.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use pager::{Config, Ended, Error, Fetch, PAGE, Pager};
use rustix::event::{EventfdFlags, eventfd};
use snapshot::Store;
use tempfile::TempDir;

/// Pages of the memory: enough for several chunks, and for two huge pages.
pub const PAGES: u64 = 1024;

/// Long enough for anything here; a test that waits longer fails instead of hanging.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A directory with a snapshot of two generations.
pub struct Stored {
    directory: TempDir,
    content: Vec<[u8; PAGE as usize]>,
}

/// A pager on a thread of this process.
pub struct Running {
    thread: JoinHandle<Result<Ended, Error>>,
    stop: OwnedFd,
}

impl Stored {
    /// Runs of data and of zeros of all lengths; parts overwritten by a second generation, also with zeros.
    pub fn new() -> Self {
        let directory = TempDir::with_prefix("pager-").unwrap();
        let store = Store::open(directory.path(), []).unwrap().0;
        let header = directory.path().join("header");
        let mut content = vec![[0; PAGE as usize]; PAGES as usize];
        for generation in [1_u64, 2] {
            let diff = tempfile::tempfile().unwrap();
            diff.set_len(PAGES * PAGE).unwrap();
            for page in (0..PAGES).filter(|page| written_in(generation, *page)) {
                let bytes = content_of(generation, page);
                content[page as usize] = bytes;
                diff.write_all_at(&bytes, page * PAGE).unwrap();
            }
            let parent = (generation > 1).then_some(header.as_path());
            let packed = store.pack(&diff, parent).unwrap();
            store.commit(&packed, &header).unwrap();
        }
        Self { directory, content }
    }

    pub fn page(&self, page: u64) -> &[u8; PAGE as usize] {
        &self.content[page as usize]
    }

    /// The same, with each page's content taken from another place.
    pub fn reordered(mut self, from: impl Fn(u64) -> u64) -> Self {
        self.content = (0..PAGES).map(|page| self.content[from(page) as usize]).collect();
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    pub fn config(&self) -> Config {
        Config {
            socket: self.socket(),
            header: self.path("header"),
            generations: self.path("generations"),
            vmm_uid: None,
            prefetch: None,
            record: None,
            record_for: DEADLINE,
            patience: DEADLINE,
        }
    }

    /// Changes one byte of the data of each generation, in its first page.
    pub fn damage(&self) {
        for entry in std::fs::read_dir(self.path("generations")).unwrap() {
            let file = File::options().read(true).write(true).open(entry.unwrap().path()).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, PAGE + 100).unwrap();
            file.write_all_at(&[byte[0] ^ 1], PAGE + 100).unwrap();
        }
    }
}

fn written_in(generation: u64, page: u64) -> bool {
    match generation {
        1 => (page / 100).is_multiple_of(2) || page.is_multiple_of(7),
        _ => page.is_multiple_of(13) || (300..330).contains(&page),
    }
}

fn content_of(generation: u64, page: u64) -> [u8; PAGE as usize] {
    // The guest has cleared these since.
    if generation == 2 && page.is_multiple_of(26) {
        return [0; PAGE as usize];
    }
    std::array::from_fn(|at| (page * 31 + generation * 7 + at as u64 / 64 + 1) as u8 | 1)
}

/// Starts a pager; it listens when this returns.
pub fn start(config: Config) -> Running {
    run(Pager::listen(config).unwrap())
}

/// Starts one that has to fetch what it serves.
pub fn start_lazy(config: Config, fetch: Arc<dyn Fetch>) -> Running {
    run(Pager::listen(config).unwrap().with_fetch(fetch))
}

fn run(pager: Pager) -> Running {
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let stops = stop.try_clone().unwrap();
    Running { thread: std::thread::spawn(move || pager.serve(stops.as_fd())), stop }
}

impl Running {
    /// Asks it to end, and says with what it did.
    pub fn stop(self) -> Result<Ended, Error> {
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).unwrap();
        self.end()
    }

    /// Waits for it to end by itself.
    pub fn end(self) -> Result<Ended, Error> {
        self.thread.join().unwrap()
    }
}
