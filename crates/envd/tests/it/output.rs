//! Output is correct, complete and ordered, and the end comes once.

use crate::harness::*;
use connectrpc::CodecFormat;
use sha2::{Digest, Sha256};

#[tokio::test]
async fn a_thousand_fast_commands_are_exact() {
    let envd = Envd::start();
    for codec in [CodecFormat::Proto, CodecFormat::Json] {
        let client = envd.client_in(codec);
        for _ in 0..500 {
            let run = run(&client, sh("echo hello; exit 3")).await;
            assert_eq!((run.out().as_str(), run.stderr.as_slice()), ("hello\n", b"".as_slice()));
            assert_eq!((run.end.exit_code, run.end.exited, run.end.status.as_str()), (3, true, "exit status 3"));
            assert!(run.pid > 0);
        }
    }
}

#[tokio::test]
async fn sixty_four_at_once_do_not_mix() {
    let envd = Envd::start();
    let one = async |number: usize| {
        let run = run(&envd.client(), sh(&format!("for i in $(seq 200); do echo {number}; done; exit {number}"))).await;
        assert_eq!(run.out(), format!("{number}\n").repeat(200));
        assert_eq!(run.end.exit_code, number as i32);
    };
    futures::future::join_all((0..64).map(one)).await;
}

#[tokio::test]
async fn sixty_four_mebibytes_are_exact() {
    const BYTES: usize = 64 << 20;
    let envd = Envd::start();
    for codec in [CodecFormat::Proto, CodecFormat::Json] {
        let script = format!("head -c {BYTES} /dev/urandom | tee /dev/fd/3 | sha256sum >&2");
        let script = format!("{{ {script}; }} 3>&1");
        let run = run(&envd.client_in(codec), command("/bin/bash", &["-c", &script])).await;
        assert_eq!(run.stdout.len(), BYTES);
        let expected = String::from_utf8(run.stderr).unwrap();
        let digest: String = Sha256::digest(&run.stdout).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(expected.split_whitespace().next(), Some(digest.as_str()));
    }
}

#[tokio::test]
async fn any_byte_passes() {
    let envd = Envd::start();
    for codec in [CodecFormat::Proto, CodecFormat::Json] {
        let script = r"import sys; b = bytes(range(256)); sys.stdout.buffer.write(b + b'a' * 8191 + b'\xe2'); sys.stderr.buffer.write(b[::-1])";
        let run = run(&envd.client_in(codec), command("python3", &["-c", script])).await;
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(run.stdout, [all.as_slice(), &[b'a'; 8191], b"\xe2"].concat());
        assert_eq!(run.stderr, all.into_iter().rev().collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_signal_ends_with_its_name() {
    let envd = Envd::start();
    let run = run(&envd.client(), sh("kill -SEGV $$")).await;
    assert_eq!((run.end.exit_code, run.end.exited), (-1, false));
    assert!(run.end.status.starts_with("signal: segmentation fault"), "{}", run.end.status);
    assert_eq!(run.end.error, Some(run.end.status));
}

#[tokio::test]
async fn success_has_no_error() {
    let envd = Envd::start();
    let run = run(&envd.client(), command("/bin/true", &[])).await;
    assert_eq!((run.end.exit_code, run.end.exited, run.end.status.as_str()), (0, true, "exit status 0"));
    assert_eq!(run.end.error, None);
}

#[tokio::test]
async fn a_descendant_that_holds_the_pipes_does_not_hold_the_end() {
    let envd = Envd::start();
    let run = run(&envd.client(), sh("sleep 1000 & echo $!; echo hi")).await;
    let (daemon, rest) = run.stdout.split_at(run.stdout.iter().position(|byte| *byte == b'\n').unwrap());
    assert_eq!(rest, b"\nhi\n");
    let daemon: u32 = std::str::from_utf8(daemon).unwrap().parse().unwrap();
    assert!(is_alive(daemon), "it goes on");
    kill(daemon);
}

#[tokio::test]
async fn a_descendant_that_goes_on_writing_neither_blocks_nor_dies() {
    let envd = Envd::start();
    let directory = tempfile::tempdir().unwrap();
    let marker = directory.path().join("marker");
    // Far more than a pipe holds, written after the end was delivered.
    let script = format!(
        "(while [ ! -e {0}.go ]; do sleep 0.05; done; head -c 1000000 /dev/zero; echo done > {0}) & echo hi",
        marker.display()
    );
    let run = run(&envd.client(), sh(&script)).await;
    assert_eq!(run.out(), "hi\n");
    std::fs::write(format!("{}.go", marker.display()), "").unwrap();
    eventually("the descendant's own end", || marker.exists()).await;
}

#[tokio::test]
async fn what_a_flooding_descendant_writes_does_not_delay_the_end_for_ever() {
    let envd = Envd::start();
    let run = run(&envd.client(), sh("yes & echo $! >&2")).await;
    let daemon: u32 = String::from_utf8(run.stderr).unwrap().trim().parse().unwrap();
    assert!(is_alive(daemon));
    kill(daemon);
}

#[tokio::test]
async fn everything_written_before_the_exit_arrives_though_a_descendant_holds_on() {
    let envd = Envd::start();
    for _ in 0..20 {
        let run = run(&envd.client(), sh("sleep 1000 & echo $! >&2; head -c 60000 /dev/zero")).await;
        kill(String::from_utf8(run.stderr).unwrap().trim().parse().unwrap());
        assert_eq!(run.stdout.len(), 60_000);
    }
}

#[tokio::test]
async fn a_background_helper_may_finish_its_sentence() {
    let envd = Envd::start();
    let run = run(&envd.client(), command("/bin/bash", &["-c", "echo one > >(sed s/one/two/)"])).await;
    assert_eq!(run.out(), "two\n");
}

#[tokio::test]
async fn programs_that_cannot_run_end_as_in_a_shell() {
    let envd = Envd::start();
    let client = envd.client();
    for (program, code, reason) in [
        ("no-such-program", 127, "no-such-program: command not found\n"),
        ("/no/such/program", 127, "/no/such/program: No such file or directory\n"),
        ("/etc/passwd", 126, "/etc/passwd: Permission denied\n"),
        ("/etc", 126, "/etc: Permission denied\n"),
    ] {
        let run = run(&client, command(program, &["x"])).await;
        assert_eq!((String::from_utf8(run.stderr).unwrap().as_str(), run.end.exit_code), (reason, code));
        assert!(run.stdout.is_empty() && run.end.exited);
    }
}

#[tokio::test]
async fn a_script_without_interpreter_runs_in_sh() {
    use std::os::unix::fs::PermissionsExt;
    let envd = Envd::start();
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("script");
    std::fs::write(&script, "echo $0 $1 $2\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let run = run(&envd.client(), command(script.to_str().unwrap(), &["a", "b"])).await;
    assert_eq!(run.out(), format!("{} a b\n", script.display()));
}

pub fn kill(pid: u32) {
    std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
}
