use std::os::unix::fs::FileExt;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::{Content, Run};

const PAGE: usize = PAGE_SIZE as usize;

/// A guest whose memory is known, paused and resumed through a store.
struct Guest {
    memory: Vec<u8>,
    /// Pages written since the last pause.
    written: Vec<bool>,
    /// Makes every write another.
    writes: u32,
    header: PathBuf,
}

struct Machine {
    dir: tempfile::TempDir,
    store: Store,
}

fn machine() -> Machine {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (store, broken) = Store::open(dir.path(), []).unwrap();
    assert!(broken.is_empty());
    Machine { dir, store }
}

impl Machine {
    fn guest(&self, name: &str, pages: usize) -> Guest {
        let header = self.dir.path().join(name);
        Guest { memory: vec![0; pages * PAGE], written: vec![false; pages], writes: 0, header }
    }

    /// The store as the next agent finds it.
    fn reopened(&self, guests: &[&Guest]) -> Store {
        let (store, broken) = Store::open(self.dir.path(), guests.iter().map(|guest| guest.header.clone())).unwrap();
        assert!(broken.is_empty(), "{broken:?}");
        store
    }

    fn files(&self) -> usize {
        fs::read_dir(self.store.generations()).unwrap().count()
    }

    /// Nothing lies beside the headers.
    fn check_no_leftovers(&self, headers: usize) {
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), headers + 1);
    }
}

impl Guest {
    fn write(&mut self, page: usize, is_zero: bool) {
        self.writes += 1;
        let content = &mut self.memory[page * PAGE..(page + 1) * PAGE];
        content.fill(0);
        if !is_zero {
            // One byte that is not zero, anywhere in the page.
            content[self.writes as usize * 37 % (PAGE - 4)..][..4].copy_from_slice(&self.writes.to_le_bytes());
        }
        self.written[page] = true;
    }

    /// What the VMM writes at a pause.
    fn diff(&mut self) -> File {
        let diff = tempfile::tempfile_in("/dev/shm").unwrap();
        diff.set_len(self.memory.len() as u64).unwrap();
        for page in (0..self.written.len()).filter(|page| self.written[*page]) {
            let at = page * PAGE;
            diff.write_all_at(&self.memory[at..at + PAGE], at as u64).unwrap();
        }
        self.written.fill(false);
        diff
    }

    fn pack(&mut self, store: &Store) -> Packed {
        let diff = self.diff();
        store.pack(&diff, self.header.exists().then_some(&*self.header)).unwrap()
    }

    fn pause(&mut self, store: &Store) {
        let packed = self.pack(store);
        store.commit(&packed, &self.header).unwrap();
    }

    fn open(&self, store: &Store) -> Snapshot {
        Snapshot::open(store.generations(), &self.header).unwrap()
    }

    fn check(&self, store: &Store) {
        check(&self.open(store), &self.memory);
    }
}

fn check(snapshot: &Snapshot, memory: &[u8]) {
    assert_eq!(snapshot.memory_size(), memory.len() as u64);
    let mut read = vec![0xaa; memory.len()];
    snapshot.read_exact_at(&mut read, 0).unwrap();
    assert!(read == memory, "the memory is another");
}

/// Bytes of a generation that has what changed and is not zero.
fn stored(before: &[u8], now: &[u8]) -> u64 {
    let pages = before.chunks(PAGE).zip(now.chunks(PAGE));
    let pages = pages.filter(|(before, now)| before != now && now.iter().any(|byte| *byte != 0)).count() as u64;
    if pages == 0 { 0 } else { PAGE_SIZE + pages * (PAGE_SIZE + 4) }
}

static GO_ON: AtomicBool = AtomicBool::new(false);

