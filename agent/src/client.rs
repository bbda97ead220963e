//! The command line's side of the API.
//!
//! The line: a request with the token → JSON, the log's bytes, or the events of a live log. Knows no terminal; never
//! starts work here, and never shows the token.

use std::fmt;
use std::time::Duration;

use reqwest::{RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use crate::builds::{Build, Millis, Stage, StageStatus, Status};
use crate::config::{Access, client_to};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Of a connection that is used again: less than after what the server closes it (`server::HEADER_TIMEOUT`).
const QUIET_MAX: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A live log that says nothing for so long, not even that it lives, has lost its other end.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// A line of the log is at most 16 KiB, and JSON makes six bytes of some.
const EVENT_BYTES_MAX: usize = 1 << 20;
const REFUSAL_CHARS_MAX: usize = 2_000;

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug)]
pub enum Problem {
    /// Nobody answers at this address, or not any more.
    Away { server: String, why: String },
    /// The agent's own word.
    Refused { status: StatusCode, why: String },
    /// Somebody answers who is no agent.
    Odd(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away { server, why } => write!(f, "cannot reach the agent at {server}: {why}"),
            Self::Refused { status, why } if why.is_empty() => {
                write!(f, "the agent answers {status}")
            }
            Self::Refused { why, .. } => f.write_str(why),
            Self::Odd(why) => write!(f, "this is not the answer of an agent: {why}"),
        }
    }
}

impl std::error::Error for Problem {}

/// One build with its stages.
#[derive(Debug, Clone, Deserialize)]
pub struct Detail {
    #[serde(flatten)]
    pub build: Build,
    #[serde(default)]
    pub stages: Vec<StageTimes>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct StageTimes {
    pub stage: Stage,
    pub status: StageStatus,
    pub begun_at: Millis,
    pub done_at: Option<Millis>,
}

/// An environment as the API lists it.
#[derive(Debug, Clone, Deserialize)]
pub struct Place {
    pub name: String,
    pub branch: String,
}

/// One time that a release served, or one that failed to.
#[derive(Debug, Clone, Deserialize)]
pub struct Served {
    pub release: i64,
    pub build: i64,
    pub commit: String,
    pub title: String,
    pub image: String,
    pub state: String,
    pub kind: String,
    pub by: String,
    pub revisions: serde_json::Map<String, Value>,
    pub began_at: Millis,
    pub ended_at: Option<Millis>,
    pub ended_why: Option<String>,
}

/// Which builds to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub environment: Option<String>,
    pub branch: Option<String>,
    pub status: Option<Status>,
    pub limit: Option<i64>,
    pub before: Option<i64>,
}

/// One event of a live log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// With its newline, where it has one.
    Line {
        number: i64,
        stage: Option<Stage>,
        text: String,
    },
    /// The build has ended, and so has its log.
    End,
}

/// A name as one segment of a path.
fn encoded(name: &str) -> String {
    url::form_urlencoded::byte_serialize(name.as_bytes())
        .collect::<String>()
        .replace('+', "%20")
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    access: Access,
}

