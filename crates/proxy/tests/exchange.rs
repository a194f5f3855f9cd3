//! Exchanges through the proxy, byte for byte: raw sockets on both sides of a server that passes everything on.

use std::convert::Infallible;
use std::net::SocketAddr;

use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use proxy::{Answer, BoxBody, Error, Target, Upstream, boxed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Passes everything on to `to`.
async fn front(to: SocketAddr) -> SocketAddr {
    let upstream = Upstream::strangers(to);
    let (listener, address) = listener().await;
    let service = tower::service_fn(move |request: Request<Incoming>| pass(upstream.clone(), request));
    tokio::spawn(async move { proxy::serve(listener, service, std::future::pending()).await });
    address
}

async fn pass(upstream: Upstream, request: Request<Incoming>) -> Result<Response<BoxBody>, Infallible> {
    let answer = match upstream.exchange(request.map(boxed)).await {
        Ok(Answer::Whole(answer)) => answer,
        Ok(Answer::Upgraded(answer, tunnel)) => {
            tokio::spawn(async move { tunnel.carry(|| ()).await });
            answer
        }
        Err(error) => {
            let mut answer = Response::new(boxed(Body::from(format!("{error:?}"))));
            *answer.status_mut() = match error {
                Error::Connect(..) | Error::Nobody(..) => StatusCode::SERVICE_UNAVAILABLE,
                Error::Exchange(..) | Error::Switched(_) => StatusCode::BAD_GATEWAY,
            };
            answer
        }
    };
    Ok(answer)
}

/// Reads until `end` has been read, and no further than to it.
async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    while !read.ends_with(end.as_bytes()) {
        match stream.read_u8().await {
            Ok(byte) => read.push(byte),
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&read)),
        }
    }
    String::from_utf8(read).unwrap()
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

async fn connect(to: SocketAddr, request: &str) -> TcpStream {
    let mut client = TcpStream::connect(to).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    client
}

