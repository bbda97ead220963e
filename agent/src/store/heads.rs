//! Heads: the newest push of each branch, and what is queued of it without a delivery: one that nobody told us of, one that
//! gave way to an older one, one that a pin held back.

use std::collections::HashMap;

use sqlx::Row;

use super::dialect::on;
use super::intake::numbers;
use super::{NewBuild, Store};
use crate::builds::{Build, BuildKind, Push, now};
use crate::fail_point;

/// Pushes that gave way: older ones are behind what is deployed.
const GAVE_WAY_MAX: i64 = 50;
/// Among so many builds before.
const LOOKED_BACK: i64 = 10_000;

/// The commit of a branch's newest push: neither one that came too late, nor one that was sent again.
pub(super) const NEWEST_PUSH: &str = "SELECT b.commit_id FROM builds b WHERE b.environment = $1 AND b.kind = 'push' AND b.branch = $2 \
    AND (b.superseded_by IS NULL OR b.superseded_by > b.id) AND (b.body_hash = '' OR NOT EXISTS (SELECT 1 FROM builds e \
    WHERE e.commit_id = b.commit_id AND e.environment = $1 AND e.body_hash = b.body_hash AND e.id < b.id AND e.kind = 'push')) \
    ORDER BY b.id DESC LIMIT 1";

/// Queues the push of an earlier build once more, behind all that waits; the number of its new build.
macro_rules! push_again {
    ($tx:ident, $id:expr, $environment:expr, $at:ident) => {{
        let row = sqlx::query(super::builds::PUSH_OF)
            .bind($id)
            .fetch_one(&mut *$tx)
            .await?;
        let push = super::builds::push!(row);
        let build = NewBuild {
            ends_others: false,
            ..NewBuild::without_delivery($environment, &push, BuildKind::Push)
        };
        super::builds::insert!($tx, build, $at)
    }};
}

impl Store {
    /// The commit of the newest push that an environment accepted, whatever became of it.
    pub async fn newest_push(
        &self,
        environment: &str,
        branch: &str,
    ) -> anyhow::Result<Option<String>> {
        Ok(on!(&self.main, pool => sqlx::query_scalar(NEWEST_PUSH)
            .bind(environment).bind(branch).fetch_optional(pool).await?))
    }

    /// Queues a build for a push of which no delivery told; None where one was accepted after `newest` was read.
    pub async fn enqueue_missed(
        &self,
        environment: &str,
        push: &Push,
        newest: Option<&str>,
    ) -> anyhow::Result<Option<i64>> {
        let at = now();
        let build = NewBuild::without_delivery(environment, push, BuildKind::Push);
        let id = on!(&self.main, pool, BEGIN, lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let _ = numbers!(tx, lock);
            let current: Option<String> = sqlx::query_scalar(NEWEST_PUSH)
                .bind(environment).bind(&push.branch).fetch_optional(&mut *tx).await?;
            if current.as_deref() != newest {
                return Ok(None);
            }
            let id = super::builds::insert!(tx, build, at);
            tx.commit().await?;
            id
        });
        fail_point::at("store: enqueue_missed");
        self.notify();
        Ok(Some(id))
    }

    /// Commits that a push must not go back from: the one that is deployed, and those of pushes that gave way and were never
    /// built, the newest first.
    pub async fn newer_commits(&self, build: &Build) -> anyhow::Result<Vec<String>> {
        let deployed = self.deployed(&build.environment).await?.0;
        let gave_way: Vec<String> = on!(&self.main, pool => sqlx::query_scalar(
                "SELECT s.commit_id FROM builds s WHERE s.environment = $1 AND s.branch = $2 AND s.kind = 'push' AND s.status = 'superseded' \
                 AND s.id > $3 AND NOT EXISTS (SELECT 1 FROM builds o WHERE o.environment = $1 AND o.commit_id = s.commit_id AND o.status <> 'superseded') \
                 ORDER BY s.id DESC LIMIT $4")
            .bind(&build.environment).bind(&build.branch).bind(build.id - LOOKED_BACK).bind(GAVE_WAY_MAX).fetch_all(pool).await?);
        Ok(deployed.into_iter().chain(gave_way).collect())
    }

    /// Queues a push that gave way to an older one, unless another build of its branch waits. The new build's number.
    pub async fn build_after_all(
        &self,
        stale: &Build,
        head: Option<&str>,
    ) -> anyhow::Result<Option<i64>> {
        let at = now();
        let id = on!(&self.main, pool, BEGIN, lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let _ = numbers!(tx, lock);
            let gave_way: Option<i64> = sqlx::query_scalar(
                    "SELECT MAX(s.id) FROM builds s WHERE s.environment = $1 AND s.branch = $2 AND s.kind = 'push' \
                     AND (s.commit_id = $3 OR $3 = '' AND s.superseded_by IN (SELECT g.id FROM builds g \
                     WHERE g.environment = $1 AND g.branch = $2 AND g.commit_id = (SELECT commit_id FROM builds WHERE id = $4))) AND s.status = 'superseded' AND NOT EXISTS (SELECT 1 \
                     FROM builds o WHERE o.environment = $1 AND o.id <> $4 AND (o.status = 'queued' AND o.branch = $2 AND o.kind = 'push' \
                     OR o.commit_id = s.commit_id AND o.status <> 'superseded'))")
                .bind(&stale.environment).bind(&stale.branch).bind(head.unwrap_or_default()).bind(stale.id).fetch_one(&mut *tx).await?;
            let Some(gave_way) = gave_way else { return Ok(None) };
            let id = push_again!(tx, gave_way, &stale.environment, at);
            tx.commit().await?;
            id
        });
        fail_point::at("store: build_after_all");
        self.notify();
        Ok(Some(id))
    }

    /// Queues the head of a branch anew where it was skipped for a pin, or gave way to an undo, and nothing holds the environment
    /// any more: its pin went with a redo, with an undo that did not come about, or just before the agent was killed.
    pub async fn build_what_was_held_back(
        &self,
        environment: &str,
        branch: &str,
    ) -> anyhow::Result<Option<i64>> {
        let at = now();
        let id = on!(&self.main, pool, BEGIN, lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let _ = numbers!(tx, lock);
            let held_back: Option<i64> = sqlx::query_scalar(
                    "SELECT b.id FROM builds b JOIN environments e ON e.name = b.environment WHERE b.id = (SELECT MAX(id) FROM builds \
                     WHERE environment = $1 AND branch = $2 AND kind = 'push' AND (superseded_by IS NULL OR superseded_by > id)) \
                     AND e.pinned_at IS NULL AND b.commit_id <> COALESCE(e.deployed_commit, '') \
                     AND (b.status = 'skipped' AND b.cause LIKE '%\"id\":\"pinned\"%' OR b.status = 'superseded' AND EXISTS \
                     (SELECT 1 FROM builds u WHERE u.id = b.superseded_by AND u.kind IN ('undo', 'redo'))) \
                     AND NOT EXISTS (SELECT 1 FROM builds o WHERE o.environment = $1 AND (o.status IN ('queued', 'running') \
                     OR o.id > b.id AND o.status NOT IN ('superseded', 'skipped') AND (o.kind NOT IN ('undo', 'redo', 'push') \
                     OR o.kind = 'push' AND o.commit_id = b.commit_id)))")
                .bind(environment).bind(branch).fetch_optional(&mut *tx).await?;
            let Some(held_back) = held_back else { return Ok(None) };
            let id = push_again!(tx, held_back, environment, at);
            tx.commit().await?;
            id
        });
        fail_point::at("store: build_what_was_held_back");
        self.notify();
        Ok(Some(id))
    }
}
