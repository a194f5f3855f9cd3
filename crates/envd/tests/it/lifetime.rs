//! How long processes live: deadlines, signals, and what a client's leaving does not do.

use crate::harness::*;
use crate::output::kill;
use connectrpc::client::CallOptions;
use connectrpc::{CodecFormat, ErrorCode};
use guest_api::process::{ListRequest, SendSignalRequest, Signal};
use std::time::Duration;

#[tokio::test]
async fn the_deadline_kills_the_whole_group() {
    let envd = Envd::start();
    for codec in [CodecFormat::Proto, CodecFormat::Json] {
        let client = envd.client_in(codec);
        // A child, a grandchild, and one that ignores every polite request.
        let script = "sleep 1000 & echo $!; sh -c 'sleep 1000 & echo $!; wait' & trap '' TERM INT HUP; echo $$; wait; sleep 1000";
        let options = CallOptions::default().with_timeout(Duration::from_secs(3));
        let mut stream = start(&client, sh(script), options).await.unwrap();
        stream.started().await;
        let mut text = String::new();
        while text.lines().count() < 3 {
            text += &String::from_utf8(stream.until("\n").await).unwrap();
        }
        let pids: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
        let error = stream.rest().await.unwrap_err();
        assert_eq!(error.code, ErrorCode::DeadlineExceeded);
        eventually("the end of the group", || !pids.iter().copied().any(is_alive)).await;
    }
}

#[tokio::test]
async fn the_deadline_arrives_on_the_wire_after_the_output() {
    use std::io::{Read, Write};
    let envd = Envd::start();
    let body = crate::wire::envelope(r#"{"process":{"cmd":"/bin/sh","args":["-c","echo before; sleep 1000"]}}"#);
    let mut socket = std::net::TcpStream::connect(envd.address).unwrap();
    let head = format!(
        "POST /process.Process/Start HTTP/1.1\r\nHost: x\r\nContent-Type: application/connect+json\r\n\
         Connect-Timeout-Ms: 3000\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(&body).unwrap();
    let mut wire = Vec::new();
    socket.read_to_end(&mut wire).unwrap();
    let events = crate::wire::events(&wire);
    assert_eq!(events.len(), 3, "{events:?}");
    assert_eq!(events[1]["event"]["data"]["stdout"], "YmVmb3JlCg==");
    assert_eq!(events[2]["error"]["code"], "deadline_exceeded");
}

#[tokio::test]
async fn a_deadline_that_is_not_reached_changes_nothing() {
    let envd = Envd::start();
    let options = CallOptions::default().with_timeout(PATIENCE);
    let run = run_with(&envd.client(), sh("echo hi; exit 4"), options).await.unwrap();
    assert_eq!((run.out().as_str(), run.end.exit_code), ("hi\n", 4));
}

#[tokio::test]
async fn the_deadline_of_a_joined_stream_is_the_streams_own() {
    let envd = Envd::start();
    let client = envd.client();
    let mut owner = start(&client, sh("read line; exit 6"), CallOptions::default()).await.unwrap();
    let number = owner.started().await;
    let request = guest_api::process::ConnectRequest { process: process(pid(number)).into(), ..Default::default() };
    let options = CallOptions::default().with_timeout(Duration::from_secs(3));
    let mut joined = Stream::Connect(client.connect_with_options(request, options).await.unwrap());
    joined.started().await;
    assert_eq!(joined.rest().await.unwrap_err().code, ErrorCode::DeadlineExceeded);
    let request = guest_api::process::CloseStdinRequest { process: process(pid(number)).into(), ..Default::default() };
    client.close_stdin(request).await.unwrap();
    assert_eq!(owner.rest().await.unwrap().end.exit_code, 6);
}

#[tokio::test]
async fn the_deadline_holds_though_the_client_has_left() {
    let envd = Envd::start();
    let client = envd.client();
    let options = CallOptions::default().with_timeout(Duration::from_secs(3));
    let mut stream = start(&client, sh("sleep 1000"), options).await.unwrap();
    let number = stream.started().await;
    drop(stream);
    assert!(is_alive(number));
    eventually("the end at the deadline", || !is_alive(number)).await;
}

#[tokio::test]
async fn signals_reach_the_group_and_end_it_by_name() {
    let envd = Envd::start();
    let client = envd.client();
    for (signal, name) in [(Signal::SIGNAL_SIGTERM, "signal: terminated"), (Signal::SIGNAL_SIGKILL, "signal: killed")] {
        let mut stream = start(&client, sh("sleep 1000 & echo $!; wait"), CallOptions::default()).await.unwrap();
        let number = stream.started().await;
        let child: u32 = String::from_utf8(stream.until("\n").await).unwrap().trim().parse().unwrap();
        send(&client, number, signal).await.unwrap();
        let run = stream.rest().await.unwrap();
        assert_eq!((run.end.exit_code, run.end.exited, run.end.status.as_str()), (-1, false, name));
        eventually("the child's end", || !is_alive(child)).await;
        assert_eq!(send(&client, number, signal).await.unwrap_err().code, ErrorCode::NotFound);
    }
}

#[tokio::test]
async fn a_process_may_catch_a_signal() {
    let envd = Envd::start();
    let client = envd.client();
    let script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut stream = start(&client, sh(script), CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    stream.until("ready\n").await;
    send(&client, number, Signal::SIGNAL_SIGTERM).await.unwrap();
    let run = stream.rest().await.unwrap();
    assert!(run.out().ends_with("caught\n"));
    assert_eq!(run.end.exit_code, 9);
}

#[tokio::test]
async fn other_signals_are_refused() {
    let envd = Envd::start();
    let client = envd.client();
    let error = send(&client, 1, Signal::SIGNAL_UNSPECIFIED).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn the_list_shows_what_runs_and_only_that() {
    let envd = Envd::start();
    let client = envd.client();
    let mut request = command("sleep", &["1000"]);
    request.tag = Some("sleeper".to_owned());
    let mut stream = start(&client, request.clone(), CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    run(&client, sh("exit 0")).await;

    let list = client.list(ListRequest::default()).await.unwrap().into_owned().processes;
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].pid, list[0].tag.as_deref()), (number, Some("sleeper")));
    assert_eq!(list[0].config, request.process);

    kill(number);
    assert_eq!(stream.rest().await.unwrap().end.status, "signal: killed");
    assert!(client.list(ListRequest::default()).await.unwrap().into_owned().processes.is_empty());
}

#[tokio::test]
async fn an_ended_process_with_a_lingering_pipe_is_not_listed() {
    let envd = Envd::start();
    let client = envd.client();
    let run = run(&client, sh("sleep 1000 & echo $!")).await;
    assert!(client.list(ListRequest::default()).await.unwrap().into_owned().processes.is_empty());
    kill(run.out().trim().parse().unwrap());
}

async fn send(client: &Client, number: u32, signal: Signal) -> Result<(), connectrpc::ConnectError> {
    let request =
        SendSignalRequest { process: process(pid(number)).into(), signal: signal.into(), ..Default::default() };
    client.send_signal(request).await.map(|_| ())
}
