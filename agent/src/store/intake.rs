//! Deliveries in: stored, recognised if repeated, and turned into queued builds.
//!
//! Deliveries that come together are stored together: the task takes what waits, decides about each in turn, writes all of it
//! in one transaction, and answers after the commit. It never lingers: while one group is synced the next one gathers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use sqlx::Row;
use tokio::sync::{SemaphorePermit, mpsc, oneshot, watch};

use super::dialect::{Db, on};
use super::notice::Notices;
use super::{NewBuild, Store};
use crate::builds::{BuildKind, Push, Status, now};
use crate::fail_point;

/// Deliveries that wait for their group; where there is no place, GitHub is told to come again.
const WAITING_MAX: usize = 1024;
/// Less than GitHub waits.
const GROUP_TIME_MAX: Duration = Duration::from_secs(7);
/// Of one transaction.
const GROUP_MAX: usize = 256;
/// Deliveries between two checkpoints: some 20 kB each are written.
const CHECKPOINT_EVERY: usize = 200;
/// Of one statement, a power of two.
const ROWS_MAX: usize = 64;

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

/// A larger body is packed on a thread of its own.
const PACKED_AT_ONCE_MAX: usize = 256 * 1024;

/// In deliveries.body_format: an LZ4 block behind its length when unpacked (four bytes, little-endian). What is written and
/// synced decides how many deliveries a second are taken, and GitHub's bodies are mostly addresses that look alike.
const LZ4_BLOCK: i64 = 1;

/// What became of a push in one environment.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Accepted {
    pub build: i64,
    pub environment: String,
    pub status: Status,
    /// The push was known; `build` is the one that it had made.
    pub duplicate: bool,
}

/// The newest push of a branch, even if it came too late; none that a restore has ended.
const NEWEST_BUILD: &str = "SELECT id, status, body_hash, before_commit, commit_id, pushed_at, superseded_by FROM builds \
    WHERE environment = $1 AND kind = 'push' AND branch = $2 AND (superseded_by IS NULL OR superseded_by <> id) ORDER BY id DESC LIMIT 1";
/// The newest push of a branch that did not come too late.
const NEWEST_IN_TIME: &str = "SELECT id, status, body_hash, before_commit, commit_id, pushed_at, superseded_by FROM builds \
    WHERE environment = $1 AND kind = 'push' AND branch = $2 AND (superseded_by IS NULL OR superseded_by > id) ORDER BY id DESC LIMIT 1";

macro_rules! newest {
    ($row:ident) => {
        Newest {
            id: $row.try_get(0)?,
            status: $row.try_get::<String, _>(1)?.parse()?,
            body_hash: $row.try_get(2)?,
            before: $row.try_get(3)?,
            commit: $row.try_get(4)?,
            pushed_at: $row.try_get(5)?,
            superseded_by: $row.try_get(6)?,
        }
    };
}

/// The numbers that people see, and the lock under which pushes are told apart: whoever numbers a build next has seen
/// every earlier one.
macro_rules! numbers {
    ($tx:ident, $lock:ident) => {
        sqlx::query_as::<_, (String, i64)>($lock!(
            "SELECT name, value FROM counters WHERE name IN ('build', 'delivery') ORDER BY name"
        ))
        .fetch_all(&mut *$tx)
        .await?
        .into_iter()
        .collect::<HashMap<_, _>>()
    };
}
pub(super) use numbers;

/// A push build that stands for the newest known state of its branch in one environment.
struct Newest {
    id: i64,
    status: Status,
    body_hash: String,
    before: String,
    commit: String,
    pushed_at: Option<i64>,
    superseded_by: Option<i64>,
}

impl Newest {
    fn came_too_late(&self) -> bool {
        self.superseded_by.is_some_and(|by| by < self.id)
    }

