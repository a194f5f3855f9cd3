//! The published SDKs, unmodified: their tests are in `tests/sdk`.

use std::path::Path;
use std::process::Command;

use end_to_end::Up;

#[test]
fn the_wrenn_package_works() {
    let up = Up::start();
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("sdk");
    let cache =
        std::env::var("WRENN_CACHE").unwrap_or_else(|_| format!("{}/.cache/wrenn", std::env::var("HOME").unwrap()));
    let status = Command::new(sdk.join("python.sh"))
        .arg(format!("{cache}/sdk"))
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider"])
        .arg(sdk.join("test_wrenn.py"))
        .env("WRENN_BASE_URL", up.url())
        .env("WRENN_API_KEY", up.api_key())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .status()
        .unwrap();
    assert!(status.success());
}
