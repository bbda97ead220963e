//! Releases: planned before the first mutation, live after the last proof, kept to be put back.

use std::collections::BTreeSet;

use sqlx::Row;

use super::Store;
use super::dialect::{on, row};
use super::seal::SEALED;
use crate::builds::{Build, BuildKind, Millis, now};
use crate::fail_point;
use crate::release::{AppliedObject, Change, Evidence, Release};

/// Before writes of a transaction that name no build's fence themselves.
macro_rules! ensure_ours {
    ($tx:ident, $lock:ident, $build:expr) => {
        let ours: Option<i64> =
            sqlx::query_scalar($lock!("SELECT id FROM builds WHERE id = $1 AND fence = $2"))
                .bind($build.id)
                .bind($build.fence)
                .fetch_optional(&mut *$tx)
                .await?;
        anyhow::ensure!(ours.is_some(), "build #{} is no longer ours", $build.id);
    };
}

impl Store {
    /// Commits a release to the store before anything of it is applied, and gives it its number. The same build plans
    /// once: a resumed one gets the number that it had.
    pub async fn plan_release(&self, build: &Build, release: &Release) -> anyhow::Result<i64> {
        let id = on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let known: Option<i64> = sqlx::query_scalar("SELECT release_id FROM builds WHERE id = $1")
                .bind(build.id).fetch_one(&mut *tx).await?;
            let id = match known {
                Some(id) => {
                    sqlx::query("DELETE FROM releases WHERE id = $1").bind(id).execute(&mut *tx).await?;
                    id
                }
                None => number!(tx),
            };
            let body = self.body(id, release)?;
            insert!(tx, id, build, release, body, "planned");
            let held = sqlx::query("UPDATE builds SET release_id = $3 WHERE id = $1 AND fence = $2")
                .bind(build.id).bind(build.fence).bind(id).execute(&mut *tx).await?.rows_affected();
            anyhow::ensure!(held == 1, "build #{} is no longer ours", build.id);
            tx.commit().await?;
            id
        });
        fail_point::at("store: plan_release");
        self.notify();
        Ok(id)
    }

    /// Records what stands in an environment before anything of ours has served there, so that it can be put back.
    pub async fn adopt(&self, build: &Build, found: &Release) -> anyhow::Result<()> {
        on!(&self.main, pool, BEGIN, lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            ensure_ours!(tx, lock, build);
            let known: Option<i64> = sqlx::query_scalar("SELECT id FROM releases WHERE environment = $1 AND state = 'adopted'")
                .bind(&found.environment).fetch_optional(&mut *tx).await?;
            let id = match known {
                Some(id) => {
                    sqlx::query("DELETE FROM releases WHERE id = $1").bind(id).execute(&mut *tx).await?;
                    id
                }
                None => number!(tx),
            };
            let body = self.body(id, found)?;
            insert!(tx, id, build, found, body, "adopted");
            tx.commit().await?;
        });
        fail_point::at("store: adopt");
        Ok(())
    }

    pub async fn release(&self, id: i64) -> anyhow::Result<Option<Release>> {
        let body = self.stored_body(id).await?;
        body.map(|body| self.of_body(&body)).transpose()
    }

    async fn stored_body(&self, id: i64) -> anyhow::Result<Option<String>> {
        Ok(
            on!(&self.main, pool => sqlx::query_scalar("SELECT body FROM releases WHERE id = $1").bind(id).fetch_optional(pool).await?),
        )
    }

    /// As `release`, with Secrets as they are stored: sealed. For whoever only shows it.
    pub async fn release_to_show(&self, id: i64) -> anyhow::Result<Option<Release>> {
        let body = self.stored_body(id).await?;
        Ok(body.as_deref().map(serde_json::from_str).transpose()?)
    }

    pub(super) async fn has_sealed(&self) -> anyhow::Result<bool> {
        let like = format!("%{SEALED}%");
        let any: Option<i64> = on!(&self.main, pool => sqlx::query_scalar("SELECT id FROM releases WHERE body LIKE $1 LIMIT 1").bind(&like).fetch_optional(pool).await?);
        Ok(any.is_some())
    }

    /// The whole release as it is stored: under its number, and with sealed Secrets.
    fn body(&self, id: i64, release: &Release) -> anyhow::Result<String> {
        let mut stored = Release {
            id,
            ..release.clone()
        };
        self.seal.close(&mut stored.objects)?;
        Ok(serde_json::to_string(&stored)?)
    }

    fn of_body(&self, body: &str) -> anyhow::Result<Release> {
        let mut release: Release = serde_json::from_str(body)?;
        self.seal.reopen(&mut release.objects)?;
        Ok(release)
    }

    /// What stood in an environment before its first release, where anything did.
    pub async fn adopted(&self, environment: &str) -> anyhow::Result<Option<Release>> {
        let body: Option<String> = on!(&self.main, pool => sqlx::query_scalar("SELECT body FROM releases WHERE environment = $1 AND state = 'adopted'")
            .bind(environment).fetch_optional(pool).await?);
        body.map(|body| self.of_body(&body)).transpose()
    }

    /// What is live in an environment by our own word: commit and release.
    pub async fn deployed(
        &self,
        environment: &str,
    ) -> anyhow::Result<(Option<String>, Option<i64>)> {
        let row: Option<(Option<String>, Option<i64>)> = on!(&self.main, pool => sqlx::query_as("SELECT deployed_commit, deployed_release FROM environments WHERE name = $1")
            .bind(environment).fetch_optional(pool).await?);
        Ok(row.unwrap_or_default())
    }

    /// Records one object as it was applied, with the UID by which it can be removed again. What a release created stays
    /// "created" when it is applied again.
    pub async fn record_applied(
        &self,
        build: &Build,
        release_id: i64,
        ordinal: usize,
        object: &AppliedObject,
    ) -> anyhow::Result<()> {
        let ordinal = i64::try_from(ordinal)?;
        let rows = on!(&self.main, pool => sqlx::query(
                "INSERT INTO release_objects (release_id, ordinal, api_version, kind, namespace, name, uid, change) \
                 SELECT $1, $2, $3, $4, $5, $6, $7, $8 WHERE EXISTS (SELECT 1 FROM builds WHERE id = $9 AND fence = $10) \
                 ON CONFLICT (release_id, ordinal) DO UPDATE SET uid = $7, removed_at = NULL, change = \
                 CASE WHEN release_objects.change = 'created' AND release_objects.uid = $7 THEN 'created' \
                 WHEN release_objects.change = 'changed' AND $8 = 'unchanged' THEN 'changed' ELSE $8 END")
            .bind(release_id).bind(ordinal).bind(&object.api_version).bind(&object.kind).bind(&object.namespace)
            .bind(&object.name).bind(&object.uid).bind(object.change.as_str()).bind(build.id).bind(build.fence)
            .execute(pool).await?.rows_affected());
        anyhow::ensure!(rows == 1, "build #{} is no longer ours", build.id);
        fail_point::at("store: record_applied");
        Ok(())
    }

    /// As `record_applied`, for what a build did on its way forward: that is what its rollback undoes.
    pub async fn record_touched(
        &self,
        build: &Build,
        ordinal: usize,
        object: &AppliedObject,
    ) -> anyhow::Result<()> {
        let ordinal = i64::try_from(ordinal)?;
        let rows = on!(&self.main, pool => sqlx::query(
                "INSERT INTO build_objects (build_id, ordinal, api_version, kind, namespace, name, uid, change) \
                 SELECT $1, $2, $3, $4, $5, $6, $7, $8 WHERE EXISTS (SELECT 1 FROM builds WHERE id = $1 AND fence = $9) ON CONFLICT (build_id, ordinal) DO UPDATE SET uid = $7, change = \
                 CASE WHEN build_objects.change = 'created' AND build_objects.uid = $7 THEN 'created' \
                 WHEN build_objects.change = 'changed' AND $8 = 'unchanged' THEN 'changed' ELSE $8 END")
            .bind(build.id).bind(ordinal).bind(&object.api_version).bind(&object.kind).bind(&object.namespace)
            .bind(&object.name).bind(&object.uid).bind(object.change.as_str()).bind(build.fence)
            .execute(pool).await?.rows_affected());
        anyhow::ensure!(rows == 1, "build #{} is no longer ours", build.id);
        fail_point::at("store: record_touched");
        Ok(())
    }

    /// What a build applied on its way forward, in its order.
    pub async fn touched(&self, build_id: i64) -> anyhow::Result<Vec<AppliedObject>> {
        let rows: Vec<ObjectRow> = on!(&self.main, pool => sqlx::query_as(
                "SELECT build_id AS release_id, api_version, kind, namespace, name, uid, change FROM build_objects \
                 WHERE build_id = $1 ORDER BY ordinal")
            .bind(build_id).fetch_all(pool).await?);
        rows.into_iter().map(ObjectRow::object).collect()
    }

    /// Whether this build has brought the release that serves: then nothing but its end is left.
    pub async fn is_served_by(&self, build: &Build) -> anyhow::Result<bool> {
        let known: Option<i64> = on!(&self.main, pool => sqlx::query_scalar("SELECT build_id FROM servings WHERE build_id = $1 AND ended_at IS NULL")
            .bind(build.id).fetch_optional(pool).await?);
        Ok(known.is_some())
    }

    /// Whether what stands in an environment is known to be what stood there before us: nothing was tried, or the last try
    /// was undone.
    pub async fn is_as_found(&self, environment: &str) -> anyhow::Result<bool> {
        let last = self.last_change(environment).await?;
        Ok(last.is_none_or(|outcome| matches!(outcome.as_str(), "rolled_back" | "removed")))
    }

    /// Whether the last build that changed anything in an environment ended with a release that was proved.
    pub async fn is_at_rest(&self, environment: &str) -> anyhow::Result<bool> {
        let last = self.last_change(environment).await?;
        Ok(last.is_some_and(|outcome| matches!(outcome.as_str(), "live" | "rolled_back")))
    }

    /// How the last ended build ended that changed anything in an environment.
    async fn last_change(&self, environment: &str) -> anyhow::Result<Option<String>> {
        let outcome = on!(&self.main, pool => sqlx::query_scalar(
                "SELECT outcome FROM builds WHERE environment = $1 AND release_id IS NOT NULL AND finished_at IS NOT NULL AND outcome <> 'unchanged' \
                 ORDER BY id DESC LIMIT 1")
            .bind(environment).fetch_optional(pool).await?);
        Ok(outcome)
    }

    /// What releases of an environment created and nobody has removed by our word, newest first, and of which release.
    pub async fn created(&self, environment: &str) -> anyhow::Result<Vec<(i64, AppliedObject)>> {
        let rows: Vec<ObjectRow> = on!(&self.main, pool => sqlx::query_as(
                "SELECT o.release_id, o.ordinal, o.api_version, o.kind, o.namespace, o.name, o.uid, o.change FROM release_objects o \
                 JOIN releases r ON r.id = o.release_id WHERE r.environment = $1 AND o.change = 'created' AND o.removed_at IS NULL \
                 ORDER BY o.release_id DESC, o.ordinal DESC")
            .bind(environment).fetch_all(pool).await?);
        rows.into_iter()
            .map(|row| Ok((row.release_id, row.object()?)))
            .collect()
    }

    /// The Jobs that are known to have run to their end in an environment, by name, which tells their content: those of
    /// releases that went live, and those after which a build has applied more. What was pruned since may run anew.
    pub async fn completed_jobs(&self, environment: &str) -> anyhow::Result<BTreeSet<String>> {
        let names: Vec<String> = on!(&self.main, pool => sqlx::query_scalar(
                "SELECT o.name FROM release_objects o JOIN releases r ON r.id = o.release_id \
                 WHERE r.environment = $1 AND r.live_at IS NOT NULL AND o.kind = 'Job' AND o.removed_at IS NULL \
                 UNION SELECT j.name FROM build_objects j JOIN builds b ON b.id = j.build_id \
                 WHERE b.environment = $1 AND j.kind = 'Job' \
                 AND EXISTS (SELECT 1 FROM build_objects later WHERE later.build_id = j.build_id AND later.ordinal > j.ordinal) \
                 AND NOT EXISTS (SELECT 1 FROM release_objects gone WHERE gone.uid = j.uid AND gone.removed_at IS NOT NULL)")
            .bind(environment).fetch_all(pool).await?);
        Ok(names.into_iter().collect())
    }

    /// An object of this UID is there no more, whichever releases had it.
    pub async fn record_removed(&self, uid: &str) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query("UPDATE release_objects SET removed_at = $2 WHERE uid = $1 AND removed_at IS NULL")
            .bind(uid).bind(now()).execute(pool).await?.rows_affected());
        fail_point::at("store: record_removed");
        Ok(())
    }

    /// The release serves: it takes the place of the one before. What was asked of it anew is no longer held against its
    /// commit.
    pub async fn release_is_live(
        &self,
        build: &Build,
        release: &Release,
        revisions: &[(String, String)],
    ) -> anyhow::Result<()> {
        let at = now();
        let revisions: std::collections::BTreeMap<_, _> = revisions.iter().cloned().collect();
        let revisions = serde_json::to_string(&revisions)?;
        on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let held = sqlx::query(
                "UPDATE environments SET deployed_commit = $2, deployed_release = $3, unsettled = FALSE WHERE name = $1 AND \
                 EXISTS (SELECT 1 FROM builds WHERE id = $4 AND fence = $5)",
            )
            .bind(&release.environment).bind(&release.commit).bind(release.id).bind(build.id).bind(build.fence)
            .execute(&mut *tx).await?.rows_affected();
            anyhow::ensure!(held == 1, "build #{} is no longer ours", build.id);
            let why = match build.kind.brings_back() {
                true => format!("{} by {} (#{})", build.kind, build.by, build.id),
                false => format!("replaced by #{}", build.id),
            };
            sqlx::query("UPDATE releases SET ended_at = $3, ended_why = $4 WHERE environment = $1 AND state = 'live' AND ended_at IS NULL AND id <> $2")
                .bind(&release.environment).bind(release.id).bind(at).bind(&why).execute(&mut *tx).await?;
            sqlx::query("UPDATE servings SET ended_at = CASE WHEN began_at > $3 THEN began_at ELSE $3 END, ended_why = $4 WHERE environment = $1 AND ended_at IS NULL AND build_id <> $2")
                .bind(&release.environment).bind(build.id).bind(at).bind(&why).execute(&mut *tx).await?;
            sqlx::query(
                "UPDATE releases SET state = CASE WHEN state = 'adopted' THEN state ELSE 'live' END, live_at = COALESCE(live_at, $2), \
                 ended_at = NULL, ended_why = NULL WHERE id = $1",
            )
            .bind(release.id).bind(at).execute(&mut *tx).await?;
            // What served is told in the order of these times, and a clock may have been set back.
            sqlx::query(
                "INSERT INTO servings (build_id, environment, release_id, revisions, began_at) SELECT $1, $2, $3, $4, \
                 CASE WHEN MAX(began_at) >= $5 THEN MAX(began_at) + 1 ELSE $5 END FROM servings WHERE environment = $2 \
                 ON CONFLICT (build_id) DO UPDATE SET revisions = $4, ended_at = NULL, ended_why = NULL",
            )
            .bind(build.id).bind(&release.environment).bind(release.id).bind(&revisions).bind(at).execute(&mut *tx).await?;
            if build.kind == BuildKind::Redo {
                super::environments::settle_pin!(tx, &release.environment);
            }
            sqlx::query("DELETE FROM quarantine WHERE environment = $1 AND commit_id = $2")
                .bind(&release.environment).bind(&release.commit).execute(&mut *tx).await?;
            tx.commit().await?;
        });
        fail_point::at("store: release_is_live");
        self.notify();
        Ok(())
    }

    /// The release has not gone live; where it `is_at_fault` its commit is not deployed again by itself.
    pub async fn release_failed(
        &self,
        build: &Build,
        release: &Release,
        why: &str,
        is_at_fault: bool,
    ) -> anyhow::Result<()> {
        let at = now();
        on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            sqlx::query(
                "UPDATE releases SET state = 'failed', ended_at = $2, ended_why = $3 WHERE id = $1 AND state IN ('planned', 'applied') AND \
                 EXISTS (SELECT 1 FROM builds WHERE id = $4 AND fence = $5)",
            )
            .bind(release.id).bind(at).bind(why).bind(build.id).bind(build.fence).execute(&mut *tx).await?;
            if is_at_fault {
                sqlx::query(
                    "INSERT INTO quarantine (environment, commit_id, build_id, at) SELECT $1, $2, $3, $4 \
                     WHERE EXISTS (SELECT 1 FROM builds WHERE id = $3 AND fence = $5) ON CONFLICT (environment, commit_id) DO UPDATE SET build_id = $3, at = $4",
                )
                .bind(&release.environment).bind(&release.commit).bind(build.id).bind(at).bind(build.fence).execute(&mut *tx).await?;
            }
            tx.commit().await?;
        });
        fail_point::at("store: release_failed");
        Ok(())
    }

    /// The build in which a commit failed in an environment, where nobody has asked for it since.
    pub async fn quarantined(
        &self,
        environment: &str,
        commit: &str,
    ) -> anyhow::Result<Option<i64>> {
        let build = on!(&self.main, pool => sqlx::query_scalar("SELECT build_id FROM quarantine WHERE environment = $1 AND commit_id = $2")
            .bind(environment).bind(commit).fetch_optional(pool).await?);
        Ok(build)
    }

    /// Keeps what a failure showed; what an earlier attempt kept stays.
    pub async fn keep_evidence(&self, build: &Build, evidence: &[Evidence]) -> anyhow::Result<()> {
        on!(&self.main, pool, BEGIN, lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            ensure_ours!(tx, lock, build);
            for (ordinal, one) in (0_i64..).zip(evidence) {
                sqlx::query(
                    "INSERT INTO evidence (build_id, ordinal, title, body) VALUES ($1, $2, $3, $4) ON CONFLICT (build_id, ordinal) DO NOTHING",
                )
                .bind(build.id).bind(ordinal).bind(&one.title).bind(&one.body).execute(&mut *tx).await?;
            }
            tx.commit().await?;
        });
        fail_point::at("store: keep_evidence");
        self.notify();
        Ok(())
    }

    pub async fn evidence(&self, build_id: i64) -> anyhow::Result<Vec<Evidence>> {
        let rows: Vec<(String, String)> = on!(&self.main, pool => sqlx::query_as("SELECT title, body FROM evidence WHERE build_id = $1 ORDER BY ordinal")
            .bind(build_id).fetch_all(pool).await?);
        Ok(rows
            .into_iter()
            .map(|(title, body)| Evidence { title, body })
            .collect())
    }

    /// How long the rollouts of the last good releases took, the longest of five; None where there was none.
    pub async fn usual_rollout(&self, environment: &str) -> anyhow::Result<Option<Millis>> {
        let took: Vec<i64> = on!(&self.main, pool => sqlx::query(
                "SELECT s.done_at - s.begun_at FROM stages s JOIN builds b ON b.id = s.build_id WHERE b.environment = $1 AND b.outcome = 'live' \
                 AND s.stage = 'verify' AND s.status = 'passed' AND s.done_at IS NOT NULL ORDER BY b.id DESC LIMIT 5")
            .bind(environment).fetch_all(pool).await?.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?);
        Ok(took.into_iter().max())
    }
}