    /// The same bytes, the same move of the branch, or a look at the branch was quicker than the delivery.
    fn is_repeated_by(&self, delivery: &Delivery, push: &Push) -> bool {
        let is_found = self.body_hash.is_empty();
        self.body_hash == delivery.body_hash
            || (self.commit == push.after && (is_found || self.before == push.before))
    }

    /// GitHub delivers out of order: a push that it took earlier than this one, or, where its clock does not tell, that this one
    /// was made on top of. A branch that is made again, or forced back, leads to an older commit by a younger push.
    fn came_after(&self, push: &Push) -> bool {
        match (self.pushed_at, push.pushed_at) {
            (Some(ours), Some(theirs)) if ours != theirs => ours > theirs,
            _ => self.before == push.after && self.commit != push.before,
        }
    }
}

/// A delivery that waits for its group.
pub(super) struct Waiting {
    delivery: Delivery,
    push: Push,
    environments: Vec<String>,
    /// Its share of the bytes in flight, given back once it is stored or refused.
    _in_flight: Option<SemaphorePermit<'static>>,
    answer: oneshot::Sender<anyhow::Result<Vec<Accepted>>>,
}

/// What the store knew of a group's pushes before it.
#[derive(Default)]
struct Known<'a> {
    /// By environment and branch.
    newest: HashMap<(&'a str, &'a str), Newest>,
    /// Where that one came too late, the newest before it that did not.
    in_time: HashMap<(&'a str, &'a str), Newest>,
    /// Environment and body of every earlier push with a body of this group.
    seen: HashSet<(&'a str, String)>,
    builds: i64,
    deliveries: i64,
}

/// What is to be written for a group.
#[derive(Default)]
struct Decided<'a> {
    /// One for each delivery of the group, in its order.
    answers: Vec<Vec<Accepted>>,
    deliveries: Vec<(i64, &'a Delivery)>,
    builds: Vec<(i64, NewBuild<'a>)>,
    /// The first of each branch and environment that takes the place of what the store holds.
    enders: Vec<usize>,
}

/// Decides about one delivery after the other, as if each were stored alone.
fn decide<'a>(group: &'a [Waiting], mut known: Known<'a>) -> Decided<'a> {
    let mut decided = Decided::default();
    let mut ended = HashSet::new();
    for waiting in group {
        let (delivery, push) = (&waiting.delivery, &waiting.push);
        let mut answer = Vec::with_capacity(waiting.environments.len());
        let mut delivery_id = None;
        for environment in &waiting.environments {
            let place = (environment.as_str(), push.branch.as_str());
            let newest = known.newest.get(&place);
            let mut heads = newest.into_iter().chain(known.in_time.get(&place));
            if let Some(newest) = heads.find(|newest| newest.is_repeated_by(delivery, push)) {
                answer.push(Accepted {
                    build: newest.id,
                    environment: environment.clone(),
                    status: newest.status,
                    duplicate: true,
                });
                continue;
            }
            let delivery_id = *delivery_id.get_or_insert_with(|| {
                known.deliveries += 1;
                decided.deliveries.push((known.deliveries, delivery));
                known.deliveries
            });
            let mut heads = newest.into_iter().chain(known.in_time.get(&place));
            let superseded_by = heads
                .find(|newest| newest.came_after(push))
                .map(|newest| newest.id);
            let is_new = known
                .seen
                .insert((environment.as_str(), delivery.body_hash.clone()));
            let ends_others = superseded_by.is_none() && is_new;
            known.builds += 1;
            let id = known.builds;
            if ends_others {
                let here = |(_, build): &&mut (i64, NewBuild<'_>)| {
                    (build.environment, build.push.branch.as_str()) == place
                };
                for (_, waits) in decided.builds.iter_mut().filter(here) {
                    waits.superseded_by.get_or_insert(id);
                }
                if ended.insert(place) {
                    decided.enders.push(decided.builds.len());
                }
            }
            let build = NewBuild {
                environment,
                push,
                kind: BuildKind::Push,
                delivery_id: Some(delivery_id),
                body_hash: &delivery.body_hash,
                superseded_by,
                ends_others,
            };
            let status = match superseded_by {
                Some(_) => Status::Superseded,
                None => Status::Queued,
            };
            decided.builds.push((id, build));
            let newest = Newest {
                id,
                status,
                body_hash: delivery.body_hash.clone(),
                before: push.before.clone(),
                commit: push.after.clone(),
                pushed_at: push.pushed_at,
                superseded_by,
            };
            let came_too_late = newest.came_too_late();
            match (known.newest.insert(place, newest), came_too_late) {
                (Some(before), true) if !before.came_too_late() => {
                    known.in_time.insert(place, before);
                }
                (_, true) => {}
                (_, false) => drop(known.in_time.remove(&place)),
            }
            answer.push(Accepted {
                build: id,
                environment: environment.clone(),
                status,
                duplicate: false,
            });
        }
        decided.answers.push(answer);
    }
    decided
}

/// The way into the task that stores deliveries; it ends with the last sender. `beside` is the same database by other
/// connections.
pub(super) fn start(db: Db, beside: Db, notices: Arc<Notices>) -> mpsc::Sender<Waiting> {
    let (sender, mut waiting) = mpsc::channel(WAITING_MAX);
    let (due, is_due) = watch::channel(());
    tokio::spawn(checkpoints(beside, is_due));
    tokio::spawn(async move {
        let mut group = Vec::new();
        let mut since_checkpoint = 0;
        while waiting.recv_many(&mut group, GROUP_MAX).await > 0 {
            since_checkpoint += group.len();
            store_and_answer(&db, std::mem::take(&mut group)).await;
            notices.tell();
            if since_checkpoint >= CHECKPOINT_EVERY {
                since_checkpoint = 0;
                due.send_replace(());
            }
        }
    });
    sender
}

/// Moves what is committed from SQLite's log into its file while the intake goes on: done by the intake itself, deliveries would
/// wait for it. One that fails is nothing lost; the intake's own is next.
async fn checkpoints(db: Db, mut is_due: watch::Receiver<()>) {
    let Db::Sqlite(pool) = db else { return };
    while is_due.changed().await.is_ok() {
        let moved = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)")
            .execute(&pool)
            .await;
        if let Err(error) = moved {
            tracing::debug!(error = %error, "cannot move the log into the store's file");
        }
    }
}

