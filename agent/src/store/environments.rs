//! Environments: what serves, what holds them, and the releases that served there.

use serde::Serialize;

use super::dialect::{on, row};
use super::heads::NEWEST_PUSH;
use super::{NewBuild, Store};
use crate::builds::{Build, BuildKind, Millis, Push, now};
use crate::fail_point;

/// What holds an environment at its release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pin {
    pub reason: String,
    pub by: String,
    pub at: Millis,
}

/// An environment that nothing holds any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LetGo {
    /// Of the branch's head, where that does not serve.
    pub build: Option<i64>,
}

fn is_of_an_undo(reason: &str) -> bool {
    reason.starts_with("undo to release ")
}

impl Pin {
    /// And no person's own.
    pub fn is_of_an_undo(&self) -> bool {
        is_of_an_undo(&self.reason)
    }
}

row! {
    /// One time that a release served, or one that failed to.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct Serving {
        pub release: i64,
        /// The build that brought it.
        pub build: i64,
        pub commit: String,
        pub title: String,
        pub image: String,
        /// `live`, `failed`, or `adopted`: what stood there before the first release.
        pub state: String,
        pub kind: String,
        pub by: String,
        /// JSON: workload and revision, as `kubectl rollout history` counts.
        #[serde(serialize_with = "as_json")]
        pub revisions: String,
        pub began_at: Millis,
        /// None where it serves now.
        pub ended_at: Option<Millis>,
        pub ended_why: Option<String>,
    }
}

/// So many rows of history are shown, and looked through for what to go back to.
pub const HISTORY_MAX: i64 = 200;
pub(super) const HISTORY: &str = "SELECT s.release_id AS release, s.build_id AS build, r.commit_id AS \"commit\", b.title AS title, r.image AS image, \
    CASE WHEN r.state = 'failed' THEN 'live' ELSE r.state END AS state, b.kind AS kind, b.pushed_by AS \"by\", \
    s.revisions AS revisions, s.began_at AS began_at, s.ended_at AS ended_at, s.ended_why AS ended_why, \
    s.began_at AS place \
    FROM servings s JOIN releases r ON r.id = s.release_id JOIN builds b ON b.id = s.build_id WHERE s.environment = $1 \
    UNION ALL \
    SELECT r.id, r.build_id, r.commit_id, b.title, r.image, r.state, b.kind, b.pushed_by, '{}', r.planned_at, r.ended_at, r.ended_why, \
    CASE WHEN r.state = 'adopted' THEN 0 ELSE r.planned_at END \
    FROM releases r JOIN builds b ON b.id = r.build_id WHERE r.environment = $1 AND r.state IN ('failed', 'adopted') \
    ORDER BY place DESC, release DESC LIMIT $2";

fn as_json<S: serde::Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let value: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    value.serialize(serializer)
}

/// What served, as an editor keeps its steps: an undo takes the last ones away, a redo brings them back, and a new release
/// ends what could be brought back. Of a history, newest first.
pub fn steps(history: &[Serving]) -> (Vec<&Serving>, Vec<Vec<&Serving>>) {
    let (mut past, mut undone): (Vec<&Serving>, Vec<Vec<&Serving>>) = (Vec::new(), Vec::new());
    for row in history.iter().rev().filter(|row| row.state != "failed") {
        let at = past.iter().position(|known| known.release == row.release);
        match (row.kind.as_str(), at) {
            ("undo", Some(at)) => undone.push(past.split_off(at + 1)),
            ("redo", _) => past.extend(undone.pop().unwrap_or_default()),
            _ => {
                undone.clear();
                past.push(row);
            }
        }
    }
    (past, undone)
}

/// The build of the undo by which the release serves that serves now, while not all that was undone is back.
pub(super) fn standing_undo(history: &[Serving]) -> Option<i64> {
    let (past, undone) = steps(history);
    let serving = past.last().filter(|_| !undone.is_empty())?.release;
    let mut undos = history
        .iter()
        .filter(|row| row.kind == "undo" && row.state != "failed");
    undos
        .find(|row| row.release == serving)
        .map(|row| row.build)
}

