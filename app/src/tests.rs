//! Over real sockets. They assert against the constants, so that you can change the greeting alone.

use super::{Duration, GREETING, TcpListener, serve};
use std::net::SocketAddr;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

const LINGER: Duration = Duration::from_millis(300);
const DRAIN: Duration = Duration::from_millis(300);

struct Served {
    addr: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<std::io::Result<()>>,
}

async fn start() -> Served {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let stop_signal = async move {
        stopped.await.unwrap();
        LINGER
    };
    let ended = tokio::spawn(serve(listener, stop_signal, DRAIN));
    Served { addr, stop, ended }
}

/// The status, the content type and the body.
async fn get(addr: SocketAddr, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head[9..12].parse().unwrap();
    let content_type = head
        .lines()
        .find_map(|line| line.strip_prefix("content-type: "))
        .unwrap_or_default();
    (status, content_type.into(), body.into())
}

#[tokio::test]
async fn the_root_greets() {
    let app = start().await;
    let (status, content_type, body) = get(app.addr, "/").await;
    assert_eq!((status, body.as_str()), (200, GREETING));
    assert_eq!(content_type, "text/plain; charset=utf-8");
}

#[tokio::test]
async fn health_and_ready_answer_the_agreed_bytes() {
    let app = start().await;
    let json = || String::from("application/json");
    let health = r#"{"status":"healthy","message":"Service is running"}"#;
    assert_eq!(get(app.addr, "/health").await, (200, json(), health.into()));
    let ready = r#"{"status":"ready","message":"Service is ready to accept traffic"}"#;
    assert_eq!(get(app.addr, "/ready").await, (200, json(), ready.into()));
}

#[tokio::test]
async fn version_names_the_commit_and_the_start() {
    let app = start().await;
    let (status, _, body) = get(app.addr, "/version").await;
    assert_eq!(status, 200);
    let version: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert!(version["commit"].is_string(), "{body}");
    let started_at = version["started_at"].as_str().unwrap();
    let started_at: jiff::Timestamp = started_at.parse().unwrap();
    assert!(started_at <= jiff::Timestamp::now(), "{body}");
}

#[tokio::test]
async fn an_unknown_path_is_404() {
    let app = start().await;
    assert_eq!(get(app.addr, "/nothing").await.0, 404);
    assert_eq!(get(app.addr, "/health/").await.0, 404);
}

#[tokio::test]
async fn told_to_stop_it_is_unready_but_still_accepts_and_then_ends() {
    let app = start().await;
    let told = Instant::now();
    app.stop.send(()).unwrap();
    // Bounded by the linger: once that is over, the connection is refused and `get` panics.
    while get(app.addr, "/ready").await.0 != 503 {}
    assert_eq!(get(app.addr, "/").await.0, 200);
    app.ended.await.unwrap().unwrap();
    assert!(told.elapsed() >= LINGER);
    assert!(TcpStream::connect(app.addr).await.is_err());
}

#[tokio::test]
async fn a_request_under_way_is_finished_during_the_drain() {
    let app = start().await;
    let mut stream = TcpStream::connect(app.addr).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    app.stop.send(()).unwrap();
    sleep(LINGER + DRAIN / 3).await;
    stream.write_all(b"Host: app\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with(GREETING), "{answer}");
    app.ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_request_that_never_ends_does_not_hold_it_up() {
    let app = start().await;
    let mut stream = TcpStream::connect(app.addr).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    app.stop.send(()).unwrap();
    let ended = timeout(Duration::from_secs(5), app.ended).await;
    ended.expect("it must end by itself").unwrap().unwrap();
}