impl Client {
    pub fn new(access: Access) -> anyhow::Result<Self> {
        let http = client_to(&access.server)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(QUIET_MAX)
            .user_agent(concat!("landfall/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self { http, access })
    }

    pub fn server(&self) -> &str {
        &self.access.server
    }

    /// The page of a build.
    pub fn page(&self, id: i64) -> String {
        format!("{}/builds/{id}", self.access.server)
    }

    /// As the API answers: `{"builds": […], "next": …}`.
    pub async fn builds(&self, wanted: &Wanted) -> Result<Value, Problem> {
        let pairs = [
            ("environment", wanted.environment.clone()),
            ("branch", wanted.branch.clone()),
            ("status", wanted.status.map(|status| status.to_string())),
            ("limit", wanted.limit.map(|limit| limit.to_string())),
            ("before", wanted.before.map(|before| before.to_string())),
        ];
        let pairs: Vec<_> = pairs
            .into_iter()
            .filter(|(_, value)| value.is_some())
            .collect();
        self.json(self.get("/api/builds").query(&pairs)).await
    }

    /// As the API answers; `read` makes a `Detail` of it.
    pub async fn build(&self, id: i64) -> Result<Value, Problem> {
        self.json(self.get(&format!("/api/builds/{id}"))).await
    }

    /// `{"environments": […]}`; `read_list` makes `Place`s of it.
    pub async fn environments(&self) -> Result<Value, Problem> {
        self.json(self.get("/api/environments")).await
    }

    /// Queues a build of a whole commit, or of the branch's head.
    pub async fn start(&self, place: &Place, commit: Option<&str>) -> Result<Value, Problem> {
        let body = match commit {
            Some(commit) => serde_json::json!({ "environment": place.name, "commit": commit }),
            None => serde_json::json!({ "environment": place.name, "branch": place.branch }),
        };
        self.json(self.post("/api/builds").json(&body)).await
    }

    pub async fn rerun(&self, id: i64) -> Result<Value, Problem> {
        self.json(self.post(&format!("/api/builds/{id}/rerun")))
            .await
    }

    pub async fn cancel(&self, id: i64) -> Result<Value, Problem> {
        self.json(self.post(&format!("/api/builds/{id}/cancel")))
            .await
    }

    /// What served in an environment and what failed to: `{"releases": […], "current": …, "pinned": …}`.
    pub async fn releases(&self, environment: &str) -> Result<Value, Problem> {
        let path = format!("/api/environments/{}/releases", encoded(environment));
        self.json(self.get(&path)).await
    }

    /// `undo`, `redo`, `pin` or `unpin`.
    pub async fn change(
        &self,
        environment: &str,
        action: &str,
        body: &Value,
    ) -> Result<Value, Problem> {
        let path = format!("/api/environments/{}/{action}", encoded(environment));
        self.json(self.post(&path).json(body)).await
    }

    /// The log as it is now, byte for byte; read it with `piece`.
    pub async fn log(&self, id: i64) -> Result<Response, Problem> {
        self.send(self.get(&format!("/api/builds/{id}/log"))).await
    }

    /// The next bytes of an answer; None at its end.
    pub async fn piece(&self, response: &mut Response) -> Result<Option<Vec<u8>>, Problem> {
        match tokio::time::timeout(SILENCE_MAX, response.chunk()).await {
            Ok(Ok(piece)) => Ok(piece.map(Into::into)),
            Ok(Err(error)) => Err(self.away(error)),
            Err(_) => Err(self.silent(SILENCE_MAX)),
        }
    }

    /// The log as it grows, from the line behind number `last` on.
    pub async fn live(&self, id: i64, last: i64) -> Result<Live<'_>, Problem> {
        let request = self
            .get(&format!("/api/builds/{id}/log/live"))
            .header("accept", "text/event-stream")
            .header("last-event-id", last);
        let response = self.send(request).await?;
        Ok(Live {
            client: self,
            response,
            parser: Parser::default(),
            events: std::collections::VecDeque::new(),
        })
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.http.get(format!("{}{path}", self.access.server))
    }

    fn post(&self, path: &str) -> RequestBuilder {
        self.http.post(format!("{}{path}", self.access.server))
    }

    /// Sends; the answer's beginning must come in time, its body may take as long as it will.
    async fn send(&self, request: RequestBuilder) -> Result<Response, Problem> {
        let request = match &self.access.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        };
        let response = tokio::time::timeout(ANSWER_TIMEOUT, request.send())
            .await
            .map_err(|_| self.silent(ANSWER_TIMEOUT))?
            .map_err(|error| self.away(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.body(response).await.unwrap_or_default();
        let value: Value = serde_json::from_slice(&body).unwrap_or_default();
        let text = |member| value.get(member).and_then(Value::as_str);
        let why = match (text("error"), text("hint")) {
            (Some(error), Some(hint)) => format!("{error}\n  {hint}"),
            (Some(error), None) => error.to_owned(),
            (None, _) => String::from_utf8_lossy(&body).trim().to_owned(),
        };
        let why = why.chars().take(REFUSAL_CHARS_MAX).collect();
        Err(Problem::Refused { status, why })
    }

    async fn json(&self, request: RequestBuilder) -> Result<Value, Problem> {
        let response = self.send(request).await?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|error| Problem::Odd(error.to_string()))
    }

    async fn body(&self, mut response: Response) -> Result<Vec<u8>, Problem> {
        /// 200 builds with long causes are far below.
        const BODY_BYTES_MAX: usize = 16 << 20;
        let mut body = Vec::new();
        while let Some(piece) = self.piece(&mut response).await? {
            body.extend_from_slice(&piece);
            if body.len() > BODY_BYTES_MAX {
                return Err(Problem::Odd(format!(
                    "it is larger than {} MiB",
                    BODY_BYTES_MAX >> 20
                )));
            }
        }
        Ok(body)
    }

    fn away(&self, error: reqwest::Error) -> Problem {
        let why = anyhow::Error::new(error).root_cause().to_string();
        let server = self.access.server.clone();
        Problem::Away { server, why }
    }

    fn silent(&self, limit: Duration) -> Problem {
        let why = format!("it says nothing for {} s", limit.as_secs());
        let server = self.access.server.clone();
        Problem::Away { server, why }
    }
}

/// Reads what the API answered.
pub fn read<T: serde::de::DeserializeOwned>(value: &Value) -> Result<T, Problem> {
    T::deserialize(value).map_err(|error| Problem::Odd(error.to_string()))
}

/// Reads a member of an answer that is a list.
pub fn read_list<T: serde::de::DeserializeOwned>(
    value: &Value,
    member: &str,
) -> Result<Vec<T>, Problem> {
    read(value.get(member).unwrap_or(&Value::Null))
}

/// A live log, event by event.
pub struct Live<'a> {
    client: &'a Client,
    response: Response,
    parser: Parser,
    events: std::collections::VecDeque<Event>,
}

