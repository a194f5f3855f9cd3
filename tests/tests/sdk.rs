//! The published `wrenn` SDK, unmodified, against `wrenn up`: its tests are in `tests/sdk`.

use end_to_end::{Sdk, Up};

#[test]
fn the_wrenn_package_works() {
    let up = Up::start();
    let env = [("WRENN_BASE_URL", up.url()), ("WRENN_API_KEY", up.api_key())];
    Sdk::Python.test("test_wrenn.py", &env);
}
