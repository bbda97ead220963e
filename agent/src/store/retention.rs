//! Retention: builds that were superseded or skipped, and what was delivered, go after their time.
//!
//! All others stay: history, undo and pruning ask for releases, and a commit that failed must not be forgotten.

use std::collections::HashSet;

use super::Store;
use super::dialect::on;
use crate::builds::Millis;

/// Of one transaction: a delivery that comes meanwhile waits for it.
const AT_ONCE: i64 = 200;

impl Store {
    /// Removes builds that were superseded or skipped, with their logs, and deliveries: those before a moment, and those that
    /// are not among the newest so many; but nothing that is `young`, nor what stands for the head of a branch. How many builds.
    pub async fn sweep_builds(
        &self,
        before: Millis,
        newest_kept: i64,
        young: Millis,
    ) -> anyhow::Result<usize> {
        let before = before.min(young);
        self.sweep_deliveries(before, newest_kept, young).await?;
        let newest: Option<i64> = on!(&self.main, pool => sqlx::query_scalar("SELECT MAX(id) FROM builds").fetch_one(pool).await?);
        let too_many = newest.unwrap_or(0) - newest_kept;
        let (heads, commits) = self.heads().await?;
        let (mut swept, mut after) = (0, 0);
        loop {
            let ended: Vec<(i64, String, String)> = on!(&self.main, pool => sqlx::query_as(
                    "SELECT id, environment, commit_id FROM builds WHERE id > $1 AND status IN ('superseded', 'skipped') \
                     AND (finished_at < $2 OR id <= $3 AND finished_at < $4) ORDER BY id LIMIT $5")
                .bind(after).bind(before).bind(too_many).bind(young).bind(AT_ONCE).fetch_all(pool).await?);
            let Some((last, ..)) = ended.last() else {
                return Ok(swept);
            };
            after = *last;
            let gone = ended.into_iter().filter_map(|(id, environment, commit)| {
                let is_head = heads.contains(&id) || commits.contains(&(environment, commit));
                (!is_head).then_some(id)
            });
            let gone: Vec<i64> = gone.collect();
            self.forget(&gone).await?;
            swept += gone.len();
        }
    }

    /// Of each branch in each environment the newest push, and the commit at which it stands.
    async fn heads(&self) -> anyhow::Result<(HashSet<i64>, HashSet<(String, String)>)> {
        let branches: Vec<(String, String, i64)> = on!(&self.main, pool => sqlx::query_as(
                "SELECT environment, branch, MAX(id) FROM builds WHERE kind = 'push' GROUP BY environment, branch")
            .fetch_all(pool).await?);
        let (mut heads, mut commits) = (HashSet::new(), HashSet::new());
        for (environment, branch, newest) in branches {
            heads.insert(newest);
            let commit = self.newest_push(&environment, &branch).await?;
            commits.extend(commit.map(|commit| (environment, commit)));
        }
        Ok((heads, commits))
    }

    async fn forget(&self, builds: &[i64]) -> anyhow::Result<()> {
        if builds.is_empty() {
            return Ok(());
        }
        // Without its build nobody would remove a log.
        on!(&self.logs, pool => delete(builds, "log_chunks", "build_id").build().execute(pool).await?.rows_affected());
        on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            // What was never built has applied nothing, and left no evidence.
            for table in ["stages", "github_outbox"] {
                delete(builds, table, "build_id").build().execute(&mut *tx).await?;
            }
            delete(builds, "builds", "id").build().execute(&mut *tx).await?;
            tx.commit().await?;
        });
        Ok(())
    }

    async fn sweep_deliveries(
        &self,
        before: Millis,
        newest_kept: i64,
        young: Millis,
    ) -> anyhow::Result<()> {
        let newest: Option<i64> = on!(&self.main, pool => sqlx::query_scalar("SELECT MAX(id) FROM deliveries").fetch_one(pool).await?);
        let too_many = newest.unwrap_or(0) - newest_kept;
        loop {
            // By their numbers, which come in the order of time: no body is read.
            let oldest: Vec<(i64, Millis)> = on!(&self.main, pool => sqlx::query_as(
                    "SELECT id, received_at FROM deliveries ORDER BY id LIMIT $1")
                .bind(AT_ONCE).fetch_all(pool).await?);
            let gone: Vec<i64> = oldest
                .iter()
                .take_while(|(id, at)| *at < before || *id <= too_many && *at < young)
                .map(|(id, _)| *id)
                .collect();
            if gone.is_empty() {
                return Ok(());
            }
            on!(&self.main, pool => delete(&gone, "deliveries", "id").build().execute(pool).await?.rows_affected());
        }
    }
}

fn delete<DB>(ids: &[i64], table: &str, column: &str) -> sqlx::QueryBuilder<DB>
where
    DB: sqlx::Database,
    i64: for<'q> sqlx::Encode<'q, DB> + sqlx::Type<DB>,
{
    let mut delete = sqlx::QueryBuilder::new(format!("DELETE FROM {table} WHERE {column} IN ("));
    let mut list = delete.separated(", ");
    for id in ids {
        list.push_bind(*id);
    }
    delete.push(")");
    delete
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build_log::LogLine;
    use crate::builds::{BuildKind, Outcome, Stage, Status};
    use crate::store::pushed;

    #[tokio::test]
    async fn builds_that_were_never_built_go_and_what_stands_for_something_stays() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), None).await.unwrap();
        on!(&store.main, pool => { sqlx::query("INSERT INTO environments (name) VALUES ('hello')").execute(pool).await.unwrap(); });
        let mut ids = Vec::new();
        for (after, status) in [
            ("a", Status::Skipped),
            ("b", Status::Failed),
            ("c", Status::Skipped),
            ("d", Status::Skipped),
        ] {
            let push = pushed(after);
            let id = store
                .enqueue("hello", &push, BuildKind::Push)
                .await
                .unwrap();
            ids.push(id);
            let line = LogLine {
                stage: Stage::Test,
                at: 0,
                bytes: vec![b'x'; 100],
            };
            let build = store.claim("us", false).await.unwrap().unwrap();
            store.append_log(&build, 1, &[line]).await.unwrap();
            store
                .finish(&build, status, Outcome::Unchanged, None)
                .await
                .unwrap();
        }
        let (never, now) = (0, i64::MAX);
        assert_eq!(
            store.sweep_builds(now, 0, never).await.unwrap(),
            0,
            "all are young"
        );
        assert_eq!(store.sweep_builds(never, 100, now).await.unwrap(), 0);
        assert_eq!(
            store.sweep_builds(never, 3, now).await.unwrap(),
            1,
            "#1 is one too many"
        );
        assert!(store.build(ids[0]).await.unwrap().is_none());
        assert_eq!(store.log_end(ids[0]).await.unwrap().1, 0);
        assert_eq!(
            store.sweep_builds(now, 100, now).await.unwrap(),
            1,
            "#3 is old"
        );
        // What failed, and the head of the branch.
        for (id, stays) in ids.iter().zip([false, true, false, true]) {
            assert_eq!(store.build(*id).await.unwrap().is_some(), stays, "#{id}");
        }
    }
}
