//! Snapshot headers from disk: any bytes give an error or a header that says the same when it is written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use snapshot::Header;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::decode(bytes) {
        assert_eq!(header.encode(), bytes);
    }
});
