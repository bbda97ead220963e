//! The live log: one line of the log is one server-sent event, whose id is the line's number.
//!
//! The line: `store → window → a few KiB of events → viewer → window …`. What is shown was read from the store, so that a viewer
//! never sees what a restart would lose; it gets more only when it has taken what was there. Never waits for a viewer.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::window::{LINE_BYTES, Window, Windows, line_event};
use super::{ApiError, IdPath};
use crate::app::App;
use crate::builds::StageRow;

/// What a viewer is given at once: thousands that are slow hold so much each.
const GIVEN_BYTES_MAX: usize = 16 * 1024;
/// The same for the few that catch up.
const CAUGHT_UP_BYTES_MAX: usize = 256 * 1024;
/// Proxies close what is silent.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);
/// How long a browser waits before it comes back.
const RECONNECT_AFTER: Duration = Duration::from_secs(2);

/// `GET /api/builds/{id}/log/live`: lines after `Last-Event-ID` (or `?after=`), then those that come, then `end`.
pub async fn live(
    State(app): State<App>,
    Extension(windows): Extension<Arc<Windows>>,
    path: IdPath,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let after = after(query.as_deref(), &headers)
        .map_err(|problem| ApiError::new(StatusCode::BAD_REQUEST, problem))?;
    let build = super::find(&app.store, &path).await?;
    let viewer = Viewer {
        window: windows.of(&app, build.id),
        catching_up: Arc::clone(&windows.catching_up),
        permit: None,
        app,
        build_id: build.id,
        next: after.saturating_add(1),
        shown_build: Arc::default(),
        shown_stages: Arc::default(),
        ready: VecDeque::from([Event::default().retry(RECONNECT_AFTER)]),
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

struct Viewer {
    app: App,
    build_id: i64,
    window: watch::Receiver<Arc<Window>>,
    catching_up: Arc<Semaphore>,
    /// While what is ready is much.
    permit: Option<OwnedSemaphorePermit>,
    /// The number of the line that comes next.
    next: i64,
    shown_build: Arc<Value>,
    shown_stages: Arc<Vec<StageRow>>,
    /// Never more than what one read gives.
    ready: VecDeque<Event>,
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
                if self.ready.is_empty() && !self.has_ended {
                    self.window.changed().await?;
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

    async fn read(&mut self) -> anyhow::Result<()> {
        self.permit = None;
        let window = Arc::clone(&self.window.borrow_and_update());
        let Some(view) = &window.view else {
            self.has_ended = window.is_over_at(self.next);
            return Ok(());
        };
        if !Arc::ptr_eq(&self.shown_stages, &window.stages) {
            for stage in window.stages.iter() {
                if !self.shown_stages.contains(stage) {
                    self.ready.push_back(event("stage").json_data(stage)?);
                }
            }
            self.shown_stages = Arc::clone(&window.stages);
        }
        if !Arc::ptr_eq(&self.shown_build, view) {
            self.ready.push_back(event("build").json_data(view)?);
            self.shown_build = Arc::clone(view);
        }
        if self.next < window.first() {
            return self.catch_up(window.first()).await;
        }
        if window.is_over_at(self.next) {
            self.ready.push_back(event("end").json_data(view)?);
            self.has_ended = true;
            return Ok(());
        }
        let (events, next) = window.take(self.next, GIVEN_BYTES_MAX);
        if next > self.next {
            // There may be more of it than was taken.
            self.window.mark_changed();
        }
        self.ready.extend(events);
        self.next = next;
        Ok(())
    }

    /// Reads alone what the window, which begins with `first`, no longer has.
    async fn catch_up(&mut self, first: i64) -> anyhow::Result<()> {
        self.permit = Arc::clone(&self.catching_up).try_acquire_owned().ok();
        let bytes_max = match self.permit {
            Some(_) => CAUGHT_UP_BYTES_MAX,
            None => GIVEN_BYTES_MAX,
        };
        let store = &self.app.store;
        let lines = store
            .read_log(self.build_id, self.next, bytes_max / 2)
            .await?;
        let mut bytes = 0;
        for line in lines.iter().take_while(|line| line.number < first) {
            if bytes >= bytes_max {
                break;
            }
            bytes += line.bytes.len() + LINE_BYTES;
            self.ready.push_back(line_event(line)?);
            self.next = line.number + 1;
        }
        if lines.is_empty() {
            // Swept meanwhile: what is left of the log begins later.
            self.next = first;
        }
        self.window.mark_changed();
        Ok(())
    }
}

fn event(name: &str) -> Event {
    Event::default().event(name)
}
