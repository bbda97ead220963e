//! The live log: one line of the log is one server-sent event, whose id is the line's number.
//!
//! The line: `store → at most 256 KiB of events → viewer → store …`. Reads only the store, so that a viewer never sees
//! what a restart would lose, and reads on only when the viewer has taken what was there. Never waits for a viewer.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{ApiError, IdPath, LOG_READ_BYTES_MAX};
use crate::ansi;
use crate::app::App;
use crate::builds::{Millis, Stage, StageRow};
use crate::store::NumberedLine;

/// Another agent may write to the same store without waking us.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// A burst of changes elsewhere is no reason to read more often.
const READ_EVERY_MIN: Duration = Duration::from_millis(50);
/// Proxies close what is silent.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);
/// How long a browser waits before it comes back.
const RECONNECT_AFTER: Duration = Duration::from_secs(2);

/// `GET /api/builds/{id}/log/live`: lines after `Last-Event-ID` (or `?after=`), then those that come, then `end`.
pub async fn live(
    State(app): State<App>,
    path: IdPath,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let after = after(query.as_deref(), &headers)
        .map_err(|problem| ApiError::new(StatusCode::BAD_REQUEST, problem))?;
    let build = super::find(&app.store, &path).await?;
    let viewer = Viewer {
        changed: app.store.watch(),
        app,
        build_id: build.id,
        next: after.saturating_add(1),
        shown_build: Value::Null,
        shown_stages: Vec::new(),
        ready: VecDeque::from([Event::default().retry(RECONNECT_AFTER)]),
        read_at: None,
        has_ended: false,
    };
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE_EVERY);
    let sse = Sse::new(stream::unfold(viewer, Viewer::next_event)).keep_alive(keep_alive);
    // Some proxies would hold back a stream until it ends.
    Ok(([("x-accel-buffering", "no")], sse).into_response())
}

/// The last line that the viewer has. A browser that comes back repeats the address and adds the header, so the header
/// counts first.
fn after(query: Option<&str>, headers: &HeaderMap) -> Result<i64, String> {
    let in_query = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes())
        .find(|(key, _)| key == "after")
        .map(|(_, value)| value.into_owned());
    let in_header = headers
        .get("last-event-id")
        .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let Some(text) = in_header.or(in_query).filter(|text| !text.is_empty()) else {
        return Ok(0);
    };
    text.parse()
        .ok()
        .filter(|line| *line >= 0)
        .ok_or_else(|| format!("{text:?} is no line number to go on after"))
}

/// One line as a viewer gets it.
#[derive(Serialize)]
struct LiveLine<'a> {
    n: i64,
    stage: Stage,
    at: Millis,
    /// Without its newline; what is not UTF-8 is replaced.
    text: &'a str,
    /// The line was too long and goes on in the next.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    open: bool,
    /// How a terminal would show the text, where that differs from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    spans: Option<Vec<ansi::Span>>,
}

/// The text of a line, without its newline, and whether it had one.
pub fn line_text(bytes: &[u8]) -> (String, bool) {
    let whole = bytes.strip_suffix(b"\n");
    let text = String::from_utf8_lossy(whole.unwrap_or(bytes)).into_owned();
    (text, whole.is_some())
}

struct Viewer {
    app: App,
    build_id: i64,
    /// The number of the line that comes next.
    next: i64,
    changed: watch::Receiver<u64>,
    shown_build: Value,
    shown_stages: Vec<StageRow>,
    /// Never more than what one read gives.
    ready: VecDeque<Event>,
    read_at: Option<Instant>,
    has_ended: bool,
}

impl Viewer {
    async fn next_event(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            if self.has_ended || self.app.shutdown.is_cancelled() {
                return None;
            }
            let shutdown = self.app.shutdown.clone();
            let step = async {
                self.read().await?;
                if self.ready.is_empty() {
                    self.wait().await;
                }
                anyhow::Ok(())
            };
            tokio::select! {
                () = shutdown.cancelled() => return None,
                step = step => if let Err(error) = step {
                    // The viewer comes back after the last line that it has.
                    tracing::warn!("cannot read on in build #{}: {error:#}", self.build_id);
                    return None;
                },
            }
        }
    }

    /// Status before lines: whoever ends a build has stored its last line by then, so that no line after `end` is missed.
    async fn read(&mut self) -> anyhow::Result<()> {
        self.changed.mark_unchanged();
        self.read_at = Some(Instant::now());
        let Some(build) = self.app.store.build(self.build_id).await? else {
            self.has_ended = true;
            return Ok(());
        };
        let stages = self.app.store.stages(self.build_id).await?;
        let view = super::full_view(&self.app.config, &build, &stages)?;
        for stage in &stages {
            if !self.shown_stages.contains(stage) {
                self.ready.push_back(event("stage").json_data(stage)?);
            }
        }
        self.shown_stages = stages;
        if view != self.shown_build {
            self.ready.push_back(event("build").json_data(&view)?);
            self.shown_build = view;
        }
        let lines = self
            .app
            .store
            .read_log(self.build_id, self.next, LOG_READ_BYTES_MAX)
            .await?;
        if lines.is_empty() && build.status.is_terminal() {
            self.ready
                .push_back(event("end").json_data(&self.shown_build)?);
            self.has_ended = true;
        }
        for line in &lines {
            self.ready.push_back(line_event(line)?);
            self.next = line.number + 1;
        }
        Ok(())
    }

    async fn wait(&mut self) {
        if timeout(POLL_EVERY, self.changed.changed())
            .await
            .is_ok_and(|changed| changed.is_err())
        {
            sleep(POLL_EVERY).await;
        }
        if let Some(read_at) = self.read_at {
            sleep_until(read_at + READ_EVERY_MIN).await;
        }
    }
}

fn event(name: &str) -> Event {
    Event::default().event(name)
}

fn line_event(line: &NumberedLine) -> anyhow::Result<Event> {
    let (text, is_whole) = line_text(&line.bytes);
    let data = LiveLine {
        n: line.number,
        stage: line.stage,
        at: line.at,
        text: &text,
        open: !is_whole,
        spans: (!ansi::is_plain(&text)).then(|| ansi::spans(&text)),
    };
    Ok(Event::default()
        .id(line.number.to_string())
        .json_data(data)?)
}