impl Live<'_> {
    /// None where the agent closed the stream without a word.
    pub async fn next(&mut self) -> Result<Option<Event>, Problem> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            let Some(piece) = self.client.piece(&mut self.response).await? else {
                return Ok(None);
            };
            let events = self.parser.push(&piece).map_err(Problem::Odd)?;
            self.events.extend(events);
        }
    }
}

/// Server-sent events out of pieces that are cut anywhere.
#[derive(Default)]
struct Parser {
    line: Vec<u8>,
    number: i64,
    name: String,
    data: String,
}

#[derive(Deserialize)]
struct LineData {
    stage: Option<Stage>,
    text: String,
    /// It goes on in the next line.
    #[serde(default)]
    open: bool,
}

impl Parser {
    fn push(&mut self, piece: &[u8]) -> Result<Vec<Event>, String> {
        let mut events = Vec::new();
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() + self.data.len() > EVENT_BYTES_MAX {
                return Err(format!(
                    "an event is larger than {} KiB",
                    EVENT_BYTES_MAX >> 10
                ));
            }
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                let line = String::from_utf8_lossy(&line);
                events.extend(self.field(line.trim_end_matches(['\n', '\r']))?);
            }
        }
        Ok(events)
    }

    fn field(&mut self, line: &str) -> Result<Option<Event>, String> {
        if line.is_empty() {
            return self.dispatch();
        }
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "id" => {
                self.number = value
                    .parse()
                    .map_err(|_| format!("{value:?} is no line's number"))?
            }
            "event" => value.clone_into(&mut self.name),
            "data" => {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(value);
            }
            _ => {}
        }
        Ok(None)
    }

    fn dispatch(&mut self) -> Result<Option<Event>, String> {
        let (name, data) = (
            std::mem::take(&mut self.name),
            std::mem::take(&mut self.data),
        );
        match name.as_str() {
            "end" => Ok(Some(Event::End)),
            "" | "message" if !data.is_empty() => {
                let line: LineData =
                    serde_json::from_str(&data).map_err(|error| error.to_string())?;
                let (number, stage, mut text) = (self.number, line.stage, line.text);
                if !line.open {
                    text.push('\n');
                }
                Ok(Some(Event::Line {
                    number,
                    stage,
                    text,
                }))
            }
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: i64, stage: Option<Stage>, text: &str) -> Event {
        let text = text.to_owned();
        Event::Line {
            number,
            stage,
            text,
        }
    }

    #[test]
    fn events_are_read_however_they_are_cut() {
        let stream = "retry: 2000\n\n: hello\n\nid: 7\ndata: {\"n\":7,\"stage\":\"test\",\"at\":5,\"text\":\"a\\r\\u001b[1m ü\"}\n\n\
                      event: stage\ndata: {}\n\nid:8\r\ndata: {\"text\":\"plain\",\"open\":true}\r\n\r\nevent: end\ndata: {\"status\":\"passed\"}\n\n";
        let expected = [
            line(7, Some(Stage::Test), "a\r\u{1b}[1m ü\n"),
            line(8, None, "plain"),
            Event::End,
        ];
        for size in 1..stream.len() {
            let mut parser = Parser::default();
            let events: Vec<Event> = stream
                .as_bytes()
                .chunks(size)
                .flat_map(|piece| parser.push(piece).unwrap())
                .collect();
            assert_eq!(events, expected, "{size}");
        }
    }

    #[test]
    fn a_stream_that_is_none_is_refused_in_bounded_memory() {
        let mut parser = Parser::default();
        assert!((0..64).any(|_| parser.push(&[b'x'; 32 * 1024]).is_err()));
        assert!(Parser::default().push(b"id: seven\n").is_err());
        assert!(Parser::default().push(b"data: {{{\n\n").is_err());
    }
}
