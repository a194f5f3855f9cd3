//! What the tree promises about itself: who may depend on whom, how long a file may be, and that what the documents
//! name is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A source file may not be longer.
const FILE_LINES: usize = 800;
/// Files that may, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// Crates of ours that each crate may use. What is not listed may not be used.
const MAY_USE: &[(&str, &[&str])] = &[
    ("api", &[]),
    ("lifecycle", &["api"]),
    ("agent-api", &["guest-api", "api"]),
    ("guest-api", &[]),
    ("network", &[]),
    ("egress", &["api"]),
    ("disk", &[]),
    ("vmm", &[]),
    ("proxy", &["api"]),
    ("snapshot", &[]),
    ("objects", &[]),
    ("firecracker-qemu", &[]),
    ("envd", &["guest-api"]),
    ("agent", &["agent-api", "api", "disk", "egress", "guest-api", "network", "objects", "proxy", "snapshot", "vmm"]),
    ("control", &["agent-api", "api", "guest-api", "lifecycle", "proxy"]),
    ("pager", &["snapshot"]),
    ("wrenn", &["agent", "agent-api", "api", "control", "objects", "pager", "proxy", "snapshot", "vmm"]),
    ("testkit", &["agent-api", "api", "guest-api", "proxy"]),
    ("end-to-end", &["agent-api", "api", "guest-api", "testkit"]),
    ("benches", &["agent", "agent-api", "api", "guest-api", "proxy", "vmm", "network", "disk", "pager", "snapshot"]),
];

/// Foreign crates that a pure crate may not use: each would bring IO or a clock.
const IMPURE: &[&str] = &[
    "tokio",
    "axum",
    "hyper",
    "hyper-util",
    "reqwest",
    "rustix",
    "libc",
    "sea-orm",
    "rtnetlink",
    "connectrpc",
    "getrandom",
];
const PURE: &[&str] = &["api", "lifecycle"];
/// Pure files of crates that do IO elsewhere.
const PURE_FILES: &[&str] =
    &["crates/snapshot/src/header.rs", "crates/snapshot/src/mapping.rs", "crates/snapshot/src/merge.rs"];
/// What only IO or a clock says.
const IMPURE_WORDS: &[&str] =
    &["std::fs", "std::net", "std::process", "SystemTime::now", "Instant::now", "Utc::now", "std::env"];

/// Crates whose sources may say `unsafe`, and where in them.
const UNSAFE: &[&str] = &[
    "crates/vmm/",
    "crates/network/",
    "crates/pager/src/uffd.rs",
    "crates/envd/src/sys",
    "crates/firecracker-qemu/",
    "crates/disk/src/extents.rs",
    "crates/disk/src/loop_device.rs",
    "crates/disk/src/device_mapper.rs",
    // Stands for a VMM.
    "benches/src/bin/pager/memory.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Files that git tracks or would, as paths below the root.
fn files() -> Vec<String> {
    let out = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(out.status.success());
    let names = String::from_utf8(out.stdout).unwrap();
    names.lines().map(str::to_owned).filter(|name| root().join(name).exists()).collect()
}

fn read(name: &str) -> String {
    String::from_utf8_lossy(&std::fs::read(root().join(name)).unwrap()).into_owned()
}

/// Every crate of the workspace, with what it depends on outside its tests.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter().map(|package| {
        let used =
            package["dependencies"].as_array().unwrap().iter().filter(|used| used["kind"].as_str() != Some("dev"));
        let used = used.map(|used| used["name"].as_str().unwrap().to_owned()).collect();
        (package["name"].as_str().unwrap().to_owned(), used)
    });
    packages.collect()
}

