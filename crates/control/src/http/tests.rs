//! The description of the API that is checked in is the one the code generates.

use super::meta;

const REFRESH: &str = "REFRESH_OPENAPI=1 cargo test -p control the_description_is_checked_in";

#[test]
fn the_description_is_checked_in() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi.yaml");
    let generated = format!("# Generated from the code. Refresh it with:\n#   {REFRESH}\n{}", meta::yaml());
    if std::env::var_os("REFRESH_OPENAPI").is_some() {
        std::fs::write(path, &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(path).unwrap_or_default();
    assert!(checked_in == generated, "openapi.yaml is not what the code says; refresh it with\n  {REFRESH}");
}
