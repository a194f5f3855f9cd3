//! Much of everything at once, and the deaths of those in between: nothing is lost, and envd keeps nothing.
//!
//! What is about envd alone runs against one in namespaces; what is about the path runs into a guest.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use end_to_end::{Api, Envd, Split, Terminal, Up};
use futures::{StreamExt, stream};
use guest_api::process::{ProcessConfig, StartRequest, process_event::Event, process_event::data_event::Output};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// How much more envd may hold after much work than after some. What an allocator keeps for itself is not lost to it.
const FLAT: u64 = 8 << 20;

/// Runs `sh -c script` in a bare envd; its output and exit code.
async fn sh(
    client: &guest_api::process::ProcessClient<connectrpc::client::HttpClient>,
    script: String,
) -> (Vec<u8>, i32) {
    let process =
        ProcessConfig { cmd: "/bin/sh".to_owned(), args: vec!["-c".to_owned(), script], ..Default::default() };
    let request = StartRequest { process: process.into(), ..Default::default() };
    let mut stream = client.start(request).await.unwrap();
    let mut out = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        match message.to_owned_message().event.into_option().and_then(|event| event.event) {
            Some(Event::Data(data)) => match data.output.unwrap() {
                Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes) => out.extend(bytes),
            },
            Some(Event::End(end)) => return (out, end.exit_code),
            _ => {}
        }
    }
    panic!("no end after {:?}", String::from_utf8_lossy(&out));
}

/// Runs a script that must succeed; its output as text.
async fn output(envd: &Envd, script: &str) -> String {
    let (out, code) = sh(&envd.processes(), script.to_owned()).await;
    let out = String::from_utf8(out).unwrap();
    assert_eq!(code, 0, "{script}: {out}");
    out.trim_end().to_owned()
}

#[tokio::test]
async fn ten_thousand_short_commands() {
    let envd = Envd::start().await;
    let client = envd.processes();
    let run = |numbers: std::ops::Range<u32>| {
        let client = &client;
        stream::iter(numbers).for_each_concurrent(8, move |number| async move {
            let (out, code) = sh(client, format!("echo {number}; exit {}", number % 7)).await;
            assert_eq!((String::from_utf8(out).unwrap(), code), (format!("{number}\n"), (number % 7) as i32));
        })
    };
    run(0..1000).await;
    let (memory, descriptors) = (envd.memory(), envd.descriptors());
    run(1000..10_000).await;
    assert!(envd.memory() < memory + FLAT, "from {memory} to {} bytes", envd.memory());
    assert!(envd.descriptors() <= descriptors + 8, "from {descriptors} to {} descriptors", envd.descriptors());
    assert_eq!(envd.children(), 0);
}

#[tokio::test]
async fn sixty_four_streams_at_once() {
    let envd = Envd::start().await;
    let client = envd.processes();
    let all = || {
        let client = &client;
        stream::iter(0..64u64).for_each_concurrent(64, move |number| async move {
            let (from, to) = (number * 100_000, number * 100_000 + 99_999);
            let (out, code) = sh(client, format!("seq {from} {to}")).await;
            let expected: String = (from..=to).map(|line| format!("{line}\n")).collect();
            assert!(code == 0 && out == expected.as_bytes(), "stream {number} differs");
        })
    };
    let rounds = |count| async move {
        for _ in 0..count {
            all().await;
        }
    };
    // What so many at once hold at most differs from round to round, and the allocator keeps the most.
    rounds(4).await;
    let memory = envd.memory();
    rounds(8).await;
    assert!(envd.memory() < memory + FLAT, "from {memory} to {} bytes", envd.memory());
    assert_eq!(envd.children(), 0);
}

/// The `index`th MiB of a large file: no two are the same.
fn mib(index: u64) -> Vec<u8> {
    let seed: [u8; 32] = Sha256::digest(index.to_le_bytes()).into();
    let mut block = seed.repeat((1 << 20) / 32);
    for (at, word) in block.chunks_exact_mut(8).enumerate() {
        word[..4].copy_from_slice(&(at as u32).to_le_bytes());
    }
    block
}

/// Watches the memory of envd until dropped; the most it held.
struct Peak(Arc<AtomicU64>, Arc<AtomicBool>);

