//! What GitHub has not been told yet: the difference between the builds and what was said of them.

use super::Store;
use super::dialect::{on, row};
use crate::builds::{Build, Millis, now};
use crate::fail_point;

/// A build of which not everything was said.
#[derive(Debug, Clone)]
pub struct Untold {
    pub build: Build,
    /// What was told last: None or `pending`.
    pub told: Option<String>,
    /// Failed tries since something was told.
    pub tries: i64,
    /// Not to be tried before.
    pub next_at: Millis,
    /// Why the last try failed.
    pub problem: Option<String>,
}

/// So many of them as are looked at together.
#[derive(Debug)]
pub struct UntoldPage {
    pub untold: Vec<Untold>,
    /// The number of the first, wanted or not.
    pub first: Option<i64>,
    /// From which number on there are more.
    pub more: Option<i64>,
}

/// Whose word it would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    pub repository: String,
    /// Environment and commit: they share one line on GitHub.
    pub commit: (String, String),
}

impl About {
    pub fn of(build: &Build) -> Self {
        Self {
            repository: build.repository.clone(),
            commit: (build.environment.clone(), build.commit.clone()),
        }
    }
}

row! {
    /// Other builds of the same commit in the same environment: they share one line on GitHub.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Siblings {
        /// Ended with a judgement: passed, failed, errored or canceled.
        pub finished: i64,
        /// Queued or running.
        pub live: i64,
        /// GitHub shows a final state of one.
        pub shown: i64,
        /// A final state of one was sent: GitHub may show it, though nobody heard so.
        pub attempted: i64,
        /// Ended with a judgement that GitHub is yet to be told.
        pub coming: i64,
    }
}

impl Store {
    /// Builds from number `from` on that GitHub was not told the end of, oldest first, as far as they are `wanted`.
    pub async fn untold(
        &self,
        from: i64,
        limit: i64,
        wanted: impl Fn(&About) -> bool,
    ) -> anyhow::Result<UntoldPage> {
        row! {
            struct Raw {
                id: i64,
                repository: String,
                environment: String,
                commit_id: String,
                told: Option<String>,
                tries: i64,
                next_at: i64,
                problem: Option<String>,
            }
        }
        let rows: Vec<Raw> = on!(&self.main, pool => sqlx::query_as(
                "SELECT b.id, b.repository, b.environment, b.commit_id, g.told, COALESCE(g.tries, 0) AS tries, COALESCE(g.next_at, 0) AS next_at, g.problem \
                 FROM builds b LEFT JOIN github_outbox g ON g.build_id = b.id \
                 WHERE b.id >= $1 AND COALESCE(g.told, '') NOT IN ('success', 'failure', 'error', 'silent') ORDER BY b.id LIMIT $2")
            .bind(from).bind(limit).fetch_all(pool).await?);
        let is_full = i64::try_from(rows.len())? == limit;
        let (first, last) = (rows.first().map(|row| row.id), rows.last());
        let more = last.filter(|_| is_full).map(|last| last.id + 1);
        let mut untold = Vec::with_capacity(rows.len());
        for row in rows {
            let about = About {
                repository: row.repository,
                commit: (row.environment, row.commit_id),
            };
            if !wanted(&about) {
                continue;
            }
            let build = self.build(row.id).await.inspect_err(|error| {
                tracing::error!(build = row.id, "cannot be read: {error:#}");
            });
            if let Ok(Some(build)) = build {
                untold.push(Untold {
                    build,
                    told: row.told,
                    tries: row.tries,
                    next_at: row.next_at,
                    problem: row.problem,
                });
            }
        }
        Ok(UntoldPage {
            untold,
            first,
            more,
        })
    }

    /// Of builds that are not to be told before a later moment than `at`, but by no wrong clock's `latest`: the moment, and why.
    pub async fn waiting(
        &self,
        at: Millis,
        latest: Millis,
    ) -> anyhow::Result<Vec<(i64, Millis, String)>> {
        Ok(on!(&self.main, pool => sqlx::query_as(
                "SELECT build_id, next_at, COALESCE(problem, '') FROM github_outbox WHERE next_at > 0 AND next_at > $1 AND next_at <= $2 \
                 AND COALESCE(told, '') NOT IN ('success', 'failure', 'error', 'silent')")
            .bind(at).bind(latest).fetch_all(pool).await?))
    }

    /// A final state is about to be sent: from here on nobody knows what GitHub shows, until somebody heard.
    pub async fn about_to_end(&self, build_id: i64) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query(
                "INSERT INTO github_outbox (build_id, is_final) VALUES ($1, TRUE) ON CONFLICT (build_id) DO UPDATE SET is_final = TRUE")
            .bind(build_id).execute(pool).await?.rows_affected());
        fail_point::at("store: about_to_end");
        Ok(())
    }

    /// GitHub shows it now. `silent`: there is nothing to say of this build.
    pub async fn told(&self, build_id: i64, state: &str) -> anyhow::Result<()> {
        self.note_github(build_id, Some(state), 0, None).await
    }

    /// GitHub could not be told: tried again from `next_at` on.
    pub async fn not_told(
        &self,
        build_id: i64,
        next_at: Millis,
        problem: &str,
    ) -> anyhow::Result<()> {
        self.note_github(build_id, None, next_at, Some(problem))
            .await
    }

    async fn note_github(
        &self,
        build_id: i64,
        told: Option<&str>,
        next_at: Millis,
        problem: Option<&str>,
    ) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query(
                "INSERT INTO github_outbox (build_id, told, told_at, tries, next_at, problem) \
                 VALUES ($1, $2, $3, CASE WHEN CAST($2 AS TEXT) IS NULL THEN 1 ELSE 0 END, $4, $5) \
                 ON CONFLICT (build_id) DO UPDATE SET told = COALESCE($2, github_outbox.told), told_at = $3, \
                 tries = CASE WHEN CAST($2 AS TEXT) IS NULL THEN github_outbox.tries + 1 ELSE 0 END, next_at = $4, problem = $5")
            .bind(build_id).bind(told).bind(now()).bind(next_at).bind(problem).execute(pool).await?.rows_affected());
        fail_point::at("store: note_github");
        Ok(())
    }

    /// What else there is of this build's commit in its environment.
    pub async fn siblings(&self, build: &Build) -> anyhow::Result<Siblings> {
        Ok(on!(&self.main, pool => sqlx::query_as(
                "SELECT COUNT(CASE WHEN b.status IN ('passed', 'failed', 'errored', 'canceled') THEN 1 END) AS finished, \
                 COUNT(CASE WHEN b.status IN ('queued', 'running') THEN 1 END) AS live, \
                 COUNT(CASE WHEN g.told IN ('success', 'failure', 'error') THEN 1 END) AS shown, \
                 COUNT(CASE WHEN g.is_final THEN 1 END) AS attempted, \
                 COUNT(CASE WHEN b.status IN ('passed', 'failed', 'errored', 'canceled') \
                 AND COALESCE(g.told, '') NOT IN ('success', 'failure', 'error', 'silent') THEN 1 END) AS coming \
                 FROM builds b LEFT JOIN github_outbox g ON g.build_id = b.id \
                 WHERE b.environment = $1 AND b.commit_id = $2 AND b.id <> $3")
            .bind(&build.environment).bind(&build.commit).bind(build.id).fetch_one(pool).await?))
    }
}