#[derive(Debug, Clone)]
enum Step {
    Write(usize, bool),
    /// Reported as written, and what it was.
    Touch(usize),
    Pause,
    Merge,
    Reopen,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_memory_survives_any_pauses_and_merges(steps in vec(prop_oneof![
        12 => (0..300_usize, prop::bool::weighted(0.3)).prop_map(|(page, is_zero)| Step::Write(page, is_zero)),
        6 => (0..300_usize).prop_map(Step::Touch),
        4 => Just(Step::Pause),
        1 => Just(Step::Merge),
        1 => Just(Step::Reopen),
    ], 1..150)) {
        let mut machine = machine();
        let mut guest = machine.guest("header", 300);
        guest.pause(&machine.store);
        let mut paused = guest.memory.clone();
        for step in steps {
            match step {
                Step::Write(page, is_zero) => guest.write(page, is_zero),
                Step::Touch(page) => guest.written[page] = true,
                Step::Pause => {
                    let packed = guest.pack(&machine.store);
                    prop_assert_eq!(packed.bytes_written(), stored(&paused, &guest.memory));
                    machine.store.commit(&packed, &guest.header).unwrap();
                    guest.check(&machine.store);
                    paused.clone_from(&guest.memory);
                }
                Step::Merge => {
                    let is_due = merge::is_due(guest.open(&machine.store).header());
                    let merged = machine.store.merge(&guest.header, &GO_ON).unwrap();
                    prop_assert_eq!(matches!(merged, Merged::Done(_)), is_due);
                }
                Step::Reopen => machine.store = machine.reopened(&[&guest]),
            }
            machine.store.collect().unwrap();
        }
        guest.pause(&machine.store);
        guest.check(&machine.store);
        machine.store.collect().unwrap();
        prop_assert_eq!(machine.files(), guest.open(&machine.store).files().len());
        machine.check_no_leftovers(1);
    }
}

#[test]
fn a_pause_writes_what_was_dirtied_and_is_not_zero() {
    let machine = machine();
    let mut guest = machine.guest("header", 4096);
    guest.pause(&machine.store);
    assert_eq!(machine.files(), 0, "an empty memory takes no space");
    (100..900).for_each(|page| guest.write(page, page % 2 == 0));
    let packed = guest.pack(&machine.store);
    assert_eq!(packed.bytes_written(), 4096 + 400 * (4096 + 4));
    machine.store.commit(&packed, &guest.header).unwrap();
    assert_eq!(machine.store.audit().unwrap().used, Collected { files: 1, bytes: packed.bytes_written() });
    guest.check(&machine.store);
    // Written again as zeros, they are zeros, and nothing is left of the generation.
    (100..900).for_each(|page| guest.write(page, true));
    guest.pause(&machine.store);
    assert_eq!(guest.open(&machine.store).files().len(), 0);
    guest.check(&machine.store);
    let bytes = packed.bytes_written();
    drop(packed);
    assert_eq!(machine.store.collect().unwrap(), Collected { files: 1, bytes });
}

#[test]
fn a_page_that_is_damaged_before_is_written_again() {
    let machine = machine();
    let mut guest = machine.guest("header", 64);
    (0..64).for_each(|page| guest.write(page, false));
    guest.pause(&machine.store);
    let (path, ..) = machine.store.files().unwrap().remove(0);
    let file = File::options().write(true).open(&path).unwrap();
    // The page itself, and its checksum.
    file.write_all_at(&[!guest.memory[7 * PAGE + 9]], 8 * PAGE_SIZE + 9).unwrap();
    file.write_all_at(&[0xab; 4], 65 * PAGE_SIZE + 9 * 4).unwrap();
    guest.written.fill(true);
    let packed = guest.pack(&machine.store);
    assert_eq!(packed.bytes_written(), PAGE_SIZE + 2 * (PAGE_SIZE + 4));
    machine.store.commit(&packed, &guest.header).unwrap();
    guest.check(&machine.store);
    // Nothing of a file that is gone is known.
    let (path, ..) = machine.store.files().unwrap().into_iter().max_by_key(|(.., len)| *len).unwrap();
    fs::remove_file(path).unwrap();
    guest.written.fill(true);
    guest.pause(&machine.store);
    guest.check(&machine.store);
}

