//! Deliveries in: stored, recognised if repeated, and turned into queued builds, all in one transaction.

use anyhow::Context;
use sqlx::Row;

use super::dialect::on;
use super::{NewBuild, Store};
use crate::builds::{BuildKind, Push, Status, now};

/// What came over the wire, its signature proved.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// GitHub's id of it: unsigned, so only for people to look up.
    pub guid: String,
    pub event: String,
    /// SHA-256 of the raw body, 64 hex digits.
    pub body_hash: String,
    pub body: Vec<u8>,
}

/// What became of a push in one environment.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Accepted {
    pub build: i64,
    pub environment: String,
    pub status: Status,
    /// The push was known; `build` is the one that it had made.
    pub duplicate: bool,
}

/// The commit of a branch's newest push: neither one that came too late, nor one that was sent again.
const NEWEST_PUSH: &str = "SELECT b.commit_id FROM builds b WHERE b.environment = $1 AND b.kind = 'push' AND b.branch = $2 \
    AND (b.superseded_by IS NULL OR b.superseded_by > b.id) AND NOT EXISTS (SELECT 1 FROM builds e WHERE e.environment = $1 \
    AND e.kind = 'push' AND e.id < b.id AND e.body_hash = b.body_hash AND e.body_hash <> '') ORDER BY b.id DESC LIMIT 1";

/// A push build that stands for the newest known state of its branch in one environment.
struct Newest {
    id: i64,
    status: String,
    body_hash: String,
    before: String,
    commit: String,
    pushed_at: Option<i64>,
}

impl Newest {
    /// The same bytes, the same move of the branch, or a look at the branch was quicker than the delivery.
    fn is_repeated_by(&self, delivery: &Delivery, push: &Push) -> bool {
        let is_found = self.body_hash.is_empty();
        self.body_hash == delivery.body_hash
            || (self.commit == push.after && (is_found || self.before == push.before))
    }

    /// GitHub delivers out of order: a push that this one was made on top of, or that GitHub took earlier.
    fn came_after(&self, push: &Push) -> bool {
        let made_on_top = self.before == push.after && self.commit != push.before;
        let taken_later =
            matches!((self.pushed_at, push.pushed_at), (Some(ours), Some(theirs)) if ours > theirs);
        made_on_top || taken_later
    }
}