async fn store_and_answer(db: &Db, group: Vec<Waiting>) {
    let stored = tokio::time::timeout(GROUP_TIME_MAX, store(db, &group)).await;
    let stored = stored.unwrap_or_else(|_| Err(anyhow::anyhow!("the store does not answer")));
    match stored {
        Ok(answers) => {
            fail_point::at("store: accept");
            for (waiting, answer) in group.into_iter().zip(answers) {
                // Whoever has left sends it again, and it is a repetition then.
                let _ = waiting.answer.send(Ok(answer));
            }
        }
        // Nothing that one of them could help, or already alone.
        Err(error) if group.len() == 1 || !is_of_a_row(&error) => {
            for waiting in group {
                let _ = waiting.answer.send(Err(anyhow::anyhow!("{error:#}")));
            }
        }
        // One that cannot be stored must not take the others with it.
        Err(_) => {
            for waiting in group {
                Box::pin(store_and_answer(db, vec![waiting])).await;
            }
        }
    }
}

/// Whether the database has refused a statement: one delivery may be at fault. A store that is away is no such case, and a
/// commit without an answer may have been one.
fn is_of_a_row(error: &anyhow::Error) -> bool {
    let refused = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(sqlx::Error::Database(_)))
    };
    error.chain().any(refused)
}

