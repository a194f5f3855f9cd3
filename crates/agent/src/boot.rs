//! Boot snapshots: every image template gets one per size, taken of a guest that nobody else ever had, so that creating a
//! capsule is a resume. Nobody but the start of a capsule knows of them: they are in no list and no count.
//!
//! One is good only where all that went into it is the same: image, kernel, VMM, processor. That is in its name, so a
//! stale one has a name that nobody asks for, and goes when the host is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::CapsuleId;
use api::egress::Policy;
use sha2::{Digest, Sha256};
use snapshot::Store;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::capsule::record::Journal;
use crate::capsule::release::release;
use crate::capsule::start::{self, Origin};
use crate::capsule::{Spec, save};
use crate::host::{Config, Host, Sizes};
use crate::point::{self, Meta, Point};
use crate::random_token;

/// What a kernel puts off until after a boot takes so long: ext4 looks at its groups within 5 s, IPv6 wants its addresses, a
/// clock is measured. Otherwise all who begin there would do it again, beside their first command.
const SETTLING: Duration = Duration::from_secs(6);
/// How many there are at most. Each takes the disk and memory that a booted guest has written.
const MOST: usize = 16;

/// Pauses after an attempt that came to nothing, or to something of no use: the first, and the longest. One cause is soon over,
/// as when a guest was killed for want of memory; an image that cannot be snapshotted must not keep the host busy.
const AGAIN: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(3600)];

/// An image and a size.
type Key = (String, Sizes);

/// The boot snapshots of a host.
pub struct Boots {
    dir: PathBuf,
    /// What all of them depend on besides the image, as text; `None` when none are wanted.
    machine: Option<String>,
    state: Mutex<State>,
    /// Ends what is being made.
    stop: CancellationToken,
}

#[derive(Default)]
struct State {
    points: BTreeMap<String, Arc<Point>>,
    wanted: Vec<Key>,
    /// What was ever wanted.
    tried: BTreeMap<Key, Attempts>,
    /// The task that makes what is wanted, one after the other.
    maker: Option<tokio::task::JoinHandle<()>>,
}

/// How often there was to be a boot snapshot of something.
#[derive(Debug, Default)]
struct Attempts {
    /// How many came to nothing.
    failed: u32,
    /// From when on there may be another; `None` while one is made, or was made and is good.
    again: Option<Instant>,
}

impl Attempts {
    fn fail(&mut self, now: Instant) {
        let [first, longest] = AGAIN;
        self.again = Some(now + first.saturating_mul(1 << self.failed.min(16)).min(longest));
        self.failed += 1;
    }

    fn may_begin(&self, now: Instant) -> bool {
        self.again.is_some_and(|again| now >= again)
    }
}

impl Boots {
    /// Those in `root` that are still good; the others are removed.
    pub fn open(config: &Config, images: &BTreeMap<String, PathBuf>, root: &Path, memory: &Store) -> io::Result<Self> {
        let dir = root.join("boots");
        let machine = config.boot_snapshots.map(|_| machine(config)).transpose()?;
        let boots = Self { dir, machine, state: Mutex::default(), stop: CancellationToken::new() };
        let good: BTreeSet<String> = images.values().filter_map(|image| boots.prefix(image)).collect();
        let points = point::open_all(memory, &boots.dir)?;
        let (kept, stale): (BTreeMap<_, _>, BTreeMap<_, _>) = points
            .into_iter()
            .partition(|(name, _)| name.split_once('-').is_some_and(|(prefix, _)| good.contains(prefix)));
        stale.values().for_each(|point| point.doom());
        boots.lock().points = kept;
        Ok(boots)
    }

    /// The one of that image file and those sizes.
    pub fn get(&self, image: &Path, sizes: Sizes) -> Option<Arc<Point>> {
        let name = self.name(image, sizes)?;
        self.lock().points.get(&name).cloned()
    }