#[test]
fn crates_depend_only_on_what_the_design_allows() {
    let dependencies = dependencies();
    for (name, used) in &dependencies {
        let (_, allowed) = MAY_USE
            .iter()
            .find(|(of, _)| of == name)
            .unwrap_or_else(|| panic!("crate `{name}` is new: say in MAY_USE what it may use"));
        let ours = used.iter().filter(|used| dependencies.contains_key(*used));
        let forbidden: Vec<_> = ours.filter(|used| !allowed.contains(&used.as_str())).collect();
        assert!(forbidden.is_empty(), "`{name}` may not use {forbidden:?}");
    }
}

#[test]
fn pure_crates_do_no_io_and_know_no_clock() {
    let dependencies = dependencies();
    for name in PURE {
        let impure: Vec<_> = dependencies[*name].iter().filter(|used| IMPURE.contains(&used.as_str())).collect();
        assert!(impure.is_empty(), "`{name}` is pure and uses {impure:?}");
        for file in files().iter().filter(|file| file.starts_with(&format!("crates/{name}/src/"))) {
            for word in IMPURE_WORDS {
                assert!(!read(file).contains(word), "{file} is in a pure crate and says `{word}`");
            }
        }
    }
    for file in PURE_FILES {
        for word in IMPURE_WORDS.iter().chain(&["rustix::", "getrandom::", "crate::store", "crate::data"]) {
            assert!(!read(file).contains(word), "{file} is pure and says `{word}`");
        }
    }
}

#[test]
fn files_are_of_a_size_that_can_be_read() {
    for file in files().iter().filter(|file| file.ends_with(".rs")) {
        let lines = read(file).lines().count();
        let excused = LONG_FILES.iter().any(|(name, _)| name == file);
        assert!(lines <= FILE_LINES || excused, "{file} has {lines} lines; {FILE_LINES} is the most");
    }
}

#[test]
fn no_file_is_empty() {
    for file in files() {
        assert!(std::fs::metadata(root().join(&file)).unwrap().len() > 0, "{file} is empty");
    }
}

#[test]
fn every_crate_says_what_it_is() {
    for file in files().iter().filter(|file| file.ends_with("src/lib.rs") || file.ends_with("src/main.rs")) {
        assert!(read(file).starts_with("//!"), "{file} does not begin with what it owns and refuses");
    }
}

#[test]
fn unsafe_stays_where_the_design_puts_it() {
    for file in files().iter().filter(|file| file.ends_with(".rs") && *file != "tests/tests/structure.rs") {
        if UNSAFE.iter().any(|place| file.starts_with(place)) || file.contains("/tests/") {
            continue;
        }
        let word = read(file).lines().any(|line| {
            let code = line.split("//").next().unwrap_or_default();
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        assert!(!word, "{file} says `unsafe`, which lives in {UNSAFE:?} only");
    }
}

#[test]
fn only_http_modules_know_http_status_codes() {
    for file in files().iter().filter(|file| file.starts_with("crates/control/src/")) {
        if file.starts_with("crates/control/src/http") {
            continue;
        }
        assert!(!read(file).contains("StatusCode"), "{file} is outside http and says `StatusCode`");
    }
}

#[test]
fn every_path_that_a_document_names_exists() {
    for document in ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md"] {
        // A path is what stands in back quotes and has a slash or one of our endings, and no placeholder in it.
        for (index, word) in read(document).split('`').enumerate() {
            let is_quoted = index % 2 == 1;
            let looks_like_a_path =
                ["crates/", "images/", "proto/", "tests/", "docs/", "tools/", "benches/", "deploy/", ".ci/"]
                    .iter()
                    .any(|top| word.starts_with(top));
            if is_quoted && looks_like_a_path && !word.contains(['{', '*', ' ', '…']) {
                assert!(root().join(word).exists(), "{document} names `{word}`, which is not there");
            }
        }
    }
}

#[test]
fn scripts_can_be_run() {
    use std::os::unix::fs::PermissionsExt;
    for file in files().iter().filter(|file| file.ends_with(".sh") || file.as_str() == ".ci/run") {
        let mode = std::fs::metadata(root().join(file)).unwrap().permissions().mode();
        assert!(mode & 0o111 != 0, "{file} is not executable");
    }
}
