use proptest::prelude::*;

use super::*;

fn manifest() -> Manifest {
    let stored = |content: &[u8]| Chunk::Stored(Hash::of(content));
    let chunks = vec![Chunk::Zero, Chunk::Base, stored(b"a"), stored(b"b")];
    Manifest {
        description: b"what it is".to_vec(),
        files: vec![
            Entry { name: "rootfs.ext4".into(), size: 4 * CHUNK - 1, chunks },
            Entry { name: "empty".into(), size: 0, chunks: Vec::new() },
        ],
    }
}

/// The same bytes with a right checksum after `change`.
fn resealed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = manifest().encode().unwrap();
    bytes.truncate(bytes.len() - DIGEST);
    change(&mut bytes);
    let digest: [u8; DIGEST] = Sha256::digest(&bytes).into();
    bytes.extend(digest);
    bytes
}

#[test]
fn what_is_encoded_is_decoded() {
    assert_eq!(Manifest::decode(&manifest().encode().unwrap()).unwrap(), manifest());
}

#[test]
fn what_is_cut_off_at_any_place_is_told() {
    let bytes = manifest().encode().unwrap();
    assert_eq!(Manifest::decode(&[]), Err(Error::Empty));
    for len in 1..bytes.len() {
        let error = Manifest::decode(&bytes[..len]).unwrap_err();
        // Only the checksum is short: nobody can tell that from a wrong one.
        let is_right = error == Error::Truncated(len) || len >= bytes.len() - DIGEST && error == Error::Checksum;
        assert!(is_right, "{len} of {}: {error:?}", bytes.len());
    }
}

#[test]
fn a_changed_bit_at_any_place_is_told() {
    let bytes = manifest().encode().unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << bit;
            let error = Manifest::decode(&bytes).unwrap_err();
            match at {
                0..8 => assert_eq!(error, Error::Foreign),
                8..12 => assert!(matches!(error, Error::Version(_))),
                _ => assert!(matches!(error, Error::Checksum | Error::Truncated(_)), "{at}: {error:?}"),
            }
        }
    }
}

#[test]
fn what_is_foreign_or_of_the_future_is_told() {
    assert_eq!(Manifest::decode(&[b'x'; 100]), Err(Error::Foreign));
    assert_eq!(Manifest::decode(&resealed(|bytes| bytes[8] = 9)), Err(Error::Version(9)));
    assert_eq!(Manifest::decode(&resealed(|bytes| bytes[12] = 1)), Err(Error::ChunkSize(CHUNK as u32 + 1)));
    assert_eq!(Manifest::decode(&resealed(|bytes| bytes.push(0))), Err(Error::Trailing(1)));
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in ["", ".", "..", ".hidden", "a/b", "a b", "ä", &"x".repeat(129)] {
        let mut manifest = manifest();
        manifest.files[1].name = name.into();
        assert_eq!(manifest.encode(), Err(Error::Name(1)), "{name:?}");
    }
    let mut twice = manifest();
    twice.files[1].name = twice.files[0].name.clone();
    assert_eq!(twice.encode(), Err(Error::Repeated("rootfs.ext4".into())));
    // The first byte of the first name.
    let at = FIXED + manifest().description.len() + 2;
    assert_eq!(Manifest::decode(&resealed(|bytes| bytes[at] = b'/')), Err(Error::Name(0)));
}

#[test]
fn a_file_has_the_chunks_that_its_size_needs() {
    let mut short = manifest();
    short.files[0].chunks.pop();
    assert_eq!(short.encode(), Err(Error::Chunks { name: "rootfs.ext4".into(), chunks: 3 }));
}

proptest! {
    #[test]
    fn whatever_the_bytes_are_it_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Manifest::decode(&bytes);
        let _ = Manifest::decode(&[&MAGIC[..], &bytes].concat());
        let _ = Manifest::decode(&resealed(|sealed| sealed.splice(8.., bytes).for_each(drop)));
    }
}