#[test]
fn runs_are_as_long_as_storage_and_memory_go_on_together() {
    let machine = machine();
    let mut guest = machine.guest("header", 1024);
    (10..600).for_each(|page| guest.write(page, false));
    guest.pause(&machine.store);
    let snapshot = guest.open(&machine.store);
    let run = snapshot.lookup(20 * PAGE_SIZE + 5).unwrap();
    assert_eq!(run.len, 580 * PAGE_SIZE - 5);
    let Content::Stored { data, index: 0, offset } = run.content else { panic!("{run:?}") };
    assert_eq!(offset, PAGE_SIZE + 10 * PAGE_SIZE + 5);
    let mut pages = vec![0; 580 * PAGE];
    data.file().read_exact_at(&mut pages, offset - 5).unwrap();
    data.check(offset - 5, &pages).unwrap();
    assert!(pages == guest.memory[20 * PAGE..600 * PAGE]);
    assert!(matches!(snapshot.lookup(0), Some(Run { len: 40960, content: Content::Zero })));
    assert!(snapshot.lookup(1024 * PAGE_SIZE).is_none());
    assert!(snapshot.lookup(u64::MAX).is_none());
    for (offset, len) in [(1, PAGE), (0, 5), (1024 * PAGE_SIZE, PAGE), (u64::MAX - 4095, PAGE)] {
        let read = snapshot.read_exact_at(&mut vec![0; len], offset);
        assert!(matches!(read, Err(open::Error::NotPages { .. })));
    }
}

#[test]
fn a_fork_shares_what_it_had_and_goes_its_own_way() {
    let machine = machine();
    let mut parent = machine.guest("parent", 64);
    (0..64).for_each(|page| parent.write(page, false));
    parent.pause(&machine.store);
    let mut child = machine.guest("child", 64);
    machine.store.link(&parent.header, &child.header).unwrap();
    child.memory.clone_from(&parent.memory);
    assert_eq!(machine.files(), 1);
    for pause in 0..9 {
        parent.write(pause, false);
        parent.pause(&machine.store);
        child.writes += 1000;
        child.write(63 - pause, false);
        child.pause(&machine.store);
    }
    // Each merges for itself; what they share stays, as each has most of it.
    assert!(matches!(machine.store.merge(&parent.header, &GO_ON).unwrap(), Merged::Done(_)));
    machine.store.collect().unwrap();
    assert_eq!(machine.files(), 1 + 1 + 9);
    let store = machine.reopened(&[&parent, &child]);
    parent.check(&store);
    child.check(&store);
    store.remove(&parent.header).unwrap();
    store.collect().unwrap();
    assert_eq!(machine.files(), 1 + 9);
    child.check(&store);
    store.remove(&child.header).unwrap();
    store.remove(&child.header).unwrap();
    store.collect().unwrap();
    assert_eq!(machine.files(), 0);
    machine.check_no_leftovers(0);
}

#[test]
fn what_is_open_stays_readable() {
    let machine = machine();
    let mut guest = machine.guest("header", 32);
    guest.write(3, false);
    guest.pause(&machine.store);
    let snapshot = guest.open(&machine.store);
    machine.store.remove(&guest.header).unwrap();
    machine.store.collect().unwrap();
    assert_eq!(machine.files(), 0);
    check(&snapshot, &guest.memory);
}

#[test]
fn what_no_header_has_yet_is_kept_until_it_is_dropped() {
    let machine = machine();
    let mut guest = machine.guest("header", 32);
    guest.write(3, false);
    let packed = guest.pack(&machine.store);
    assert_eq!(machine.store.collect().unwrap(), Collected::default());
    // Also what it shares with a parent that is gone.
    machine.store.commit(&packed, &guest.header).unwrap();
    guest.write(4, false);
    let second = guest.pack(&machine.store);
    machine.store.remove(&guest.header).unwrap();
    drop(packed);
    assert_eq!(machine.store.collect().unwrap(), Collected::default());
    machine.store.commit(&second, &guest.header).unwrap();
    guest.check(&machine.store);
    guest.write(5, false);
    let third = guest.pack(&machine.store);
    assert_eq!(machine.files(), 3);
    drop(third);
    assert_eq!(machine.store.collect().unwrap().files, 1);
}

