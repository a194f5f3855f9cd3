use std::fs;

use super::*;

const GENERATION: Generation = Generation { id: Id([7; 16]), pages: 2 };

/// The bytes of a whole file.
fn bytes() -> Vec<u8> {
    let pages = [[1; PAGE], [2; PAGE]];
    let mut bytes = encode_head(GENERATION).to_vec();
    bytes.extend(pages.concat());
    bytes.extend(pages.iter().flat_map(|page| crc32fast::hash(page).to_le_bytes()));
    assert_eq!(bytes.len() as u64, file_len(2));
    bytes
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn open(&self, bytes: &[u8]) -> Result<DataFile, Error> {
        let path = self.0.path().join("file");
        fs::write(&path, bytes).unwrap();
        DataFile::open(&path, GENERATION)
    }
}

fn dir() -> Dir {
    Dir(tempfile::tempdir_in("/dev/shm").unwrap())
}

#[test]
fn a_whole_file_is_read() {
    let file = dir().open(&bytes()).unwrap();
    file.verify().unwrap();
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, offset_of(1)).unwrap();
    assert_eq!(page, [2; PAGE]);
    assert_eq!((file.generation(), file.data_end()), (GENERATION, 3 * PAGE_SIZE));
}

#[test]
fn a_file_of_any_other_length_is_refused() {
    let (dir, bytes) = (dir(), bytes());
    let lengths = (0..64).chain([100, 4095, 4096, 4097, 8191, 8192, 12287, 12288]).chain(12289..bytes.len());
    for len in lengths {
        let error = dir.open(&bytes[..len]).unwrap_err();
        match len {
            0..8 => assert!(matches!(error, Error::Foreign(_)), "{len}: {error:?}"),
            // The checksum is at the very end of the head.
            8..4096 => assert!(matches!(error, Error::Head(_)), "{len}: {error:?}"),
            _ => assert!(matches!(error, Error::Length { expected: 12296, .. }), "{len}: {error:?}"),
        }
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(dir.open(&longer), Err(Error::Length { len: 12297, .. })));
}

#[test]
fn every_flipped_byte_is_found() {
    let (dir, bytes) = (dir(), bytes());
    dir.open(&bytes).unwrap();
    let path = dir.0.path().join("file");
    let file = File::options().write(true).open(&path).unwrap();
    for at in 0..bytes.len() {
        file.write_all_at(&[bytes[at] ^ 0x40], at as u64).unwrap();
        let opened = DataFile::open(&path, GENERATION);
        match at {
            0..8 => assert!(matches!(opened, Err(Error::Foreign(_))), "{at}"),
            8..12 => assert!(matches!(opened, Err(Error::Version { .. })), "{at}"),
            12..4096 => assert!(matches!(opened, Err(Error::Head(_))), "{at}"),
            _ => {
                let page = if at < 12288 { at / PAGE - 1 } else { (at - 12288) / 4 } as u64;
                let file = opened.unwrap();
                assert!(matches!(file.verify(), Err(Error::Page { page: found, .. }) if found == page), "{at}");
                // The other page is as good as ever.
                let other = 1 - page as u32;
                file.read_exact_at(&mut [0; PAGE], offset_of(other)).unwrap();
            }
        }
        file.write_all_at(&bytes[at..=at], at as u64).unwrap();
    }
}

#[test]
fn pages_that_changed_places_are_found() {
    let mut bytes = bytes();
    let (first, second) = bytes[PAGE..3 * PAGE].split_at_mut(PAGE);
    first.swap_with_slice(second);
    assert!(matches!(dir().open(&bytes).unwrap().verify(), Err(Error::Page { page: 0, .. })));
}

#[test]
fn blocks_that_never_reached_the_disk_are_found() {
    // As a file system may leave them: the length is right and the content zeros.
    let mut bytes = bytes();
    bytes[PAGE..].fill(0);
    assert!(matches!(dir().open(&bytes).unwrap().verify(), Err(Error::Page { page: 0, .. })));
    bytes.fill(0);
    assert!(matches!(dir().open(&bytes), Err(Error::Foreign(_))));
}

#[test]
fn another_generation_is_not_taken_for_this_one() {
    let mut bytes = bytes();
    for other in [Generation { id: Id([8; 16]), pages: 2 }, Generation { pages: 1, ..GENERATION }] {
        bytes[..PAGE].copy_from_slice(&encode_head(other));
        assert!(matches!(dir().open(&bytes), Err(Error::Another { found, .. }) if found == other));
    }
    let missing = DataFile::open(&dir().0.path().join("none"), GENERATION).unwrap_err();
    assert!(matches!(missing, Error::Open { .. }));
}

#[test]
fn only_whole_pages_of_the_data_are_read() {
    let file = dir().open(&bytes()).unwrap();
    for (offset, len) in
        [(0, PAGE), (4097, PAGE), (4096, 100), (8192, 2 * PAGE), (12288, PAGE), (u64::MAX - 4095, PAGE)]
    {
        let read = file.read_exact_at(&mut vec![0; len], offset);
        assert!(matches!(read, Err(Error::NotPages { .. })), "{offset} {len}");
        assert!(matches!(file.check(offset, &vec![0; len]), Err(Error::NotPages { .. })), "{offset} {len}");
    }
}
