//! An agent on the wire for the command line: one build whose log comes over connections that break.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

pub const TOKEN: &str = "canary-token-0123456789";

/// How a connection of the live log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With `end`, after the last line.
    End,
    /// Cut in the middle of the event behind so many lines.
    CutAfter(usize),
    /// Closed properly behind so many lines, without `end`.
    CloseAfter(usize),
    /// 503 and no line.
    Busy,
    /// Never: after so many lines nothing more is said.
    HangAfter(usize),
}

#[derive(Debug)]
pub struct Play {
    pub build: Value,
    pub lines: Vec<String>,
    /// One for each connection; the last one counts for all that follow.
    pub endings: Vec<Ending>,
    /// `Last-Event-ID` of each connection.
    pub asked: Vec<i64>,
    pub posts: Vec<String>,
}

#[derive(Clone)]
pub struct FakeAgent {
    pub address: SocketAddr,
    play: Arc<Mutex<Play>>,
}

pub fn build(status: &str, outcome: &str) -> Value {
    json!({
        "id": 42, "environment": "hello", "repository": "acme/hello", "branch": "main", "commit": "a".repeat(40),
        "title": "Greet\u{1b}[2J \u{202e}louder", "by": "ann", "kind": "push", "status": status, "outcome": outcome, "cause": null, "stage": null,
        "attempt": 1, "fence": 1, "image": null, "release_id": null, "queued_at": 1, "started_at": 2, "finished_at": 3,
        "cancel_requested": false, "superseded_by": null, "stages": []
    })
}

impl FakeAgent {
    pub async fn start(build: Value, lines: Vec<String>, endings: Vec<Ending>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let play = Play {
            build,
            lines,
            endings,
            asked: Vec::new(),
            posts: Vec::new(),
        };
        let fake = Self {
            address: listener.local_addr().unwrap(),
            play: Arc::new(Mutex::new(play)),
        };
        let routes = Router::new()
            .route("/api/builds", get(list))
            .route("/api/builds/42", get(one))
            .route("/api/builds/42/log", get(log))
            .route("/api/builds/42/log/live", get(live))
            .route("/api/builds/42/{action}", post(write))
            .with_state(fake.clone());
        tokio::spawn(async { axum::serve(listener, routes).await });
        fake
    }

    pub fn play(&self) -> MutexGuard<'_, Play> {
        self.play.lock().unwrap()
    }
}

async fn list(State(agent): State<FakeAgent>) -> Json<Value> {
    Json(json!({ "builds": [agent.play().build], "next": null }))
}

async fn one(State(agent): State<FakeAgent>) -> Json<Value> {
    Json(agent.play().build.clone())
}

async fn log(State(agent): State<FakeAgent>) -> String {
    agent
        .play()
        .lines
        .iter()
        .map(|line| format!("{line}\n"))
        .collect()
}

async fn write(
    State(agent): State<FakeAgent>,
    axum::extract::Path(action): axum::extract::Path<String>,
    headers: HeaderMap,
) -> Response {
    if headers
        .get("authorization")
        .is_none_or(|value| value != format!("Bearer {TOKEN}").as_str())
    {
        return (
            StatusCode::UNAUTHORIZED,
            Json(json!({ "error": "needs a token" })),
        )
            .into_response();
    }
    let mut play = agent.play();
    play.posts.push(action);
    (StatusCode::ACCEPTED, Json(play.build.clone())).into_response()
}

async fn live(State(agent): State<FakeAgent>, headers: HeaderMap) -> Response {
    let last: i64 = headers["last-event-id"].to_str().unwrap().parse().unwrap();
    let mut play = agent.play();
    let ending = play.endings[play.asked.len().min(play.endings.len() - 1)];
    play.asked.push(last);
    // One line twice, as after a restart that lost sight of what was sent.
    let from = usize::try_from(last).unwrap().saturating_sub(1);
    let events: Vec<String> = play
        .lines
        .iter()
        .enumerate()
        .skip(from)
        .map(|(at, text)| event(at + 1, text))
        .collect();
    drop(play);
    let (count, rest) = match ending {
        Ending::Busy => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Ending::End => (events.len(), "event: end\ndata: {}\n\n"),
        Ending::CutAfter(count) => (count, "id: 999\ndata: {\"n\": 9"),
        Ending::CloseAfter(count) | Ending::HangAfter(count) => (count, ""),
    };
    let mut text: String = events.into_iter().take(count).collect();
    text.insert_str(0, "retry: 2000\n\n: alive\n\nevent: build\ndata: {}\n\n");
    text.push_str(rest);
    let begin = stream::iter(
        text.into_bytes()
            .chunks(1000)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect::<Vec<_>>(),
    );
    let end = stream::once(async move {
        match ending {
            Ending::CutAfter(_) => Err(std::io::Error::other("cut")),
            Ending::HangAfter(_) => std::future::pending().await,
            _ => Ok(Bytes::new()),
        }
    });
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(Body::from_stream(begin.chain(end)))
        .unwrap()
}

fn event(number: usize, text: &str) -> String {
    let data = json!({ "n": number, "stage": "test", "at": 1, "text": text });
    format!("id: {number}\ndata: {data}\n\n")
}
