//! What the viewers of one build share: its state and its last lines, read from the store once for all of them.
//!
//! A window is where the viewer is that has read furthest; who is behind it reads the store alone until it has caught up.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use axum::response::sse::Event;
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, sleep_until};

use super::LOG_READ_BYTES_MAX;
use crate::ansi;
use crate::app::App;
use crate::builds::{Millis, Stage, StageRow};
use crate::store::NumberedLine;

/// A burst of changes elsewhere is no reason to read more often.
const READ_EVERY_MIN: Duration = Duration::from_millis(50);
/// Another agent may write to the same store without waking us.
const READ_EVERY_MAX: Duration = Duration::from_millis(900);
/// What one viewer takes at once: thousands that are slow hold so much each.
const TAKEN_BYTES_MAX: usize = 16 * 1024;

/// The windows of all builds that somebody watches.
#[derive(Default)]
pub struct Windows {
    of_builds: Mutex<HashMap<i64, Weak<tokio::sync::Mutex<Window>>>>,
}

impl Windows {
    /// A build's window; it lives as long as its viewers.
    pub fn of(&self, build_id: i64) -> Arc<tokio::sync::Mutex<Window>> {
        let mut of_builds = self
            .of_builds
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(window) = of_builds.get(&build_id).and_then(Weak::upgrade) {
            return window;
        }
        of_builds.retain(|_, window| window.strong_count() > 0);
        let window = Arc::new(tokio::sync::Mutex::new(Window::new(build_id)));
        of_builds.insert(build_id, Arc::downgrade(&window));
        window
    }
}

/// A build as it was read last.
pub struct Window {
    build_id: i64,
    /// The store's word of a change that had come before the last read.
    seen: Option<u64>,
    read_at: Option<Instant>,
    /// The last read brought lines, so that there may be more.
    has_more: bool,
    lines: VecDeque<Line>,
    bytes: usize,
    /// The number of the line that comes next.
    next: i64,
    /// As the API answers it; None where the build is gone.
    pub view: Option<Arc<Value>>,
    pub stages: Arc<Vec<StageRow>>,
    /// The build has ended, and its last line is here.
    is_complete: bool,
}

struct Line {
    number: i64,
    bytes: usize,
    event: Event,
}

impl Window {
    fn new(build_id: i64) -> Self {
        Self {
            build_id,
            seen: None,
            read_at: None,
            has_more: false,
            lines: VecDeque::new(),
            bytes: 0,
            next: 0,
            view: None,
            stages: Arc::default(),
            is_complete: false,
        }
    }

    /// Brings the window up to date for a viewer that has all lines before `next`.
    pub async fn follow(&mut self, app: &App, next: i64) -> anyhow::Result<()> {
        let word = *app.store.watch().borrow();
        if next > self.next {
            // Whoever asks for lines that nobody has written moves nothing.
            let next = next.min(app.store.log_end(self.build_id).await?.0);
            if next > self.next {
                self.lines.clear();
                (self.bytes, self.next, self.has_more) = (0, next, true);
            }
        }
        let is_old = self.read_at.is_none_or(|at| at.elapsed() >= READ_EVERY_MAX);
        if !is_old && !self.has_more && self.seen == Some(word) {
            return Ok(());
        }
        if let Some(read_at) = self.read_at {
            sleep_until(read_at + READ_EVERY_MIN).await;
        }
        self.read(app).await?;
        self.seen = Some(word);
        Ok(())
    }

    /// Status before lines: whoever ends a build has stored its last line by then, so that no line comes after the end.
    async fn read(&mut self, app: &App) -> anyhow::Result<()> {
        self.read_at = Some(Instant::now());
        let Some(build) = app.store.build(self.build_id).await? else {
            self.view = None;
            return Ok(());
        };
        let stages = app.store.stages(self.build_id).await?;
        let view = super::full_view(&app.config, &build, &stages)?;
        if *self.stages != stages {
            self.stages = Arc::new(stages);
        }
        if self.view.as_deref() != Some(&view) {
            self.view = Some(Arc::new(view));
        }
        let read = app
            .store
            .read_log(self.build_id, self.next, LOG_READ_BYTES_MAX)
            .await?;
        self.has_more = !read.is_empty();
        self.is_complete = read.is_empty() && build.status.is_terminal();
        for line in &read {
            self.next = line.number + 1;
            self.bytes += line.bytes.len();
            self.lines.push_back(Line {
                number: line.number,
                bytes: line.bytes.len(),
                event: line_event(line)?,
            });
        }
        while self.bytes > LOG_READ_BYTES_MAX
            && let Some(first) = self.lines.pop_front()
        {
            self.bytes -= first.bytes;
        }
        Ok(())
    }

    /// The next lines from number `next` on, and the number after them; None where they are not here any more.
    pub fn take(&self, next: i64) -> Option<(Vec<Event>, i64)> {
        let first = self.lines.front().map_or(self.next, |line| line.number);
        if next < first {
            return None;
        }
        let (mut taken, mut bytes, mut after) = (Vec::new(), 0, next);
        let from = self.lines.partition_point(|line| line.number < next);
        for line in self.lines.range(from..) {
            if bytes >= TAKEN_BYTES_MAX {
                break;
            }
            bytes += line.bytes;
            after = line.number + 1;
            taken.push(line.event.clone());
        }
        Some((taken, after))
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
