//! The log as a page shows it: its last lines, grouped by stage, as a terminal would show them.
//!
//! The line: `store → the last 5,000 lines, at most 1 MiB → sections`. Never holds a whole log.

use std::collections::VecDeque;

use crate::ansi::{self, Span};
use crate::api::LOG_READ_BYTES_MAX;
use crate::api::window::line_text;
use crate::builds::Stage;
use crate::store::{NumberedLine, Store};

/// More would freeze a browser; the rest is in the raw log.
pub const PAGE_LINES_MAX: i64 = 5_000;
const PAGE_BYTES_MAX: usize = 1 << 20;

/// The end of a log.
pub struct LogView {
    pub sections: Vec<Section>,
    /// How many lines stand before the first that is shown.
    pub hidden: i64,
    /// The last line's number; 0 where there is none.
    pub last: i64,
}

/// A run of lines of one stage. A stage that was begun anew after a crash has several.
pub struct Section {
    pub stage: Stage,
    pub anchor: String,
    pub lines: Vec<Row>,
}

pub struct Row {
    pub number: i64,
    pub spans: Vec<Span>,
}

/// Reads the end of a log as it stands now; lines that come meanwhile are left to the live log.
pub async fn tail(store: &Store, build_id: i64) -> anyhow::Result<LogView> {
    let (end, _) = store.log_end(build_id).await?;
    let mut from = (end - PAGE_LINES_MAX).max(1);
    let mut lines: VecDeque<NumberedLine> = VecDeque::new();
    let mut bytes = 0;
    while from < end {
        let read = store.read_log(build_id, from, LOG_READ_BYTES_MAX).await?;
        let Some(last) = read.last() else { break };
        from = last.number + 1;
        for line in read.into_iter().filter(|line| line.number < end) {
            bytes += line.bytes.len();
            lines.push_back(line);
        }
        while bytes > PAGE_BYTES_MAX
            && let Some(line) = lines.pop_front()
        {
            bytes -= line.bytes.len();
        }
    }
    let last = end - 1;
    Ok(LogView {
        hidden: lines.front().map_or(last, |line| line.number - 1),
        last,
        sections: sections(lines),
    })
}

fn sections(lines: impl IntoIterator<Item = NumberedLine>) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for line in lines {
        let row = Row {
            number: line.number,
            spans: ansi::spans(&line_text(&line.bytes).0),
        };
        match sections.last_mut().filter(|last| last.stage == line.stage) {
            Some(section) => section.lines.push(row),
            None => {
                let is_first = sections.iter().all(|one| one.stage != line.stage);
                let anchor = match is_first {
                    true => format!("stage-{}", line.stage),
                    false => format!("stage-{}-{}", line.stage, line.number),
                };
                sections.push(Section {
                    stage: line.stage,
                    anchor,
                    lines: vec![row],
                });
            }
        }
    }
    sections
}
