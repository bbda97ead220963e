//! Log lines, in chunks: written by one task a build, read by everyone who watches.

use std::collections::HashMap;

use super::Store;
use super::dialect::{Db, on, row};
use crate::build_log::{CHUNK_BYTES_MAX, LogLine};
use crate::builds::{Build, Millis, Stage};
use crate::fail_point;

/// Short lines weigh more than their bytes once they are read.
const CHUNK_LINES_MAX: usize = 1_000;

/// A line as it is read back. Numbers begin with 1 and have no gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumberedLine {
    pub number: i64,
    pub stage: Stage,
    pub at: Millis,
    pub bytes: Vec<u8>,
}

impl Store {
    /// Stores lines behind those that are there; `next` is the number of the first, the answer that of the next one. Nothing where
    /// another agent has the build by now: the log is no place for who lost it while it slept.
    pub async fn append_log(
        &self,
        build: &Build,
        mut next: i64,
        lines: &[LogLine],
    ) -> anyhow::Result<i64> {
        for chunk in chunks(lines) {
            let index: Vec<(i64, usize)> = chunk
                .iter()
                .map(|line| (line.at, line.bytes.len()))
                .collect();
            let bytes: Vec<u8> = chunk
                .iter()
                .flat_map(|line| line.bytes.iter().copied())
                .collect();
            let Some(stage) = chunk.first().map(|line| line.stage) else {
                continue;
            };
            let count = i64::try_from(chunk.len())?;
            // The agent of a SQLite store is alone, and its builds are in another file.
            let holds = match &self.logs {
                Db::Sqlite(_) => "$7 = $7",
                Db::Postgres(_) => "EXISTS (SELECT 1 FROM builds WHERE id = $1 AND fence = $7)",
            };
            let insert = sqlx::AssertSqlSafe(format!(
                "INSERT INTO log_chunks (build_id, first_line, line_count, stage, lines, bytes) SELECT $1, $2, $3, $4, $5, $6 WHERE {holds}"
            ));
            let rows = on!(&self.logs, pool => sqlx::query(insert)
                .bind(build.id).bind(next).bind(count).bind(stage.as_str()).bind(serde_json::to_string(&index)?).bind(&bytes)
                .bind(build.fence).execute(pool).await?.rows_affected());
            if rows == 0 {
                break;
            }
            next += count;
        }
        fail_point::at("store: append_log");
        self.notify();
        Ok(next)
    }

    /// The number of the line that comes next, and the bytes that are there.
    pub async fn log_end(&self, build_id: i64) -> anyhow::Result<(i64, u64)> {
        let (next, bytes): (i64, i64) = on!(&self.logs, pool => sqlx::query_as(
                "SELECT COALESCE(MAX(first_line + line_count), 1), CAST(COALESCE(SUM(LENGTH(bytes)), 0) AS BIGINT) FROM log_chunks WHERE build_id = $1")
            .bind(build_id).fetch_one(pool).await?);
        Ok((next, u64::try_from(bytes).unwrap_or(0)))
    }

    /// Removes the logs of builds that ended before a moment, and then of the oldest until all logs together are at most so
    /// large. Builds that run keep theirs. Of how many builds a log was removed.
    pub async fn sweep_logs(&self, ended_before: Millis, bytes_max: u64) -> anyhow::Result<usize> {
        let sizes: Vec<(i64, i64)> = on!(&self.logs, pool => sqlx::query_as(
                "SELECT build_id, CAST(SUM(LENGTH(bytes)) AS BIGINT) FROM log_chunks GROUP BY build_id ORDER BY build_id DESC")
            .fetch_all(pool).await?);
        let ended: HashMap<i64, Millis> = on!(&self.main, pool => sqlx::query_as("SELECT id, finished_at FROM builds WHERE finished_at IS NOT NULL")
            .fetch_all(pool).await?).into_iter().collect();
        let (mut sum, mut swept) = (0_u64, 0);
        // The newest first: what is over the sum then is the oldest.
        for (build, bytes) in sizes {
            sum = sum.saturating_add(u64::try_from(bytes).unwrap_or(0));
            // One that still runs is not there.
            let is_over = ended
                .get(&build)
                .is_some_and(|at| *at < ended_before || sum > bytes_max);
            if !is_over {
                continue;
            }
            on!(&self.logs, pool => sqlx::query("DELETE FROM log_chunks WHERE build_id = $1")
                .bind(build).execute(pool).await?.rows_affected());
            swept += 1;
        }
        if let Db::Sqlite(pool) = &self.logs {
            super::care::shrink(pool).await?;
        }
        Ok(swept)
    }

