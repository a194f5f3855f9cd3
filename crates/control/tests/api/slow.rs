//! Clients that do not read: they hold back whoever writes to them, lose nothing, and cost no more than the buffers on the way.
//! And clients that read much: nobody else waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::Message;

use crate::socket::Socket;
use crate::world::{PATIENCE, World, on_both};

on_both![
    output_waits_for_its_reader,
    an_answer_waits_for_its_reader,
    a_flood_of_one_capsule_leaves_the_terminals_of_others,
];

/// Bytes that are written when nobody holds the writer back.
const ALL: u64 = 48 << 20;
/// Bytes between a writer and a client that does not read. Most of it is the kernel's, for the sockets of both ends.
const BETWEEN: u64 = 32 << 20;
/// Bytes of a flood that may pass, all in all, while a key goes to a terminal and its echo comes back.
const WAITED_FOR: u64 = 8 << 20;
/// Lines of output are this long, so that they tell where they belong.
const LINE: u64 = 16;

/// What `written` says once it says the same for a while.
async fn settled(written: impl Fn() -> u64) -> u64 {
    let settling = async {
        let (mut last, mut same) = (0, 0);
        while same < 20 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let now = written();
            same = if now == last && now > 0 { same + 1 } else { 0 };
            last = now;
        }
        last
    };
    tokio::time::timeout(PATIENCE, settling).await.expect("something is written")
}

async fn output_waits_for_its_reader(world: World) {
    let id = world.capsule().await;
    let dir = tempfile::tempdir().unwrap();
    let progress = dir.path().join("progress");
    let script = format!(
        "stty raw 2>/dev/null; exec awk 'BEGIN {{ for (i = 0; i < {}; i++) {{ printf \"%0{}d\\n\", i; \
         if (i % 4096 == 0) {{ print i * {LINE} >\"{}\"; close(\"{}\") }} }} }}'",
        ALL / LINE,
        LINE - 1,
        progress.display(),
        progress.display(),
    );
    for what in ["exec/stream", "pty"] {
        let _ = std::fs::remove_file(&progress);
        let start = json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", script], "encoding": "base64"});
        let mut socket = Socket::open(&world, id, what, start).await;
        let written = || std::fs::read_to_string(&progress).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let held_at = settled(written).await;
        assert!(held_at < BETWEEN, "{what}: {held_at} bytes were written to a client that reads nothing");
        let (mut read, mut rest) = (0, Vec::new());
        let code = loop {
            let Message::Text(text) = socket.next().await else { continue };
            let told: serde_json::Value = serde_json::from_str(&text).unwrap();
            match told["type"].as_str().unwrap() {
                "stdout" | "output" => {
                    rest.extend(BASE64_STANDARD.decode(told["data"].as_str().unwrap()).unwrap());
                    let whole = rest.len() - rest.len() % LINE as usize;
                    for line in rest.drain(..whole).collect::<Vec<u8>>().chunks(LINE as usize) {
                        let number: u64 = std::str::from_utf8(line).unwrap().trim_end().parse().unwrap();
                        assert_eq!(number * LINE, read, "{what}");
                        read += LINE;
                    }
                }
                "exit" => break told["exit_code"].as_i64(),
                _ => {}
            }
        };
        assert_eq!((read, code), (ALL, Some(0)), "{what}");
        world.until_idle(id).await;
    }
}

async fn an_answer_waits_for_its_reader(world: World) {
    let id = world.capsule().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let written = Arc::new(AtomicU64::new(0));
    let count = written.clone();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await.unwrap();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {ALL}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        for piece in 0..ALL >> 16 {
            stream.write_all(&vec![piece as u8; 1 << 16]).await.unwrap();
            count.fetch_add(1 << 16, Ordering::Relaxed);
        }
    });
    let mut answer = world.visit(Method::GET, id, port, "/").send().await.unwrap();
    let held_at = settled(|| written.load(Ordering::Relaxed)).await;
    assert!(held_at < BETWEEN, "{held_at} bytes were written to a client that reads nothing");
    let mut read = 0;
    while let Some(chunk) = answer.chunk().await.unwrap() {
        // Each piece has its own byte.
        for part in chunk.chunks(1 << 10) {
            let ends = [(part[0], read), (part[part.len() - 1], read + part.len() as u64 - 1)];
            assert!(ends.iter().all(|(byte, at)| *byte == (at >> 16) as u8), "at {read}");
            read += part.len() as u64;
        }
    }
    assert_eq!(read, ALL);
}

async fn a_flood_of_one_capsule_leaves_the_terminals_of_others(world: World) {
    let (loud, quiet) = (world.capsule().await, world.capsule().await);
    let passed = Arc::new(AtomicU64::new(0));
    let mut floods = tokio::task::JoinSet::<()>::new();
    // More of them than there are threads, and as many that read nothing.
    for number in 0..8 {
        let start = json!({"type": "start", "cmd": "/usr/bin/yes"});
        let mut socket = Socket::open(&world, loud, "exec/stream", start).await;
        let passed = passed.clone();
        floods.spawn(async move {
            if number % 2 == 1 {
                return std::future::pending().await;
            }
            loop {
                passed.fetch_add(socket.next().await.len() as u64, Ordering::Relaxed);
            }
        });
    }
    let start = json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", "stty raw -echo; echo ready; exec cat"]});
    let mut terminal = Socket::open(&world, quiet, "pty", start).await;
    terminal.told().await;
    terminal.shows("ready").await;
    while passed.load(Ordering::Relaxed) < WAITED_FOR {
        tokio::task::yield_now().await;
    }
    let mut floods_of_keys = Vec::new();
    for key in 0..30 {
        let before = passed.load(Ordering::Relaxed);
        let key = format!("<{key}>");
        terminal.write(&key).await;
        terminal.shows(&key).await;
        floods_of_keys.push(passed.load(Ordering::Relaxed) - before);
    }
    floods_of_keys.sort_unstable();
    assert!(floods_of_keys[29] > 0, "there is no flood");
    assert!(floods_of_keys[15] < WAITED_FOR, "bytes of another capsule's that passed for each key: {floods_of_keys:?}");
    floods.shutdown().await;
}
