//! Agents that share a store: who is alive, and whose builds go to another.
//!
//! An agent is alive while its lease runs, by the database's clock alone. On SQLite there is one agent, by the lock on its
//! folder. On PostgreSQL the name of a holder begins with that of its data folder: whoever has the folder's lock knows that
//! earlier holders of it are dead, and waits for no lease.

use std::time::Duration;

use super::Store;
use super::dialect::{Db, on};
use crate::builds::Build;

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
    /// Says that an agent is alive.
    pub async fn renew(&self, holder: &str) -> anyhow::Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        on!(&self.main, pool => sqlx::query(concat!(
                "INSERT INTO agents (holder, joined_at, seen_at) VALUES ($1, ", clock!(), ", ", clock!(), ") \
                 ON CONFLICT (holder) DO UPDATE SET seen_at = ", clock!()))
            .bind(holder).execute(pool).await?.rows_affected());
        Ok(())
    }

    /// The agent ends: what it leaves can be taken at once.
    pub async fn leave(&self, holder: &str) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query("DELETE FROM agents WHERE holder = $1").bind(holder).execute(pool).await?.rows_affected());
        self.notify();
        Ok(())
    }

    /// Running builds that this agent may take: its own that no task of it runs, and those of agents that are dead.
    pub async fn abandoned(&self, holder: &str) -> anyhow::Result<Vec<Build>> {
        let running = self.running().await?;
        if running.is_empty() || self.is_alone() {
            return Ok(running);
        }
        let others = self.alive().await?;
        let is_ours = |of: &str| folder(of) == folder(holder);
        let mut abandoned = Vec::new();
        for build in running {
            let of = self.holder(build.id).await?;
            if of.is_none_or(|of| is_ours(&of) || !others.contains(&of)) {
                abandoned.push(build);
            }
        }
        Ok(abandoned)
    }

    /// Whether this agent speaks for all: the one of those alive that joined first.
    pub async fn leads(&self, holder: &str) -> anyhow::Result<bool> {
        Ok(self.is_alone()
            || self
                .alive()
                .await?
                .first()
                .is_none_or(|first| first == holder))
    }

    /// On SQLite no other agent can be.
    const fn is_alone(&self) -> bool {
        matches!(self.main, Db::Sqlite(_))
    }

    /// Who is alive, the oldest first; rows of the dead are removed after a day.
    async fn alive(&self) -> anyhow::Result<Vec<String>> {
        let lease = i64::try_from(LEASE.as_millis())?;
        Ok(on!(&self.main, pool => {
            sqlx::query(concat!("DELETE FROM agents WHERE seen_at < ", clock!(), " - 86400000")).execute(pool).await?;
            sqlx::query_scalar(concat!("SELECT holder FROM agents WHERE seen_at > ", clock!(), " - $1 ORDER BY joined_at, holder"))
                .bind(lease).fetch_all(pool).await?
        }))
    }

    async fn holder(&self, build_id: i64) -> anyhow::Result<Option<String>> {
        Ok(
            on!(&self.main, pool => sqlx::query_scalar("SELECT holder FROM builds WHERE id = $1").bind(build_id).fetch_one(pool).await?),
        )
    }

    /// How many agents died with a build since its last stage passed.
    pub async fn losses(&self, build_id: i64) -> anyhow::Result<i64> {
        Ok(
            on!(&self.main, pool => sqlx::query_scalar("SELECT losses FROM builds WHERE id = $1").bind(build_id).fetch_one(pool).await?),
        )
    }

    /// The agent stops in the middle of a build: the next one takes it at once, and nothing was lost.
    pub async fn hand_over(&self, build: &Build) -> anyhow::Result<()> {
        on!(&self.main, pool => sqlx::query("UPDATE builds SET holder = NULL WHERE id = $1 AND fence = $2 AND status = 'running'")
            .bind(build.id).bind(build.fence).execute(pool).await?.rows_affected());
        self.notify();
        Ok(())
    }
}

/// The data folder's name in a holder's.
fn folder(holder: &str) -> &str {
    holder.split('.').next().unwrap_or(holder)
}
