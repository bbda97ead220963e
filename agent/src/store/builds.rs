//! Builds and the journal of their stages: queued, claimed, moved on, ended.

use sqlx::Row;

use super::Store;
use super::dialect::{on, row};
use crate::builds::{
    Build, BuildKind, Cause, Millis, Outcome, Push, Stage, StageRow, StageStatus, Status, now,
};
use crate::fail_point;

/// A push that took the place of another waits so long for the next one of the burst; never one to an idle environment.
const BURST: Millis = 1000;

/// How often a claim is tried where other agents are quicker.
const CLAIMS_MAX: usize = 10;

/// What is needed to queue a build.
pub struct NewBuild<'a> {
    pub environment: &'a str,
    pub push: &'a Push,
    pub kind: BuildKind,
    pub delivery_id: Option<i64>,
    pub body_hash: &'a str,
    /// It is known already that this one came too late.
    pub superseded_by: Option<i64>,
    /// Whether it takes the place of what waits; a redelivered old push does not.
    pub ends_others: bool,
}

impl<'a> NewBuild<'a> {
    /// One that no delivery asked for.
    pub const fn without_delivery(environment: &'a str, push: &'a Push, kind: BuildKind) -> Self {
        Self {
            environment,
            push,
            kind,
            delivery_id: None,
            body_hash: "",
            superseded_by: None,
            ends_others: true,
        }
    }
}

/// Numbers and inserts a build within a transaction, and ends what it takes the place of.
macro_rules! insert {
    ($tx:ident, $build:ident, $at:ident) => {{
        let id: i64 = sqlx::query_scalar(
            "UPDATE counters SET value = value + 1 WHERE name = 'build' RETURNING value",
        )
        .fetch_one(&mut *$tx)
        .await?;
        if $build.ends_others {
            $crate::store::builds::end_others!($tx, id, $build, $at);
        }
        let build = [(id, $build)];
        $crate::store::builds::write!($tx, build, $at);
        id
    }};
}
pub(super) use insert;

/// Ends what a build takes the place of: builds of its environment that wait, or that run and have not begun to deploy.
/// One that a person asked for ends no push.
macro_rules! end_others {
    ($tx:ident, $id:ident, $build:ident, $at:ident) => {
        sqlx::query(
            "UPDATE builds SET status = 'superseded', superseded_by = $1, finished_at = $2 \
             WHERE environment = $3 AND status = 'queued' AND branch = $4 AND ($5 = 'push' OR kind <> 'push') \
             AND kind NOT IN ('undo', 'redo')",
        )
        .bind($id)
        .bind($at)
        .bind($build.environment)
        .bind(&$build.push.branch)
        .bind($build.kind.as_str())
        .execute(&mut *$tx)
        .await?;
        sqlx::query(
            "UPDATE builds SET superseded_by = $1 \
             WHERE environment = $2 AND status = 'running' AND branch = $3 AND NOT deploying AND superseded_by IS NULL \
             AND ($4 = 'push' OR kind <> 'push') AND kind NOT IN ('undo', 'redo')",
        )
        .bind($id)
        .bind($build.environment)
        .bind(&$build.push.branch)
        .bind($build.kind.as_str())
        .execute(&mut *$tx)
        .await?;
    };
}
pub(super) use end_others;

/// Inserts numbered builds, all in one statement: at most 1,000, by the parameters that a statement of SQLite may have.
macro_rules! write {
    ($tx:ident, $builds:ident, $at:ident) => {
        let mut insert = sqlx::QueryBuilder::new(
            "INSERT INTO builds (id, environment, repository, repository_id, branch, before_commit, commit_id, title, pushed_by, \
             pushed_at, kind, delivery_id, body_hash, status, outcome, queued_at, finished_at, superseded_by) ",
        );
        insert.push_values($builds.iter(), |mut row, (id, build)| {
            let is_overtaken = build.superseded_by.is_some();
            row.push_bind(*id)
                .push_bind(build.environment)
                .push_bind(&build.push.repository)
                .push_bind(build.push.repository_id)
                .push_bind(&build.push.branch)
                .push_bind(&build.push.before)
                .push_bind(&build.push.after)
                .push_bind(&build.push.title)
                .push_bind(&build.push.pusher)
                .push_bind(build.push.pushed_at)
                .push_bind(build.kind.as_str())
                .push_bind(build.delivery_id)
                .push_bind(build.body_hash)
                .push_bind(if is_overtaken { "superseded" } else { "queued" })
                .push_bind("unchanged")
                .push_bind($at)
                .push_bind(is_overtaken.then_some($at))
                .push_bind(build.superseded_by);
        });
        insert.build().execute(&mut *$tx).await?;
    };
}
pub(super) use write;

