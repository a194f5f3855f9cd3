//! What is recorded is what is fetched, and no other file is.

use proptest::prelude::*;

use super::*;

const MEMORY: u64 = 1000 * CHUNK - 8192;

fn recorded(chunks: &[u64], fetched: Option<&WorkingSet>) -> WorkingSet {
    let mut recorder = Recorder::new(MEMORY);
    for chunk in chunks {
        recorder.missed(chunk * CHUNK + 4096);
    }
    recorder.finish(fetched)
}

fn chunks(set: &WorkingSet) -> Vec<u64> {
    set.ranges().flat_map(|range| range.start / CHUNK..range.end.div_ceil(CHUNK)).collect()
}

#[test]
fn it_is_what_was_missed_in_order_and_once() {
    let set = recorded(&[7, 8, 9, 3, 8, 2, 999], None);
    assert_eq!(chunks(&set), [7, 8, 9, 3, 2, 999]);
    assert_eq!(set.ranges().next(), Some(7 * CHUNK..10 * CHUNK), "neighbours are one range");
    assert_eq!(set.ranges().last(), Some(999 * CHUNK..MEMORY), "nothing is beyond the end of memory");
    assert_eq!(WorkingSet::decode(&set.encode(), MEMORY).unwrap(), set);
}

#[test]
fn what_is_fetched_and_never_missed_is_forgotten_after_a_while() {
    let mut set = recorded(&[1, 2, 3], None);
    for _ in 0..MAX_AGE {
        set = recorded(&[50], Some(&set));
        assert_eq!(chunks(&set), [1, 2, 3, 50]);
    }
    set = recorded(&[50, 2], Some(&set));
    assert_eq!(chunks(&set), [2, 50], "2 was missed although it was to be fetched");
}

#[test]
fn a_file_comes_back_and_a_wrong_one_does_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("set");
    let set = recorded(&[5, 4, 3], None);
    set.write(&path).unwrap();
    set.write(&path).unwrap();
    assert_eq!(WorkingSet::read(&path, MEMORY).unwrap(), set);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "nothing is left beside it");

    assert!(matches!(WorkingSet::read(&path, MEMORY + CHUNK), Err(Error::MemorySize(MEMORY))));
    let good = set.encode();
    for length in 0..good.len() {
        assert!(WorkingSet::decode(&good[..length], MEMORY).is_err(), "{length} bytes");
    }
    for byte in 0..good.len() {
        let mut changed = good.clone();
        changed[byte] ^= 0x10;
        assert!(WorkingSet::decode(&changed, MEMORY).is_err(), "byte {byte}");
    }
    assert!(matches!(WorkingSet::read(&directory.path().join("none"), MEMORY), Err(Error::File(_))));
    assert!(matches!(set.write(&directory.path().join("no/set")), Err(Error::File(_))));
}

#[test]
fn runs_outside_of_memory_are_refused() {
    for run in [
        Run { first: 999, chunks: 2, age: 0 },
        Run { first: 0, chunks: 0, age: 0 },
        Run { first: u32::MAX, chunks: 1, age: 0 },
    ] {
        let set = WorkingSet { memory_size: MEMORY, runs: vec![run] };
        assert!(matches!(WorkingSet::decode(&set.encode(), MEMORY), Err(Error::Damaged)), "{run:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_set_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let _ = WorkingSet::decode(&bytes, MEMORY);
    }
}
