//! The published `wrenn` SDK, unmodified, against `wrenn up`: its tests are in `tests/sdk`.

use end_to_end::{Sdk, Up};

fn passes(file: &str) {
    let up = Up::start();
    Sdk::Python.test(file, &[("WRENN_BASE_URL", up.url()), ("WRENN_API_KEY", up.api_key())]);
}

#[test]
fn capsules() {
    passes("test_wrenn.py");
}

#[test]
fn what_is_done_in_a_capsule() {
    passes("test_wrenn_guest.py");
}

#[test]
fn git() {
    passes("test_wrenn_git.py");
}

#[test]
fn pause_resume_and_templates() {
    passes("test_wrenn_pause.py");
}