impl Store {
    pub async fn pinned(&self, environment: &str) -> anyhow::Result<Option<Pin>> {
        type Row = (Option<String>, Option<String>, Option<i64>);
        let row: Option<Row> = on!(&self.main, pool => sqlx::query_as("SELECT pinned_reason, pinned_by, pinned_at FROM environments WHERE name = $1")
            .bind(environment).fetch_optional(pool).await?);
        Ok(row.and_then(|(reason, by, at)| {
            Some(Pin {
                reason: reason.unwrap_or_default(),
                by: by.unwrap_or_default(),
                at: at?,
            })
        }))
    }

    /// Holds an environment at its release; a pin that is there gets the new reason.
    pub async fn pin(&self, environment: &str, reason: &str, by: &str) -> anyhow::Result<()> {
        let at = now();
        // A person's words are never taken for an undo's, which go with it.
        let reason = &match is_of_an_undo(reason) {
            true => format!("by hand: {reason}"),
            false => reason.to_owned(),
        };
        on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            pin!(tx, environment, reason, by, at);
            audit!(tx, at, by, "pin", environment, None::<i64>, reason);
            tx.commit().await?;
        });
        fail_point::at("store: pin");
        self.notify();
        Ok(())
    }

    /// Lets an environment go and, where the newest push to the branch does not serve, queues `head`: a build of the branch's
    /// head. None where nothing held it.
    pub async fn unpin(&self, environment: &str, head: &Push) -> anyhow::Result<Option<LetGo>> {
        let at = now();
        let by = &head.pusher;
        let manual = NewBuild::without_delivery(environment, head, BuildKind::Manual);
        let let_go = on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let held = sqlx::query("UPDATE environments SET pinned_reason = NULL, pinned_by = NULL, pinned_at = NULL WHERE name = $1 AND pinned_at IS NOT NULL")
                .bind(environment).execute(&mut *tx).await?.rows_affected();
            if held == 0 {
                return Ok(None);
            }
            let serving: Option<String> = sqlx::query_scalar("SELECT deployed_commit FROM environments WHERE name = $1")
                .bind(environment).fetch_one(&mut *tx).await?;
            let pushed: Option<String> = sqlx::query_scalar(NEWEST_PUSH)
                .bind(environment).bind(&head.branch).fetch_optional(&mut *tx).await?;
            let build = match pushed.is_some() && pushed != serving {
                true => Some(super::builds::insert!(tx, manual, at)),
                false => None,
            };
            audit!(tx, at, by, "unpin", environment, build, "");
            tx.commit().await?;
            LetGo { build }
        });
        fail_point::at("store: unpin");
        self.notify();
        Ok(Some(let_go))
    }

    /// Whether it is not known what stands in an environment, so that it must be settled first.
    pub async fn is_unsettled(&self, environment: &str) -> anyhow::Result<bool> {
        let row: Option<bool> = on!(&self.main, pool => sqlx::query_scalar("SELECT unsettled FROM environments WHERE name = $1")
            .bind(environment).fetch_optional(pool).await?);
        Ok(row.unwrap_or_default())
    }

    /// By the build that holds the environment; an error where it was taken over.
    pub async fn set_unsettled(&self, build: &Build, unsettled: bool) -> anyhow::Result<()> {
        let rows = on!(&self.main, pool => sqlx::query(
                "UPDATE environments SET unsettled = $2 WHERE name = $1 AND EXISTS (SELECT 1 FROM builds WHERE id = $3 AND fence = $4)")
            .bind(&build.environment).bind(unsettled).bind(build.id).bind(build.fence).execute(pool).await?.rows_affected());
        anyhow::ensure!(rows == 1, "build #{} is no longer ours", build.id);
        fail_point::at("store: set_unsettled");
        Ok(())
    }

    /// What served and what failed to, newest first.
    pub async fn history(&self, environment: &str, limit: i64) -> anyhow::Result<Vec<Serving>> {
        Ok(on!(&self.main, pool => sqlx::query_as(HISTORY)
            .bind(environment).bind(limit).fetch_all(pool).await?))
    }

    /// Queues the return to a release that served before, and pins the environment for an undo; a redo lets it go when it
    /// is live.
    /// What runs and has not begun to deploy gives way.
    pub async fn bring_back(
        &self,
        push: &Push,
        environment: &str,
        release_id: i64,
        kind: BuildKind,
        reason: &str,
    ) -> anyhow::Result<i64> {
        let at = now();
        let build = NewBuild {
            ends_others: false,
            ..NewBuild::without_delivery(environment, push, kind)
        };
        let by = &push.pusher;
        let id = on!(&self.main, pool, BEGIN, lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            hold!(tx, lock, environment);
            let id = super::builds::insert!(tx, build, at);
            sqlx::query("UPDATE builds SET release_id = $2, image = (SELECT image FROM releases WHERE id = $2) WHERE id = $1")
                .bind(id).bind(release_id).execute(&mut *tx).await?;
            sqlx::query(
                "UPDATE builds SET superseded_by = $1 WHERE environment = $2 AND status = 'running' AND NOT deploying AND superseded_by IS NULL",
            )
            .bind(id).bind(environment).execute(&mut *tx).await?;
            let held: Option<String> = sqlx::query_scalar("SELECT pinned_reason FROM environments WHERE name = $1")
                .bind(environment).fetch_one(&mut *tx).await?;
            // A person's own pin keeps its reason. A redo lets go once it is live.
            if kind == BuildKind::Undo && held.is_none_or(|held| is_of_an_undo(&held)) {
                pin!(tx, environment, reason, by, at);
            }
            audit!(tx, at, by, kind.as_str(), environment, Some(id), reason);
            tx.commit().await?;
            id
        });
        fail_point::at("store: bring_back");
        self.notify();
        Ok(id)
    }
}

