//! Requests that no client means well with, byte by byte: each is either refused or reaches the program as the one request
//! that it is.

use api::CapsuleId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::edge::{Program, host};
use crate::world::{World, on_both};

on_both![
    what_can_be_understood_in_two_ways_is_refused,
    what_is_odd_but_clear_arrives_as_one_request,
    what_is_hidden_in_headers_stays_behind,
    an_old_client_is_served,
];

/// What comes back on a connection on which `bytes` are sent and then nothing more.
async fn say(world: &World, bytes: &str) -> String {
    let mut stream = TcpStream::connect(world.address()).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut read = [0; 4096];
    loop {
        // The first answer is what matters; connections that live on are left.
        match stream.read(&mut read).await {
            Ok(0) | Err(_) => break,
            Ok(length) => answer.extend_from_slice(&read[..length]),
        }
        if answer.windows(4).any(|end| end == b"\r\n\r\n") {
            break;
        }
    }
    String::from_utf8(answer).unwrap()
}

fn ports(id: CapsuleId, program: &Program) -> [String; 2] {
    [host(id, program.port), format!("{}-{id}.wrenn.test", program.port)]
}

async fn what_can_be_understood_in_two_ways_is_refused(world: World) {
    let id = world.capsule().await;
    let mut program = Program::saying_ok().await;
    let [host, _] = ports(id, &program);
    let other = format!("{}-{}.wrenn.test", program.port, CapsuleId::random());
    for request in [
        // Two lengths.
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5, 5\r\n\r\nhello"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: +5\r\n\r\nhello"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0x5\r\n\r\nhello"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: -1\r\n\r\n"),
        // Encodings that are chunked for one and not for the other.
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        format!(
            "POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"
        ),
        format!("POST / HTTP/1.0\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n"),
        // Lines that end early, go on, or begin with what no line begins with.
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nX: a\r\n b\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n Host: {host}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nX: a\rY: b\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nX: a\0b\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nX y: a\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\n: a\r\n\r\n"),
        format!("GET /a b HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("GET / HTTP/1.1 \r\nHost: {host}\r\n\r\n"),
        format!("GET / HTTP/2.0\r\nHost: {host}\r\n\r\n"),
        format!("GET /\r\nHost: {host}\r\n\r\n"),
        // Hosts that are none, several, or contradict the target.
        "GET / HTTP/1.1\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: \r\nHost: \r\n\r\n".into(),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nHost: localhost\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}, localhost\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}/x\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: localhost@{host}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}\\@localhost\r\n\r\n"),
        format!("GET http://{other}/ HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("GET http://localhost/v1/capsules HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("GET http://{host}/ HTTP/1.1\r\n\r\n"),
        format!("GET http://localhost@{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        // Targets that are no paths.
        format!("CONNECT {host}:80 HTTP/1.1\r\nHost: {host}:80\r\n\r\n"),
        format!("CONNECT 10.0.0.1:80 HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("OPTIONS * HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("GET \\evil HTTP/1.1\r\nHost: {host}\r\n\r\n"),
    ] {
        let answer = say(&world, &request).await;
        let is_refused =
            ["HTTP/1.1 400 ", "HTTP/1.0 400 ", "HTTP/1.1 505 "].iter().any(|start| answer.starts_with(start));
        assert!(is_refused || answer.is_empty(), "{request:?} is answered {answer}");
        assert!(program.is_quiet(), "{request:?} arrived");
    }
}

async fn what_is_odd_but_clear_arrives_as_one_request(world: World) {
    let id = world.capsule().await;
    let mut program = Program::saying_ok().await;
    let [host, _] = ports(id, &program);
    // Whoever believes the length would find a second request in the body.
    let hidden = "0\r\n\r\nGET /hidden HTTP/1.1\r\nHost: x\r\n\r\n";
    for (request, begins) in [
        (format!("GET http://{host}/abs?q HTTP/1.1\r\nHost: {host}\r\n\r\n"), "GET /abs?q HTTP/1.1"),
        (format!("GET http://{host} HTTP/1.1\r\nHost: {host}\r\n\r\n"), "GET / HTTP/1.1"),
        (format!("GET /dot HTTP/1.1\r\nHost: {host}.\r\n\r\n"), "GET /dot HTTP/1.1"),
        (format!("GET /port HTTP/1.1\r\nHost: {host}:9725\r\n\r\n"), "GET /port HTTP/1.1"),
        (format!("GET /upper HTTP/1.1\r\nHOST: {}\r\n\r\n", host.to_uppercase()), "GET /upper HTTP/1.1"),
        (format!("GET //../%2e%2e/;x HTTP/1.1\r\nHost: {host}\r\n\r\n"), "GET //../%2e%2e/;x HTTP/1.1"),
        (
            format!("POST /cl HTTP/1.1\r\nHost: {host}\r\nContent-Length: {}\r\n\r\n{hidden}", hidden.len()),
            "POST /cl HTTP/1.1",
        ),
        (
            format!(
                "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close, Host, Content-Length, X-Forwarded-For\r\n\r\n"
            ),
            "GET / HTTP/1.1",
        ),
    ] {
        let answer = say(&world, &request).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{request:?}: {answer}");
        let seen = program.request().await;
        assert!(seen.starts_with(begins), "{seen}");
        let lower = seen.split("\r\n\r\n").next().unwrap().to_lowercase();
        assert_eq!(lower.matches("\r\nhost: ").count(), 1, "{seen}");
        assert_eq!(lower.contains("content-length: "), begins.starts_with("POST"), "{seen}");
        assert!(!lower.contains("transfer-encoding"), "{seen}");
        assert!(program.is_quiet());
    }
    // Both a length and chunks: what arrives has one of them.
    let both = format!(
        "POST /both HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n{hidden}"
    );
    let answer = say(&world, &both).await;
    if answer.starts_with("HTTP/1.1 200 ") {
        let seen = program.request().await.to_lowercase();
        assert!(seen.contains("transfer-encoding: chunked\r\n") && !seen.contains("content-length"), "{seen}");
        assert!(!seen.contains("hidden"), "{seen}");
    } else {
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
    assert!(program.is_quiet());
}

async fn what_is_hidden_in_headers_stays_behind(world: World) {
    let id = world.capsule().await;
    let mut program = Program::saying_ok().await;
    let [host, _] = ports(id, &program);
    // Chunks that end in different places for different readers never end the request in two places.
    for chunks in [
        "5;a=\"\r\nhello\r\n0\r\n\r\n",
        "5\nhello\r\n0\r\n\r\n",
        "ffffffffffffffff5\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "5 \r\nhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "\r\nhello\r\n0\r\n\r\n",
    ] {
        let smuggled = "GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n";
        let request =
            format!("POST /chunks HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}{smuggled}");
        say(&world, &request).await;
        // The head may have been on its way when the body turned out wrong.
        let seen =
            tokio::time::timeout(std::time::Duration::from_millis(200), program.request()).await.unwrap_or_default();
        assert!(!seen.contains("/hidden"), "{chunks:?}: {seen}");
    }
    let key = &world.key;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nX_API_Key: {key}\r\nx-API-key: {key}\r\nX-Wrenn-Refusal: closed\r\n\
         E2b_Sandbox_Id: x\r\nConnection: close\r\n\r\n"
    );
    assert!(say(&world, &request).await.starts_with("HTTP/1.1 200 "));
    let seen = program.request().await.to_lowercase();
    for word in [key.as_str(), "refusal", "sandbox"] {
        assert!(!seen.contains(word), "{seen}");
    }
}

async fn an_old_client_is_served(world: World) {
    let id = world.capsule().await;
    let mut program = Program::saying_ok().await;
    let [host, _] = ports(id, &program);
    let answer = say(&world, &format!("GET /old HTTP/1.0\r\nHost: {host}\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.0 200 ") || answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(program.request().await.starts_with("GET /old HTTP/1.1"));
    // Without a Host it is nobody's but the API's.
    assert!(say(&world, "GET /health HTTP/1.0\r\n\r\n").await.contains(" 200 "));
}
