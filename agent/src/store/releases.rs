//! Releases: planned before the first mutation, live after the last proof, kept to be put back.

use super::Store;
use super::dialect::on;
use crate::builds::{Build, now};
use crate::release::{AppliedObject, Release};

impl Store {
    /// Commits a release to the store before anything of it is applied, and gives it its number. The same build plans
    /// once: a resumed one gets the number that it had.
    pub async fn plan_release(&self, build: &Build, release: &Release) -> anyhow::Result<i64> {
        let id = on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            let known: Option<i64> = sqlx::query_scalar("SELECT id FROM releases WHERE build_id = $1 ORDER BY id DESC LIMIT 1")
                .bind(build.id).fetch_optional(&mut *tx).await?;
            let id: i64 = match known {
                Some(id) => {
                    sqlx::query("DELETE FROM releases WHERE id = $1").bind(id).execute(&mut *tx).await?;
                    id
                }
                None => {
                    sqlx::query_scalar("UPDATE counters SET value = value + 1 WHERE name = 'release' RETURNING value")
                        .fetch_one(&mut *tx).await?
                }
            };
            let body = serde_json::to_string(&Release { id, ..release.clone() })?;
            sqlx::query(
                "INSERT INTO releases (id, environment, build_id, commit_id, image, set_hash, body, state, planned_at) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, 'planned', $8)",
            )
            .bind(id).bind(&release.environment).bind(build.id).bind(&release.commit).bind(&release.image).bind(&release.set_hash)
            .bind(body).bind(now()).execute(&mut *tx).await?;
            let held = sqlx::query("UPDATE builds SET release_id = $3 WHERE id = $1 AND fence = $2")
                .bind(build.id).bind(build.fence).bind(id).execute(&mut *tx).await?.rows_affected();
            anyhow::ensure!(held == 1, "build #{} is no longer ours", build.id);
            tx.commit().await?;
            id
        });
        self.notify();
        Ok(id)
    }

    pub async fn release(&self, id: i64) -> anyhow::Result<Option<Release>> {
        let body: Option<String> = on!(&self.main, pool => sqlx::query_scalar("SELECT body FROM releases WHERE id = $1").bind(id).fetch_optional(pool).await?);
        Ok(body.as_deref().map(serde_json::from_str).transpose()?)
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

    /// Records what was applied, with the UIDs by which it can be removed again.
    pub async fn record_applied(
        &self,
        build: &Build,
        release_id: i64,
        objects: &[AppliedObject],
    ) -> anyhow::Result<()> {
        on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            sqlx::query("DELETE FROM release_objects WHERE release_id = $1").bind(release_id).execute(&mut *tx).await?;
            for (ordinal, object) in (0_i64..).zip(objects) {
                let change = serde_json::to_value(object.change)?;
                sqlx::query(
                    "INSERT INTO release_objects (release_id, ordinal, api_version, kind, namespace, name, uid, change) \
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
                )
                .bind(release_id).bind(ordinal).bind(&object.api_version).bind(&object.kind).bind(&object.namespace)
                .bind(&object.name).bind(&object.uid).bind(change.as_str().unwrap_or_default()).execute(&mut *tx).await?;
            }
            sqlx::query("UPDATE releases SET state = 'applied' WHERE id = $1 AND EXISTS (SELECT 1 FROM builds WHERE id = $2 AND fence = $3)")
                .bind(release_id).bind(build.id).bind(build.fence).execute(&mut *tx).await?;
            tx.commit().await?;
        });
        Ok(())
    }

    /// The release serves: it takes the place of the one before.
    pub async fn release_is_live(&self, build: &Build, release: &Release) -> anyhow::Result<()> {
        let at = now();
        on!(&self.main, pool, BEGIN, _lock => {
            let mut tx = pool.begin_with(BEGIN).await?;
            sqlx::query(
                "UPDATE releases SET ended_at = $3, ended_why = 'replaced' WHERE environment = $1 AND state = 'live' AND ended_at IS NULL AND id <> $2",
            )
            .bind(&release.environment).bind(release.id).bind(at).execute(&mut *tx).await?;
            sqlx::query("UPDATE releases SET state = 'live', live_at = COALESCE(live_at, $2), ended_at = NULL WHERE id = $1")
                .bind(release.id).bind(at).execute(&mut *tx).await?;
            let held = sqlx::query(
                "UPDATE environments SET deployed_commit = $2, deployed_release = $3, unsettled = FALSE WHERE name = $1 AND \
                 EXISTS (SELECT 1 FROM builds WHERE id = $4 AND fence = $5)",
            )
            .bind(&release.environment).bind(&release.commit).bind(release.id).bind(build.id).bind(build.fence)
            .execute(&mut *tx).await?.rows_affected();
            anyhow::ensure!(held == 1, "build #{} is no longer ours", build.id);
            tx.commit().await?;
        });
        self.notify();
        Ok(())
    }

    pub async fn release_failed(
        &self,
        build: &Build,
        release_id: i64,
        why: &str,
    ) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query(
                "UPDATE releases SET state = 'failed', ended_at = $2, ended_why = $3 WHERE id = $1 AND state <> 'live' AND \
                 EXISTS (SELECT 1 FROM builds WHERE id = $4 AND fence = $5)")
            .bind(release_id).bind(now()).bind(why).bind(build.id).bind(build.fence).execute(pool).await?.rows_affected());
        Ok(())
    }
}
