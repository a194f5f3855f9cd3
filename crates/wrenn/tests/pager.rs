//! `wrenn pager` as the agent starts it: what it says, and what it exits with.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use snapshot::Store;

/// A directory with a snapshot of a small memory.
fn stored() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 20).unwrap();
    memory.write_all_at(&[7; 4096], 8192).unwrap();
    let (store, _) = Store::open(directory.path(), []).unwrap();
    let packed = store.pack(&memory, None).unwrap();
    store.commit(&packed, &directory.path().join("header")).unwrap();
    directory
}

fn start(directory: &Path, more: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_wrenn"))
        .arg("pager")
        .arg("--socket")
        .arg(directory.join("socket"))
        .arg("--header")
        .arg(directory.join("header"))
        .arg("--generations")
        .arg(directory.join("generations"))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn wait_for_ready(pager: &mut Child) {
    let mut line = String::new();
    BufReader::new(pager.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
}

/// Its exit code, and what it said went wrong.
fn end(mut pager: Child) -> (Option<i32>, String) {
    let code = pager.wait().unwrap().code();
    let mut said = String::new();
    pager.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (code, said)
}

#[test]
fn it_is_ready_when_it_says_so_and_ends_when_told() {
    let directory = stored();
    for connect in [false, true] {
        let mut pager = start(directory.path(), &[]);
        wait_for_ready(&mut pager);
        let stream = connect.then(|| UnixStream::connect(directory.path().join("socket")).unwrap());
        kill_process(Pid::from_child(&pager), Signal::TERM).unwrap();
        assert_eq!(end(pager), (Some(0), String::new()));
        assert!(!directory.path().join("socket").exists());
        drop(stream);
    }
}

#[test]
fn its_exit_code_tells_who_failed() {
    let directory = stored();
    let pager = start(directory.path(), &["--patience-seconds", "0"]);
    let (code, said) = end(pager);
    assert_eq!(code, Some(12), "{said}");
    assert!(said.contains("in time"), "{said}");

    let pager = start(&directory.path().join("nowhere"), &[]);
    assert_eq!(end(pager).0, Some(10), "no snapshot");
    File::create(directory.path().join("socket")).unwrap();
    let (code, said) = end(start(directory.path(), &[]));
    assert_eq!(code, Some(11), "{said}");
    assert!(said.contains("listen on"), "{said}");

    File::create(directory.path().join("header")).unwrap();
    let (code, said) = end(start(directory.path(), &[]));
    assert_eq!(code, Some(10), "{said}");
    assert!(said.contains("header"), "{said}");
}