    /// Throws away that of an image and those sizes, which turned out to be of no use.
    pub fn discard(&self, image: &str, sizes: Sizes, point: &Arc<Point>) {
        point.doom();
        let mut state = self.lock();
        let before = state.points.len();
        state.points.retain(|_, other| !Arc::ptr_eq(point, other));
        // Several may find that at once.
        if state.points.len() < before {
            state.tried.entry((image.to_owned(), sizes)).or_default().fail(Instant::now());
        }
    }

    /// Has one made in the background if there is none, and the last attempt was not just now.
    pub fn want(host: &Arc<Host>, image: &str, sizes: Sizes) {
        let boots = &host.boots;
        let Some(name) = host.images.get(image).and_then(|file| boots.name(file, sizes)) else { return };
        let key = (image.to_owned(), sizes);
        let mut state = boots.lock();
        let is_new = !state.points.contains_key(&name) && state.points.len() + state.wanted.len() < MOST;
        let is_due = state.tried.get(&key).is_none_or(|attempts| attempts.may_begin(Instant::now()));
        if boots.stop.is_cancelled() || !is_new || !is_due {
            return;
        }
        state.tried.entry(key.clone()).or_default().again = None;
        state.wanted.push(key);
        if state.maker.as_ref().is_none_or(|maker| maker.is_finished()) {
            state.maker = Some(tokio::spawn(make_all(host.clone())));
        }
    }

    /// Ends what is being made and waits until nothing of it is left. None are made any more.
    pub async fn stop(&self) {
        self.stop.cancel();
        let maker = self.lock().maker.take();
        if let Some(maker) = maker {
            // A maker that panicked has said so.
            let _ = maker.await;
        }
    }

    fn name(&self, image: &Path, sizes: Sizes) -> Option<String> {
        let Sizes { vcpus, memory_mib, disk_mib } = sizes;
        Some(format!("{}-{vcpus}-{memory_mib}-{disk_mib}", self.prefix(image)?))
    }

