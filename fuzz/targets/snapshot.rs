//! Snapshot headers from disk: any bytes give an error or a header that says the same when it is written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use snapshot::Header;

/// Makes the number of extents and the checksum those of the rest, so that something is made of it.
fn fitting(bytes: &[u8]) -> Option<Vec<u8>> {
    let generations = u32::from_le_bytes(*bytes.get(36..40)?.first_chunk()?) as usize;
    let extents = (bytes.len() - 40).checked_sub(generations.checked_mul(24)?.checked_add(12)?)? / 12;
    let mut bytes = bytes[..52 + generations * 24 + extents * 12 - 4].to_owned();
    bytes[40..44].copy_from_slice(&(extents as u32).to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    Some(bytes)
}

fuzz_target!(|bytes: &[u8]| {
    for bytes in [Some(bytes.to_owned()), fitting(bytes)].into_iter().flatten() {
        if let Ok(header) = Header::decode(&bytes) {
            assert_eq!(header.encode(), bytes);
        }
    }
});