/// A guest with as many generations as make a merge due.
fn due(machine: &Machine) -> Guest {
    let mut guest = machine.guest("header", 1024);
    for pause in 0..merge::MERGE_AT {
        (pause..1024).step_by(merge::MERGE_AT).for_each(|page| guest.write(page, false));
        guest.pause(&machine.store);
    }
    guest
}

#[test]
fn a_stopped_merge_leaves_nothing() {
    let machine = machine();
    let guest = due(&machine);
    assert_eq!(machine.store.merge(&guest.header, &AtomicBool::new(true)).unwrap(), Merged::Stopped);
    assert_eq!(machine.files(), merge::MERGE_AT);
    guest.check(&machine.store);
}

#[test]
fn a_pause_and_a_removal_win_over_a_merge() {
    let machine = machine();
    let mut guest = due(&machine);
    // A merge from here on, which is slower than what happens to the header meanwhile.
    let old = machine.store.pinned(&guest.header).unwrap();
    guest.write(0, false);
    guest.pause(&machine.store);
    assert!(!machine.store.place(&guest.header, &old.header, Some(old.commit)).unwrap());
    guest.check(&machine.store);
    machine.store.remove(&guest.header).unwrap();
    assert!(!machine.store.place(&guest.header, &old.header, Some(old.commit)).unwrap());
    assert!(!guest.header.exists());
    drop(old);
    machine.store.collect().unwrap();
    assert_eq!(machine.files(), 0);
    machine.check_no_leftovers(0);
}

#[test]
fn pauses_merges_and_collections_at_once_lose_nothing() {
    let machine = machine();
    let is_done = AtomicBool::new(false);
    let guests: Vec<_> = ["a", "b"].map(|name| machine.guest(name, 256)).into();
    std::thread::scope(|scope| {
        let running: Vec<_> = guests
            .into_iter()
            .map(|mut guest| {
                let store = &machine.store;
                guest.pause(store);
                scope.spawn(move || {
                    for pause in 0..60 {
                        (0..20).for_each(|write| guest.write((pause * 7 + write * 11) % 256, write % 5 == 0));
                        guest.pause(store);
                        // Another process would open it like this.
                        guest.check(store);
                    }
                    guest
                })
            })
            .collect();
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                for name in ["a", "b"] {
                    machine.store.merge(&machine.dir.path().join(name), &GO_ON).unwrap();
                }
                machine.store.collect().unwrap();
            }
        });
        let guests: Vec<_> = running.into_iter().map(|thread| thread.join()).collect();
        is_done.store(true, Ordering::Relaxed);
        for guest in guests {
            guest.unwrap().check(&machine.store);
        }
    });
    machine.store.collect().unwrap();
    let audit = machine.store.audit().unwrap();
    assert_eq!((audit.garbage, audit.broken.len(), audit.foreign.len()), (Collected::default(), 0, 0));
    machine.check_no_leftovers(2);
}

#[test]
fn collections_at_once_leave_each_other_alone() {
    let machine = machine();
    for _ in 0..4000 {
        fs::write(machine.store.generations().join(random_id().unwrap().to_string()), "garbage").unwrap();
    }
    let (threads, garbage) = (4, machine.files());
    let together = std::sync::Barrier::new(threads);
    let collected = std::thread::scope(|scope| {
        let collect = || {
            together.wait();
            machine.store.collect().unwrap().files
        };
        let collections: Vec<_> = (0..threads).map(|_| scope.spawn(collect)).collect();
        collections.into_iter().map(|collection| collection.join().unwrap()).sum::<u64>()
    });
    assert_eq!((collected, machine.files()), (garbage as u64, 0));
}