/// What became of each delivery of a group; it is on disk then. A group of repetitions writes nothing.
async fn store(db: &Db, group: &[Waiting]) -> anyhow::Result<Vec<Vec<Accepted>>> {
    let at = now();
    Ok(on!(db, pool, BEGIN, lock => {
        let mut tx = pool.begin_with(BEGIN).await.context("cannot begin to store deliveries")?;
        let numbers = numbers!(tx, lock);
        let number = |name: &str| numbers.get(name).copied().with_context(|| format!("the store has lost its counter of {name}s"));
        let mut known = Known { builds: number("build")?, deliveries: number("delivery")?, ..Known::default() };
        for (environment, branch) in places(group) {
            let Some(row) = sqlx::query(NEWEST_BUILD).bind(environment).bind(branch).fetch_optional(&mut *tx).await? else { continue };
            let newest = newest!(row);
            if newest.came_too_late()
                && let Some(row) = sqlx::query(NEWEST_IN_TIME).bind(environment).bind(branch).fetch_optional(&mut *tx).await?
            {
                known.in_time.insert((environment, branch), newest!(row));
            }
            known.newest.insert((environment, branch), newest);
        }
        for (environment, pushed) in pushed(group) {
            // The same bytes name the same commit, for which there is an index anyway.
            let mut seen = sqlx::QueryBuilder::new("SELECT body_hash FROM builds WHERE kind = 'push' AND environment = ");
            seen.push_bind(environment).push(" AND commit_id IN (");
            let mut list = seen.separated(", ");
            // Some twice, so that the statement is one of few.
            let size = pushed.len().next_power_of_two();
            for commit in pushed.iter().cycle().take(size) {
                list.push_bind(*commit);
            }
            seen.push(")");
            let hashes: Vec<String> = seen.build_query_scalar().fetch_all(&mut *tx).await?;
            known.seen.extend(hashes.into_iter().map(|hash| (environment, hash)));
        }
        let decided = decide(group, known);
        if decided.builds.is_empty() {
            return Ok(decided.answers);
        }
        for index in &decided.enders {
            let Some((id, build)) = decided.builds.get(*index) else { continue };
            super::builds::end_others!(tx, id, build, at);
        }
        for deliveries in parts(&decided.deliveries) {
            let mut insert = sqlx::QueryBuilder::new("INSERT INTO deliveries (id, guid, event, body_hash, body, body_format, received_at) ");
            insert.push_values(deliveries, |mut row, (id, delivery)| {
                row.push_bind(*id).push_bind(&delivery.guid).push_bind(&delivery.event).push_bind(&delivery.body_hash)
                    .push_bind(delivery.body.as_slice()).push_bind(LZ4_BLOCK).push_bind(at);
            });
            insert.build().execute(&mut *tx).await?;
        }
        for builds in parts(&decided.builds) {
            super::builds::write!(tx, builds, at);
        }
        sqlx::query("UPDATE counters SET value = CASE name WHEN 'build' THEN $1 ELSE $2 END WHERE name IN ('build', 'delivery')")
            .bind(decided.builds.last().map(|(id, _)| *id)).bind(decided.deliveries.last().map(|(id, _)| *id))
            .execute(&mut *tx).await?;
        tx.commit().await.context("cannot store deliveries")?;
        decided.answers
    }))
}

/// Rows in parts of 64, 32, 16 … 1: groups come in all sizes, and the database keeps what it has understood of a few statements.
fn parts<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = rows.len().checked_ilog2().map(|bits| 1 << bits)?;
        let (part, rest) = rows.split_at(ROWS_MAX.min(size));
        rows = rest;
        Some(part)
    })
}

/// Each environment and branch of a group, once.
fn places(group: &[Waiting]) -> HashSet<(&str, &str)> {
    let mut places = HashSet::new();
    for waiting in group {
        let branch = waiting.push.branch.as_str();
        let environments = waiting.environments.iter();
        places.extend(environments.map(|environment| (environment.as_str(), branch)));
    }
    places
}

