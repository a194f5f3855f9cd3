//! Standard input and terminals.

use crate::harness::*;
use connectrpc::client::CallOptions;
use connectrpc::{ConnectError, ErrorCode};
use guest_api::process::process_input::Input;
use guest_api::process::stream_input_request::{DataEvent, KeepAlive, StartEvent};
use guest_api::process::{
    CloseStdinRequest, PTY, ProcessInput, SendInputRequest, StartRequest, StreamInputRequest, UpdateRequest, pty::Size,
};

#[tokio::test]
async fn what_is_sent_is_read_and_closing_ends_it() {
    let envd = Envd::start();
    let client = envd.client();
    // It outlives its input, so that what comes after the end of input has somebody to come to.
    let mut stream = start(&client, sh("cat; echo eof; exec sleep 1000"), CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    send(&client, number, Input::Stdin(b"one\n".to_vec())).await.unwrap();
    assert_eq!(stream.until("one\n").await, b"one\n");
    send(&client, number, Input::Stdin(b"\xff\0two".to_vec())).await.unwrap();
    close(&client, number).await.unwrap();
    assert_eq!(stream.until("eof\n").await, b"\xff\0twoeof\n");
    close(&client, number).await.unwrap();
    let late = send(&client, number, Input::Stdin(b"x".to_vec())).await;
    assert_eq!(late.unwrap_err().code, ErrorCode::FailedPrecondition);
    crate::output::kill(number);
    assert_eq!(stream.rest().await.unwrap().end.status, "signal: killed");
    assert_eq!(close(&client, number).await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn large_input_flows_at_the_process_pace() {
    let envd = Envd::start();
    let client = envd.client();
    let mut stream = start(&client, sh("sleep 0.3; wc -c"), CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    for _ in 0..4 {
        send(&client, number, Input::Stdin(vec![b'x'; 3_000_000])).await.unwrap();
    }
    close(&client, number).await.unwrap();
    assert_eq!(stream.rest().await.unwrap().out().trim(), "12000000");
}

#[tokio::test]
async fn input_to_a_process_that_does_not_read_ends_with_it() {
    let envd = Envd::start();
    let client = envd.client();
    let mut stream = start(&client, sh("sleep 0.5"), CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    let error = send(&client, number, Input::Stdin(vec![0; 1_000_000])).await.unwrap_err();
    assert!(matches!(error.code, ErrorCode::NotFound | ErrorCode::FailedPrecondition), "{error:?}");
    assert_eq!(stream.rest().await.unwrap().end.exit_code, 0);
}

#[tokio::test]
async fn without_stdin_there_is_nothing_to_read() {
    let envd = Envd::start();
    let client = envd.client();
    let request =
        StartRequest { stdin: Some(false), ..sh("readlink /proc/self/fd/0; cat; echo end; read x; sleep 0.2") };
    let mut stream = start(&client, request, CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    let error = send(&client, number, Input::Stdin(b"x".to_vec())).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    assert_eq!(stream.rest().await.unwrap().out(), "/dev/null\nend\n");
}

#[tokio::test]
async fn a_stream_of_input_keeps_its_order() {
    let envd = Envd::start();
    let client = envd.client();
    let mut stream = start(&client, command("cat", &[]), CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    let begin = StreamInputRequest {
        event: Some(StartEvent { process: process(pid(number)).into(), ..Default::default() }.into()),
        ..Default::default()
    };
    let alive = StreamInputRequest { event: Some(KeepAlive::default().into()), ..Default::default() };
    let lines = (0..1000).map(|number| {
        let input =
            ProcessInput { input: Some(Input::Stdin(format!("{number}\n").into_bytes())), ..Default::default() };
        StreamInputRequest {
            event: Some(DataEvent { input: input.into(), ..Default::default() }.into()),
            ..Default::default()
        }
    });
    let requests: Vec<_> = [begin, alive].into_iter().chain(lines).collect();
    client.stream_input(connectrpc::stream_iter(requests)).await.unwrap();
    close(&client, number).await.unwrap();
    let expected: String = (0..1000).map(|number| format!("{number}\n")).collect();
    assert_eq!(stream.rest().await.unwrap().out(), expected);
}

#[tokio::test]
async fn a_terminal_echoes_resizes_and_controls() {
    let envd = Envd::start();
    let client = envd.client();
    let request = StartRequest { pty: pty(100, 30).into(), ..command("/bin/sh", &[]) };
    let mut stream = start(&client, request, CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    let type_in = async |text: &str| send(&client, number, Input::Pty(text.as_bytes().to_vec())).await.unwrap();

    type_in("PS1='$ '; echo $TERM; stty size; tty >/dev/tty\n").await;
    let seen = String::from_utf8(stream.until("/dev/pts/").await).unwrap();
    assert!(seen.contains("stty size; tty"), "what is typed is echoed: {seen}");
    assert!(seen.contains("xterm-256color\r\n30 100\r\n"), "{seen}");

    let update = UpdateRequest { process: process(pid(number)).into(), pty: pty(132, 43).into(), ..Default::default() };
    client.update(update).await.unwrap();
    type_in("stty size\n").await;
    stream.until("43 132\r\n").await;

    // What is waited for must not be what the terminal echoes of the typing.
    type_in("sh -c 'trap \"printf cau%s ght; exit\" INT; printf ar%s med; while :; do sleep 0.1; done'\n").await;
    stream.until("armed").await;
    type_in("\u{3}").await;
    stream.until("caught").await;

    let error = close(&client, number).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    let error = send(&client, number, Input::Stdin(b"x".to_vec())).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    type_in("exit 5\n").await;
    let run = stream.rest().await.unwrap();
    assert_eq!(run.end.exit_code, 5);
    assert!(run.stdout.is_empty() && run.stderr.is_empty());
}

#[tokio::test]
async fn the_last_words_on_a_terminal_arrive() {
    let envd = Envd::start();
    let client = envd.client();
    for number in 0..100 {
        let request = StartRequest { pty: pty(80, 24).into(), ..sh(&format!("echo first; echo last {number}")) };
        let run = run(&client, request).await;
        assert_eq!(String::from_utf8(run.pty).unwrap(), format!("first\r\nlast {number}\r\n"));
    }
}

#[tokio::test]
async fn a_lot_of_terminal_output_is_exact() {
    let envd = Envd::start();
    let request = StartRequest { pty: pty(80, 24).into(), ..sh("stty -opost; seq 200000") };
    let run = run(&envd.client(), request).await;
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    assert!(run.pty == expected.as_bytes(), "{} of {} bytes", run.pty.len(), expected.len());
}

#[tokio::test]
async fn only_terminals_have_a_size() {
    let envd = Envd::start();
    let client = envd.client();
    let mut stream = start(&client, command("cat", &[]), CallOptions::default()).await.unwrap();
    let number = stream.started().await;
    let update = UpdateRequest { process: process(pid(number)).into(), pty: pty(132, 43).into(), ..Default::default() };
    assert_eq!(client.update(update).await.unwrap_err().code, ErrorCode::FailedPrecondition);
    let error = send(&client, number, Input::Pty(b"x".to_vec())).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    close(&client, number).await.unwrap();
    stream.rest().await.unwrap();
    let update = UpdateRequest { process: process(pid(number)).into(), pty: pty(132, 43).into(), ..Default::default() };
    assert_eq!(client.update(update).await.unwrap_err().code, ErrorCode::NotFound);
}

fn pty(cols: u32, rows: u32) -> PTY {
    PTY { size: Size { cols, rows, ..Default::default() }.into(), ..Default::default() }
}

async fn send(client: &Client, number: u32, input: Input) -> Result<(), ConnectError> {
    let input = ProcessInput { input: Some(input), ..Default::default() };
    let request = SendInputRequest { process: process(pid(number)).into(), input: input.into(), ..Default::default() };
    client.send_input(request).await.map(|_| ())
}

async fn close(client: &Client, number: u32) -> Result<(), ConnectError> {
    let request = CloseStdinRequest { process: process(pid(number)).into(), ..Default::default() };
    client.close_stdin(request).await.map(|_| ())
}
