//! What a pager does besides answering: fetches neighbours and working sets, records, leaves.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pager::{CHUNK, Config, Ended, Error, PAGE, Pager, WorkingSet};

use crate::stored::{DEADLINE, PAGES, Stored, start};
use crate::vmm::{Kind, Vmm};

/// Asks again until it is so; for what sends no event.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < DEADLINE, "waited too long for {what}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn neighbours_come_with_a_page() {
    let stored = Stored::new();
    for kind in [Kind::Anonymous, Kind::Tracked] {
        let mut vmm = Vmm::new(kind, PAGES * PAGE).unwrap();
        let pager = start(stored.config());
        vmm.connect(&stored.socket());
        assert_eq!(vmm.resident(), 0);
        // In the middle of a chunk that is all data, and of one that is partly zeros.
        assert_eq!(vmm.touch(40), stored.page(40)[0]);
        let chunk = CHUNK / PAGE;
        until("the neighbours", || vmm.resident() >= chunk);
        assert_eq!(vmm.resident(), chunk, "and nothing else");
        assert_eq!(pager.stop().unwrap(), Ended::Stopped);
    }
}

#[test]
fn it_leaves_when_all_data_is_there() {
    let stored = Stored::new();
    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let pager = start(stored.config());
    vmm.connect(&stored.socket());
    // One chunk is never touched but removed: it is not waited for.
    let chunk = CHUNK / PAGE;
    vmm.remove(2 * chunk, chunk);
    for page in (0..PAGES).filter(|page| !(2 * chunk..3 * chunk).contains(page) && stored.page(*page)[0] != 0) {
        assert_eq!(vmm.touch(page), stored.page(page)[0]);
    }
    assert_eq!(pager.end().unwrap(), Ended::Whole);
    // The kernel serves the rest: zeros that were never touched, and those that are given up now.
    for page in 0..PAGES {
        let expected = if (2 * chunk..3 * chunk).contains(&page) { 0 } else { stored.page(page)[0] };
        assert_eq!(vmm.touch(page), expected, "page {page}");
    }
    vmm.remove(0, PAGES);
    assert_eq!(vmm.touch(40), 0);
}

#[test]
fn it_stays_with_memory_whose_writes_are_tracked() {
    let stored = Stored::new();
    let mut vmm = Vmm::new(Kind::Tracked, PAGES * PAGE).unwrap();
    let pager = start(stored.config());
    vmm.connect(&stored.socket());
    (0..PAGES).for_each(|page| assert_eq!(vmm.touch(page), stored.page(page)[0]));
    assert_eq!(vmm.written(), Vec::<u64>::new());
    // Needs somebody to read the event, and to fill the page.
    vmm.remove(40, 1);
    assert_eq!(vmm.touch(40), 0);
    vmm.poke(41, 9);
    assert_eq!(vmm.written(), [40, 41]);
    assert_eq!(pager.stop().unwrap(), Ended::Stopped);
}

#[test]
fn what_was_needed_is_recorded_and_fetched_the_next_time() {
    let stored = Stored::new();
    let record = stored.path("working-set");
    let with_record = || Config { record: Some(record.clone()), prefetch: Some(record.clone()), ..stored.config() };
    let pages = [900, 40, 41, 420, 0];
    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    // There is no record yet.
    let pager = start(with_record());
    vmm.connect(&stored.socket());
    pages.iter().for_each(|page| assert_eq!(vmm.touch(*page), stored.page(*page)[0]));
    assert_eq!(pager.stop().unwrap(), Ended::Stopped);
    let set = WorkingSet::read(&record, PAGES * PAGE).unwrap();
    let chunk = |page: u64| page * PAGE / CHUNK;
    let starts: Vec<_> = set.ranges().map(|range| range.start / CHUNK).collect();
    assert_eq!(starts, [chunk(900), chunk(40), chunk(420), chunk(0)]);
    drop(vmm);

    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let pager = start(with_record());
    vmm.connect(&stored.socket());
    until("the working set", || vmm.resident() >= 4 * CHUNK / PAGE);
    assert_eq!(vmm.resident(), 4 * CHUNK / PAGE, "nothing else comes");
    for page in (0..4).flat_map(|index| starts[index] * 16..starts[index] * 16 + 16) {
        assert!(vmm.read(page) == *stored.page(page), "page {page}");
    }
    assert_eq!(pager.stop().unwrap(), Ended::Stopped);
    let again = WorkingSet::read(&record, PAGES * PAGE).unwrap();
    assert_eq!(again.ranges().collect::<Vec<_>>(), set.ranges().collect::<Vec<_>>(), "nothing was missed");
}