impl Store {
    /// Stores a delivery and queues one build for each environment, unless the push is a repetition there. When this
    /// returns, everything is on disk.
    ///
    /// A repetition is a body seen before, or the same branch, before and after as the branch's newest; after a newer
    /// push in between it is built behind what waits, and skipped at checkout unless it is the branch's head.
    pub async fn accept(
        &self,
        delivery: &Delivery,
        push: &Push,
        environments: &[&str],
    ) -> anyhow::Result<Vec<Accepted>> {
        let at = now();
        let accepted = on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await.context("cannot begin to store a delivery")?;
            let mut accepted = Vec::with_capacity(environments.len());
            let mut delivery_id = None;
            for environment in environments {
                let newest = sqlx::query(
                    "SELECT id, status, body_hash, before_commit, commit_id, pushed_at FROM builds \
                     WHERE environment = $1 AND kind = 'push' AND branch = $2 ORDER BY id DESC LIMIT 1",
                )
                .bind(*environment)
                .bind(&push.branch)
                .fetch_optional(&mut *tx)
                .await?
                .map(|row| -> sqlx::Result<Newest> {
                    Ok(Newest {
                        id: row.try_get(0)?,
                        status: row.try_get(1)?,
                        body_hash: row.try_get(2)?,
                        before: row.try_get(3)?,
                        commit: row.try_get(4)?,
                        pushed_at: row.try_get(5)?,
                    })
                })
                .transpose()?;
                if let Some(newest) = newest.as_ref().filter(|newest| newest.is_repeated_by(delivery, push)) {
                    let (build, status) = (newest.id, newest.status.parse()?);
                    accepted.push(Accepted { build, environment: (*environment).to_owned(), status, duplicate: true });
                    continue;
                }
                if delivery_id.is_none() {
                    let id: i64 = sqlx::query_scalar("UPDATE counters SET value = value + 1 WHERE name = 'delivery' RETURNING value")
                        .fetch_one(&mut *tx)
                        .await?;
                    sqlx::query("INSERT INTO deliveries (id, guid, event, body_hash, body, received_at) VALUES ($1, $2, $3, $4, $5, $6)")
                        .bind(id)
                        .bind(&delivery.guid)
                        .bind(&delivery.event)
                        .bind(&delivery.body_hash)
                        .bind(&delivery.body)
                        .bind(at)
                        .execute(&mut *tx)
                        .await?;
                    delivery_id = Some(id);
                }
                let seen: Option<i64> = sqlx::query_scalar(
                    "SELECT id FROM builds WHERE environment = $1 AND kind = 'push' AND body_hash = $2 LIMIT 1",
                )
                .bind(*environment)
                .bind(&delivery.body_hash)
                .fetch_optional(&mut *tx)
                .await?;
                let overtaken_by = newest.filter(|newest| newest.came_after(push)).map(|newest| newest.id);
                let build = NewBuild {
                    environment,
                    push,
                    kind: BuildKind::Push,
                    delivery_id,
                    body_hash: &delivery.body_hash,
                    superseded_by: overtaken_by,
                    ends_others: overtaken_by.is_none() && seen.is_none(),
                };
                let id = super::builds::insert!(tx, build, at);
                let status = if overtaken_by.is_some() { Status::Superseded } else { Status::Queued };
                accepted.push(Accepted { build: id, environment: (*environment).to_owned(), status, duplicate: false });
            }
            tx.commit().await.context("cannot store a delivery")?;
            accepted
        });
        self.notify();
        Ok(accepted)
    }

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
        let id = on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let current: Option<String> = sqlx::query_scalar(NEWEST_PUSH)
                .bind(environment).bind(&push.branch).fetch_optional(&mut *tx).await?;
            if current.as_deref() != newest {
                return Ok(None);
            }
            let id = super::builds::insert!(tx, build, at);
            tx.commit().await?;
            id
        });
        self.notify();
        Ok(Some(id))
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
        self.notify();
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: &str = "0000000000000000000000000000000000000000";

    async fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), None).await.unwrap();
        (folder, store)
    }

    fn push(before: &str, after: &str) -> (Delivery, Push) {
        let body = format!("{before}..{after}").into_bytes();
        let delivery = Delivery {
            guid: "g".to_owned(),
            event: "push".to_owned(),
            body_hash: hex::encode(&body),
            body,
        };
        let push = Push {
            repository_id: Some(1),
            repository: "acme/hello".to_owned(),
            branch: "main".to_owned(),
            before: before.to_owned(),
            after: after.to_owned(),
            pusher: "mona".to_owned(),
            title: String::new(),
            pushed_at: None,
        };
        (delivery, push)
    }

    async fn accept(store: &Store, before: &str, after: &str) -> Accepted {
        let (delivery, push) = push(before, after);
        store
            .accept(&delivery, &push, &["hello"])
            .await
            .unwrap()
            .remove(0)
    }

    async fn status(store: &Store, id: i64) -> Status {
        store.build(id).await.unwrap().unwrap().status
    }

    #[tokio::test]
    async fn a_repetition_is_the_build_that_it_made() {
        let (_folder, store) = store().await;
        let first = accept(&store, ZERO, "a").await;
        let again = accept(&store, ZERO, "a").await;
        assert_eq!((again.build, again.duplicate), (first.build, true));
        assert_eq!(
            store
                .builds(&crate::store::Filter::default())
                .await
                .unwrap()
                .len(),
            1
        );
    }

    #[tokio::test]
    async fn a_newer_push_supersedes_what_waits_and_an_overtaken_one_ends_nothing() {
        let (_folder, store) = store().await;
        let first = accept(&store, ZERO, "a").await;
        // GitHub delivers b..c before a..b.
        let third = accept(&store, "b", "c").await;
        let second = accept(&store, "a", "b").await;
        assert_eq!(status(&store, first.build).await, Status::Superseded);
        assert_eq!(second.status, Status::Superseded);
        assert_eq!(status(&store, third.build).await, Status::Queued);
    }

    #[tokio::test]
    async fn an_old_push_sent_again_ends_no_newer_one() {
        let (_folder, store) = store().await;
        accept(&store, ZERO, "a").await;
        accept(&store, "x", "b").await;
        let newest = accept(&store, "y", "c").await;
        let again = accept(&store, ZERO, "a").await;
        assert!(again.build > newest.build && !again.duplicate);
        assert_eq!(status(&store, newest.build).await, Status::Queued);
    }

    #[tokio::test]
    async fn the_newest_push_is_not_the_one_that_came_last() {
        let (_folder, store) = store().await;
        accept(&store, ZERO, "a").await;
        accept(&store, "b", "c").await;
        accept(&store, "a", "b").await;
        accept(&store, ZERO, "a").await;
        let newest = store.newest_push("hello", "main").await.unwrap();
        assert_eq!(newest.as_deref(), Some("c"));
        let (_, found) = push("c", "d");
        let missed = async |newest| store.enqueue_missed("hello", &found, newest).await.unwrap();
        assert_eq!(
            missed(Some("b")).await,
            None,
            "another was accepted meanwhile"
        );
        let build = missed(Some("c")).await.unwrap();
        let told = accept(&store, "x", "d").await;
        assert_eq!((told.build, told.duplicate), (build, true));
    }

    #[tokio::test]
    async fn a_build_by_hand_ends_no_push() {
        let (_folder, store) = store().await;
        let newest = accept(&store, ZERO, "a").await;
        let (_, older) = push(ZERO, "b");
        let by_hand = store
            .enqueue("hello", &older, BuildKind::Rerun)
            .await
            .unwrap();
        assert_eq!(status(&store, newest.build).await, Status::Queued);
        assert_eq!(status(&store, by_hand).await, Status::Queued);
    }

    #[tokio::test]
    async fn a_fence_that_is_not_the_newest_writes_nothing() {
        let (folder, store) = store().await;
        let environment = "environments:\n  - { name: hello, repository: a/b, branch: main, clone_url: \"https://x/y\", webhook_secrets: [0123456789abcdef0123456789abcdef], namespace: n, image_prefix: r }\n";
        let path = folder.path().join("agent.yaml");
        std::fs::write(&path, environment).unwrap();
        let config = crate::config::Config::load_with(&path, &|_| None).unwrap();
        store
            .ensure_environments(&config.environments)
            .await
            .unwrap();
        accept(&store, ZERO, "a").await;
        let ours = store.claim("one", false).await.unwrap().unwrap();
        let theirs = store.reclaim(ours.id, "two").await.unwrap().unwrap();
        assert!(theirs.fence > ours.fence);
        let done = crate::builds::Outcome::Live;
        assert!(
            !store
                .finish(&ours, Status::Passed, done, None)
                .await
                .unwrap()
        );
        assert!(!store.begin_deploying(&ours).await.unwrap());
        assert!(
            store
                .begin_stage(&ours, crate::builds::Stage::Test)
                .await
                .is_err()
        );
        assert!(
            store
                .finish(&theirs, Status::Passed, done, None)
                .await
                .unwrap()
        );
        assert!(
            !store
                .finish(&theirs, Status::Failed, done, None)
                .await
                .unwrap(),
            "a terminal status never changes"
        );
    }
}