/// Which builds a list shows, newest first.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(default)]
pub struct Filter {
    pub environment: Option<String>,
    pub branch: Option<String>,
    pub status: Option<Status>,
    /// At most 200; default 50.
    pub limit: Option<i64>,
    /// Only builds with a smaller number.
    pub before: Option<i64>,
}

row! {
    struct BuildRow {
        id: i64,
        environment: String,
        repository: String,
        branch: String,
        commit_id: String,
        title: String,
        pushed_by: String,
        kind: String,
        status: String,
        outcome: String,
        cause: Option<String>,
        stage: Option<String>,
        attempt: i64,
        fence: i64,
        image: Option<String>,
        release_id: Option<i64>,
        queued_at: i64,
        started_at: Option<i64>,
        finished_at: Option<i64>,
        cancel_requested: bool,
        superseded_by: Option<i64>,
        restored_release: Option<i64>,
    }
}

/// What this agent can read: one that is newer may have written others.
macro_rules! known_kinds {
    () => {
        "('push', 'manual', 'rerun', 'undo', 'redo')"
    };
}

/// Which of those that wait in an environment goes first, by its kind.
macro_rules! rank {
    ($kind:literal) => {
        concat!(
            "CASE ",
            $kind,
            " WHEN 'undo' THEN 0 WHEN 'redo' THEN 0 WHEN 'push' THEN 2 ELSE 1 END"
        )
    };
}

macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT id, environment, repository, branch, commit_id, title, pushed_by, kind, status, outcome, cause, stage, attempt, \
             fence, image, release_id, queued_at, started_at, finished_at, cancel_requested, superseded_by, \
             restored_release FROM builds ",
            $rest
        )
    };
}

impl TryFrom<BuildRow> for Build {
    type Error = anyhow::Error;

    fn try_from(row: BuildRow) -> anyhow::Result<Self> {
        Ok(Self {
            id: row.id,
            environment: row.environment,
            repository: row.repository,
            branch: row.branch,
            commit: row.commit_id,
            title: row.title,
            by: row.pushed_by,
            kind: row.kind.parse()?,
            status: row.status.parse()?,
            outcome: row.outcome.parse()?,
            cause: row.cause.as_deref().map(serde_json::from_str).transpose()?,
            stage: row.stage.as_deref().map(str::parse).transpose()?,
            attempt: row.attempt,
            fence: row.fence,
            image: row.image,
            release_id: row.release_id,
            queued_at: row.queued_at,
            started_at: row.started_at,
            finished_at: row.finished_at,
            cancel_requested: row.cancel_requested,
            superseded_by: row.superseded_by,
            restored_release: row.restored_release,
        })
    }
}

/// A newer agent's, of a kind that this one does not know, must not keep it from all others.
fn readable(rows: Vec<BuildRow>) -> Vec<Build> {
    let read = |row: BuildRow| {
        let id = row.id;
        Build::try_from(row)
            .inspect_err(|error| tracing::error!(build = id, "cannot be read: {error:#}"))
            .ok()
    };
    rows.into_iter().filter_map(read).collect()
}

impl Store {
    pub async fn build(&self, id: i64) -> anyhow::Result<Option<Build>> {
        let row: Option<BuildRow> = on!(&self.main, pool => sqlx::query_as(select!("WHERE id = $1")).bind(id).fetch_optional(pool).await?);
        row.map(Build::try_from).transpose()
    }

    pub async fn builds(&self, filter: &Filter) -> anyhow::Result<Vec<Build>> {
        // Only what is asked for, so that an index is found for it.
        let rows = on!(&self.main, pool => {
            let mut query = sqlx::QueryBuilder::new(select!("WHERE kind IN "));
            query.push(known_kinds!());
            if let Some(environment) = &filter.environment {
                query.push(" AND environment = ").push_bind(environment);
            }
            if let Some(branch) = &filter.branch {
                query.push(" AND branch = ").push_bind(branch);
            }
            if let Some(status) = filter.status {
                query.push(" AND status = ").push_bind(status.as_str());
            }
            if let Some(before) = filter.before {
                query.push(" AND id < ").push_bind(before);
            }
            query.push(" ORDER BY id DESC LIMIT ").push_bind(filter.limit.unwrap_or(50).clamp(1, 200));
            query.build_query_as().fetch_all(pool).await?
        });
        Ok(readable(rows))
    }