/// The commits that were pushed for each environment.
fn pushed(group: &[Waiting]) -> HashMap<&str, HashSet<&str>> {
    let mut pushed: HashMap<&str, HashSet<&str>> = HashMap::new();
    for waiting in group {
        for environment in &waiting.environments {
            let of_environment = pushed.entry(environment).or_default();
            of_environment.insert(&waiting.push.after);
        }
    }
    pushed
}

/// As its body is stored.
async fn packed(mut delivery: Delivery) -> anyhow::Result<Delivery> {
    let raw = std::mem::take(&mut delivery.body);
    delivery.body = match raw.len() {
        ..=PACKED_AT_ONCE_MAX => lz4_flex::compress_prepend_size(&raw),
        _ => tokio::task::spawn_blocking(move || lz4_flex::compress_prepend_size(&raw)).await?,
    };
    Ok(delivery)
}

impl Store {
    /// Stores a delivery and queues one build for each environment, unless the push is a repetition there. When this
    /// returns, everything is on disk. An error where it could not be stored, or where too many wait.
    ///
    /// A repetition is a body seen before, or the same branch, before and after as the branch's newest; after a newer
    /// push in between it is built behind what waits, and skipped at checkout unless it is the branch's head.
    pub async fn accept(
        &self,
        delivery: Delivery,
        push: Push,
        environments: &[&str],
        in_flight: Option<SemaphorePermit<'static>>,
    ) -> anyhow::Result<Vec<Accepted>> {
        let (answer, stored) = oneshot::channel();
        let waiting = Waiting {
            delivery: packed(delivery).await?,
            push,
            environments: environments.iter().map(|&name| name.to_owned()).collect(),
            _in_flight: in_flight,
            answer,
        };
        self.intake
            .try_send(waiting)
            .ok()
            .with_context(|| format!("{WAITING_MAX} deliveries wait to be stored"))?;
        stored.await.context("the intake has ended")?
    }

    /// Comes back where deliveries can no longer be stored.
    pub async fn intake_ended(&self) {
        self.intake.closed().await;
    }

