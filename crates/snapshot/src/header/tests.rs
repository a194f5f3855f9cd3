use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn id(number: u128) -> Id {
    Id(number.to_be_bytes())
}

fn stored(pages: u32, generation: u16, page: u32) -> Extent {
    Extent { pages, source: Source::Stored { generation, page } }
}

const ZEROS: Extent = Extent { pages: 3, source: Source::Zero };

fn header() -> Header {
    let generations = vec![Generation { id: id(1), pages: 10 }, Generation { id: id(2), pages: 4 }];
    Header::new(id(7), generations, Mapping::new([ZEROS, stored(4, 1, 0), stored(1, 0, 9)]).unwrap()).unwrap()
}

/// With the checksum that the bytes before it have.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - CHECKSUM;
    let checksum = crc32fast::hash(&bytes[..body]);
    bytes[body..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// What decoding says after `change` was made and the checksum put right.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Result<Header, Error> {
    let mut bytes = header().encode();
    change(&mut bytes);
    Header::decode(&sealed(bytes))
}

fn set(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

const FIRST_GENERATION: usize = FIXED;
const FIRST_EXTENT: usize = FIXED + 2 * GENERATION;

#[test]
fn the_bytes_are_these() {
    // The format is a promise to files that exist: a change needs a new version.
    let mut expected = Vec::new();
    expected.extend(b"WRENNMEM\x01\0\0\0\0\x10\0\0");
    expected.extend(7_u128.to_be_bytes());
    expected.extend(b"\x08\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0");
    expected.extend(1_u128.to_be_bytes());
    expected.extend(b"\x0a\0\0\0\0\0\0\0");
    expected.extend(2_u128.to_be_bytes());
    expected.extend(b"\x04\0\0\0\0\0\0\0");
    expected.extend(b"\x03\0\0\0\0\0\0\0\xff\xff\0\0");
    expected.extend(b"\x04\0\0\0\0\0\0\0\x01\0\0\0");
    expected.extend(b"\x01\0\0\0\x09\0\0\0\0\0\0\0");
    expected.extend(crc32fast::hash(&expected).to_le_bytes());
    assert_eq!(header().encode(), expected);
    assert_eq!(Header::decode(&expected), Ok(header()));
    assert_eq!(header().memory_size(), 8 * PAGE_SIZE);
}

#[test]
fn cut_off_anywhere_is_an_error() {
    let bytes = header().encode();
    assert_eq!(Header::decode(&[]), Err(Error::Empty));
    for len in 1..bytes.len() {
        let expected = if len < FIXED { FIXED } else { bytes.len() };
        assert_eq!(Header::decode(&bytes[..len]), Err(Error::Truncated { expected, len }));
    }
    let mut longer = bytes.clone();
    longer.push(0);
    let (expected, len) = (bytes.len(), longer.len());
    assert_eq!(Header::decode(&longer), Err(Error::Trailing { expected, len }));
}

#[test]
fn every_flipped_bit_is_an_error() {
    let bytes = header().encode();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let error = Header::decode(&flipped).unwrap_err();
        match bit / 64 {
            0 => assert_eq!(error, Error::Foreign),
            1 if bit < 96 => assert!(matches!(error, Error::Version(_)), "{error:?}"),
            // Lengths are looked at before the checksum, which is after what they count.
            5 if bit >= 64 * 5 => {
                assert!(
                    matches!(error, Error::Truncated { .. } | Error::Trailing { .. } | Error::Checksum),
                    "{error:?}"
                );
            }
            4 if bit >= 64 * 4 + 32 => {
                assert!(matches!(error, Error::Truncated { .. } | Error::Trailing { .. }), "{error:?}");
            }
            _ => assert_eq!(error, Error::Checksum),
        }
    }
}

#[test]
fn other_files_are_told_by_name() {
    assert_eq!(Header::decode(&[0; 4096]), Err(Error::Foreign));
    assert_eq!(Header::decode(b"\x7fELF"), Err(Error::Foreign));
    assert_eq!(changed(|bytes| set(bytes, 8, 2)), Err(Error::Version(2)));
    // A later version may have another length and another checksum.
    assert_eq!(Header::decode(&[&MAGIC[..], &[9; FIXED]].concat()), Err(Error::Version(0x0909_0909)));
}