    /// Builds that were running when an agent died: to be resumed before anything else.
    pub async fn running(&self) -> anyhow::Result<Vec<Build>> {
        let rows: Vec<BuildRow> = on!(&self.main, pool => sqlx::query_as(select!("WHERE status = 'running' ORDER BY id")).fetch_all(pool).await?);
        Ok(readable(rows))
    }

    /// Queues a build that a person asked for.
    pub async fn enqueue(
        &self,
        environment: &str,
        push: &Push,
        kind: BuildKind,
    ) -> anyhow::Result<i64> {
        let at = now();
        let build = NewBuild::without_delivery(environment, push, kind);
        let id = on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let id = super::builds::insert!(tx, build, at);
            tx.commit().await?;
            id
        });
        fail_point::at("store: enqueue");
        self.notify();
        Ok(id)
    }

    /// Takes a queued build whose environment is free, one that brings a release back first (`only_back`: no other), with a new
    /// fence. Of several environments that one comes next whose last build is the oldest: a push that takes the place of another
    /// has the newest number, and its environment must not go to the back for it.
    pub async fn claim(&self, holder: &str, only_back: bool) -> anyhow::Result<Option<Build>> {
        // Of several agents that see the same build one gets it, and the others look again.
        for _ in 0..CLAIMS_MAX {
            let Some(id) = self.next_in_turn(only_back).await? else {
                return Ok(None);
            };
            let taken = on!(&self.main, pool, BEGIN, lock => {
                let mut tx = pool.begin_with(BEGIN).await?;
                let free = sqlx::query(lock!(
                        "SELECT name FROM environments WHERE name = (SELECT environment FROM builds WHERE id = $1)", " SKIP LOCKED"))
                    .bind(id).fetch_optional(&mut *tx).await?;
                let taken = free.is_some() && take!(tx, id, holder, "status = 'queued' AND NOT EXISTS (SELECT 1 FROM builds r \
                    WHERE r.environment = builds.environment AND r.status = 'running')");
                tx.commit().await?;
                taken
            });
            if taken {
                return self.taken(Some(id)).await;
            }
        }
        Ok(None)
    }

    /// Only reads, so that a queue with nothing to do keeps no delivery from being written. Of a kind that only a newer agent
    /// knows it is none.
    async fn next_in_turn(&self, only_back: bool) -> anyhow::Result<Option<i64>> {
        let at = now();
        // Of each environment its first, so that thousands that wait are not each compared with what was served.
        Ok(on!(&self.main, pool => sqlx::query_scalar(concat!(
                "SELECT b.id FROM environments e JOIN builds b ON b.id = (SELECT q.id FROM builds q WHERE q.environment = e.name \
                 AND q.status = 'queued' AND q.kind IN ", known_kinds!(), " AND (NOT $1 OR q.kind IN ('undo', 'redo')) \
                 AND (q.kind <> 'push' OR q.queued_at < $2 OR q.queued_at > $3 OR NOT EXISTS \
                 (SELECT 1 FROM builds o WHERE o.superseded_by = q.id)) \
                 ORDER BY ", rank!("q.kind"), ", q.id LIMIT 1) \
                 WHERE NOT EXISTS (SELECT 1 FROM builds r WHERE r.environment = e.name AND r.status = 'running') \
                 AND ($4 = '' OR $4 LIKE '%,' || e.name || ',%') \
                 ORDER BY ", rank!("b.kind"), ", COALESCE((SELECT r.id \
                 FROM builds r WHERE r.environment = e.name AND r.started_at IS NOT NULL ORDER BY r.id DESC LIMIT 1), 0), b.id LIMIT 1"))
            .bind(only_back).bind(at - BURST).bind(at).bind(self.served()).fetch_optional(pool).await?))
    }

    /// Takes a running build of a dead holder again, with a new fence and one attempt more. None where another agent was
    /// quicker.
    pub async fn reclaim(&self, build: &Build, holder: &str) -> anyhow::Result<Option<Build>> {
        let id = build.id;
        let taken = on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let taken = take!(tx, id, holder, "status = 'running' AND fence = $5", build.fence);
            tx.commit().await?;
            taken
        });
        self.taken(taken.then_some(id)).await
    }

    async fn taken(&self, id: Option<i64>) -> anyhow::Result<Option<Build>> {
        let Some(id) = id else { return Ok(None) };
        fail_point::at("store: taken");
        self.notify();
        self.build(id).await
    }

    /// Says who made a commit what, once checkout knows it.
    pub async fn describe(&self, build: &Build, commit: &str, title: &str) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query("UPDATE builds SET commit_id = $3, title = $4 WHERE id = $1 AND fence = $2")
            .bind(build.id).bind(build.fence).bind(commit).bind(title).execute(pool).await?.rows_affected());
        fail_point::at("store: describe");
        self.notify();
        Ok(())
    }

    pub async fn set_image(&self, build: &Build, image: &str) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query("UPDATE builds SET image = $3 WHERE id = $1 AND fence = $2")
            .bind(build.id).bind(build.fence).bind(image).execute(pool).await?.rows_affected());
        fail_point::at("store: set_image");
        Ok(())
    }

    /// The last moment at which a newer push, a pin or a person can stop a build: false when one has. From here on it is
    /// let through to its end.
    pub async fn begin_deploying(&self, build: &Build) -> anyhow::Result<bool> {
        let rows = on!(&self.main, pool => sqlx::query(
                "UPDATE builds SET deploying = TRUE WHERE id = $1 AND fence = $2 AND superseded_by IS NULL AND NOT cancel_requested \
                 AND (kind IN ('undo', 'redo') OR NOT EXISTS \
                 (SELECT 1 FROM environments e WHERE e.name = builds.environment AND e.pinned_at IS NOT NULL))")
            .bind(build.id).bind(build.fence).execute(pool).await?.rows_affected());
        fail_point::at("store: begin_deploying");
        Ok(rows == 1)
    }

    /// The build that waits for this one's end, if there is one.
    pub async fn waits_behind(&self, build: &Build) -> anyhow::Result<Option<i64>> {
        Ok(
            on!(&self.main, pool => sqlx::query_scalar("SELECT MIN(id) FROM builds WHERE environment = $1 AND status = 'queued'")
            .bind(&build.environment).fetch_one(pool).await?),
        )
    }

    /// An error where another agent has taken the build over.
    pub async fn ensure_held(&self, build: &Build) -> anyhow::Result<()> {
        let known: Option<i64> = on!(&self.main, pool => sqlx::query_scalar("SELECT id FROM builds WHERE id = $1 AND fence = $2 AND status = 'running'")
            .bind(build.id).bind(build.fence).fetch_optional(pool).await?);
        anyhow::ensure!(known.is_some(), "build #{} is no longer ours", build.id);
        Ok(())
    }

    /// Says why a build fails while it still runs: its rollback comes next, and may be gone on with by another agent.
    pub async fn set_cause(&self, build: &Build, cause: &Cause) -> anyhow::Result<()> {
        let cause = serde_json::to_string(cause)?;
        on!(&self.main, pool => sqlx::query("UPDATE builds SET cause = $3 WHERE id = $1 AND fence = $2 AND status = 'running'")
            .bind(build.id).bind(build.fence).bind(&cause).execute(pool).await?.rows_affected());
        fail_point::at("store: set_cause");
        self.notify();
        Ok(())
    }

    /// The release that this build's rollback has put back.
    pub async fn set_restored(&self, build: &Build, release_id: i64) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query("UPDATE builds SET restored_release = $3 WHERE id = $1 AND fence = $2")
            .bind(build.id).bind(build.fence).bind(release_id).execute(pool).await?.rows_affected());
        fail_point::at("store: set_restored");
        Ok(())
    }

    /// Ends a build, once: a terminal status never changes. False when it had ended or another holds it.
    pub async fn finish(
        &self,
        build: &Build,
        status: Status,
        outcome: Outcome,
        cause: Option<&Cause>,
    ) -> anyhow::Result<bool> {
        let cause = cause.map(serde_json::to_string).transpose()?;
        let is_lost_undo = build.kind == BuildKind::Undo && status != Status::Passed;
        let rows = on!(&self.main, pool, BEGIN, lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            if is_lost_undo {
                super::environments::hold!(tx, lock, &build.environment);
            }
            let rows = sqlx::query(
                "UPDATE builds SET status = $3, outcome = $4, cause = $5, \
                 finished_at = CASE WHEN $6 < started_at THEN started_at ELSE $6 END WHERE id = $1 AND fence = $2 AND status = 'running'")
                .bind(build.id).bind(build.fence).bind(status.as_str()).bind(outcome.as_str()).bind(&cause).bind(now())
                .execute(&mut *tx).await?.rows_affected();
            if rows == 1 && is_lost_undo {
                super::environments::settle_pin!(tx, &build.environment);
            }
            tx.commit().await?;
            rows
        });
        fail_point::at("store: finish");
        self.notify();
        Ok(rows == 1)
    }

    /// Asks for the end of a build: a waiting one ends at once, a running one at its next safe point. The status before,
    /// or None where there is no such build.
    pub async fn cancel(&self, id: i64, actor: &str) -> anyhow::Result<Option<Status>> {
        let Some(build) = self.build(id).await? else {
            return Ok(None);
        };
        let at = now();
        on!(&self.main, pool, BEGIN, lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            super::environments::hold!(tx, lock, &build.environment);
            sqlx::query("UPDATE builds SET cancel_requested = TRUE WHERE id = $1 AND status IN ('queued', 'running')")
                .bind(id).execute(&mut *tx).await?;
            let ended = sqlx::query("UPDATE builds SET status = 'canceled', finished_at = $2 WHERE id = $1 AND status = 'queued'")
                .bind(id).bind(at).execute(&mut *tx).await?.rows_affected();
            if ended == 1 && build.kind == BuildKind::Undo {
                super::environments::settle_pin!(tx, &build.environment);
            }
            sqlx::query("INSERT INTO audit (at, actor, action, environment, build_id, detail) VALUES ($1, $2, 'cancel', $3, $4, '')")
                .bind(at).bind(actor).bind(&build.environment).bind(id).execute(&mut *tx).await?;
            tx.commit().await?;
        });
        fail_point::at("store: cancel");
        self.notify();
        Ok(Some(build.status))
    }

    /// How many builds have each status; those with none are left out.
    pub async fn count_by_status(&self) -> anyhow::Result<Vec<(Status, i64)>> {
        let rows: Vec<(String, i64)> = on!(&self.main, pool => sqlx::query_as("SELECT status, COUNT(*) FROM builds GROUP BY status").fetch_all(pool).await?);
        rows.into_iter()
            .map(|(status, count)| Ok((status.parse()?, count)))
            .collect()
    }

    /// The push behind a build, to queue it anew.
    pub async fn push_of(&self, id: i64) -> anyhow::Result<Option<Push>> {
        Ok(
            on!(&self.main, pool => match sqlx::query(PUSH_OF).bind(id).fetch_optional(pool).await? {
                Some(row) => Some(push!(row)),
                None => None,
            }),
        )
    }

    /// Writes into the journal that a stage began; one that was begun before begins anew, with what was kept where it was cut off.
    pub async fn begin_stage(&self, build: &Build, stage: Stage) -> anyhow::Result<()> {
        let ordinal = Stage::ALL
            .iter()
            .position(|one| *one == stage)
            .map_or(0, |at| i64::try_from(at).unwrap_or(0));
        on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let held = sqlx::query("UPDATE builds SET stage = $3 WHERE id = $1 AND fence = $2 AND status = 'running'")
                .bind(build.id).bind(build.fence).bind(stage.as_str()).execute(&mut *tx).await?.rows_affected();
            anyhow::ensure!(held == 1, "build #{} is no longer ours", build.id);
            sqlx::query(
                "INSERT INTO stages (build_id, stage, ordinal, attempt, status, begun_at) VALUES ($1, $2, $3, $4, 'running', $5) \
                 ON CONFLICT (build_id, stage) DO UPDATE SET attempt = $4, status = 'running', begun_at = $5, done_at = NULL, \
                 baton = CASE stages.status WHEN 'running' THEN stages.baton END",
            )
            .bind(build.id).bind(stage.as_str()).bind(ordinal).bind(build.attempt).bind(now()).execute(&mut *tx).await?;
            tx.commit().await?;
        });
        fail_point::at("store: begin_stage");
        self.notify();
        Ok(())
    }

    /// Keeps what a stage that is under way has found out, for an attempt after this one.
    pub async fn keep_baton(&self, build: &Build, stage: Stage, baton: &str) -> anyhow::Result<()> {
        let rows = on!(&self.main, pool => sqlx::query(
                "UPDATE stages SET baton = $3 WHERE build_id = $1 AND stage = $2 AND status = 'running' AND \
                 EXISTS (SELECT 1 FROM builds WHERE id = $1 AND fence = $4)")
            .bind(build.id).bind(stage.as_str()).bind(baton).bind(build.fence)
            .execute(pool).await?.rows_affected());
        anyhow::ensure!(rows == 1, "build #{} is no longer ours", build.id);
        fail_point::at("store: keep_baton");
        Ok(())
    }

    /// Writes into the journal how a stage ended, and the baton where it passed; where it did not, the one that was kept stays.
    pub async fn end_stage(
        &self,
        build: &Build,
        stage: Stage,
        status: StageStatus,
        baton: Option<&str>,
    ) -> anyhow::Result<()> {
        let rows = on!(&self.main, pool => sqlx::query(
                "UPDATE stages SET status = $3, done_at = CASE WHEN $4 < begun_at THEN begun_at ELSE $4 END, baton = COALESCE($5, baton) WHERE build_id = $1 AND stage = $2 AND \
                 EXISTS (SELECT 1 FROM builds WHERE id = $1 AND fence = $6)")
            .bind(build.id).bind(stage.as_str()).bind(status.as_str()).bind(now()).bind(baton).bind(build.fence)
            .execute(pool).await?.rows_affected());
        anyhow::ensure!(rows == 1, "build #{} is no longer ours", build.id);
        fail_point::at("store: end_stage");
        self.notify();
        Ok(())
    }

    pub async fn stages(&self, build_id: i64) -> anyhow::Result<Vec<StageRow>> {
        row! {
            struct Raw {
                stage: String,
                attempt: i64,
                status: String,
                begun_at: i64,
                done_at: Option<i64>,
                baton: Option<String>,
            }
        }
        let rows: Vec<Raw> = on!(&self.main, pool => sqlx::query_as(
                "SELECT stage, attempt, status, begun_at, done_at, baton FROM stages WHERE build_id = $1 ORDER BY ordinal")
            .bind(build_id).fetch_all(pool).await?);
        rows.into_iter()
            .map(|row| {
                let stage: Stage = row.stage.parse()?;
                let status: StageStatus = row.status.parse()?;
                Ok(StageRow {
                    stage,
                    title: stage.title(),
                    attempt: row.attempt,
                    status,
                    begun_at: row.begun_at,
                    done_at: row.done_at,
                    baton: row.baton,
                })
            })
            .collect()
    }
}

