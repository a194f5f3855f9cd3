//! Handshakes as they are sent, and as they must not be.

use proptest::prelude::*;

use super::*;

/// As Firecracker 1.12 sent it.
const REAL: &str =
    r#"[{"base_host_virt_addr":140647629586432,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]"#;

fn wire(base: u64, size: u64, offset: u64) -> String {
    format!(r#"{{"base_host_virt_addr":{base},"size":{size},"offset":{offset},"page_size":4096}}"#)
}

#[test]
fn what_firecracker_sends_is_understood() {
    let regions = parse(REAL.as_bytes()).unwrap();
    let only = Region { base: 140_647_629_586_432, size: 128 << 20, offset: 0, page_size: PAGE };
    assert_eq!(regions.iter().collect::<Vec<_>>(), [&only]);
    assert!(regions.fit(128 << 20).is_ok());
    assert!(matches!(regions.fit((128 << 20) - PAGE), Err(Error::BeyondMemory { .. })));
}

#[test]
fn every_beginning_of_a_handshake_is_incomplete() {
    for length in 0..REAL.len() {
        let error = parse(&REAL.as_bytes()[..length]).unwrap_err();
        assert!(matches!(error, Error::Incomplete), "{length} bytes: {error:?}");
    }
}

#[test]
fn the_old_name_of_the_page_size_and_unknown_fields_are_accepted() {
    let old = r#"[{"base_host_virt_addr":2097152,"size":4194304,"offset":0,"page_size_kib":2097152,"gpa_start":[1]}]"#;
    assert_eq!(parse(old.as_bytes()).unwrap().iter().next().unwrap().page_size, HUGE_PAGE);
}

#[test]
fn regions_are_found_by_address_and_by_offset() {
    // The second region has the lower address.
    let json = format!("[{},{}]", wire(0x9000, 0x3000, 0), wire(0x1000, 0x2000, 0x3000));
    let regions = parse(json.as_bytes()).unwrap();
    let offset = |address| regions.at_address(address).map(|region| address - region.base + region.offset);
    assert_eq!(offset(0x9000), Some(0));
    assert_eq!(offset(0xbfff), Some(0x2fff));
    assert_eq!(offset(0x1000), Some(0x3000));
    for outside in [0, 0xfff, 0x3000, 0x8fff, 0xc000, u64::MAX] {
        assert_eq!(offset(outside), None, "{outside:#x}");
    }
    assert_eq!(regions.at_offset(0x2fff).unwrap().base, 0x9000);
    assert_eq!(regions.at_offset(0x3000).unwrap().base, 0x1000);
    assert_eq!(regions.at_offset(0x5000), None);
}

#[test]
fn wrong_handshakes_are_refused() {
    type Is = fn(&Error) -> bool;
    let last = u64::MAX - 0xfff;
    let cases: [(&str, String, Is); 12] = [
        ("no JSON", "hello".into(), |e| matches!(e, Error::Json(_))),
        ("no list", "{}".into(), |e| matches!(e, Error::Json(_))),
        ("something after it", format!("{REAL} x"), |e| matches!(e, Error::Json(_))),
        ("a negative address", REAL.replace("140647629586432", "-4096"), |e| matches!(e, Error::Json(_))),
        ("nothing", "[]".into(), |e| matches!(e, Error::NoRegions)),
        ("too many", format!("[{}]", vec![wire(0, 4096, 0); 1025].join(",")), |e| {
            matches!(e, Error::TooManyRegions(_))
        }),
        ("an odd page size", REAL.replace("4096", "4097"), |e| matches!(e, Error::PageSize { .. })),
        ("an empty region", format!("[{}]", wire(4096, 0, 0)), |e| matches!(e, Error::Empty(0))),
        ("half a page", format!("[{}]", wire(4096, 6144, 0)), |e| matches!(e, Error::Unaligned(0))),
        ("a region without end", format!("[{}]", wire(last, 8192, 0)), |e| matches!(e, Error::Endless(0))),
        ("one address twice", format!("[{},{}]", wire(4096, 8192, 0), wire(8192, 4096, 8192)), |e| {
            matches!(e, Error::SameAddress(8192))
        }),
        ("one place twice", format!("[{},{}]", wire(4096, 8192, 0), wire(65536, 4096, 4096)), |e| {
            matches!(e, Error::SameMemory(4096))
        }),
    ];
    for (what, json, is_right) in cases {
        let error = parse(json.as_bytes()).unwrap_err();
        assert!(is_right(&error), "{what}: {error:?}");
    }
}

proptest! {
    #[test]
    fn whatever_is_accepted_is_sound(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
    }

    #[test]
    fn accepted_regions_are_aligned_and_disjoint(
        wires in proptest::collection::vec((0..32_u64, 0..8_u64, 0..32_u64), 1..5),
    ) {
        let list: Vec<_> = wires.iter().map(|(base, size, offset)| wire(base * 2048, size * 2048, offset * 2048)).collect();
        if let Ok(regions) = parse(format!("[{}]", list.join(",")).as_bytes()) {
            for region in regions.iter() {
                prop_assert!(region.base % PAGE == 0 && region.size % PAGE == 0 && region.offset % PAGE == 0);
                // Each byte is found in the region it belongs to, so in one only.
                for at in (0..region.size).step_by(1024) {
                    prop_assert_eq!(regions.at_address(region.base + at), Some(region));
                    prop_assert_eq!(regions.at_offset(region.offset + at), Some(region));
                }
            }
        }
    }
}
