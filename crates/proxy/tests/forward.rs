//! The proxy between a real client body and a real server.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::routing::{any, post};
use bytes::Bytes;
use http_body_util::BodyExt;
use proxy::{Error, Upstream, boxed};
use tokio::net::{TcpListener, TcpSocket};

async fn server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new()
        .route("/echo", post(|body: Body| async { body }))
        .fallback(any(|request: Request| async move { request.uri().to_string() }));
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

#[tokio::test]
async fn path_and_query_arrive_as_they_were_sent() {
    let upstream = Upstream::new(server().await);
    for path in ["/", "/a//b/", "/a%2Fb?x=%20&y", "/caf%C3%A9/"] {
        let request = http::Request::get(path).body(boxed(Body::empty())).unwrap();
        let answer = upstream.forward(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
        assert_eq!(answer, path.as_bytes());
    }
}

#[tokio::test]
async fn a_body_streams_through_while_it_is_still_being_sent() {
    let upstream = Upstream::new(server().await);
    let (send, receive) = tokio::sync::mpsc::channel::<Bytes>(1);
    let frames = futures::stream::unfold(receive, |mut receive| async {
        receive.recv().await.map(|chunk| (Ok::<_, std::io::Error>(chunk), receive))
    });
    send.send(Bytes::from_static(b"first")).await.unwrap();
    let request = http::Request::post("/echo").body(boxed(Body::from_stream(frames))).unwrap();
    let mut answer = upstream.forward(request).await.unwrap().into_body();
    let first = answer.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, b"first"[..]);
    send.send(Bytes::from_static(b"second")).await.unwrap();
    drop(send);
    assert_eq!(answer.collect().await.unwrap().to_bytes(), b"second"[..]);
}

/// A port that is taken, at which nobody listens.
fn nobody() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    socket
}

#[tokio::test]
async fn a_server_that_is_late_is_waited_for() {
    let socket = nobody();
    let address = socket.local_addr().unwrap();
    let answer = tokio::spawn(async move {
        Upstream::new(address).forward(http::Request::get("/").body(boxed(Body::empty())).unwrap()).await
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let listener = socket.listen(1).unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(any(|| async { "late" }))).await });
    assert_eq!(answer.await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn nobody_there_is_a_connect_error() {
    let socket = nobody();
    let address = socket.local_addr().unwrap();
    let error = Upstream::new(address)
        .forward(http::Request::get("/").body(boxed(Body::empty())).unwrap())
        .await
        .err()
        .unwrap();
    assert!(matches!(&error, Error::Connect(at, _) if *at == address.into()), "{error:?}");
}