#[test]
fn a_header_that_cannot_be_read_keeps_everything() {
    let machine = machine();
    let mut guest = machine.guest("header", 32);
    guest.write(3, false);
    guest.pause(&machine.store);
    let whole = fs::read(&guest.header).unwrap();
    let future = [&whole[..8], &[2], &whole[9..]].concat();
    let flipped = [&whole[..60], &[!whole[60]], &whole[61..]].concat();
    for (bytes, expected) in [
        (Vec::new(), "the header is empty"),
        (whole[..50].to_vec(), "the header is cut off: 50 of 112 bytes"),
        (flipped, "the header's checksum is wrong"),
        (b"<html></html>".to_vec(), "this is no snapshot header"),
        (future, "the header has version 2; this program reads version 1"),
    ] {
        fs::write(&guest.header, bytes).unwrap();
        let (store, broken) = Store::open(machine.dir.path(), [guest.header.clone()]).unwrap();
        let [Broken { error: Error::Open { source: open::Error::Header { source, .. }, .. }, .. }] = &broken[..] else {
            panic!("{broken:?}")
        };
        assert_eq!(source.to_string(), expected);
        let opened = Snapshot::open(store.generations(), &guest.header);
        assert!(matches!(opened, Err(open::Error::Header { source: found, .. }) if found == *source));
        let diff = guest.diff();
        assert!(matches!(store.pack(&diff, Some(&guest.header)), Err(Error::Open { .. })));
        assert!(matches!(store.collect(), Err(Error::Blocked(path)) if path == guest.header));
        assert_eq!(store.audit().unwrap().broken.len(), 1);
        assert_eq!(machine.files(), 1);
    }
    let (store, _) = Store::open(machine.dir.path(), [guest.header.clone()]).unwrap();
    store.remove(&guest.header).unwrap();
    assert_eq!(store.collect().unwrap().files, 1);
}

#[test]
fn a_generation_that_is_missing_or_damaged_is_told_at_once() {
    let machine = machine();
    let mut guest = machine.guest("header", 32);
    guest.write(3, false);
    guest.pause(&machine.store);
    let (path, ..) = machine.store.files().unwrap().remove(0);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let opened = Snapshot::open(machine.store.generations(), &guest.header);
    assert!(matches!(opened, Err(open::Error::Generation(crate::DataError::Length { .. }))));
    assert_eq!(machine.store.audit().unwrap().broken.len(), 1);
    fs::write(&path, [&whole[..5000], &[9], &whole[5001..]].concat()).unwrap();
    let read = guest.open(&machine.store).read_exact_at(&mut [0; PAGE], 3 * PAGE_SIZE);
    assert!(matches!(read, Err(open::Error::Generation(crate::DataError::Page { page: 0, .. }))));
    fs::remove_file(&path).unwrap();
    let (store, broken) = Store::open(machine.dir.path(), [guest.header.clone()]).unwrap();
    assert!(matches!(&broken[..], [Broken { error: Error::Missing { .. }, .. }]), "{broken:?}");
    assert_eq!(store.audit().unwrap().broken.len(), 1);
}

#[test]
fn a_header_that_was_never_there_needs_nothing() {
    let machine = machine();
    let (store, broken) = Store::open(machine.dir.path(), [machine.dir.path().join("none")]).unwrap();
    assert_eq!(broken.len(), 1);
    store.collect().unwrap();
    assert!(matches!(
        store.link(&machine.dir.path().join("none"), &machine.dir.path().join("to")),
        Err(Error::Unknown(_))
    ));
}

#[test]
fn leftovers_go_and_the_files_of_others_stay() {
    let machine = machine();
    let guest = machine.guest("header", 32);
    let temporary = random_id().unwrap();
    fs::write(machine.store.generations().join(format!("{TEMPORARY}{temporary}")), "half").unwrap();
    fs::write(machine.store.generations().join("notes.txt"), "mine").unwrap();
    fs::write(machine.dir.path().join(format!("header{TEMPORARY}{temporary}")), "half").unwrap();
    let (store, _) = Store::open(machine.dir.path(), [guest.header.clone()]).unwrap();
    machine.check_no_leftovers(0);
    let audit = store.audit().unwrap();
    assert_eq!(audit.garbage, Collected { files: 1, bytes: 4 });
    assert_eq!(audit.foreign, [store.generations().join("notes.txt")]);
    assert_eq!(store.collect().unwrap(), Collected { files: 1, bytes: 4 });
    assert_eq!(machine.files(), 1);
}