#[test]
fn what_the_fields_must_not_say() {
    assert_eq!(changed(|bytes| set(bytes, 12, 2 << 20)), Err(Error::PageSize(2 << 20)));
    assert_eq!(changed(|bytes| set(bytes, 32, 9)), Err(Error::Uncovered { covered: 8, pages: 9 }));
    assert_eq!(changed(|bytes| set(bytes, 32, 7)), Err(Error::Uncovered { covered: 8, pages: 7 }));
    assert_eq!(changed(|bytes| bytes[44] = 1), Err(Error::Reserved));
    assert_eq!(changed(|bytes| bytes[FIRST_GENERATION + 20] = 1), Err(Error::Reserved));
    assert_eq!(changed(|bytes| bytes[FIRST_EXTENT + 10] = 1), Err(Error::Reserved));
    assert_eq!(changed(|bytes| bytes[FIRST_EXTENT + 4] = 1), Err(Error::Reserved));
    assert_eq!(changed(|bytes| set(bytes, FIRST_GENERATION + 16, 0)), Err(Error::EmptyGeneration(0)));
    assert_eq!(
        changed(|bytes| bytes.copy_within(FIRST_GENERATION..FIRST_GENERATION + 16, FIRST_GENERATION + GENERATION)),
        Err(Error::RepeatedGeneration(1))
    );
    assert_eq!(
        changed(|bytes| set(bytes, FIRST_GENERATION + 16, 9)),
        Err(Error::BeyondGeneration { generation: 0, end: 10, pages: 9 })
    );
    let second = FIRST_EXTENT + EXTENT;
    assert_eq!(changed(|bytes| set(bytes, second + 8, 2)), Err(Error::UnknownGeneration(2)));
    assert_eq!(changed(|bytes| set(bytes, second, 0)), Err(Error::Mapping(mapping::Error::EmptyExtent(1))));
    assert_eq!(changed(|bytes| set(bytes, second, u32::MAX)), Err(Error::Mapping(mapping::Error::TooLarge(1))));
    assert_eq!(changed(|bytes| set(bytes, second + 4, u32::MAX)), Err(Error::Mapping(mapping::Error::TooLarge(1))));
    // The second extent turned into zeros goes on where the first ends.
    assert_eq!(changed(|bytes| bytes[second + 8..second + 10].fill(0xff)), Err(Error::NotNormal));
    let no_extents = [header().encode()[..FIRST_EXTENT].to_vec(), vec![0; CHECKSUM]].concat();
    let no_extents = sealed({
        let mut bytes = no_extents;
        set(&mut bytes, 40, 0);
        bytes
    });
    assert_eq!(Header::decode(&no_extents), Err(Error::Mapping(mapping::Error::Empty)));
}

#[test]
fn counts_that_nothing_backs_allocate_nothing() {
    // Some hundred GiB if they were believed.
    let mut bytes = header().encode();
    set(&mut bytes, 36, u32::MAX);
    set(&mut bytes, 40, u32::MAX);
    assert!(matches!(Header::decode(&bytes), Err(Error::Truncated { .. })));
}

#[test]
fn more_generations_than_an_index_names_are_refused() {
    let generations = (0..u128::from(u16::MAX)).map(|number| Generation { id: id(number), pages: 1 }).collect();
    let error = Header::new(id(0), generations, Mapping::new([ZEROS]).unwrap());
    assert_eq!(error, Err(Error::TooManyGenerations(65535)));
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in vec(any::<u8>(), 0..200), is_sealed: bool, has_magic: bool) {
        let mut bytes = bytes;
        if has_magic && bytes.len() >= 12 {
            bytes[..8].copy_from_slice(&MAGIC);
            set(&mut bytes, 8, VERSION);
        }
        let bytes = if is_sealed && bytes.len() >= 4 { sealed(bytes) } else { bytes };
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn a_header_with_wrong_fields_is_refused_or_is_one(changes in vec((0..132_usize, any::<u8>()), 1..6)) {
        let mut bytes = header().encode();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        let bytes = sealed(bytes);
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }
}
