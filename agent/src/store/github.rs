//! What GitHub has not been told yet: the difference between the builds and what was said of them.

use sqlx::FromRow;

use super::Store;
use super::dialect::on;
use crate::builds::{Build, now};

/// A build whose status GitHub does not show yet.
#[derive(Debug, Clone)]
pub struct Untold {
    pub build: Build,
    /// What was told last: `pending`, `success`, `failure` or `error`.
    pub told: Option<String>,
    pub tries: i64,
}

impl Store {
    /// Builds that changed since GitHub was told, oldest first, less those that must wait.
    pub async fn untold(&self, limit: i64) -> anyhow::Result<Vec<Untold>> {
        #[derive(FromRow)]
        struct Raw {
            id: i64,
            told: Option<String>,
            tries: i64,
        }
        let rows: Vec<Raw> = on!(&self.main, pool => sqlx::query_as(
                "SELECT b.id, g.told, COALESCE(g.tries, 0) AS tries FROM builds b LEFT JOIN github_outbox g ON g.build_id = b.id \
                 WHERE COALESCE(g.next_at, 0) <= $1 AND COALESCE(g.told, '') NOT IN ('success', 'failure', 'error', 'silent') \
                 AND (b.status NOT IN ('queued', 'running') OR g.told IS NULL) ORDER BY b.id LIMIT $2")
            .bind(now()).bind(limit).fetch_all(pool).await?);
        let mut untold = Vec::with_capacity(rows.len());
        for row in rows {
            if let Some(build) = self.build(row.id).await? {
                untold.push(Untold {
                    build,
                    told: row.told,
                    tries: row.tries,
                });
            }
        }
        Ok(untold)
    }

    /// GitHub shows it now. `silent`: there is nothing to say of this build.
    pub async fn told(&self, build_id: i64, state: &str) -> anyhow::Result<()> {
        self.note_github(build_id, Some(state), 0, None).await
    }

    /// GitHub could not be told: tried again from `next_at` on.
    pub async fn not_told(&self, build_id: i64, next_at: i64, problem: &str) -> anyhow::Result<()> {
        self.note_github(build_id, None, next_at, Some(problem))
            .await
    }

    async fn note_github(
        &self,
        build_id: i64,
        told: Option<&str>,
        next_at: i64,
        problem: Option<&str>,
    ) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query(
                "INSERT INTO github_outbox (build_id, told, told_at, tries, next_at, problem) VALUES ($1, $2, $3, 1, $4, $5) \
                 ON CONFLICT (build_id) DO UPDATE SET told = COALESCE($2, github_outbox.told), told_at = $3, \
                 tries = CASE WHEN CAST($2 AS TEXT) IS NULL THEN github_outbox.tries + 1 ELSE 0 END, next_at = $4, problem = $5")
            .bind(build_id).bind(told).bind(now()).bind(next_at).bind(problem).execute(pool).await?.rows_affected());
        Ok(())
    }

    /// Whether a commit has a finished build in this environment besides `except`: then silence is kept for skipped ones.
    pub async fn has_finished_build(
        &self,
        environment: &str,
        commit: &str,
        except: i64,
    ) -> anyhow::Result<bool> {
        let count: i64 = on!(&self.main, pool => sqlx::query_scalar(
                "SELECT COUNT(*) FROM builds WHERE environment = $1 AND commit_id = $2 AND id <> $3 AND status IN ('passed', 'failed', 'errored', 'canceled')")
            .bind(environment).bind(commit).bind(except).fetch_one(pool).await?);
        Ok(count > 0)
    }
}
