//! What clients and destinations that mean harm send through the proxy: each attack is named after what it would do. Requests
//! that two programs could understand in two ways are tried where they come in, in `crates/control/tests/api/edge_raw.rs`.

use std::convert::Infallible;
use std::net::SocketAddr;

use axum::body::Body;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use proxy::{Answer, BoxBody, Upstream, boxed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A listener, and a server before it that passes everything on.
async fn pair() -> (TcpListener, SocketAddr) {
    let destination = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = Upstream::strangers(destination.local_addr().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let front = listener.local_addr().unwrap();
    let service = tower::service_fn(move |request: Request<Incoming>| pass(upstream.clone(), request));
    tokio::spawn(async move { proxy::serve(listener, service, std::future::pending()).await });
    (destination, front)
}

async fn pass(upstream: Upstream, request: Request<Incoming>) -> Result<Response<BoxBody>, Infallible> {
    Ok(match upstream.exchange(request.map(boxed)).await {
        Ok(Answer::Whole(answer)) => answer,
        Ok(Answer::Upgraded(answer, tunnel)) => {
            tokio::spawn(async move { tunnel.carry(|| ()).await });
            answer
        }
        Err(_) => {
            let mut answer = Response::new(boxed(Body::empty()));
            *answer.status_mut() = StatusCode::BAD_GATEWAY;
            answer
        }
    })
}

async fn connect(to: SocketAddr, bytes: &str) -> TcpStream {
    let mut client = TcpStream::connect(to).await.unwrap();
    client.write_all(bytes.as_bytes()).await.unwrap();
    client
}

async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    while !read.ends_with(end.as_bytes()) {
        read.push(
            stream.read_u8().await.unwrap_or_else(|error| panic!("{error} after {:?}", String::from_utf8_lossy(&read))),
        );
    }
    String::from_utf8(read).unwrap()
}

/// Everything until the connection ends, in whatever way.
async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all).await;
    all
}

#[tokio::test]
async fn oversized_trailers_fill_nobodys_memory() {
    let trailers: String = (0..100_000).map(|index| format!("x-{index}: {}\r\n", "v".repeat(100))).collect();
    let (destination, front) = pair().await;
    let head = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n";
    let mut client = connect(front, head).await;
    let (mut server, _) = destination.accept().await.unwrap();
    until(&mut server, "abc\r\n").await;
    // It may be cut before it has sent all of it.
    let sent = client.write_all(format!("{trailers}\r\n").as_bytes()).await;
    let arrived = rest(&mut server).await;
    assert!(arrived.len() < 64 << 10, "{} bytes of trailers passed", arrived.len());
    drop((sent, client));

    let (destination, front) = pair().await;
    let mut client = connect(front, "GET / HTTP/1.1\r\nHost: h\r\nTE: trailers\r\nConnection: TE\r\n\r\n").await;
    let (mut server, _) = destination.accept().await.unwrap();
    until(&mut server, "\r\n\r\n").await;
    server.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n").await.unwrap();
    let _ = server.write_all(format!("{trailers}\r\n").as_bytes()).await;
    let arrived = rest(&mut client).await;
    assert!(arrived.len() < 64 << 10, "{} bytes of trailers passed", arrived.len());
}

#[tokio::test]
async fn trailers_change_nothing_that_was_decided() {
    let (destination, front) = pair().await;
    let request = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: host, content-length, transfer-encoding\r\n\r\n\
                   3\r\nabc\r\n0\r\nHost: evil\r\nContent-Length: 9\r\nTransfer-Encoding: identity\r\n\r\n";
    let _client = connect(front, request).await;
    let (mut server, _) = destination.accept().await.unwrap();
    let got = until(&mut server, "0\r\n\r\n").await.to_lowercase();
    assert!(!got.contains("host: evil") && !got.contains("content-length: 9"), "{got}");
}

#[tokio::test]
async fn an_upgrade_that_is_not_answered_with_101_tunnels_nothing() {
    let (destination, front) = pair().await;
    // Whoever believed that the connection is another protocol's now would pass the rest on as it is.
    let hidden = "GET /hidden HTTP/1.1\r\nHost: h\r\nX-Smuggled:  spaces\r\nConnection: close\r\n\r\n";
    let request = format!("GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n{hidden}");
    for answer in ["HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 426 No\r\nContent-Length: 0\r\n\r\n"] {
        let mut client = connect(front, &request).await;
        let (mut server, _) = destination.accept().await.unwrap();
        let got = until(&mut server, "\r\n\r\n").await;
        assert!(got.starts_with("GET / ") && !got.contains("hidden"), "{got}");
        server.write_all(answer.as_bytes()).await.unwrap();
        // It is a request like any other: read, and written anew.
        let got = until(&mut server, "\r\n\r\n").await;
        assert!(
            got.starts_with("GET /hidden ")
                && got.contains("x-smuggled: spaces\r\n")
                && !got.contains("connection: close"),
            "{got}"
        );
        server.write_all(b"HTTP/1.1 204 No\r\n\r\n").await.unwrap();
        drop(server);
        let answers = String::from_utf8(rest(&mut client).await).unwrap();
        assert_eq!(answers.matches("HTTP/1.1 ").count(), 2, "{answers}");
    }
}

#[tokio::test]
async fn an_answer_that_is_two_answers_is_one() {
    // A destination that answers more than it was asked, so that the next client gets what it wants them to get.
    let (destination, front) = pair().await;
    let mut client = connect(front, "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let (mut server, _) = destination.accept().await.unwrap();
    until(&mut server, "\r\n\r\n").await;
    let two = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    server.write_all(two.as_bytes()).await.unwrap();
    until(&mut client, "ok").await;
    let mut other = connect(front, "GET /2 HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let (mut second, _) = destination.accept().await.unwrap();
    until(&mut second, "\r\n\r\n").await;
    second.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood").await.unwrap();
    let answer = until(&mut other, "good").await;
    assert!(!answer.contains("evil"), "{answer}");
}

#[tokio::test]
async fn an_answer_that_can_be_understood_in_two_ways_is_none() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 40\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length: 2, 40\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nX y: z\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "evil\r\n\r\n",
    ] {
        let (destination, front) = pair().await;
        let mut client = connect(front, "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").await;
        let (mut server, _) = destination.accept().await.unwrap();
        until(&mut server, "\r\n\r\n").await;
        server.write_all(answer.as_bytes()).await.unwrap();
        drop(server);
        let got = String::from_utf8_lossy(&rest(&mut client).await).into_owned();
        assert!(got.starts_with("HTTP/1.1 502 ") && !got.contains("evil"), "{answer:?} became {got}");
    }
}
