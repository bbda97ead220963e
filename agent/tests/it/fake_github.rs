//! GitHub on the wire: commit statuses by commit and context, and the moods of the real one.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

pub const TOKEN: &str = "ghp_canary0123456789";

/// One status as GitHub keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub state: String,
    pub description: String,
    pub target_url: String,
}

/// How GitHub answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Well,
    Down,
    /// 403 with `Retry-After` of so many seconds.
    Limited(u64),
    UnknownToken,
    /// No such commit.
    Unprocessable,
}

#[derive(Default)]
struct Kept {
    mood: Option<Mood>,
    gone: Vec<String>,
    statuses: HashMap<(String, String), Vec<Shown>>,
    /// The repository's webhook, and what it has sent: the newest first.
    hook_url: String,
    sent: Vec<Value>,
    /// When each request came, and what it got.
    requests: Vec<(Instant, u16)>,
}

#[derive(Clone)]
pub struct FakeGithub {
    pub address: SocketAddr,
    kept: Arc<Mutex<Kept>>,
}

impl FakeGithub {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Self {
            address: listener.local_addr().unwrap(),
            kept: Arc::default(),
        };
        let routes = Router::new()
            .route("/api/v3/repos/{owner}/{name}/statuses/{sha}", post(status))
            .route("/api/v3/repos/{owner}/{name}", get(repository))
            .route("/api/v3/repos/{owner}/{name}/hooks", get(hooks))
            .route(
                "/api/v3/repos/{owner}/{name}/hooks/7/deliveries",
                get(deliveries),
            )
            .route(
                "/api/v3/repos/{owner}/{name}/hooks/7/deliveries/{id}/attempts",
                post(attempt),
            )
            .with_state(fake.clone());
        tokio::spawn(async { axum::serve(listener, routes).await });
        fake
    }

    /// As an Enterprise Server has it, with a path.
    pub fn url(&self) -> String {
        format!("http://{}/api/v3", self.address)
    }

    pub fn be(&self, mood: Mood) {
        self.lock().mood = Some(mood);
    }

    /// Answers 404 for a repository.
    pub fn remove(&self, repository: &str) {
        self.lock().gone.push(repository.to_owned());
    }

    /// A delivery to this address that got this answer.
    pub fn has_sent(&self, url: &str, guid: &str, status_code: u16) {
        let mut kept = self.lock();
        url.clone_into(&mut kept.hook_url);
        let id = kept.sent.len() + 1;
        let now = jiff::Timestamp::now().to_string();
        let one = json!({"id": id, "guid": guid, "event": "push", "status_code": status_code, "delivered_at": now});
        kept.sent.insert(0, one);
    }

    /// Every delivery so far, the oldest first: guid and answer.
    pub fn sent(&self) -> Vec<(String, i64)> {
        let kept = self.lock();
        let of = |one: &Value| {
            (
                one["guid"].as_str().unwrap().to_owned(),
                one["status_code"].as_i64().unwrap(),
            )
        };
        kept.sent.iter().rev().map(of).collect()
    }

    /// What was shown of a commit in a context, in order.
    pub fn shown(&self, sha: &str, context: &str) -> Vec<Shown> {
        let key = (sha.to_owned(), context.to_owned());
        self.lock().statuses.get(&key).cloned().unwrap_or_default()
    }

    pub fn states(&self, sha: &str, context: &str) -> Vec<String> {
        self.shown(sha, context)
            .into_iter()
            .map(|shown| shown.state)
            .collect()
    }

    pub fn requests(&self) -> Vec<(Instant, u16)> {
        self.lock().requests.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap()
    }
}

async fn repository(
    State(github): State<FakeGithub>,
    Path((owner, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let is_gone = github.lock().gone.contains(&format!("{owner}/{name}"));
    match (is_known(&headers), is_gone) {
        (false, _) => refuse(401, "Bad credentials"),
        (true, true) => refuse(404, "Not Found"),
        (true, false) => Json(json!({ "full_name": format!("{owner}/{name}") })).into_response(),
    }
}

async fn hooks(State(github): State<FakeGithub>, headers: HeaderMap) -> Response {
    if !is_known(&headers) {
        return refuse(404, "Not Found");
    }
    let url = github.lock().hook_url.clone();
    let other = json!({"id": 8, "config": {"url": "https://elsewhere.example.org/webhook"}});
    Json(json!([other, {"id": 7, "config": {"url": url, "content_type": "json"}}])).into_response()
}

async fn deliveries(State(github): State<FakeGithub>) -> Response {
    Json(Value::from(github.lock().sent.clone())).into_response()
}

/// Sent again, and this time it arrives.
async fn attempt(
    State(github): State<FakeGithub>,
    Path((_, _, id)): Path<(String, String, i64)>,
) -> Response {
    let (url, guid) = {
        let kept = github.lock();
        let one = kept.sent.iter().find(|one| one["id"] == id).unwrap();
        (
            kept.hook_url.clone(),
            one["guid"].as_str().unwrap().to_owned(),
        )
    };
    github.has_sent(&url, &guid, 202);
    (StatusCode::ACCEPTED, Json(json!({}))).into_response()
}

async fn status(
    State(github): State<FakeGithub>,
    Path((owner, name, sha)): Path<(String, String, String)>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    let mut kept = github.lock();
    let answer = judge(&mut kept, &format!("{owner}/{name}"), &sha, &headers, &body);
    let code = answer.status().as_u16();
    kept.requests.push((Instant::now(), code));
    answer
}

fn judge(
    kept: &mut Kept,
    repository: &str,
    sha: &str,
    headers: &HeaderMap,
    body: &Value,
) -> Response {
    match kept.mood.unwrap_or(Mood::Well) {
        Mood::Well => {}
        Mood::Down => return refuse(502, ""),
        Mood::Limited(seconds) => {
            let message = "You have exceeded a secondary rate limit";
            let mut answer = refuse(403, message);
            answer.headers_mut().insert("retry-after", seconds.into());
            return answer;
        }
        Mood::UnknownToken => return refuse(401, "Bad credentials"),
        Mood::Unprocessable => return refuse(422, "No commit found for SHA"),
    }
    if !is_known(headers) {
        return refuse(401, "Bad credentials");
    }
    if kept.gone.iter().any(|gone| gone == repository) {
        return refuse(404, "Not Found");
    }
    let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    let shown = Shown {
        state: text("state"),
        description: text("description"),
        target_url: text("target_url"),
    };
    let is_state = ["pending", "success", "failure", "error"].contains(&shown.state.as_str());
    let is_plain = shown.description.chars().all(|c| c <= '\u{ffff}');
    if sha.len() != 40 || !is_state || !is_plain || shown.description.chars().count() > 140 {
        return refuse(422, "Validation Failed");
    }
    let key = (sha.to_owned(), text("context"));
    kept.statuses.entry(key).or_default().push(shown);
    // Less than the real answer has: nobody may depend on it.
    (StatusCode::CREATED, Json(json!({ "id": 1 }))).into_response()
}

fn is_known(headers: &HeaderMap) -> bool {
    headers
        .get("authorization")
        .is_some_and(|value| value == format!("Bearer {TOKEN}").as_str())
}

fn refuse(code: u16, message: &str) -> Response {
    let code = StatusCode::from_u16(code).unwrap();
    (code, Json(json!({ "message": message }))).into_response()
}