#[tokio::test]
async fn another_protocol_is_carried_until_each_direction_has_ended() {
    let (server, address) = listener().await;
    let front = front(address).await;
    let mut client =
        connect(front, "GET /x HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: Echo\r\n\r\n").await;
    let (mut server, _) = server.accept().await.unwrap();
    let head = until(&mut server, "\r\n\r\n").await;
    assert!(head.starts_with("GET /x HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("upgrade: Echo\r\n") && head.contains("connection: upgrade\r\n"), "{head}");
    // The first bytes come with the head.
    server
        .write_all(b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: Echo\r\nX-More: 1\r\n\r\nhello")
        .await
        .unwrap();
    let head = until(&mut client, "hello").await;
    assert!(head.contains("x-more: 1") && head.contains("upgrade: Echo"), "{head}");
    client.write_all(b"last words").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut server).await, "last words");
    // This direction goes on.
    server.write_all(b"answer").await.unwrap();
    drop(server);
    assert_eq!(rest(&mut client).await, "answer");
}

#[tokio::test]
async fn a_protocol_that_was_not_asked_for_is_refused() {
    for request in [
        "GET / HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n\r\n",
        "GET / HTTP/1.0\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nGET /",
    ] {
        let (server, address) = listener().await;
        let mut client = connect(front(address).await, request).await;
        let (mut server, _) = server.accept().await.unwrap();
        let head = until(&mut server, "\r\n\r\n").await;
        assert!(!head.to_lowercase().contains("upgrade"), "{head}");
        server.write_all(b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").await.unwrap();
        let head = until(&mut client, "\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 502 ") || head.starts_with("HTTP/1.0 502 "), "{request}: {head}");
    }
}

#[tokio::test]
async fn a_body_is_asked_for_only_once_the_destination_wants_it() {
    let (server, address) = listener().await;
    let front = front(address).await;
    let request = "POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    let mut client = connect(front, request).await;
    let (mut first, _) = server.accept().await.unwrap();
    assert!(until(&mut first, "\r\n\r\n").await.contains("expect: 100-continue"));
    first.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
    assert_eq!(until(&mut client, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"body").await.unwrap();
    until(&mut first, "body").await;
    first.write_all(b"HTTP/1.1 201 Made\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    assert!(until(&mut client, "\r\n\r\n").await.starts_with("HTTP/1.1 201 "));

    // One that is refused is never asked for.
    drop(first);
    let mut client = connect(front, request).await;
    let (mut second, _) = server.accept().await.unwrap();
    until(&mut second, "\r\n\r\n").await;
    second.write_all(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await.unwrap();
    assert!(until(&mut client, "\r\n\r\n").await.starts_with("HTTP/1.1 413 "));

    // And one whose destination never heard of asking is sent after a while.
    let mut client = connect(front, request).await;
    let (mut third, _) = server.accept().await.unwrap();
    until(&mut third, "\r\n\r\n").await;
    assert_eq!(until(&mut client, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"body").await.unwrap();
    until(&mut third, "body").await;
}

#[tokio::test]
async fn trailers_travel_both_ways() {
    let (server, address) = listener().await;
    let request = "POST / HTTP/1.1\r\nHost: h\r\nTE: trailers\r\nConnection: TE\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n\
                   3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n";
    let mut client = connect(front(address).await, request).await;
    let (mut server, _) = server.accept().await.unwrap();
    let got = until(&mut server, "x-sum: 1\r\n\r\n").await;
    assert!(got.contains("te: trailers\r\n") && got.contains("trailer: x-sum\r\n"), "{got}");
    server
        .write_all(
            b"HTTP/1.1 200 OK\r\nTrailer: x-end\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nz\r\n0\r\nx-end: 2\r\n\r\n",
        )
        .await
        .unwrap();
    let got = until(&mut client, "x-end: 2\r\n\r\n").await;
    assert!(got.contains("trailer: x-end\r\n") && got.contains("1\r\nz\r\n0\r\n"), "{got}");
}

#[tokio::test]
async fn a_head_is_answered_without_a_body_and_with_its_length() {
    let (server, address) = listener().await;
    let mut client = connect(front(address).await, "HEAD /f HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let (mut server, _) = server.accept().await.unwrap();
    assert!(until(&mut server, "\r\n\r\n").await.starts_with("HEAD /f "));
    server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n").await.unwrap();
    assert!(until(&mut client, "\r\n\r\n").await.contains("content-length: 1000000\r\n"));
    // The connection goes on where the head ends.
    client.write_all(b"GET /g HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
    assert!(until(&mut server, "\r\n\r\n").await.starts_with("GET /g "));
    server.write_all(b"HTTP/1.1 204 None\r\n\r\n").await.unwrap();
    assert!(until(&mut client, "\r\n\r\n").await.starts_with("HTTP/1.1 204 "));
}

#[tokio::test]
async fn many_and_large_headers_pass() {
    let (server, address) = listener().await;
    let many: String = (0..200).map(|index| format!("x-{index}: {index}\r\n")).collect();
    let large = "v".repeat(64 * 1024);
    let request = format!("GET / HTTP/1.1\r\nHost: h\r\n{many}X-Large: {large}\r\n\r\n");
    let mut client = connect(front(address).await, &request).await;
    let (mut server, _) = server.accept().await.unwrap();
    let got = until(&mut server, "\r\n\r\n").await;
    assert!(got.contains("x-199: 199\r\n") && got.contains(&large));
    server
        .write_all(format!("HTTP/1.1 200 OK\r\n{many}X-Large: {large}\r\nContent-Length: 0\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let got = until(&mut client, "\r\n\r\n").await;
    assert!(got.contains("x-199: 199\r\n") && got.contains(&large));
}

#[tokio::test]
async fn a_client_that_leaves_is_a_client_that_left_for_the_destination_too() {
    let (server, address) = listener().await;
    let front = front(address).await;
    // Before the answer, within it, and in another protocol.
    for answer in [
        "",
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n",
        "HTTP/1.1 101 Go\r\nUpgrade: e\r\n\r\n1\n\n",
    ] {
        let client = "GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: e\r\n\r\n";
        let mut client = connect(front, client).await;
        let (mut server, _) = server.accept().await.unwrap();
        until(&mut server, "\r\n\r\n").await;
        if !answer.is_empty() {
            server.write_all(answer.as_bytes()).await.unwrap();
            // It comes although more of it will follow.
            until(&mut client, "1\n\n").await;
        }
        drop(client);
        assert_eq!(server.read(&mut [0; 1]).await.unwrap_or(0), 0);
    }
}

#[tokio::test]
async fn who_accepts_and_resets_is_nobody_and_who_closes_is_somebody() {
    let (server, address) = listener().await;
    let resetting = tokio::spawn(async move {
        loop {
            let (mut stream, _) = server.accept().await.unwrap();
            // Later than a dial takes.
            let _ = stream.read(&mut [0; 1]).await;
            stream.set_zero_linger().unwrap();
        }
    });
    let mut client = connect(front(address).await, "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n").await;
    let head = until(&mut client, "Nobody").await;
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    resetting.abort();

    let (server, address) = listener().await;
    let front = front(address).await;
    let mut client = connect(front, "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n").await;
    let (mut stream, _) = server.accept().await.unwrap();
    until(&mut stream, "\r\n\r\n").await;
    drop(stream);
    assert!(until(&mut client, "\r\n\r\n").await.starts_with("HTTP/1.1 502 "));
}

#[tokio::test]
async fn a_kept_connection_that_is_closed_costs_nobody_a_page() {
    let (server, address) = listener().await;
    let mut client = connect(front(address).await, "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let (mut first, _) = server.accept().await.unwrap();
    until(&mut first, "\r\n\r\n").await;
    first.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    until(&mut client, "ok").await;
    client.write_all(b"GET /2 HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
    // The server reads the second request and then thinks better of it.
    assert!(until(&mut first, "\r\n\r\n").await.starts_with("GET /2 "));
    drop(first);
    let (mut second, _) = server.accept().await.unwrap();
    assert!(until(&mut second, "\r\n\r\n").await.starts_with("GET /2 "));
    second.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
    until(&mut client, "no").await;
    // What may have been done is not done twice.
    client.write_all(b"POST /3 HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    until(&mut second, "\r\n\r\n").await;
    drop(second);
    assert!(until(&mut client, "\r\n\r\n").await.starts_with("HTTP/1.1 502 "));
}

/// Bytes that fill every buffer between two ends.
const MUCH: usize = 32 << 20;

#[tokio::test]
async fn an_answer_that_nobody_reads_yet_holds_up_no_request() {
    let (server, address) = listener().await;
    let head = format!("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {MUCH}\r\n\r\n");
    let mut client = connect(front(address).await, &head).await;
    let (server, _) = server.accept().await.unwrap();
    let (mut from, mut to) = server.into_split();
    // It says all it has to say before it has heard all.
    let answering = tokio::spawn(async move {
        to.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {MUCH}\r\n\r\n").as_bytes()).await.unwrap();
        to.write_all(&vec![b'a'; MUCH]).await.unwrap();
        to
    });
    let hearing = tokio::spawn(async move {
        let mut heard = 0;
        let mut buffer = vec![0; 64 << 10];
        while heard < MUCH {
            let more = from.read(&mut buffer).await.unwrap();
            assert!(more > 0, "the request ends after {heard} bytes");
            heard += more;
        }
        from
    });
    assert!(until(&mut client, "\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
    client.write_all(&vec![b'q'; MUCH]).await.unwrap();
    hearing.await.unwrap();
    let mut body = vec![0; MUCH];
    client.read_exact(&mut body).await.unwrap();
    assert!(body.iter().all(|byte| *byte == b'a'));
    answering.await.unwrap();
}

#[tokio::test]
async fn a_connection_is_kept_after_any_answer_that_says_where_it_ends() {
    let (server, address) = listener().await;
    let mut client = connect(front(address).await, "").await;
    let mut kept = None;
    for (request, answer, end) in [
        ("GET /1", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok"),
        ("HEAD /2", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", "\r\n\r\n"),
        ("GET /3", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "0\r\n\r\n"),
        ("GET /4", "HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n", "\r\n\r\n"),
        ("GET /5", "HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n", ""),
        ("GET /6", "HTTP/1.1 204 None\r\n\r\n", "\r\n\r\n"),
    ] {
        client.write_all(format!("{request} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await.unwrap();
        let server = match &mut kept {
            Some(kept) => kept,
            None => kept.insert(server.accept().await.unwrap().0),
        };
        assert!(until(server, "\r\n\r\n").await.starts_with(request), "{request}");
        server.write_all(answer.as_bytes()).await.unwrap();
        if end.is_empty() {
            until(&mut client, "\r\n\r\n").await;
            // More than comes at once.
            let mut body = vec![0; 3_000_000];
            let (sent, read) = tokio::join!(server.write_all(&[b'x'; 3_000_000]), client.read_exact(&mut body));
            sent.and(read.map(drop)).unwrap();
        } else {
            until(&mut client, end).await;
        }
    }
}

#[tokio::test]
async fn a_connection_that_nobody_uses_is_closed_before_its_server_would() {
    let (server, address) = listener().await;
    let mut client = connect(front(address).await, "GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let (mut server, _) = server.accept().await.unwrap();
    until(&mut server, "\r\n\r\n").await;
    server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    until(&mut client, "ok").await;
    // Nothing is on its way any more, which the clock would overtake.
    tokio::time::pause();
    assert_eq!(rest(&mut server).await, "");
}

#[tokio::test]
async fn what_a_kept_connection_never_took_is_sent_on_another() {
    let (server, address) = listener().await;
    let mut client = connect(front(address).await, "GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let (mut first, _) = server.accept().await.unwrap();
    until(&mut first, "\r\n\r\n").await;
    // It is closed at once, while nobody looks, or something comes that nobody asked for.
    first.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    until(&mut client, "ok").await;
    for unasked in ["", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"] {
        first.write_all(unasked.as_bytes()).await.unwrap();
        if unasked.is_empty() {
            first.shutdown().await.unwrap();
        }
        // Until the proxy can know.
        tokio::task::yield_now().await;
        client.write_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody").await.unwrap();
        let (mut next, _) = server.accept().await.unwrap();
        assert!(until(&mut next, "body").await.starts_with("POST / "));
        next.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood").await.unwrap();
        assert!(until(&mut client, "good").await.starts_with("HTTP/1.1 200 "));
        first = next;
    }
}

#[tokio::test]
async fn nothing_listens_there() {
    let (server, address) = listener().await;
    drop(server);
    let error = Upstream::strangers(address).exchange(Request::new(boxed(Body::empty()))).await.err().unwrap();
    assert!(matches!(&error, Error::Connect(Target::Address(at), _) if *at == address), "{error:?}");
}

#[tokio::test]
async fn an_http_1_0_client_gets_an_answer_it_understands() {
    let (server, address) = listener().await;
    let mut client = connect(front(address).await, "GET / HTTP/1.0\r\n\r\n").await;
    let (mut server, _) = server.accept().await.unwrap();
    assert!(until(&mut server, "\r\n\r\n").await.starts_with("GET / HTTP/1.1\r\n"));
    server
        .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
        .await
        .unwrap();
    let answer = rest(&mut client).await;
    assert!(answer.ends_with("\r\n\r\nabc") && !answer.contains("chunked"), "{answer}");
}

#[tokio::test]
async fn a_slow_head_is_cut_and_an_idle_connection_is_not() {
    let (server, address) = listener().await;
    let (front_listener, front) = listener().await;
    let service = tower::service_fn(|request: Request<Incoming>| async move {
        Ok::<_, Infallible>(Response::new(Body::from(Bytes::from(request.uri().to_string()))))
    });
    drop((server, address));
    tokio::spawn(async move { proxy::serve(front_listener, service, std::future::pending()).await });
    let mut slow = connect(front, "GET /slow HTTP/1.1\r\nHo").await;
    let mut client = connect(front, "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n").await;
    until(&mut client, "/1").await;
    // What is on its way, the clock would overtake.
    tokio::time::pause();
    assert_eq!(rest(&mut slow).await, "");
    tokio::time::sleep(std::time::Duration::from_secs(600)).await;
    tokio::time::resume();
    client.write_all(b"GET /2 HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
    until(&mut client, "/2").await;
    tokio::time::pause();
    // Until it has been idle for too long.
    assert_eq!(rest(&mut client).await, "");
}

#[tokio::test]
async fn a_stop_lets_what_is_open_end() {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (listener, address) = listener().await;
    let (asked, mut hear) = tokio::sync::mpsc::channel::<()>(1);
    let gate = std::sync::Arc::new(tokio::sync::Notify::new());
    let open = gate.clone();
    let service = tower::service_fn(move |_: Request<Incoming>| {
        let (asked, open) = (asked.clone(), open.clone());
        async move {
            asked.send(()).await.unwrap();
            open.notified().await;
            Ok::<_, Infallible>(Response::new(Body::from("done")))
        }
    });
    let served = tokio::spawn(async move {
        proxy::serve(listener, service, async {
            let _ = stopped.await;
        })
        .await;
    });
    let mut client = connect(address, "GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
    hear.recv().await.unwrap();
    drop(stop);
    gate.notify_one();
    assert!(rest(&mut client).await.ends_with("done"));
    served.await.unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}
