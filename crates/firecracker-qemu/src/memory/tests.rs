use std::os::unix::fs::MetadataExt as _;

use proptest::prelude::*;

use super::*;

const PAGE: u64 = 4096;

fn with_pages(pages: &[u64]) -> Memory {
    let memory = Memory::create(64 * PAGE).unwrap();
    for page in pages {
        memory.file().write_all_at(&vec![u8::try_from(*page % 255).unwrap() + 1; 4096], page * PAGE).unwrap();
    }
    memory
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; 64 * 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn untouched_memory_is_absent_and_stays_so() {
    let memory = with_pages(&[]);
    assert_eq!(memory.present().unwrap(), []);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    memory.save(&path, &memory.present().unwrap()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().blocks(), 0);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), memory.size());
    assert_eq!(Memory::restore(&path, memory.size()).unwrap().present().unwrap(), []);
}

#[test]
fn zeros_that_were_written_are_data() {
    let memory = Memory::create(64 * PAGE).unwrap();
    memory.file().write_all_at(&[0; 4096], 5 * PAGE).unwrap();
    memory.file().write_all_at(&[0; 4096], 9 * PAGE).unwrap();
    let written = Vec::from([5 * PAGE..6 * PAGE, 9 * PAGE..10 * PAGE]);
    assert_eq!(memory.present().unwrap(), written);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    memory.save(&path, &memory.present().unwrap()).unwrap();
    assert_eq!(used(&File::open(&path).unwrap(), memory.size()).unwrap(), written);
}

#[test]
fn a_file_of_another_size_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    with_pages(&[1]).save(&path, std::slice::from_ref(&(0..2 * PAGE))).unwrap();
    assert!(matches!(Memory::restore(&path, 63 * PAGE), Err(Error::WrongSize { .. })));
    assert!(matches!(Memory::restore(&directory.path().join("none"), PAGE), Err(Error::Open(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn what_is_saved_comes_back(pages in prop::collection::btree_set(0_u64..64, 0..40)) {
        let pages: Vec<u64> = pages.into_iter().collect();
        let memory = with_pages(&pages);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        memory.save(&path, &memory.present().unwrap()).unwrap();
        let restored = Memory::restore(&path, memory.size()).unwrap();
        prop_assert!(contents(restored.file()) == contents(memory.file()));
        prop_assert_eq!(restored.present().unwrap(), memory.present().unwrap());
    }
}
