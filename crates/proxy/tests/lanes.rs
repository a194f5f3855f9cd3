//! Connections that change their lane: what is asked for aside waits for nobody at home, nor the other way round.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use proxy::{Answer, BoxBody, Lane, Upstream, boxed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What the threads aside are called.
const ASIDE: &str = "wrenn-ports";

/// A door that can be waited at by a thread, not only by a task.
#[derive(Default)]
struct Door(Mutex<(usize, bool)>, Condvar);

impl Door {
    fn wait(&self) {
        let mut state = self.0.lock().unwrap();
        state.0 += 1;
        self.1.notify_all();
        drop(self.1.wait_while(state, |(_, open)| !*open).unwrap());
    }

    fn until_waiting(&self, count: usize) {
        drop(self.1.wait_while(self.0.lock().unwrap(), |(waiting, _)| *waiting < count).unwrap());
    }

    fn open(&self) {
        self.0.lock().unwrap().1 = true;
        self.1.notify_all();
    }
}

/// Answers with the thread that did it, and what the body was. `/aside…` is done aside, `/door` waits there with its thread.
async fn answer(request: Request<Incoming>, door: Arc<Door>) -> Result<Response<BoxBody>, Infallible> {
    let path = request.uri().path().to_owned();
    if path.starts_with("/aside") {
        proxy::aside(request.extensions()).await;
    } else {
        proxy::back(request.extensions()).await;
    }
    if path.starts_with("/aside/door") {
        door.wait();
    }
    let thread = || std::thread::current().name().unwrap_or_default().to_owned();
    let lane = request.extensions().get::<Lane>().cloned().unwrap();
    let spawned = tokio::spawn(async move { thread() }).await.unwrap();
    let home = lane.at_home(async move { thread() }).await;
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let head = format!("{} {spawned} {home}\n", thread());
    Ok(Response::new(boxed(Full::new([head.as_bytes(), &body].concat().into()))))
}

async fn server(door: Arc<Door>, stop: impl Future<Output = ()> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = tower::service_fn(move |request| answer(request, door.clone()));
    tokio::spawn(proxy::serve(listener, service, stop));
    address
}

async fn ask(stream: &mut TcpStream, path: &str, body: &[u8]) -> String {
    let head = format!("POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n", body.len());
    let (mut from, mut to) = stream.split();
    let write = async {
        to.write_all(head.as_bytes()).await.unwrap();
        to.write_all(body).await.unwrap();
    };
    tokio::join!(write, read(&mut from)).1
}

/// What comes before a body.
async fn head(from: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(from.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// One answer's body.
async fn read(from: &mut (impl AsyncReadExt + Unpin)) -> String {
    let head = head(from).await;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    from.read_exact(&mut body).await.unwrap();
    String::from_utf8(body).unwrap()
}

#[tokio::test]
async fn a_connection_changes_its_lane_with_what_it_is_asked_for() {
    let address = server(Arc::default(), std::future::pending()).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    // More than any buffer on the way holds.
    let body = "0123456789abcdef".repeat(1 << 18);
    for round in 0..4 {
        for (path, is_aside) in [("/", false), ("/aside", true), ("/aside", true), ("/", false), ("/", false)] {
            let text = ask(&mut stream, path, body.as_bytes()).await;
            let (threads, rest) = text.split_once('\n').unwrap();
            let threads: Vec<bool> = threads.split(' ').map(|thread| thread == ASIDE).collect();
            assert_eq!(threads, [is_aside, is_aside, false], "{path} in round {round}");
            assert!(rest == body, "{path} in round {round}");
        }
    }
}

#[tokio::test]
async fn who_is_at_home_waits_for_nobody_aside() {
    let door = Arc::new(Door::default());
    let address = server(door.clone(), std::future::pending()).await;
    // Every thread that there is aside.
    let threads = proxy::threads_aside();
    let held: Vec<_> = (0..threads)
        .map(|_| {
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                ask(&mut stream, "/aside/door", b"").await
            })
        })
        .collect();
    let waiting = door.clone();
    tokio::task::spawn_blocking(move || waiting.until_waiting(threads)).await.unwrap();
    for _ in 0..10 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert!(!ask(&mut stream, "/", b"").await.starts_with(ASIDE));
    }
    door.open();
    for held in held {
        assert!(held.await.unwrap().starts_with(ASIDE));
    }
}

#[tokio::test]
async fn what_is_aside_comes_to_its_end_before_the_server_does() {
    let door = Arc::new(Door::default());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let inside = door.clone();
    let service = tower::service_fn(move |request| answer(request, inside.clone()));
    let serving = tokio::spawn(proxy::serve(listener, service, async move { drop(stopped.await) }));
    let asked = tokio::spawn(async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let answer = ask(&mut stream, "/aside/door", b"last words").await;
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "the connection is closed after the answer");
        answer
    });
    let waiting = door.clone();
    tokio::task::spawn_blocking(move || waiting.until_waiting(1)).await.unwrap();
    drop(stop);
    tokio::task::yield_now().await;
    assert!(!serving.is_finished());
    door.open();
    assert!(asked.await.unwrap().ends_with("last words"));
    serving.await.unwrap();
}

#[tokio::test]
async fn a_tunnel_is_carried_aside() {
    let (server, upstream) = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, Upstream::strangers(address))
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (carried, by) = tokio::sync::oneshot::channel();
    let carried = Arc::new(Mutex::new(Some(carried)));
    let service = tower::service_fn(move |request: Request<Incoming>| {
        let (upstream, carried) = (upstream.clone(), carried.clone());
        async move {
            proxy::aside(request.extensions()).await;
            let Ok(Answer::Upgraded(answer, tunnel)) = upstream.exchange(request.map(boxed)).await else { panic!() };
            tokio::spawn(async move {
                tunnel.carry(|| ()).await.unwrap();
                carried.lock().unwrap().take().unwrap().send(std::thread::current().name().map(str::to_owned)).unwrap();
            });
            Ok::<_, Infallible>(answer)
        }
    });
    tokio::spawn(proxy::serve(listener, service, std::future::pending()));
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").await.unwrap();
    let (mut server, _) = server.accept().await.unwrap();
    head(&mut server).await;
    server.write_all(b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").await.unwrap();
    let body = Bytes::from("fedcba9876543210".repeat(1 << 18));
    let (mut from, mut to) = server.split();
    let echo = async { tokio::io::copy(&mut from, &mut tokio::io::sink()).await.unwrap() };
    let send = async {
        to.write_all(&body).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let receive = async {
        let (mut from, mut to) = client.split();
        to.write_all(&body).await.unwrap();
        to.shutdown().await.unwrap();
        let mut text = Vec::new();
        from.read_to_end(&mut text).await.unwrap();
        text
    };
    let (_, _, text) = tokio::join!(echo, send, receive);
    let end = text.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    assert!(text[end..] == body);
    assert_eq!(by.await.unwrap().as_deref(), Some(ASIDE));
}