row! {
    struct ObjectRow {
        release_id: i64,
        api_version: String,
        kind: String,
        namespace: String,
        name: String,
        uid: String,
        change: String,
    }
}

impl ObjectRow {
    fn object(self) -> anyhow::Result<AppliedObject> {
        Ok(AppliedObject {
            change: self.change.parse::<Change>()?,
            api_version: self.api_version,
            kind: self.kind,
            namespace: self.namespace,
            name: self.name,
            uid: self.uid,
            generation: 0,
        })
    }
}

/// The next number that people see.
macro_rules! number {
    ($tx:ident) => {
        sqlx::query_scalar(
            "UPDATE counters SET value = value + 1 WHERE name = 'release' RETURNING value",
        )
        .fetch_one(&mut *$tx)
        .await?
    };
}
use number;

macro_rules! insert {
    ($tx:ident, $id:ident, $build:ident, $release:ident, $body:ident, $state:literal) => {
        sqlx::query(
            "INSERT INTO releases (id, environment, build_id, commit_id, image, set_hash, body, state, planned_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        )
        .bind($id).bind(&$release.environment).bind($build.id).bind(&$release.commit).bind(&$release.image).bind(&$release.set_hash)
        .bind($body).bind($state).bind(now()).execute(&mut *$tx).await?;
    };
}
use insert;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builds::{Outcome, Status};
    use crate::store::pushed;

    fn release(build: &Build) -> Release {
        Release {
            environment: build.environment.clone(),
            build_id: build.id,
            commit: build.commit.clone(),
            ..Release::default()
        }
    }

    #[tokio::test]
    async fn what_an_environment_is_known_to_hold_is_told_by_the_last_build_that_changed_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), None).await.unwrap();
        on!(&store.main, pool => { sqlx::query("INSERT INTO environments (name) VALUES ('hello')").execute(pool).await.unwrap(); });
        assert!(store.is_as_found("hello").await.unwrap());
        assert!(!store.is_at_rest("hello").await.unwrap());
        for (after, outcome, as_found, at_rest) in [
            ("a", Outcome::Unchanged, true, false),
            ("b", Outcome::LeftFailed, false, false),
            ("c", Outcome::Unchanged, false, false),
            ("d", Outcome::Removed, true, false),
            ("e", Outcome::RolledBack, true, true),
            ("f", Outcome::RollbackFailed, false, false),
            ("g", Outcome::Unchanged, false, false),
            ("h", Outcome::Live, false, true),
            ("i", Outcome::Unchanged, false, true),
        ] {
            store
                .enqueue("hello", &pushed(after), BuildKind::Push)
                .await
                .unwrap();
            let build = store.claim("us", false).await.unwrap().unwrap();
            store.plan_release(&build, &release(&build)).await.unwrap();
            store
                .finish(&build, Status::Failed, outcome, None)
                .await
                .unwrap();
            let known = (
                store.is_as_found("hello").await.unwrap(),
                store.is_at_rest("hello").await.unwrap(),
            );
            assert_eq!(known, (as_found, at_rest), "after {after}");
        }
    }
}