    /// Lines from number `from` on: whole chunks, at most about `bytes_max`. Empty where there are no more yet.
    pub async fn read_log(
        &self,
        build_id: i64,
        from: i64,
        bytes_max: usize,
    ) -> anyhow::Result<Vec<NumberedLine>> {
        row! {
            struct Chunk {
                first_line: i64,
                stage: String,
                lines: String,
                bytes: Vec<u8>,
            }
        }
        let limit = i64::try_from(bytes_max / CHUNK_BYTES_MAX)?.max(1);
        let chunks: Vec<Chunk> = on!(&self.logs, pool => sqlx::query_as(
                "SELECT first_line, stage, lines, bytes FROM log_chunks WHERE build_id = $1 AND first_line + line_count > $2 \
                 ORDER BY first_line LIMIT $3")
            .bind(build_id).bind(from).bind(limit).fetch_all(pool).await?);
        let mut lines = Vec::new();
        for chunk in chunks {
            let stage: Stage = chunk.stage.parse()?;
            let index: Vec<(i64, usize)> = serde_json::from_str(&chunk.lines)?;
            let mut rest = chunk.bytes.as_slice();
            for (number, (at, length)) in (chunk.first_line..).zip(index) {
                let (bytes, after) = rest.split_at_checked(length).unwrap_or((rest, &[]));
                rest = after;
                if number >= from {
                    lines.push(NumberedLine {
                        number,
                        stage,
                        at,
                        bytes: bytes.to_vec(),
                    });
                }
            }
        }
        Ok(lines)
    }
}

/// Runs of lines of one stage, each at most `CHUNK_BYTES_MAX` and `CHUNK_LINES_MAX`.
fn chunks(lines: &[LogLine]) -> Vec<&[LogLine]> {
    let mut chunks = Vec::new();
    let mut rest = lines;
    while let Some(first) = rest.first() {
        let mut bytes = 0;
        let length = rest
            .iter()
            .take(CHUNK_LINES_MAX)
            .take_while(|line| {
                bytes += line.bytes.len();
                line.stage == first.stage && bytes <= CHUNK_BYTES_MAX
            })
            .count()
            .max(1);
        let (chunk, after) = rest.split_at(length);
        chunks.push(chunk);
        rest = after;
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builds::{BuildKind, Outcome, Status};
    use crate::store::pushed;

    #[tokio::test]
    async fn old_logs_go_first_and_those_of_running_builds_stay() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), None).await.unwrap();
        let push = pushed("a");
        on!(&store.main, pool => { sqlx::query("INSERT INTO environments (name) VALUES ('one'), ('two'), ('three')").execute(pool).await.unwrap(); });
        for environment in ["one", "two", "three"] {
            let id = store
                .enqueue(environment, &push, BuildKind::Manual)
                .await
                .unwrap();
            let line = LogLine {
                stage: Stage::Test,
                at: 0,
                bytes: vec![b'x'; 100],
            };
            let build = store.build(id).await.unwrap().unwrap();
            store.append_log(&build, 1, &[line]).await.unwrap();
        }
        // #1 and #2 have ended, #3 waits.
        for _ in 0..2 {
            let build = store.claim("us", false).await.unwrap().unwrap();
            store
                .finish(&build, Status::Passed, Outcome::Live, None)
                .await
                .unwrap();
        }
        let left = async || -> Vec<u64> {
            let mut bytes = Vec::new();
            for id in 1..=3 {
                bytes.push(store.log_end(id).await.unwrap().1);
            }
            bytes
        };
        assert_eq!(store.sweep_logs(0, 1000).await.unwrap(), 0);
        assert_eq!(store.sweep_logs(0, 250).await.unwrap(), 1);
        assert_eq!(left().await, [0, 100, 100]);
        assert_eq!(store.sweep_logs(i64::MAX, 1000).await.unwrap(), 1);
        assert_eq!(left().await, [0, 0, 100]);
    }
}
