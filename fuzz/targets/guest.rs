//! What reaches envd: the kernel's file events, the bodies of its plain requests, and paths as callers write them.
#![no_main]

use envd::filesystem::watch::event;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = event::parse(bytes);
    let _ = serde_json::from_slice::<guest_api::Init>(bytes);
    let _ = serde_json::from_slice::<guest_api::Compose>(bytes);
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(path) = envd::path::resolve(text, Some("/work"), "/home/user")
    {
        assert!(path.is_absolute());
    }
});
