//! Slow readers, several readers, readers that leave, and readers that come late.

use crate::harness::*;
use connectrpc::client::CallOptions;
use connectrpc::{CodecFormat, ErrorCode};
use std::io::Read;

#[tokio::test]
async fn a_slow_reader_stalls_the_process_and_loses_nothing() {
    const BYTES: usize = 32 << 20;
    let envd = Envd::start();
    let directory = tempfile::tempdir().unwrap();
    let progress = directory.path().join("progress");
    let script = format!(
        "import sys\nf = open('{}', 'w')\nfor i in range({}):\n b = i.to_bytes(4, 'big') * 256\n sys.stdout.buffer.write(b)\n if i % 64 == 0:\n  f.seek(0); f.write(str(i * 1024)); f.flush()\n",
        progress.display(),
        BYTES / 1024
    );
    // A socket of our own, so that nothing but us reads ahead.
    let mut socket = std::net::TcpStream::connect(envd.address).unwrap();
    let body = serde_json::json!({"process": {"cmd": "python3", "args": ["-c", script]}}).to_string();
    crate::wire::send(&mut socket, "/process.Process/Start", "application/connect+json", &crate::wire::envelope(&body));
    let written =
        || std::fs::read_to_string(&progress).ok().and_then(|text| text.trim().parse::<usize>().ok()).unwrap_or(0);
    // It stops once every buffer on the way is full.
    let mut last = usize::MAX;
    while written() == 0 || written() != last {
        last = written();
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    assert!(last < BYTES - (4 << 20), "the process was not held back: {last}");

    let mut wire = Vec::new();
    socket.read_to_end(&mut wire).unwrap();
    let events = crate::wire::events(&wire);
    let mut output = Vec::new();
    for event in &events {
        if let Some(data) = event["event"]["data"]["stdout"].as_str() {
            use base64::Engine;
            output.extend(base64::engine::general_purpose::STANDARD.decode(data).unwrap());
        }
    }
    assert_eq!(output.len(), BYTES);
    assert!(output.chunks(1024).enumerate().all(|(i, chunk)| chunk == (i as u32).to_be_bytes().repeat(256)));
    assert_eq!(events[events.len() - 2]["event"]["end"]["status"], "exit status 0");
}

#[tokio::test]
async fn a_reader_that_leaves_neither_stalls_nor_ends_the_process() {
    let envd = Envd::start();
    let client = envd.client();
    let directory = tempfile::tempdir().unwrap();
    let marker = directory.path().join("marker");
    let script = format!("head -c 5000000 /dev/zero; echo over > {}; read line; exit 7", marker.display());
    let mut stream = start(&client, sh(&script), CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    drop(stream);
    eventually("the process's progress without a reader", || marker.exists()).await;

    let mut late = connect(&client, pid(number)).await.unwrap();
    assert_eq!(late.started().await, number);
    let request = guest_api::process::CloseStdinRequest { process: process(pid(number)).into(), ..Default::default() };
    client.close_stdin(request).await.unwrap();
    let run = late.rest().await.unwrap();
    assert_eq!(run.end.exit_code, 7);
    // The end of what it wrote, at least the promised window of it.
    assert!((256 << 10..5_000_000).contains(&run.stdout.len()), "{}", run.stdout.len());
}

#[tokio::test]
async fn two_readers_both_get_everything() {
    let envd = Envd::start();
    let client = envd.client();
    let mut first = start(&client, sh("read line; seq 300000"), CallOptions::default()).await.unwrap();
    let number = first.started().await;
    let mut second = connect(&envd.client_in(CodecFormat::Json), pid(number)).await.unwrap();
    assert_eq!(second.started().await, number);
    let request = guest_api::process::CloseStdinRequest { process: process(pid(number)).into(), ..Default::default() };
    client.close_stdin(request).await.unwrap();
    let (first, second) = tokio::join!(first.rest(), second.rest());
    let expected: String = (1..=300_000).map(|number| format!("{number}\n")).collect();
    assert!(first.unwrap().out() == expected);
    assert!(second.unwrap().out() == expected);
}

#[tokio::test]
async fn a_stuck_reader_does_not_stall_another() {
    const BYTES: usize = 40 << 20;
    let envd = Envd::start();
    let client = envd.client();
    let script = format!(
        "import sys\nsys.stdin.read()\nfor i in range({}):\n \
         sys.stdout.buffer.write(b''.join(n.to_bytes(4, 'big') for n in range(i * 1024, i * 1024 + 1024)))",
        BYTES / 4096
    );
    let request = command("python3", &["-c", &script]);
    let mut good = start(&client, request, CallOptions::default()).await.unwrap();
    let number = good.started().await;
    let mut stuck = std::net::TcpStream::connect(envd.address).unwrap();
    let body = serde_json::json!({"process": {"pid": number}}).to_string();
    crate::wire::send(
        &mut stuck,
        "/process.Process/Connect",
        "application/connect+json",
        &crate::wire::envelope(&body),
    );
    let mut first_byte = [0];
    stuck.read_exact(&mut first_byte).unwrap();
    let request = guest_api::process::CloseStdinRequest { process: process(pid(number)).into(), ..Default::default() };
    client.close_stdin(request).await.unwrap();
    let run = good.rest().await.unwrap();
    assert_eq!((run.stdout.len(), run.end.exit_code), (BYTES, 0));
    assert!(envd.holds("/var/tmp/"), "the backlog is on disk");

    // The stuck one finds everything that it missed meanwhile, and the end.
    let mut wire = first_byte.to_vec();
    stuck.read_to_end(&mut wire).unwrap();
    let events = crate::wire::events(&wire);
    let output = |event: &serde_json::Value| {
        use base64::Engine;
        let data = event["event"]["data"]["stdout"].as_str()?.to_owned();
        base64::engine::general_purpose::STANDARD.decode(data).ok()
    };
    let output: Vec<u8> = events.iter().filter_map(output).flatten().collect();
    assert!(output.len() == BYTES && output.chunks(4).enumerate().all(|(i, word)| word == (i as u32).to_be_bytes()));
    assert_eq!(events[events.len() - 2]["event"]["end"]["status"], "exit status 0");
    // Nothing of it stays: neither the file nor its memory.
    eventually("the backlog's end", || !envd.holds("/var/tmp/")).await;
}

#[tokio::test]
async fn a_latecomer_gets_what_was_said_and_the_end() {
    let envd = Envd::start();
    let client = envd.client();
    let mut request = sh("echo early; echo problem >&2; exit 5");
    request.tag = Some("job".to_owned());
    let run = run(&client, request).await;
    for selector in [pid(run.pid), tag("job")] {
        let mut late = connect(&client, selector).await.unwrap();
        assert_eq!(late.started().await, run.pid);
        let late = late.rest().await.unwrap();
        assert_eq!(
            (late.out().as_str(), late.stderr.as_slice(), late.end),
            ("early\n", b"problem\n".as_slice(), run.end.clone())
        );
    }
}

#[tokio::test]
async fn nobody_knows_an_unknown_process() {
    let envd = Envd::start();
    let client = envd.client();
    for selector in [pid(0), pid(u32::MAX), pid(1), tag("nope")] {
        let mut stream = connect(&client, selector).await.unwrap();
        let error = stream.next().await.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound, "{error:?}");
    }
}

#[tokio::test]
async fn an_idle_stream_says_that_it_lives() {
    let envd = Envd::start();
    let options = CallOptions::default().with_header("keepalive-ping-interval", "1");
    let run = run_with(&envd.client(), sh("sleep 2.5; echo done"), options).await.unwrap();
    assert_eq!(run.out(), "done\n");
    assert!(run.keepalives >= 1, "{}", run.keepalives);
}
