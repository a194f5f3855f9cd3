//! envd is flat: a thousand processes leave no process, no descriptor and no memory behind.

use crate::harness::*;
use connectrpc::client::CallOptions;
use guest_api::process::{PTY, StartRequest};

#[tokio::test]
async fn a_thousand_runs_leave_nothing() {
    let envd = Envd::start();
    let client = envd.client();
    for _ in 0..50 {
        run(&client, sh("echo warm")).await;
    }
    let (files, memory) = (envd.open_files(), envd.resident());
    for number in 0..1000 {
        match number % 5 {
            0 => drop(run(&client, sh("echo hello; exit 3")).await),
            1 => drop(run(&client, StartRequest { pty: PTY::default().into(), ..sh("echo hello") }).await),
            2 => drop(run(&client, command("no-such-program", &[])).await),
            3 => {
                // A client that leaves at once.
                let mut stream = start(&client, sh("head -c 100000 /dev/zero"), CallOptions::default()).await.unwrap();
                stream.started().await;
            }
            _ => {
                let process = start(&client, StartRequest { ..sh("exit 0") }, basic("no-such-user")).await;
                assert!(process.unwrap().next().await.is_err());
            }
        }
    }
    eventually("no children", || envd.children() == 0).await;
    // The client's own idle connections may have come or gone.
    eventually("no descriptors", || envd.open_files() <= files + 2).await;
    let grown = envd.resident().saturating_sub(memory);
    // What is kept of ended processes is bounded; an allocator in a debug build is not exact.
    assert!(grown < 24 << 20, "{grown} bytes more");
}

#[tokio::test]
async fn a_failed_start_leaves_nothing() {
    let envd = Envd::start();
    let client = envd.client();
    run(&client, sh("echo warm")).await;
    let files = envd.open_files();
    for _ in 0..50 {
        let mut request = command("id", &[]);
        let mut process = request.process.into_option().unwrap();
        process.cwd = Some("/root".to_owned());
        request.process = process.into();
        let mut stream = start(&client, request, basic("nobody")).await.unwrap();
        assert!(stream.next().await.is_err());
    }
    eventually("no children", || envd.children() == 0).await;
    eventually("no descriptors", || envd.open_files() <= files + 2).await;
}