#[test]
fn a_diff_that_is_no_memory_is_refused_and_changes_nothing() {
    let machine = machine();
    let mut guest = machine.guest("header", 32);
    guest.write(3, false);
    guest.pause(&machine.store);
    for len in [0, 100, 4097, (u64::from(u32::MAX) + 1) * PAGE_SIZE] {
        let diff = tempfile::tempfile_in("/dev/shm").unwrap();
        diff.set_len(len).unwrap();
        assert!(matches!(machine.store.pack(&diff, None), Err(Error::DiffLength(found)) if found == len));
    }
    let mut other = machine.guest("other", 33);
    other.write(1, false);
    let packed = machine.store.pack(&other.diff(), Some(&guest.header));
    assert!(matches!(packed, Err(Error::Merge(merge::Error::MemorySize { .. }))));
    assert_eq!(machine.files(), 1);
    guest.check(&machine.store);
}

/// A tmpfs of huge pages, unmounted when dropped.
struct Huge(tempfile::TempDir);

impl Huge {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", dir.path(), "tmpfs", flags, Some(c"huge=always")).unwrap();
        Self(dir)
    }
}

impl Drop for Huge {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_diff_whose_holes_are_not_as_fine_as_pages_is_refused() {
    // One byte makes 2 MiB of data there: packed, it would turn the pages around it into zeros.
    let machine = machine();
    let huge = Huge::mount();
    let diff = File::create_new(huge.0.path().join("diff")).unwrap();
    diff.set_len(8 << 20).unwrap();
    diff.write_all_at(&[1], 3_000_000).unwrap();
    assert!(matches!(machine.store.pack(&diff, None), Err(Error::CoarseDiff(2_097_152))));
    assert_eq!(machine.files(), 0);
}

#[test]
fn a_failed_commit_leaves_the_header_that_was_there() {
    let machine = machine();
    let mut guest = machine.guest("header", 32);
    guest.write(3, false);
    let packed = guest.pack(&machine.store);
    let nowhere = machine.dir.path().join("none/header");
    assert!(matches!(machine.store.commit(&packed, &nowhere), Err(Error::Write { .. })));
    let taken = machine.dir.path().join("taken");
    fs::create_dir(&taken).unwrap();
    assert!(matches!(machine.store.commit(&packed, &taken), Err(Error::Write { .. })));
    machine.check_no_leftovers(1);
    machine.store.commit(&packed, &guest.header).unwrap();
    guest.check(&machine.store);
}

#[test]
fn a_memory_from_elsewhere_becomes_one_of_ours() {
    let (there, here) = (machine(), machine());
    let mut guest = there.guest("guest", 40);
    (0..30).for_each(|page| guest.write(page, page % 3 == 0));
    guest.pause(&there.store);
    (10..12).for_each(|page| guest.write(page, false));
    guest.pause(&there.store);
    let came = here.dir.path().join("came");
    fs::create_dir(&came).unwrap();
    let names: Vec<_> = fs::read_dir(there.store.generations()).unwrap().map(|entry| entry.unwrap().path()).collect();
    for path in &names {
        fs::copy(path, came.join(path.file_name().unwrap())).unwrap();
    }

    let header = here.dir.path().join("header");
    // Not while a page is damaged, and nothing of it stays.
    let damaged = came.join(names[0].file_name().unwrap());
    let good = fs::read(&damaged).unwrap();
    let mut bad = good.clone();
    bad[PAGE + 7] ^= 1;
    fs::write(&damaged, bad).unwrap();
    let error = here.store.adopt(&guest.header, &came, &header).unwrap_err();
    assert!(matches!(error, Error::Generation(crate::DataError::Page { .. })), "{error:?}");
    assert!(!header.exists());
    fs::write(&damaged, good).unwrap();

    for _ in 0..2 {
        here.store.adopt(&guest.header, &came, &header).unwrap();
    }
    fs::remove_dir_all(&came).unwrap();
    here.store.collect().unwrap();
    assert_eq!(here.files(), 2);
    let snapshot = Snapshot::open(here.store.generations(), &header).unwrap();
    check(&snapshot, &guest.memory);
    here.store.remove(&header).unwrap();
    here.store.collect().unwrap();
    assert_eq!(here.files(), 0);
}
