//! Agents that share a store: who is alive, and whose builds go to another.
//!
//! An agent is alive while its lease runs, by the database's clock alone. On SQLite there is one agent, by the lock on its
//! folder. On PostgreSQL the name of a holder begins with that of its data folder and of where that is, so that a copy is another:
//! whoever has the folder's lock knows that earlier holders of it are dead, and waits for no lease.

use std::time::Duration;

use super::Store;
use super::dialect::{Db, on};
use crate::builds::Build;
use crate::fail_point;

/// For how long an agent is believed after its last word.
pub const LEASE: Duration = Duration::from_secs(15);
/// How often it says so.
pub const RENEW_EVERY: Duration = Duration::from_secs(5);

/// Milliseconds by the database's clock; PostgreSQL has `unixepoch` from `dialect.rs`.
macro_rules! clock {
    () => {
        "CAST(unixepoch('subsec') * 1000 AS BIGINT)"
    };
}

impl Store {
    /// Says that an agent is alive, and whether it could tell GitHub.
    pub async fn renew(&self, holder: &str, tells_github: bool) -> anyhow::Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let own = of_folder(holder);
        on!(&self.main, pool => {
            sqlx::query(concat!(
                    "INSERT INTO agents (holder, joined_at, tells_github, seen_at) VALUES ($1, ", clock!(), ", $2, ", clock!(), ") \
                     ON CONFLICT (holder) DO UPDATE SET tells_github = $2, seen_at = ", clock!()))
                .bind(holder).bind(tells_github).execute(pool).await?;
            // Long dead, or the earlier ones of our folder: nobody waits for their lease.
            sqlx::query(concat!("DELETE FROM agents WHERE seen_at < ", clock!(), " - 86400000 OR holder LIKE $1 AND holder <> $2"))
                .bind(&own).bind(holder).execute(pool).await?;
        });
        fail_point::at("store: renew");
        Ok(())
    }

    /// The agent ends: what it leaves can be taken at once.
    pub async fn leave(&self, holder: &str) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query("DELETE FROM agents WHERE holder = $1").bind(holder).execute(pool).await?.rows_affected());
        fail_point::at("store: leave");
        self.notify();
        Ok(())
    }

    /// Running builds that this agent may take: its own that no task of it runs, and those of agents that are dead, in
    /// environments that it knows.
    pub async fn abandoned(&self, holder: &str) -> anyhow::Result<Vec<Build>> {
        let running = self.running().await?;
        if running.is_empty() || self.is_alone() {
            return Ok(running);
        }
        let others = of_folder(holder);
        let abandoned: Vec<i64> = on!(&self.main, pool => sqlx::query_scalar(concat!(
                "SELECT b.id FROM builds b WHERE b.status = 'running' AND ($2 = '' OR $2 LIKE '%,' || b.environment || ',%') AND \
                 (b.holder IS NULL OR b.holder LIKE $1 OR NOT EXISTS \
                 (SELECT 1 FROM agents a WHERE a.holder = b.holder AND a.seen_at > ", clock!(), " - $3))"))
            .bind(others).bind(self.served()).bind(i64::try_from(LEASE.as_millis())?).fetch_all(pool).await?);
        let is_abandoned = |build: &Build| abandoned.contains(&build.id);
        Ok(running.into_iter().filter(is_abandoned).collect())
    }

    /// Whether this agent speaks to GitHub for all: of those alive that can, the one that joined first.
    pub async fn leads(&self, holder: &str) -> anyhow::Result<bool> {
        if self.is_alone() {
            return Ok(true);
        }
        let first: Option<String> = on!(&self.main, pool => sqlx::query_scalar(concat!(
                "SELECT holder FROM agents WHERE tells_github AND seen_at > ", clock!(), " - $1 ORDER BY joined_at, holder LIMIT 1"))
            .bind(i64::try_from(LEASE.as_millis())?).fetch_optional(pool).await?);
        Ok(first.is_none_or(|first| first == holder))
    }

    /// On SQLite no other agent can be.
    pub const fn is_alone(&self) -> bool {
        matches!(self.main, Db::Sqlite(_))
    }

    /// How many agents died with a build one after the other in the stage that it is in.
    pub async fn losses(&self, build_id: i64) -> anyhow::Result<i64> {
        Ok(
            on!(&self.main, pool => sqlx::query_scalar("SELECT losses FROM builds WHERE id = $1").bind(build_id).fetch_one(pool).await?),
        )
    }

    /// The agent stops in the middle of a build: the next one takes it at once, and nothing was lost.
    pub async fn hand_over(&self, build: &Build) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query("UPDATE builds SET holder = NULL WHERE id = $1 AND fence = $2 AND status = 'running'")
            .bind(build.id).bind(build.fence).execute(pool).await?.rows_affected());
        fail_point::at("store: hand_over");
        self.notify();
        Ok(())
    }
}

/// Pattern of the holders that are of the same data folder.
fn of_folder(holder: &str) -> String {
    let folder = holder.split('.').next().unwrap_or(holder);
    format!("{folder}.%")
}
