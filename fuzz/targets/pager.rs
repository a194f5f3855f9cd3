//! What a VMM says to the pager, and the working set an earlier pager left.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pager::{WorkingSet, handshake};

fuzz_target!(|bytes: &[u8]| {
    let _ = handshake::parse(bytes);
    let _ = WorkingSet::decode(bytes, 1 << 30);
});