impl Peak {
    fn of(envd: &Arc<Envd>) -> Self {
        let peak = Self(Arc::default(), Arc::default());
        let (envd, most, over) = (Arc::clone(envd), Arc::clone(&peak.0), Arc::clone(&peak.1));
        tokio::spawn(async move {
            while !over.load(Ordering::Relaxed) {
                most.fetch_max(envd.memory(), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        peak
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_gibibyte_up_and_down() {
    const MIB: u64 = 1024;
    let envd = Arc::new(Envd::start().await);
    let before = envd.memory();
    let peak = Peak::of(&envd);
    let host = envd.url().trim_start_matches("http://").to_owned();

    let mut connection = TcpStream::connect(&host).await.unwrap();
    let head = format!(
        "POST /files?path=/tmp/large HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/octet-stream\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        MIB << 20
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut sent = Sha256::new();
    for index in 0..MIB {
        let block = mib(index);
        sent.update(&block);
        connection.write_all(&block).await.unwrap();
    }
    let sent = hex::encode(sent.finalize());
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(output(&envd, "sha256sum </tmp/large").await, format!("{sent}  -"));

    let mut connection = BufReader::new(TcpStream::connect(&host).await.unwrap());
    let head = format!("GET /files?path=/tmp/large HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut line = String::new();
    while !line.ends_with("\r\n\r\n") {
        assert_ne!(connection.read_line(&mut line).await.unwrap(), 0, "{line}");
    }
    assert!(line.starts_with("HTTP/1.1 200") && line.contains(&format!("content-length: {}", MIB << 20)), "{line}");
    let mut received = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match connection.read(&mut buffer).await.unwrap() {
            0 => break,
            length => received.update(&buffer[..length]),
        }
    }
    assert_eq!(hex::encode(received.finalize()), sent);
    let most = peak.0.load(Ordering::Relaxed);
    assert!(most < before + FLAT, "from {before} to {most} bytes");
}

#[tokio::test]
async fn a_directory_of_a_hundred_thousand() {
    let envd = Envd::start().await;
    output(&envd, "mkdir /tmp/many && cd /tmp/many && seq -f entry-%06.0f 100000 | xargs touch").await;
    let files = guest_api::filesystem::FilesystemClient::new(
        connectrpc::client::HttpClient::plaintext(),
        envd.config().with_default_max_message_size(64 << 20).with_default_element_memory_limit(256 << 20),
    );
    let mut memory = 0;
    // The first rounds are for the allocator, which has a place of its own for each of envd's threads.
    for round in 0..12 {
        let request = guest_api::filesystem::ListDirRequest { path: "/tmp/many".to_owned(), ..Default::default() };
        let listed = files.list_dir(request).await.unwrap().into_owned();
        assert_eq!(listed.entries.len(), 100_000);
        for (entry, number) in listed.entries.iter().zip(1..) {
            assert_eq!((&entry.name, entry.owner.as_str()), (&format!("entry-{number:06}"), "user"));
        }
        match round {
            0..6 => memory = memory.max(envd.memory()),
            _ => assert!(envd.memory() < memory + FLAT, "from {memory} to {} bytes", envd.memory()),
        }
    }
}

/// Opens a terminal in a capsule.
async fn terminal(api: &Api, id: &str, hello: Value) -> Terminal {
    let mut terminal = Terminal::open(api, id, "pty", hello).await;
    assert_eq!(terminal.told().await.unwrap()["type"], "started");
    terminal
}

#[tokio::test]
async fn an_editor_and_top_on_the_screen() {
    let up = Up::start();
    let id = up.create().await;
    let mut vi =
        terminal(&up, &id, json!({"type": "start", "cmd": "vi", "args": ["/tmp/text"], "cols": 80, "rows": 24})).await;
    vi.screen("empty file", |rows| rows[1].starts_with('~') && rows[23].contains("/tmp/text")).await;
    vi.write("ifirst\rsecond").await;
    vi.screen("text", |rows| rows[0].trim_end() == "first" && rows[1].trim_end() == "second").await;
    vi.write("\x1b").await;
    vi.resize(40, 100).await;
    vi.screen("larger file", |rows| rows.len() == 40 && rows[0].trim_end() == "first" && rows[38].starts_with('~'))
        .await;
    vi.write("ggddp").await;
    vi.screen("lines changed places", |rows| rows[0].trim_end() == "second" && rows[1].trim_end() == "first").await;
    vi.write(":wq\r").await;
    assert_eq!(vi.told().await.unwrap(), json!({"type": "exit", "exit_code": 0}));
    assert_eq!(up.output(&id, "cat /tmp/text").await, "second\nfirst");

    let hello = json!({"type": "start", "cmd": "top", "args": ["-d", "0.5"], "envs": {"TERM": "xterm-256color"}, "cols": 100, "rows": 30});
    let mut top = terminal(&up, &id, hello).await;
    let whole = |rows: &[String]| {
        let heads = ["top - ", "Tasks:", "%Cpu(s):", "MiB Mem :", "MiB Swap:"];
        heads.iter().zip(rows).all(|(head, row)| row.starts_with(head))
            && rows[6].trim_start().starts_with("PID USER")
            && rows.iter().any(|row| row.trim_end().ends_with(" envd"))
            && rows.iter().any(|row| row.trim_end().ends_with(" top"))
    };
    top.screen("all of top", whole).await;
    top.resize(20, 80).await;
    top.screen("all of top on less", |rows| rows.len() == 20 && whole(rows)).await;
    top.write("q").await;
    assert_eq!(top.told().await.unwrap(), json!({"type": "exit", "exit_code": 0}));
}

/// Memory that only envd has, in bytes, as its guest sees it.
async fn envd_memory(api: &Api, id: &str) -> u64 {
    api.output(id, "awk '/RssAnon/ {print $2}' /proc/1/status").await.parse::<u64>().unwrap() << 10
}

#[tokio::test]
async fn much_of_everything_into_a_guest() {
    const MIB: u64 = 64;
    let up = Up::start();
    let id = up.create().await;
    let round = || async {
        stream::iter(0..64u64)
            .for_each_concurrent(64, |number| {
                let (up, id) = (&up, &id);
                async move {
                    let (from, to) = (number * 5000, number * 5000 + 4999);
                    let hello =
                        json!({"type": "start", "cmd": "/usr/bin/seq", "args": [from.to_string(), to.to_string()]});
                    let mut stream = Terminal::open(up, id, "exec/stream", hello).await;
                    let mut seen = String::new();
                    let code = loop {
                        let message = stream.told().await.unwrap();
                        match message["type"].as_str().unwrap() {
                            "stdout" => seen.push_str(message["data"].as_str().unwrap()),
                            "exit" => break message["exit_code"].clone(),
                            "start" => {}
                            other => panic!("{other}: {message}"),
                        }
                    };
                    let expected: String = (from..=to).map(|line| format!("{line}\n")).collect();
                    assert!(code == 0 && seen == expected, "stream {number} differs");
                }
            })
            .await;
    };
    round().await;
    let memory = envd_memory(&up, &id).await;
    round().await;
    let mut sent = Sha256::new();
    let content: Vec<u8> = (0..MIB).flat_map(mib).collect();
    sent.update(&content);
    let sent = hex::encode(sent.finalize());
    upload(&up, &id, "/root/large", content.chunks(1 << 20).map(<[u8]>::to_vec)).await;
    assert_eq!(up.output(&id, "sha256sum </root/large").await, format!("{sent}  -"));
    assert_eq!(hex::encode(Sha256::digest(up.read(&id, "/root/large").await)), sent);
    let after = envd_memory(&up, &id).await;
    assert!(after < memory + FLAT, "from {memory} to {after} bytes");
}

/// Opens `files/stream/write` to a file, ready for its chunks.
async fn start_upload(api: &Api, id: &str, path: &str) -> TcpStream {
    let host = api.url().trim_start_matches("http://");
    let mut connection = TcpStream::connect(host).await.unwrap();
    let head = format!(
        "POST /v1/capsules/{id}/files/stream/write HTTP/1.1\r\nhost: {host}\r\nx-api-key: {}\r\nconnection: close\r\n\
         content-type: multipart/form-data; boundary=cut\r\ntransfer-encoding: chunked\r\n\r\n",
        api.api_key()
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let part = format!(
        "--cut\r\ncontent-disposition: form-data; name=\"path\"\r\n\r\n{path}\r\n\
         --cut\r\ncontent-disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\n"
    );
    send_chunk(&mut connection, part.as_bytes()).await.unwrap();
    connection
}

async fn send_chunk(connection: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    connection.write_all(format!("{:x}\r\n", bytes.len()).as_bytes()).await?;
    connection.write_all(bytes).await?;
    connection.write_all(b"\r\n").await
}

async fn upload(api: &Api, id: &str, path: &str, chunks: impl Iterator<Item = Vec<u8>>) {
    let mut connection = start_upload(api, id, path).await;
    for chunk in chunks {
        send_chunk(&mut connection, &chunk).await.unwrap();
    }
    send_chunk(&mut connection, b"\r\n--cut--\r\n").await.unwrap();
    connection.write_all(b"0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
}

/// Who dies in the middle of everything.
#[derive(Debug, Clone, Copy)]
enum Dies {
    Control,
    Agent,
    Connection,
}

/// So many lines of numbers are a file of 127 MiB: far more than the sockets between hold.
const LINES: u64 = 16_000_000;

/// A command, a terminal, an upload and a download are under way when `dies` does; all of them can be gone on with.
async fn all_goes_on(dies: Dies) {
    let mut split = Split::start();
    let id = split.create().await;
    split.output(&id, &format!("echo before > /root/file; mkfifo /root/go; seq {LINES} > /root/large")).await;

    // A command that counts, and waits in the middle.
    let script =
        "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); [ $i -ne 1000 ] || read line </root/go; done; exit 7";
    let hello = json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", script]});
    let mut command = Terminal::open(&split, &id, "exec/stream", hello).await;
    let pid = command.told().await.unwrap()["pid"].as_u64().unwrap();
    let mut counted = String::new();
    while !counted.ends_with("\n999\n") {
        counted.push_str(command.told().await.unwrap()["data"].as_str().unwrap());
    }
    // A terminal with something on it.
    let hello = json!({"type": "start", "cmd": "/bin/sh", "envs": {"PS1": "> "}});
    let mut shell = Terminal::open(&split, &id, "pty", hello).await;
    let tag = shell.told().await.unwrap()["tag"].clone();
    shell.write("MARK=still; echo sc$((1))reen\n").await;
    shell.until("sc1reen\r\n").await;
    // An upload that has got half-way.
    let mut half = start_upload(&split, &id, "/root/file").await;
    send_chunk(&mut half, &mib(0)).await.unwrap();
    // And a download.
    let mut large = split.download(&id, "/root/large").await;
    assert!(!large.chunk().await.unwrap().unwrap().is_empty());

    match dies {
        Dies::Control => split.restart_control(),
        Dies::Agent => split.restart_agent(),
        Dies::Connection => {}
    }
    match dies {
        Dies::Connection => drop((command, shell, half, large)),
        // Whoever is left is told, and not left waiting.
        Dies::Control | Dies::Agent => {
            while let Some(message) = command.told().await {
                assert_eq!(message["type"], "error", "{dies:?}: {message}");
            }
            while let Some(message) = shell.told().await {
                assert_eq!(message["type"], "error", "{dies:?}: {message}");
            }
            let mut answer = String::new();
            let _ = half.read_to_string(&mut answer).await;
            assert!(!answer.starts_with("HTTP/1.1 2"), "{dies:?}: {answer}");
            // What was on its way may still come, and then it is plain that it was not all.
            let broken = loop {
                match large.chunk().await {
                    Ok(Some(_)) => {}
                    Ok(None) => break false,
                    Err(_) => break true,
                }
            };
            assert!(broken, "{dies:?}: a part of a file looked whole");
        }
    }

    // The command goes on where it was, and all that it said and says is there.
    let mut command = Terminal::open(&split, &id, &format!("processes/{pid}/stream"), Value::Null).await;
    assert_eq!(command.told().await.unwrap(), json!({"type": "start", "pid": pid}));
    split.output(&id, "echo on >/root/go").await;
    let mut counted = String::new();
    let code = loop {
        let message = command.told().await.unwrap();
        match message["data"].as_str() {
            Some(data) => counted.push_str(data),
            None => break message["exit_code"].clone(),
        }
    };
    let expected: String = (0..2000).map(|number| format!("{number}\n")).collect();
    assert!(code == 7 && counted == expected, "{dies:?}: {code} after {counted}");

    // So does the terminal, with what it showed.
    let mut shell = Terminal::open(&split, &id, "pty", json!({"type": "connect", "tag": tag})).await;
    assert_eq!(shell.told().await.unwrap()["tag"], tag);
    shell.until("sc1reen\r\n").await;
    shell.write("echo $MARK-here; exit 3\n").await;
    assert_eq!(shell.told().await.unwrap(), json!({"type": "exit", "exit_code": 3}));
    shell.until("still-here\r\n").await;

    // The download is whole when it is asked for again.
    let expected = std::process::Command::new("seq").arg(LINES.to_string()).output().unwrap().stdout;
    assert!(split.read(&id, "/root/large").await == expected, "{dies:?}: another file came");

    // The file is what it was until it is sent again, and nothing of the half is left.
    assert_eq!(split.output(&id, "cat /root/file").await, "before");
    upload(&split, &id, "/root/file", std::iter::once(b"after".to_vec())).await;
    assert_eq!(split.output(&id, "cat /root/file").await, "after");
    let names: BTreeSet<String> = split.output(&id, "ls -A /root").await.lines().map(str::to_owned).collect();
    let expected = [".bashrc", ".profile", "file", "go", "large"].map(str::to_owned).into();
    assert!(names.is_subset(&expected), "{dies:?}: {names:?}");
    split.destroy(&id).await;
}

#[tokio::test]
async fn control_dies_in_the_middle() {
    all_goes_on(Dies::Control).await;
}

#[tokio::test]
async fn the_agent_dies_in_the_middle() {
    all_goes_on(Dies::Agent).await;
}

#[tokio::test]
async fn the_connection_dies_in_the_middle() {
    all_goes_on(Dies::Connection).await;
}