    /// What the names of an image's boot snapshots begin with. Images are named by their content.
    fn prefix(&self, image: &Path) -> Option<String> {
        let machine = self.machine.as_ref()?;
        let digest = Sha256::new().chain_update(machine).chain_update(image.file_name()?.as_encoded_bytes()).finalize();
        Some(hex::encode(&digest[..8]))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything but the image that a restored guest depends on.
fn machine(config: &Config) -> io::Result<String> {
    let mut text = String::new();
    for file in [&config.kernel, &config.vmm] {
        let file = fs::canonicalize(file).unwrap_or_else(|_| file.clone());
        // One that is missing is for the first start to complain about.
        let (size, time) =
            fs::metadata(&file).map_or((0, 0), |metadata| (metadata.size(), metadata.mtime_nsec() + metadata.mtime()));
        text += &format!("{} {size} {time}\n", file.display());
    }
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    let is_kind =
        |line: &&str| ["model", "vendor_id", "stepping", "microcode", "flags"].iter().any(|of| line.starts_with(of));
    // The first processor's lines: they come first.
    let mut seen = BTreeSet::new();
    for line in processor.lines().filter(is_kind) {
        if seen.insert(line.split(':').next()) {
            text += line;
        }
    }
    text += &fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(text)
}

async fn make_all(host: Arc<Host>) {
    let boots = &host.boots;
    while !boots.stop.is_cancelled() {
        let Some((image, sizes)) = boots.lock().wanted.pop() else { return };
        match make(&host, &image, sizes).await {
            Ok(()) => info!(image, ?sizes, "took a boot snapshot"),
            Err(_) if boots.stop.is_cancelled() => {}
            Err(error) => {
                warn!(image, ?sizes, error = crate::chain(&error), "no boot snapshot could be taken");
                boots.lock().tried.entry((image, sizes)).or_default().fail(Instant::now());
            }
        }
    }
}

/// Why there is no boot snapshot.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("preparing")]
    Prepare(#[source] io::Error),
    #[error(transparent)]
    Full(#[from] crate::admission::Full),
    #[error("booting")]
    Start(#[from] start::Error),
    #[error("saving")]
    Save(#[from] save::Failed),
    #[error("keeping it")]
    Keep(#[source] io::Error),
}

/// Boots a guest that nobody knows of, keeps what it is then, and begins from that once: what a start needs first is known
/// from then on, and that it is of use.
async fn make(host: &Arc<Host>, image: &str, sizes: Sizes) -> Result<(), Error> {
    let mut journal = begin(host, image, sizes)?;
    let made = capture(host, &mut journal).await;
    end(host, &mut journal).await;
    let (name, point) = made?;
    let mut journal = begin(host, image, sizes)?;
    let rehearsed = rehearse(host, &mut journal, &point).await;
    match &rehearsed {
        Ok(()) => drop(host.boots.lock().points.insert(name, point)),
        Err(_) => point.doom(),
    }
    end(host, &mut journal).await;
    Ok(rehearsed?)
}

fn begin(host: &Host, image: &str, sizes: Sizes) -> Result<Journal, Error> {
    let Sizes { vcpus, memory_mib, disk_mib } = sizes;
    let spec = Spec {
        id: CapsuleId::random(),
        image: image.to_owned(),
        vcpus,
        memory_mib,
        disk_mib,
        timeout_sec: 0,
        default_env: BTreeMap::new(),
        template_id: String::new(),
    };
    // Only where there is room for it; but there is one at a time and soon gone, so nobody is refused because of it.
    drop(host.admission.admit(&spec)?);
    let token = random_token().map_err(Error::Prepare)?;
    Journal::create(host.passing(), spec, Policy::default(), token).map_err(Error::Prepare)
}

async fn end(host: &Host, journal: &mut Journal) {
    let (id, dir) = (journal.record().spec.id, journal.dir().to_owned());
    let released = release(host, id, &dir, Some(journal)).await;
    for error in released.err().unwrap_or_default() {
        warn!(error = crate::chain(&error), "left behind by a boot snapshot");
    }
}

async fn capture(host: &Arc<Host>, journal: &mut Journal) -> Result<(String, Arc<Point>), Error> {
    let stop = &host.boots.stop;
    let running = start::start(host, journal, Origin::Image, stop).await?;
    running.guest.warm_up().await;
    let settled = stop.run_until_cancelled(tokio::time::sleep(SETTLING)).await;
    settled.ok_or(start::Error::Cancelled)?;
    let spec = &journal.record().spec;
    let image = host.images.get(&spec.image).expect("it was booted");
    let name = host.boots.name(image, spec.sizes()).expect("none are made where none are wanted");
    let dir = host.boots.dir.join(&name);
    fs::create_dir(&dir).map_err(Error::Keep)?;
    let digest = match save::capture(host, journal, &running, &dir).await {
        Ok(digest) => digest,
        Err(failed) => {
            point::discard(&host.memory, &dir);
            return Err(failed.into());
        }
    };
    let point = Point::made(&host.memory, dir, Meta::of(journal.record(), digest));
    point.keep().await.map_err(Error::Keep)?;
    Ok((name, point))
}

async fn rehearse(host: &Arc<Host>, journal: &mut Journal, point: &Point) -> Result<(), start::Error> {
    let running = start::start(host, journal, Origin::Rehearsal(point), &host.boots.stop).await?;
    running.guest.warm_up().await;
    if let Some(pager) = &running.pager
        && let Err(error) = pager.terminate().await
    {
        // It has not written down what it noted: starts are slower and not wrong.
        warn!(error = crate::chain(&error), "a boot snapshot without a working set");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_tried_again_after_ever_longer_pauses() {
        let (mut attempts, mut now, mut pauses) = (Attempts::default(), Instant::now(), Vec::new());
        assert!(!attempts.may_begin(now), "one is made");
        for _ in 0..40 {
            attempts.fail(now);
            let again = attempts.again.unwrap();
            assert!(!attempts.may_begin(again - Duration::from_millis(1)) && attempts.may_begin(again));
            pauses.push((again - now).as_secs());
            (attempts.again, now) = (None, again);
            assert!(!attempts.may_begin(now));
        }
        assert_eq!(pauses[..10], [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600]);
        assert!(pauses[10..].iter().all(|pause| *pause == 3600));
    }
}
