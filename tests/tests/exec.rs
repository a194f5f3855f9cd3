//! What a command prints and how it ends arrives exactly, through every hop.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use end_to_end::Up;
use reqwest::Method;
use serde_json::json;
use sha2::{Digest, Sha256};

#[tokio::test]
async fn a_thousand_fast_commands_lose_nothing() {
    let up = Up::start();
    let id = up.create().await;
    let before = up.processes(&id).await;
    for run in 0..1000 {
        let answer = up.sh(&id, "echo hello; echo oops >&2; exit 3").await;
        let seen = (answer["stdout"].as_str(), answer["stderr"].as_str(), answer["exit_code"].as_i64());
        assert_eq!(seen, (Some("hello\n"), Some("oops\n"), Some(3)), "run {run}");
    }
    assert_eq!(up.processes(&id).await, before);
}

#[tokio::test]
async fn large_output_is_exact() {
    let up = Up::start();
    let id = up.create().await;
    // 64 MiB that differ from block to block, and their checksum as the guest computes it.
    let script =
        "python3 -c 'import sys\nfor i in range(65536): sys.stdout.write(\"%08d\" % i + \"x\" * 1015 + \"\\n\")'";
    let body = json!({"cmd": "/bin/sh", "args": ["-c", script], "timeout_sec": 300});
    let (status, answer) = up.call(Method::POST, &format!("/v1/capsules/{id}/exec"), Some(body)).await;
    assert_eq!(status, 200);
    let stdout = answer["stdout"].as_str().unwrap();
    assert_eq!(stdout.len(), 64 << 20);
    let mut expected = Sha256::new();
    for index in 0..65536 {
        expected.update(format!("{index:08}{}\n", "x".repeat(1015)));
    }
    assert_eq!(hex::encode(Sha256::digest(stdout)), hex::encode(expected.finalize()));
}

#[tokio::test]
async fn output_that_is_no_text_comes_as_base64() {
    let up = Up::start();
    let id = up.create().await;
    let answer = up.sh(&id, "printf 'a\\377\\000b'; printf plain >&2").await;
    assert_eq!(answer["encoding"], "base64");
    let decode = |name: &str| BASE64_STANDARD.decode(answer[name].as_str().unwrap()).unwrap();
    assert_eq!(decode("stdout"), b"a\xff\0b");
    assert_eq!(decode("stderr"), b"plain");
}

#[tokio::test]
async fn environment_and_directory_are_honoured() {
    let up = Up::start();
    let id = up.create().await;
    let body = json!({"cmd": "/bin/sh", "args": ["-c", "echo $GREETING; pwd"], "envs": {"GREETING": "ça va"}, "cwd": "/usr/lib"});
    let (_, answer) = up.call(Method::POST, &format!("/v1/capsules/{id}/exec"), Some(body)).await;
    assert_eq!(answer["stdout"], "ça va\n/usr/lib\n");
    let body = json!({"cmd": "/bin/true", "cwd": "/no/such/place"});
    let (status, answer) = up.call(Method::POST, &format!("/v1/capsules/{id}/exec"), Some(body)).await;
    assert_eq!((status.as_u16(), answer["error"]["code"].as_str()), (400, Some("invalid_request")));
    assert!(answer["error"]["message"].as_str().unwrap().contains("/no/such/place"), "{answer}");
}

#[tokio::test]
async fn a_command_may_take_ninety_seconds() {
    let up = Up::start();
    let id = up.create().await;
    let body = json!({"cmd": "/bin/sh", "args": ["-c", "sleep 90; echo done"], "timeout_sec": 120});
    let (status, answer) = up.call(Method::POST, &format!("/v1/capsules/{id}/exec"), Some(body)).await;
    assert_eq!((status.as_u16(), answer["stdout"].as_str()), (200, Some("done\n")));
}

#[tokio::test]
async fn a_timeout_ends_the_whole_group_in_time() {
    let up = Up::start();
    let id = up.create().await;
    let body = json!({"cmd": "/bin/sh", "args": ["-c", "sleep 1234 & sleep 1234"], "timeout_sec": 2});
    let (status, answer) = up.call(Method::POST, &format!("/v1/capsules/{id}/exec"), Some(body)).await;
    assert_eq!((status.as_u16(), answer["error"]["code"].as_str()), (504, Some("timeout")), "{answer}");
    while up.sh(&id, "pgrep -x sleep").await["exit_code"] != 1 {}
}

#[tokio::test]
async fn a_background_command_outlives_its_call() {
    let up = Up::start();
    let id = up.create().await;
    let body =
        json!({"cmd": "/bin/sh", "args": ["-c", "sleep 1; echo late > /tmp/late"], "background": true, "tag": "later"});
    let (status, answer) = up.call(Method::POST, &format!("/v1/capsules/{id}/exec"), Some(body)).await;
    assert_eq!((status.as_u16(), answer["tag"].as_str()), (202, Some("later")));
    assert!(answer["pid"].as_u64().unwrap() > 1);
    up.output(&id, "for i in $(seq 200); do [ -e /tmp/late ] && break; sleep 0.1; done; cat /tmp/late").await;
}