#[test]
fn threads_that_want_the_same_pages_at_once_all_get_them() {
    let stored = Stored::new();
    let record = stored.path("working-set");
    let vmm = |config: Config| {
        let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
        let pager = start(config);
        vmm.connect(&stored.socket());
        (vmm, pager)
    };
    let (all, pager) = vmm(Config { record: Some(record.clone()), ..stored.config() });
    (0..PAGES).for_each(|page| assert_eq!(all.touch(page), stored.page(page)[0]));
    assert_eq!(pager.end().unwrap(), Ended::Whole);
    for _ in 0..20 {
        let (vmm, pager) = vmm(Config { prefetch: Some(record.clone()), ..stored.config() });
        std::thread::scope(|scope| {
            for step in [1, 5, 7, 1021] {
                let (vmm, stored) = (&vmm, &stored);
                scope.spawn(move || {
                    for page in (0..PAGES).map(|index| index * step % PAGES) {
                        assert_eq!(vmm.touch(page), stored.page(page)[0], "page {page}");
                    }
                });
            }
        });
        assert_eq!(pager.end().unwrap(), Ended::Whole);
    }
}

#[test]
fn the_record_is_written_when_its_time_is_over() {
    let stored = Stored::new();
    let record = stored.path("working-set");
    let config = Config { record: Some(record.clone()), record_for: Duration::ZERO, ..stored.config() };
    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let pager = start(config);
    vmm.connect(&stored.socket());
    until("the record", || record.exists());
    assert_eq!(vmm.touch(900), stored.page(900)[0]);
    assert_eq!(pager.stop().unwrap(), Ended::Stopped);
    assert_eq!(WorkingSet::read(&record, PAGES * PAGE).unwrap().ranges().count(), 0, "it was over before the fault");
}

#[test]
fn an_unusable_working_set_is_no_error() {
    let stored = Stored::new();
    let record = stored.path("working-set");
    for bytes in [&b""[..], b"something else", &[0xff; 5000]] {
        std::fs::write(&record, bytes).unwrap();
        let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
        let pager = start(Config { prefetch: Some(record.clone()), ..stored.config() });
        vmm.connect(&stored.socket());
        assert_eq!(vmm.touch(40), stored.page(40)[0]);
        assert_eq!(pager.stop().unwrap(), Ended::Stopped);
    }
}

#[test]
fn a_damaged_page_is_not_served() {
    let stored = Stored::new();
    stored.damage();
    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let pager = start(stored.config());
    vmm.connect(&stored.socket());
    // The first page of the second generation. Nobody answers this thread until the end of the test, as nothing is ever
    // served again.
    let vmm = &vmm;
    std::thread::scope(|scope| {
        let waits = scope.spawn(move || vmm.touch(13));
        let error = pager.end().unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error:?}");
        assert_eq!(error.exit_code(), 10);
        assert!(!waits.is_finished(), "the page was served");
        vmm.unregister();
        waits.join().unwrap();
    });
}

#[test]
fn a_killed_vmm_ends_its_pager() {
    let stored = Stored::new();
    let record = stored.path("working-set");
    let pager = start(Config { record: Some(record.clone()), ..stored.config() });
    let mut vmm = Command::new(std::env::current_exe().unwrap())
        .args(["behaviour::vmm_of_another_process", "--exact", "--nocapture"])
        .env(SOCKET, stored.socket())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(vmm.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find(|line| line.contains("touched")).expect("it touches a page");
    assert!(line.ends_with(&format!("touched {}", stored.page(40)[0])), "{line}");
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    assert_eq!(pager.end().unwrap(), Ended::VmmGone);
    assert_eq!(WorkingSet::read(&record, PAGES * PAGE).unwrap().ranges().count(), 1);
}

const SOCKET: &str = "PAGER_TEST_SOCKET";

/// Not a test but the other process of one.
#[test]
fn vmm_of_another_process() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    vmm.connect(socket.as_ref());
    writeln!(std::io::stdout(), "touched {}", vmm.touch(40)).unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn the_socket_is_for_the_vmm_alone() {
    let stored = Stored::new();
    let pager = Pager::listen(Config { vmm_uid: Some(4711), ..stored.config() }).unwrap();
    let file = std::fs::metadata(stored.socket()).unwrap();
    assert_eq!((file.uid(), file.permissions().mode() & 0o777), (4711, 0o600));
    let second = Pager::listen(stored.config()).unwrap_err();
    assert!(matches!(second, Error::Listen { .. }), "{second:?}");
    assert!(stored.socket().exists(), "the second has not removed the socket of the first");
    drop(pager);
    assert!(!stored.socket().exists());
}

#[test]
fn an_unusable_snapshot_is_refused_before_anyone_can_connect() {
    let stored = Stored::new();
    std::fs::write(stored.path("header"), b"no header").unwrap();
    let error = Pager::listen(stored.config()).unwrap_err();
    assert!(matches!(error, Error::Open(_)), "{error:?}");
    assert!(!stored.socket().exists());
}
