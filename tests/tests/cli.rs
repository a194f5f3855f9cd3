//! The command against a real capsule: files in and out, processes, input and output.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Output, Stdio};

use end_to_end::Up;

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn run(up: &Up, words: &[&str]) -> Output {
    let output = up.wrenn().arg("capsule").args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    output
}

#[test]
fn files_and_processes_by_command() {
    let up = Up::start();
    let id = text(&run(&up, &["create"]).stdout).trim().to_owned();
    let there = |path: &str| format!("{id}:{path}");
    let here = tempfile::tempdir().unwrap();
    let path = |name: &str| here.path().join(name).to_str().unwrap().to_owned();

    // A file keeps its bytes and stays a program.
    let bytes: Vec<u8> = (0..3_000_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(path("blob"), &bytes).unwrap();
    fs::set_permissions(path("blob"), fs::Permissions::from_mode(0o755)).unwrap();
    run(&up, &["cp", &path("blob"), &there("/root/new/blob")]);
    let mode = run(&up, &["exec", &id, "stat", "-c", "%a %s", "new/blob"]);
    assert_eq!(text(&mode.stdout), "755 12000000\n");
    run(&up, &["cp", &there("new/blob"), &path("back")]);
    assert!(fs::read(path("back")).unwrap() == bytes);
    // Into a directory it keeps its name.
    run(&up, &["cp", &path("blob"), &there("/var")]);
    run(&up, &["exec", &id, "cmp", "/var/blob", "/root/new/blob"]);
    fs::create_dir(path("dir")).unwrap();
    run(&up, &["cp", &there("/var/blob"), &path("dir")]);
    assert!(fs::read(path("dir/blob")).unwrap() == bytes);

    // A directory keeps modes, links and names.
    fs::create_dir_all(path("tree/a b/empty")).unwrap();
    fs::write(path("tree/a b/é"), "x").unwrap();
    fs::set_permissions(path("tree/a b/é"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("a b/é", path("tree/link")).unwrap();
    run(&up, &["cp", &path("tree"), &there("/srv/tree")]);
    let found = run(&up, &["exec", &id, "find", "/srv/tree", "-mindepth", "1", "-printf", "%P %y %m %l\n"]);
    let mut lines: Vec<_> = text(&found.stdout).lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["a b d 755 ", "a b/empty d 755 ", "a b/é f 640 ", "link l 777 a b/é"]);
    run(&up, &["cp", &there("/srv/tree"), &path("copy")]);
    assert_eq!(fs::read_to_string(path("copy/link")).unwrap(), "x");
    assert!(
        fs::symlink_metadata(path("copy/link")).unwrap().is_symlink() && fs::metadata(path("copy/a b/empty")).is_ok()
    );
    // Nothing of the copying is left.
    assert_eq!(text(&run(&up, &["exec", &id, "ls", "-A", "/var/tmp"]).stdout), "");
    let missing = up.wrenn().args(["capsule", "cp", &there("/no/such"), &path("x")]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(!fs::exists(path("x")).unwrap());

    // Input goes in, output comes out, processes can be found, followed and ended.
    let mut child = up
        .wrenn()
        .args(["capsule", "exec", "-i", &id, "sha256sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let sum = child.wait_with_output().unwrap();
    let expected = run(&up, &["exec", &id, "sha256sum", "/var/blob"]);
    assert_eq!(text(&sum.stdout).split(' ').next(), text(&expected.stdout).split(' ').next());
    let loud = "for i in 1 2 3; do echo $i; done; exec sleep 1000";
    run(&up, &["exec", "--background", "--tag", "loud", &id, "sh", "-c", loud]);
    // What it has said so far.
    while text(&run(&up, &["logs", &id, "loud"]).stdout) != "1\n2\n3\n" {}
    assert!(text(&run(&up, &["ps", &id]).stdout).contains("loud"));
    let following = up.wrenn().args(["capsule", "logs", "-f", &id, "loud"]).stdout(Stdio::piped()).spawn().unwrap();
    run(&up, &["kill", &id, "loud", "--signal", "SIGTERM"]);
    let followed = following.wait_with_output().unwrap();
    assert_eq!(followed.status.code(), Some(255));
    assert_eq!(text(&run(&up, &["ps", "-q", &id]).stdout), "");
    let stats = run(&up, &["stats"]);
    let [header, line] = &text(&stats.stdout).lines().collect::<Vec<_>>()[..] else { panic!("{stats:?}") };
    assert!(header.ends_with("RECEIVED") && line.starts_with(&id) && line.ends_with("iB"), "{stats:?}");
    let stats = run(&up, &["--json", "stats", "--range", "1h", &id]).stdout;
    let stats: serde_json::Value = serde_json::from_slice(&stats).unwrap();
    assert!(stats[0]["points"][0]["disk_bytes"].as_u64().unwrap() > 0, "{stats}");
    run(&up, &["rm", &id]);
}