    /// Those of these environments whose newest push came from the repository with this number.
    pub async fn of_repository(
        &self,
        environments: &[&str],
        repository_id: i64,
    ) -> anyhow::Result<Vec<String>> {
        let mut found = Vec::new();
        for environment in environments {
            let known: Option<i64> = on!(&self.main, pool => sqlx::query_scalar(
                    "SELECT repository_id FROM builds WHERE environment = $1 AND kind = 'push' AND repository_id IS NOT NULL ORDER BY id DESC LIMIT 1")
                .bind(*environment).fetch_optional(pool).await?);
            if known == Some(repository_id) {
                found.push((*environment).to_owned());
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: &str = "0000000000000000000000000000000000000000";

    impl Store {
        /// The body of a stored delivery, as it came; None where there is no such delivery.
        async fn delivered_body(&self, id: i64) -> anyhow::Result<Option<Vec<u8>>> {
            let stored: Option<(Vec<u8>, i64)> = on!(&self.main, pool => sqlx::query_as("SELECT body, body_format FROM deliveries WHERE id = $1")
                .bind(id).fetch_optional(pool).await?);
            match stored {
                Some((body, LZ4_BLOCK)) => Ok(Some(lz4_flex::decompress_size_prepended(&body)?)),
                stored => Ok(stored.map(|(body, _)| body)),
            }
        }
    }

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
            .accept(delivery, push, &["hello"], None)
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
    async fn a_body_is_kept_to_the_byte() {
        let (_folder, store) = store().await;
        let (delivery, push) = push(ZERO, "a");
        let body: Vec<u8> = (0..70_000_u32)
            .flat_map(|number| (number % 251).to_be_bytes())
            .collect();
        let sent = Delivery {
            body: body.clone(),
            ..delivery
        };
        store.accept(sent, push, &["hello"], None).await.unwrap();
        assert_eq!(store.delivered_body(1).await.unwrap().unwrap(), body);
        assert_eq!(store.delivered_body(2).await.unwrap(), None);
        sql(
            &store,
            "UPDATE deliveries SET body = CAST('{}' AS BLOB), body_format = 0",
        )
        .await;
        assert_eq!(
            store.delivered_body(1).await.unwrap().unwrap(),
            b"{}",
            "one of before"
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
    async fn the_head_that_is_sent_again_is_the_head_also_after_one_that_came_late() {
        let (_folder, store) = store().await;
        let head = accept(&store, "b", "c").await;
        let late = accept(&store, "a", "b").await;
        assert_eq!(late.status, Status::Superseded);
        let later = accept(&store, "z", "a").await;
        assert_eq!(later.status, Status::Superseded, "by the one before it");
        let again = accept(&store, "b", "c").await;
        assert_eq!((again.build, again.duplicate), (head.build, true));
        // In one group as over several.
        let group = [("c", "d"), ("b", "c"), ("c", "d")].map(|(before, after)| {
            let (delivery, push) = push(before, after);
            let store = store.clone();
            async move {
                store
                    .accept(delivery, push, &["hello"], None)
                    .await
                    .unwrap()
                    .remove(0)
            }
        });
        let answers = futures_util::future::join_all(group).await;
        assert_eq!(
            (answers[2].build, answers[2].duplicate),
            (answers[0].build, true)
        );
    }

    #[tokio::test]
    async fn a_branch_that_is_made_again_at_an_older_commit_is_its_newest_by_githubs_clock() {
        let (_folder, store) = store().await;
        let at = async |before: &str, after: &str, seconds: i64| {
            let (mut delivery, mut push) = push(before, after);
            push.pushed_at = Some(seconds * 1000);
            delivery.body_hash = format!("{before}{after}{seconds}");
            store
                .accept(delivery, push, &["hello"], None)
                .await
                .unwrap()
                .remove(0)
        };
        at(ZERO, "a", 1).await;
        let second = at("a", "b", 2).await;
        let again = at(ZERO, "a", 9).await;
        assert_eq!(again.status, Status::Queued);
        assert_eq!(status(&store, second.build).await, Status::Superseded);
        // Forced back to before a push whose delivery was lost.
        at("x", "y", 10).await;
        let forced = at("z", "x", 12).await;
        assert_eq!(forced.status, Status::Queued);
        // Within one second the commits tell.
        let late = at("q", "z", 12).await;
        assert_eq!(late.status, Status::Superseded);
    }

    #[tokio::test]
    async fn back_and_forth_between_two_commits_are_pushes_of_their_own() {
        let (_folder, store) = store().await;
        let moves = [(ZERO, "a"), ("a", "b"), ("b", "a"), ("a", "b"), ("b", "a")];
        let mut builds = Vec::new();
        for (before, after) in moves {
            let accepted = accept(&store, before, after).await;
            assert!(!accepted.duplicate, "{before} to {after}");
            builds.push(accepted.build);
        }
        let last = builds.pop().unwrap();
        assert_eq!(status(&store, last).await, Status::Queued);
        let newest = store.newest_push("hello", "main").await.unwrap();
        assert_eq!(newest.as_deref(), Some("a"));
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
    async fn deliveries_that_come_together_are_told_apart_as_if_alone() {
        let (_folder, store) = store().await;
        let deliver = async |before: &str, after: &str| accept(&store, before, after).await;
        let (first, again, second, late) = tokio::join!(
            deliver(ZERO, "a"),
            deliver(ZERO, "a"),
            deliver("b", "c"),
            deliver("a", "b"),
        );
        assert_eq!((again.build, again.duplicate), (first.build, true));
        assert_eq!(status(&store, first.build).await, Status::Superseded);
        assert_eq!(late.status, Status::Superseded);
        assert_eq!(status(&store, second.build).await, Status::Queued);
        let numbers = [first.build, second.build, late.build];
        assert_eq!(numbers, [1, 2, 3], "people see these: none is left out");
    }

    /// GitHub delivers in any order. Each order of six pushes ends at the branch's head, and no build on the way deploys an
    /// older commit than the last; whether builds begin between the deliveries or after them.
    #[tokio::test]
    async fn p4_six_pushes_in_all_720_orders_end_at_the_head_and_never_go_back() {
        // Thousands of commits, and none is asked for after a crash: in memory, where the machine has such a folder.
        let shared = std::path::Path::new("/dev/shm");
        let folder = match shared.is_dir() {
            true => tempfile::tempdir_in(shared).unwrap(),
            false => tempfile::tempdir().unwrap(),
        };
        let store = Store::open(folder.path(), None).await.unwrap();
        for (index, order) in orders(&mut vec![1, 2, 3, 4, 5, 6]).into_iter().enumerate() {
            let environment = format!("e{index}");
            sql(
                &store,
                &format!("INSERT INTO environments (name) VALUES ('{environment}')"),
            )
            .await;
            let mut deployed = 0;
            for number in &order {
                let (delivery, push) = push(&commit(number - 1), &commit(*number));
                store
                    .accept(delivery, push, &[environment.as_str()], None)
                    .await
                    .unwrap();
                match index % 3 {
                    0 => {}
                    1 => drop(build_one(&store, &environment, &mut deployed).await),
                    _ => while build_one(&store, &environment, &mut deployed).await {},
                }
            }
            while build_one(&store, &environment, &mut deployed).await {}
            assert_eq!(deployed, 6, "order {order:?}");
        }
    }

    /// Amends: each push takes the one before it away.
    #[tokio::test]
    async fn the_head_is_built_though_pushes_that_it_took_away_come_later() {
        let (_folder, store) = store().await;
        let mut ids = Vec::new();
        // With GitHub's clock: the one in the middle is older than the head too.
        for (after, at) in [("c", 10), ("a", 5), ("b", 7)] {
            let (delivery, mut push) = push(ZERO, after);
            push.pushed_at = Some(at);
            let accepted = store
                .accept(delivery, push, &["hello"], None)
                .await
                .unwrap();
            ids.push(accepted[0].build);
        }
        let states = [Status::Queued, Status::Superseded, Status::Superseded];
        for (id, state) in ids.iter().zip(states) {
            assert_eq!(status(&store, *id).await, state);
        }

        // Without it the late ones end the head, and are found to be gone.
        let (_folder, store) = self::store().await;
        sql(&store, "INSERT INTO environments (name) VALUES ('hello')").await;
        for (before, after) in [("b", "c"), (ZERO, "a"), ("a", "b")] {
            accept(&store, before, after).await;
        }
        let mut built = Vec::new();
        let settled = "UPDATE builds SET queued_at = 0 WHERE status = 'queued'";
        loop {
            sql(&store, settled).await;
            let Some(build) = store.claim("me", false).await.unwrap() else {
                break;
            };
            if build.commit != "c" {
                store.build_after_all(&build, None).await.unwrap();
            }
            let outcome = crate::builds::Outcome::Unchanged;
            store
                .finish(&build, Status::Skipped, outcome, None)
                .await
                .unwrap();
            built.push(build.commit);
        }
        assert_eq!(built, ["b", "a", "c"]);
    }

    /// `builds_at_once: 1`, and one environment that is pushed to all the time.
    #[tokio::test]
    async fn an_environment_does_not_go_to_the_back_with_each_push() {
        let (_folder, store) = store().await;
        for name in ["busy", "calm"] {
            sql(
                &store,
                &format!("INSERT INTO environments (name) VALUES ('{name}')"),
            )
            .await;
        }
        let mut built = Vec::new();
        for turn in 0..6 {
            for name in ["calm", "busy"] {
                let (delivery, push) =
                    push(&format!("{name}{turn}"), &format!("{name}{}", turn + 1));
                store.accept(delivery, push, &[name], None).await.unwrap();
            }
            sql(&store, "UPDATE builds SET queued_at = 0").await;
            let build = store.claim("me", false).await.unwrap().unwrap();
            let outcome = crate::builds::Outcome::Live;
            store
                .finish(&build, Status::Passed, outcome, None)
                .await
                .unwrap();
            built.push(build.environment);
        }
        assert_eq!(built, ["calm", "busy", "calm", "busy", "calm", "busy"]);
    }

    fn commit(number: u32) -> String {
        format!("{number:040}")
    }

    fn orders(rest: &mut Vec<u32>) -> Vec<Vec<u32>> {
        if rest.is_empty() {
            return vec![Vec::new()];
        }
        let mut all = Vec::new();
        for index in 0..rest.len() {
            let first = rest.remove(index);
            for mut order in orders(rest) {
                order.insert(0, first);
                all.push(order);
            }
            rest.insert(index, first);
        }
        all
    }

    async fn sql(store: &Store, statement: &str) {
        let statement = sqlx::AssertSqlSafe(statement.to_owned());
        on!(&store.main, pool => { sqlx::raw_sql(statement).execute(pool).await.unwrap(); });
    }

    /// What runner and git child do with the next build, on a branch whose commits are numbers and whose head is 6. False
    /// where none waits.
    async fn build_one(store: &Store, environment: &str, deployed: &mut u32) -> bool {
        // No burst is waited for.
        sql(
            store,
            "UPDATE builds SET queued_at = 0 WHERE status = 'queued'",
        )
        .await;
        let Some(build) = store.claim("me", false).await.unwrap() else {
            return false;
        };
        let own: u32 = build.commit.parse().unwrap();
        let newer = store.newer_commits(&build).await.unwrap();
        let is_stale = own != 6
            && newer
                .iter()
                .any(|other| other.parse::<u32>().unwrap() > own);
        if is_stale {
            store
                .build_after_all(&build, Some(&commit(6)))
                .await
                .unwrap();
            store
                .finish(
                    &build,
                    Status::Skipped,
                    crate::builds::Outcome::Unchanged,
                    None,
                )
                .await
                .unwrap();
            return true;
        }
        assert!(own > *deployed, "{own} after {deployed}");
        *deployed = own;
        sql(
            store,
            &format!(
                "UPDATE environments SET deployed_commit = '{}' WHERE name = '{environment}'",
                build.commit
            ),
        )
        .await;
        store
            .finish(&build, Status::Passed, crate::builds::Outcome::Live, None)
            .await
            .unwrap();
        true
    }

    #[tokio::test]
    async fn a_build_of_every_kind_is_claimed_and_one_that_a_newer_agent_made_is_left_to_it() {
        let (_folder, store) = store().await;
        sql(&store, "INSERT INTO environments (name) VALUES ('hello')").await;
        for (number, kind) in BuildKind::ALL.iter().enumerate() {
            let push = crate::store::pushed(&format!("{number:040x}"));
            let id = store.enqueue("hello", &push, *kind).await.unwrap();
            sql(&store, "UPDATE builds SET queued_at = 0").await;
            let build = store.claim("us", false).await.unwrap().unwrap();
            assert_eq!(build.id, id, "{kind}");
            store
                .finish(
                    &build,
                    Status::Canceled,
                    crate::builds::Outcome::Unchanged,
                    None,
                )
                .await
                .unwrap();
        }
        let push = crate::store::pushed("new");
        store
            .enqueue("hello", &push, BuildKind::Manual)
            .await
            .unwrap();
        sql(
            &store,
            "UPDATE builds SET kind = 'canary' WHERE status = 'queued'",
        )
        .await;
        assert_eq!(store.claim("us", false).await.unwrap(), None);
        let shown = store
            .builds(&crate::store::Filter::default())
            .await
            .unwrap();
        assert_eq!(shown.len(), BuildKind::ALL.len());
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
        let theirs = store.reclaim(&ours, "two").await.unwrap().unwrap();
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
