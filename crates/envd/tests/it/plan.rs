//! Who a process runs as, where, and with what. Running as somebody else needs root, as in a guest.

use crate::harness::*;
use connectrpc::ErrorCode;
use connectrpc::client::CallOptions;
use guest_api::process::StartRequest;
use std::collections::BTreeMap;

#[tokio::test]
async fn a_process_becomes_its_user_entirely() {
    let envd = Envd::start();
    let script = "id -u; id -g; id -G; echo $HOME $USER $LOGNAME; grep -E '^(Uid|Gid|Cap(Eff|Prm))' /proc/self/status";
    let request = StartRequest { ..in_directory(sh(script), "/") };
    let run = run_with(&envd.client(), request, basic("nobody")).await.unwrap();
    let out = run.out();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..4], ["65534", "65534", "65534", "/nonexistent nobody nobody"]);
    assert!(out.contains("Uid:\t65534\t65534\t65534\t65534\n") && out.contains("Gid:\t65534\t65534\t65534\t65534\n"));
    assert!(out.contains("CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n"), "{out}");
}

#[tokio::test]
async fn an_unknown_user_is_nobody_we_know() {
    let envd = Envd::start();
    let client = envd.client();
    let mut stream = start(&client, command("id", &[]), basic("root123")).await.unwrap();
    let error = stream.next().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unauthenticated);
    assert_eq!(error.message.as_deref(), Some("invalid username: 'root123'"));
}

#[tokio::test]
async fn a_malformed_authorization_is_refused() {
    let envd = Envd::start();
    for header in ["Bearer x", "Basic !", "Basic", "Basic /w=="] {
        let options = CallOptions::default().with_header("authorization", header);
        let mut stream = start(&envd.client(), command("id", &[]), options).await.unwrap();
        assert_eq!(stream.next().await.unwrap_err().code, ErrorCode::Unauthenticated, "{header}");
    }
}

#[tokio::test]
async fn directories() {
    let envd = Envd::start();
    let client = envd.client();
    for (asked, expected) in [("/usr", "/usr"), ("~", "/root"), ("..", "/"), ("", "/root")] {
        let run = run(&client, in_directory(sh("pwd -P"), asked)).await;
        assert_eq!(run.out().trim(), expected, "{asked}");
    }
    assert_eq!(run(&client, sh("pwd -P")).await.out().trim(), "/root");
    for missing in ["/no/such/place", "~/no-such-place", "/etc/passwd"] {
        let mut stream = start(&client, in_directory(sh("pwd"), missing), CallOptions::default()).await.unwrap();
        let error = stream.next().await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert!(error.message.unwrap().contains(missing.trim_start_matches('~')), "{missing}");
    }
    // One the user may not enter is as good as none.
    let mut stream = start(&client, in_directory(sh("pwd"), "/root"), basic("nobody")).await.unwrap();
    let error = stream.next().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.message.unwrap().contains("/root"));
}

#[tokio::test]
async fn environments_are_layered() {
    let envd = Envd::start_with(&[("PATH", "/usr/bin:/bin"), ("SECRET_OF_ENVD", "x")]);
    let body = r#"{"envVars":{"A":"init","B":"init","HOME":"/somewhere"},"defaultWorkdir":"/usr"}"#;
    assert_eq!(crate::http::request(&envd, "POST", "/init", &[], body).0, 204);
    let mut request = command("env", &[]);
    let mut process = request.process.into_option().unwrap();
    process.envs = [("B".to_owned(), "request".to_owned()), ("EMPTY".to_owned(), String::new())].into_iter().collect();
    request.process = process.into();
    let run = run(&envd.client(), request).await;
    let out = run.out();
    let env: BTreeMap<&str, &str> = out.lines().map(|line| line.split_once('=').unwrap()).collect();
    let expected = [
        ("A", "init"),
        ("B", "request"),
        ("E2B_SANDBOX", "false"),
        ("EMPTY", ""),
        ("HOME", "/somewhere"),
        ("LOGNAME", "root"),
        ("PATH", "/usr/bin:/bin"),
        ("SHELL", "/bin/bash"),
        ("USER", "root"),
        ("WRENN_SANDBOX", "false"),
    ];
    assert_eq!(env, BTreeMap::from(expected));
}

#[tokio::test]
async fn the_default_user_and_directory_come_from_init() {
    let envd = Envd::start();
    let body = r#"{"defaultUser":"nobody","defaultWorkdir":"/usr"}"#;
    assert_eq!(crate::http::request(&envd, "POST", "/init", &[], body).0, 204);
    assert_eq!(run(&envd.client(), sh("id -un; pwd")).await.out(), "nobody\n/usr\n");
    assert_eq!(run_with(&envd.client(), sh("id -un"), basic("root")).await.unwrap().out(), "root\n");
}

#[tokio::test]
async fn a_process_starts_clean() {
    let envd = Envd::start();
    // Descriptors, session, priority, signals, limits.
    let script = "import os, signal, resource\n\
        print(sorted(int(f) for f in os.listdir('/proc/self/fd'))[:3], len(os.listdir('/proc/self/fd')))\n\
        print(os.getsid(0) == os.getpid() == os.getpgid(0))\n\
        print(os.nice(0), open('/proc/self/oom_score_adj').read().strip(), oct(os.umask(0)))\n\
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n";
    let run = run(&envd.client(), command("python3", &["-c", script])).await;
    // The fourth descriptor is the listing's own.
    assert_eq!(run.out(), "[0, 1, 2] 4\nTrue\n0 100 0o22\n1024\n", "{}", String::from_utf8_lossy(&run.stderr));
    let masks = run_masks(&envd).await;
    assert_eq!(masks, ["0000000000000000", "0000000000000000", "0000000000000000"], "SigBlk, SigIgn, SigCgt");
}

async fn run_masks(envd: &Envd) -> Vec<String> {
    let run = run(&envd.client(), command("cat", &["/proc/self/status"])).await;
    let out = run.out();
    let masks = out.lines().filter(|line| ["SigBlk", "SigIgn", "SigCgt"].iter().any(|mask| line.starts_with(mask)));
    masks.map(|line| line.split_whitespace().last().unwrap().to_owned()).collect()
}

fn in_directory(mut request: StartRequest, cwd: &str) -> StartRequest {
    let mut process = request.process.into_option().unwrap();
    process.cwd = Some(cwd.to_owned());
    request.process = process.into();
    request
}