/// Whoever changes both locks the environment's row before those of its builds, as a claim does.
macro_rules! hold {
    ($tx:ident, $lock:ident, $environment:expr) => {
        sqlx::query($lock!("SELECT name FROM environments WHERE name = $1"))
            .bind($environment)
            .fetch_optional(&mut *$tx)
            .await?;
    };
}
pub(super) use hold;

macro_rules! pin {
    ($tx:ident, $environment:ident, $reason:ident, $by:ident, $at:ident) => {
        sqlx::query("UPDATE environments SET pinned_reason = $2, pinned_by = $3, pinned_at = $4 WHERE name = $1")
            .bind($environment).bind($reason).bind($by).bind($at).execute(&mut *$tx).await?;
    };
}
use pin;

/// An undo has not come about, or what it had undone is back: the pin is that of an undo which waits or runs, else of the one
/// that stands, else none. A person's own stays.
macro_rules! settle_pin {
    ($tx:ident, $environment:expr) => {
        let coming: Option<i64> = sqlx::query_scalar(
            "SELECT MAX(id) FROM builds WHERE environment = $1 AND kind = 'undo' AND status IN ('queued', 'running')",
        )
        .bind($environment)
        .fetch_one(&mut *$tx)
        .await?;
        let history: Vec<$crate::store::Serving> =
            sqlx::query_as($crate::store::environments::HISTORY)
                .bind($environment)
                .bind($crate::store::environments::HISTORY_MAX)
                .fetch_all(&mut *$tx)
                .await?;
        let holds = coming.or_else(|| $crate::store::environments::standing_undo(&history));
        sqlx::query(
            "UPDATE environments SET pinned_reason = (SELECT detail FROM audit WHERE build_id = $2 AND action = 'undo'), \
             pinned_by = (SELECT actor FROM audit WHERE build_id = $2 AND action = 'undo'), \
             pinned_at = (SELECT at FROM audit WHERE build_id = $2 AND action = 'undo') \
             WHERE name = $1 AND pinned_reason LIKE 'undo to release %'",
        )
        .bind($environment)
        .bind(holds)
        .execute(&mut *$tx)
        .await?;
    };
}
pub(super) use settle_pin;