pub(super) const PUSH_OF: &str = "SELECT repository_id, repository, branch, before_commit, commit_id, pushed_by, title, pushed_at \
    FROM builds WHERE id = $1";

/// The push in a row of `PUSH_OF`.
macro_rules! push {
    ($row:ident) => {
        Push {
            repository_id: $row.try_get(0)?,
            repository: $row.try_get(1)?,
            branch: $row.try_get(2)?,
            before: $row.try_get(3)?,
            after: $row.try_get(4)?,
            pusher: $row.try_get(5)?,
            title: $row.try_get(6)?,
            pushed_at: $row.try_get(7)?,
        }
    };
}
pub(super) use push;

/// Makes a build the holder's where `$if` holds: running, one attempt more, the environment's next fence. Whose holder did
/// not hand it over has lost an agent, and it counts how often in the same stage.
macro_rules! take {
    ($tx:ident, $id:ident, $holder:ident, $if:literal $(, $bound:expr)?) => {{
        let fence: i64 = sqlx::query_scalar(
            "UPDATE environments SET fence = fence + 1 WHERE name = (SELECT environment FROM builds WHERE id = $1) RETURNING fence",
        )
        .bind($id)
        .fetch_one(&mut *$tx)
        .await?;
        let taken = sqlx::query(concat!(
            "UPDATE builds SET status = 'running', attempt = attempt + 1, fence = $2, started_at = COALESCE(started_at, $4), \
             losses = CASE WHEN holder IS NULL OR holder = $3 THEN losses WHEN lost_in = COALESCE(stage, '') THEN losses + 1 ELSE 1 END, \
             lost_in = CASE WHEN holder IS NULL OR holder = $3 THEN lost_in ELSE COALESCE(stage, '') END, holder = $3 \
             WHERE id = $1 AND ", $if
        ))
        .bind($id)
        .bind(fence)
        .bind($holder)
        .bind(now())
        $(.bind($bound))?
        .execute(&mut *$tx)
        .await?;
        taken.rows_affected() == 1
    }};
}
use take;
