//! Random access by several threads, compared byte for byte with what memory should hold.

use std::collections::HashSet;

use pager::{Ended, HUGE_PAGE, PAGE};

use crate::stored::{PAGES, Stored, start};
use crate::vmm::{Kind, Vmm};

const THREADS: u64 = 4;
const STEPS: usize = 3000;

/// Numbers that look random, the same ones each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What one thread did to its pages.
struct Changes {
    /// Page and what is in it now.
    model: Vec<(u64, [u8; PAGE as usize])>,
    written: HashSet<u64>,
    removed: HashSet<u64>,
}

/// Reads, writes and removes pages, checking each. Blocks of pages belong to one thread each, whose neighbours' faults
/// bring some of them in.
fn work(vmm: &Vmm, stored: &Stored, thread: u64) -> Changes {
    let block = vmm.page_size() / PAGE * if vmm.kind == Kind::Huge { 1 } else { 3 };
    let mine: Vec<u64> = (0..PAGES).filter(|page| page / block % THREADS == thread).collect();
    let mut model: std::collections::BTreeMap<u64, [u8; PAGE as usize]> =
        mine.iter().map(|page| (*page, *stored.page(*page))).collect();
    let (mut written, mut removed) = (HashSet::new(), HashSet::new());
    let mut random = Random(thread + 1);
    for _ in 0..if mine.is_empty() { 0 } else { STEPS } {
        let page = mine[random.below(mine.len() as u64) as usize];
        match random.below(8) {
            0..4 => assert!(vmm.read(page) == model[&page], "page {page} of thread {thread}"),
            4..6 => {
                let byte = random.below(256) as u8;
                vmm.poke(page, byte);
                model.get_mut(&page).unwrap()[0] = byte;
                written.insert(page);
            }
            6 => {
                let byte = random.below(3) as u8;
                vmm.write(page, byte);
                model.insert(page, [byte; PAGE as usize]);
                written.insert(page);
            }
            _ => {
                let unit = vmm.page_size() / PAGE;
                let first = page - page % unit;
                vmm.remove(first, unit);
                for page in first..first + unit {
                    model.insert(page, [0; PAGE as usize]);
                    removed.insert(page);
                    written.remove(&page);
                }
            }
        }
    }
    Changes { model: model.into_iter().collect(), written, removed }
}

fn check(kind: Kind, crossed: bool) {
    let stored = Stored::new();
    let Some(mut vmm) = Vmm::new(kind, PAGES * PAGE) else { return };
    let pager = start(stored.config());
    if crossed {
        vmm.connect_with(&stored.socket(), &vmm.crossed_handshake());
    } else {
        vmm.connect(&stored.socket());
    }
    let vmm = &vmm;
    let of = |page: u64| if crossed { (page + PAGES / 2) % PAGES } else { page };
    let stored = &stored.reordered(of);
    let changes: Vec<Changes> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || work(vmm, stored, thread))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (page, content) in changes.iter().flat_map(|changes| &changes.model) {
        assert!(vmm.read(*page) == *content, "page {page} in the end");
    }
    if kind == Kind::Tracked {
        let told: HashSet<u64> = vmm.written().into_iter().collect();
        let (mut written, mut removed) = (HashSet::new(), HashSet::new());
        for changes in &changes {
            written.extend(&changes.written);
            removed.extend(&changes.removed);
        }
        assert_eq!(written.difference(&told).count(), 0, "a written page is told");
        // Each was read since, so each is there with zeros in place of what is stored.
        assert_eq!(removed.difference(&told).count(), 0, "a removed page that came back is a written page");
        assert_eq!(
            told.iter().filter(|page| !written.contains(page) && !removed.contains(page)).count(),
            0,
            "and no other"
        );
    }
    let ended = pager.stop().unwrap();
    assert!(matches!(ended, Ended::Stopped | Ended::Whole), "{ended:?}");
}

#[test]
fn anonymous_memory_is_what_it_should_be() {
    check(Kind::Anonymous, false);
}

#[test]
fn shared_memory_is_what_it_should_be() {
    check(Kind::Shared, false);
}

#[test]
fn tracked_memory_is_what_it_should_be_and_is_tracked_exactly() {
    check(Kind::Tracked, false);
}

#[test]
fn huge_pages_are_what_they_should_be() {
    assert_eq!(PAGES * PAGE % HUGE_PAGE, 0);
    check(Kind::Huge, false);
}

#[test]
fn regions_in_another_order_than_memory_are_what_they_should_be() {
    check(Kind::Anonymous, true);
}
