//! What the viewers of one build share: its state and its last lines, read from the store once for all of them.
//!
//! One task a watched build reads on whenever the store has changed, and ends with its last viewer. A window holds the end of the
//! log; whoever is behind it reads the store alone until it has caught up.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::response::sse::Event;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::LOG_READ_BYTES_MAX;
use crate::ansi;
use crate::app::App;
use crate::builds::{Millis, Stage, StageRow};
use crate::store::NumberedLine;

/// A burst of changes elsewhere is no reason to read more often.
const READ_EVERY_MIN: Duration = Duration::from_millis(50);
/// Another agent may write to the same store without waking us.
const READ_EVERY_MAX: Duration = Duration::from_secs(1);
/// What a line weighs beside its bytes.
pub const LINE_BYTES: usize = 200;

/// How many viewers may hold much of a log at once, while they catch up.
const CATCHING_UP_MAX: usize = 64;

/// The windows of all builds that somebody watches.
pub struct Windows {
    of_builds: Mutex<HashMap<i64, watch::Sender<Arc<Window>>>>,
    /// For those that are behind: who has a permit reads more at once.
    pub catching_up: Arc<Semaphore>,
}

impl Default for Windows {
    fn default() -> Self {
        Self {
            of_builds: Mutex::default(),
            catching_up: Arc::new(Semaphore::new(CATCHING_UP_MAX)),
        }
    }
}

impl Windows {
    /// A build's window, as it is read now and from now on.
    pub fn of(self: &Arc<Self>, app: &App, build_id: i64) -> watch::Receiver<Arc<Window>> {
        let mut of_builds = self
            .of_builds
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(window) = of_builds.get(&build_id) {
            return window.subscribe();
        }
        let (shown, receiver) = watch::channel(Arc::default());
        of_builds.insert(build_id, shown.clone());
        let kept = Kept {
            windows: Arc::clone(self),
            build_id,
            shown,
        };
        tokio::spawn(keep(kept, app.clone()));
        receiver
    }

    /// Forgets a window that nobody watches any more; whether that was so.
    fn forget(&self, build_id: i64, window: &watch::Sender<Arc<Window>>) -> bool {
        let mut of_builds = self
            .of_builds
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_over = window.receiver_count() == 0;
        if is_over {
            of_builds.remove(&build_id);
        }
        is_over
    }
}

/// A window that somebody keeps up to date. When that ends, by a panic too, its viewers hear of it, and come back to another.
struct Kept {
    windows: Arc<Windows>,
    build_id: i64,
    shown: watch::Sender<Arc<Window>>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        let of_builds = self.windows.of_builds.lock();
        let mut of_builds = of_builds.unwrap_or_else(PoisonError::into_inner);
        let newest = of_builds.get(&self.build_id);
        if newest.is_some_and(|newest| newest.same_channel(&self.shown)) {
            of_builds.remove(&self.build_id);
        }
    }
}

/// Keeps a build's window up to date for as long as somebody watches.
async fn keep(kept: Kept, app: App) {
    let (build_id, shown) = (kept.build_id, &kept.shown);
    let mut changed = app.store.watch();
    let mut window = Window::default();
    while !kept.windows.forget(build_id, shown) {
        changed.mark_unchanged();
        let begun = Instant::now();
        match window.read(&app, build_id).await {
            Ok(has_more) => {
                shown.send_replace(Arc::new(window.clone()));
                if has_more {
                    continue;
                }
            }
            Err(error) => tracing::warn!("cannot read on in build #{build_id}: {error:#}"),
        }
        let wait = async {
            if window.is_complete {
                return std::future::pending().await;
            }
            if timeout(READ_EVERY_MAX, changed.changed())
                .await
                .is_ok_and(|changed| changed.is_err())
            {
                sleep(READ_EVERY_MAX).await;
            }
            sleep_until(begun + READ_EVERY_MIN).await;
        };
        tokio::select! {
            () = app.shutdown.cancelled() => return,
            () = shown.closed() => {}
            () = wait => {}
        }
    }
}

/// A build as it was read last.
#[derive(Clone, Default)]
pub struct Window {
    /// As the API answers it; None before the first read, and where the build is gone.
    pub view: Option<Arc<Value>>,
    pub stages: Arc<Vec<StageRow>>,
    lines: VecDeque<Arc<Line>>,
    bytes: usize,
    /// The number of the line that comes next; 0 before the first read.
    next: i64,
    /// The build has ended, and its last line is here; or it is gone.
    is_complete: bool,
}

struct Line {
    number: i64,
    bytes: usize,
    event: Event,
}

impl Window {
    /// Status before lines: whoever ends a build has stored its last line by then, so that no line comes after the end.
    /// Whether there may be more to read.
    async fn read(&mut self, app: &App, build_id: i64) -> anyhow::Result<bool> {
        let Some(build) = app.store.build(build_id).await? else {
            (self.view, self.is_complete) = (None, true);
            return Ok(false);
        };
        let stages = app.store.stages(build_id).await?;
        let view = super::full_view(&app.config, &build, &stages)?;
        if *self.stages != stages {
            self.stages = Arc::new(stages);
        }
        if self.view.as_deref() != Some(&view) {
            self.view = Some(Arc::new(view));
        }
        if self.next == 0 {
            self.next = app.store.log_end(build_id).await?.0;
        }
        let read = app
            .store
            .read_log(build_id, self.next, LOG_READ_BYTES_MAX)
            .await?;
        for line in &read {
            let bytes = line.bytes.len() + LINE_BYTES;
            self.next = line.number + 1;
            self.bytes += bytes;
            self.lines.push_back(Arc::new(Line {
                number: line.number,
                bytes,
                event: line_event(line)?,
            }));
        }
        while self.bytes > LOG_READ_BYTES_MAX
            && let Some(first) = self.lines.pop_front()
        {
            self.bytes -= first.bytes;
        }
        self.is_complete = read.is_empty() && build.status.is_terminal();
        Ok(!read.is_empty())
    }

    /// The number of the first line that is here, or of the one that comes next.
    pub fn first(&self) -> i64 {
        self.lines.front().map_or(self.next, |line| line.number)
    }

    /// Lines from number `next` on, at most about `bytes_max`, and the number after them.
    pub fn take(&self, next: i64, bytes_max: usize) -> (Vec<Event>, i64) {
        let (mut taken, mut bytes, mut after) = (Vec::new(), 0, next);
        let from = self.lines.partition_point(|line| line.number < next);
        for line in self.lines.range(from..) {
            if bytes >= bytes_max {
                break;
            }
            bytes += line.bytes;
            after = line.number + 1;
            taken.push(line.event.clone());
        }
        (taken, after)
    }

    /// Whether a viewer that has all lines before `next` has all that there will be.
    pub const fn is_over_at(&self, next: i64) -> bool {
        self.is_complete && next >= self.next
    }
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

/// A line as viewers get it.
pub fn line_event(line: &NumberedLine) -> anyhow::Result<Event> {
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