macro_rules! audit {
    ($tx:ident, $at:ident, $by:ident, $action:expr, $environment:ident, $build:expr, $detail:expr) => {
        sqlx::query("INSERT INTO audit (at, actor, action, environment, build_id, detail) VALUES ($1, $2, $3, $4, $5, $6)")
            .bind($at).bind($by).bind($action).bind($environment).bind($build).bind($detail).execute(&mut *$tx).await?;
    };
}
use audit;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builds::{Cause, Outcome, Status};
    use crate::store::Delivery;

    const ONE: &str = "1111111111111111111111111111111111111111";
    const TWO: &str = "2222222222222222222222222222222222222222";

    fn push(after: &str) -> Push {
        Push {
            repository_id: None,
            repository: "acme/hello".to_owned(),
            branch: "main".to_owned(),
            before: "0000000000000000000000000000000000000000".to_owned(),
            after: after.to_owned(),
            pusher: "mona".to_owned(),
            title: String::new(),
            pushed_at: None,
        }
    }

    async fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), None).await.unwrap();
        let environment = crate::config::Environment {
            name: "hello".to_owned(),
            ..crate::config::Environment::of_person("hello", None, None, "hello".to_owned())
        };
        store.ensure_environments(&[environment]).await.unwrap();
        (folder, store)
    }

    async fn deliver(store: &Store, after: &str) -> i64 {
        let delivery = Delivery {
            guid: String::new(),
            event: "push".to_owned(),
            body_hash: after.to_owned(),
            body: Vec::new(),
        };
        store
            .accept(delivery, push(after), &["hello"], None)
            .await
            .unwrap()[0]
            .build
    }

    #[tokio::test]
    async fn a_push_does_not_end_an_undo_and_the_undo_goes_first() {
        let (_folder, store) = store().await;
        let running = deliver(&store, ONE).await;
        assert_eq!(store.claim("me", false).await.unwrap().unwrap().id, running);
        let undo = store
            .bring_back(&push(ONE), "hello", 1, BuildKind::Undo, "undo to release 1")
            .await
            .unwrap();
        let later = deliver(&store, TWO).await;
        let build = |id| store.build(id);
        // What has not begun to deploy gives way.
        assert_eq!(
            build(running).await.unwrap().unwrap().superseded_by,
            Some(undo)
        );
        assert_eq!(build(undo).await.unwrap().unwrap().status, Status::Queued);
        let first = build(running).await.unwrap().unwrap();
        store
            .finish(&first, Status::Superseded, Outcome::Unchanged, None)
            .await
            .unwrap();
        let claimed = store.claim("me", false).await.unwrap().unwrap();
        assert_eq!((claimed.id, claimed.release_id), (undo, Some(1)));
        assert!(store.begin_deploying(&claimed).await.unwrap());
        store
            .finish(&claimed, Status::Passed, Outcome::Live, None)
            .await
            .unwrap();
        // The pin holds the push back at its last moment too.
        let held = store.claim("me", false).await.unwrap().unwrap();
        assert_eq!(held.id, later);
        assert!(!store.begin_deploying(&held).await.unwrap());
    }

    #[tokio::test]
    async fn what_a_pin_held_back_is_built_once_nothing_holds_the_environment() {
        let (_folder, store) = store().await;
        let again = async || {
            store
                .build_what_was_held_back("hello", "main")
                .await
                .unwrap()
        };
        deliver(&store, ONE).await;
        assert_eq!(again().await, None, "it waits by itself");
        let build = store.claim("me", false).await.unwrap().unwrap();
        let pinned = Cause::new("pinned", "hello is pinned");
        store
            .finish(&build, Status::Skipped, Outcome::Unchanged, Some(&pinned))
            .await
            .unwrap();
        // Whose undo does not come about.
        let undo = store
            .bring_back(&push(ONE), "hello", 1, BuildKind::Undo, "undo to release 1")
            .await
            .unwrap();
        assert_eq!(again().await, None, "the undo waits");
        store.cancel(undo, "me").await.unwrap();
        let id = again().await.unwrap();
        assert_eq!(store.build(id).await.unwrap().unwrap().commit, ONE);
        assert_eq!(again().await, None, "it is on its way");

        // An undo takes a build's place, and does not come about.
        let build = store.claim("me", false).await.unwrap().unwrap();
        let undo = store
            .bring_back(&push(ONE), "hello", 1, BuildKind::Undo, "undo to release 1")
            .await
            .unwrap();
        store
            .finish(&build, Status::Superseded, Outcome::Unchanged, None)
            .await
            .unwrap();
        assert_eq!(again().await, None, "the undo waits");
        store.cancel(undo, "me").await.unwrap();
        let id = again().await.unwrap();
        assert_eq!(store.build(id).await.unwrap().unwrap().commit, ONE);
    }

    #[tokio::test]
    async fn who_lets_an_environment_go_gets_the_head_of_its_branch_in_the_same_moment() {
        let (_folder, store) = store().await;
        deliver(&store, ONE).await;
        let build = store.claim("me", false).await.unwrap().unwrap();
        let unpin = async || store.unpin("hello", &push("")).await.unwrap();
        assert_eq!(unpin().await, None, "nothing holds it");
        store.pin("hello", "on fire", "me").await.unwrap();
        let pinned = Cause::new("pinned", "hello is pinned");
        store
            .finish(&build, Status::Skipped, Outcome::Unchanged, Some(&pinned))
            .await
            .unwrap();
        let id = unpin().await.unwrap().build.unwrap();
        let head = store.build(id).await.unwrap().unwrap();
        assert_eq!((head.kind, head.commit.as_str()), (BuildKind::Manual, ""));
        assert_eq!(store.pinned("hello").await.unwrap(), None);

        // What serves is the newest push: nothing is to be built.
        store.pin("hello", "on fire", "me").await.unwrap();
        on!(&store.main, pool => { sqlx::query("UPDATE environments SET deployed_commit = $1").bind(ONE).execute(pool).await.unwrap(); });
        assert_eq!(unpin().await, Some(LetGo { build: None }));
    }

    #[tokio::test]
    async fn an_undo_that_does_not_come_about_holds_nothing_and_a_persons_pin_stays() {
        let (_folder, store) = store().await;
        let undo = async || {
            store
                .bring_back(&push(ONE), "hello", 1, BuildKind::Undo, "undo to release 1")
                .await
                .unwrap()
        };
        let id = undo().await;
        assert_eq!(
            store.pinned("hello").await.unwrap().unwrap().reason,
            "undo to release 1"
        );
        store.cancel(id, "admin").await.unwrap();
        assert_eq!(store.pinned("hello").await.unwrap(), None);
        undo().await;
        let claimed = store.claim("me", false).await.unwrap().unwrap();
        store
            .finish(&claimed, Status::Failed, Outcome::RolledBack, None)
            .await
            .unwrap();
        assert_eq!(store.pinned("hello").await.unwrap(), None);

        store.pin("hello", "sale", "mona").await.unwrap();
        let id = undo().await;
        assert_eq!(store.pinned("hello").await.unwrap().unwrap().reason, "sale");
        store.cancel(id, "admin").await.unwrap();
        assert_eq!(store.pinned("hello").await.unwrap().unwrap().reason, "sale");
    }

    #[test]
    fn an_undo_stands_until_all_that_it_undid_is_back() {
        let told = |rows: &[(i64, &str, i64)]| {
            let row = |(build, kind, release): &(i64, &str, i64)| Serving {
                release: *release,
                build: *build,
                commit: String::new(),
                title: String::new(),
                image: String::new(),
                state: "live".to_owned(),
                kind: (*kind).to_owned(),
                by: String::new(),
                revisions: String::new(),
                began_at: *build,
                ended_at: None,
                ended_why: None,
            };
            let history: Vec<Serving> = rows.iter().rev().map(row).collect();
            standing_undo(&history)
        };
        let three = [(1, "push", 1), (2, "push", 2), (3, "push", 3)];
        let with = |more: &[(i64, &str, i64)]| told(&[&three, more].concat());
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[(4, "undo", 2)]), Some(4));
        assert_eq!(with(&[(4, "undo", 2), (5, "undo", 1)]), Some(5));
        assert_eq!(
            with(&[(4, "undo", 2), (5, "undo", 1), (6, "redo", 2)]),
            Some(4)
        );
        let back = [
            (4, "undo", 2),
            (5, "undo", 1),
            (6, "redo", 2),
            (7, "redo", 3),
        ];
        assert_eq!(with(&back), None);
        assert_eq!(with(&[(4, "undo", 2), (5, "push", 4)]), None);
    }
}
