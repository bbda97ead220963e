//! What SQLite and PostgreSQL say differently, and how each is opened.
//!
//! Everything else is one text of SQL for both: `on!` runs it on the pool at hand.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Connection, PgPool, SqlSafeStr, SqlitePool};

use super::care;

/// An earlier one loses committed writes in WAL mode (sqlite.org, changes of 3.51.3).
const SQLITE_VERSION_MIN: (u32, u32, u32) = (3, 51, 3);
const CONNECTIONS: u32 = 4;
/// Of a PostgreSQL that is away: less than an agent may be silent.
const ACQUIRE_MAX: Duration = Duration::from_secs(5);
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Of 4 KiB. SQLite's own 1,000 are reached many times a second where deliveries come in thousands, each time with two syncs.
const CHECKPOINT_PAGES: &str = "4000";
/// The intake's are done beside it (`intake::checkpoints`); what they leave over is little, and its own to do.
const CHECKPOINT_PAGES_OF_INTAKE: &str = "16000";
/// Of a connection, in pragma's words: 512 KiB. There are eight, and the system keeps the files' pages anyway.
const CACHE: &str = "-512";
/// What is asked for each delivery is spread over whole indexes.
const CACHE_OF_INTAKE: &str = "-4096";

// By hand, as `row!` below: sqlx's own macros bring a second SQLite, compiled for the compiler.
fn main_migrations() -> Migrator {
    Migrator::with_migrations(vec![
        migration(
            1,
            "builds",
            include_str!("../../migrations/main/0001_builds.sql"),
        ),
        migration(
            2,
            "transaction",
            include_str!("../../migrations/main/0002_transaction.sql"),
        ),
        migration(
            3,
            "agents",
            include_str!("../../migrations/main/0003_agents.sql"),
        ),
        migration(
            4,
            "intake",
            include_str!("../../migrations/main/0004_intake.sql"),
        ),
        migration(
            5,
            "started",
            include_str!("../../migrations/main/0005_started.sql"),
        ),
        migration(
            6,
            "outbox",
            include_str!("../../migrations/main/0006_outbox.sql"),
        ),
    ])
}

fn logs_migrations() -> Migrator {
    let chunks = include_str!("../../migrations/logs/0002_log_chunks.sql");
    Migrator::with_migrations(vec![migration(2, "log chunks", chunks)])
}

fn migration(version: i64, description: &'static str, sql: &'static str) -> Migration {
    let (kind, without_transaction) = (MigrationType::Simple, false);
    Migration::new(
        version,
        description.into(),
        kind,
        sql.into_sql_str(),
        without_transaction,
    )
}

/// A struct that is read from a row by the names of its fields.
macro_rules! row {
    ($(#[$about:meta])* $vis:vis struct $name:ident { $($(#[$field_about:meta])* $field_vis:vis $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        $vis struct $name {
            $($(#[$field_about])* $field_vis $field: $type,)*
        }

        impl<'r, R> sqlx::FromRow<'r, R> for $name
        where
            R: sqlx::Row,
            &'static str: sqlx::ColumnIndex<R>,
            $($type: sqlx::Decode<'r, R::Database> + sqlx::Type<R::Database>,)*
        {
            fn from_row(row: &'r R) -> sqlx::Result<Self> {
                Ok(Self {
                    $($field: row.try_get(stringify!($field))?,)*
                })
            }
        }
    };
}
pub(crate) use row;

/// One database of either kind.
#[derive(Debug, Clone)]
pub enum Db {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// Runs a body of sqlx calls on whichever pool it is. `$begin` is the statement that begins a writing transaction,
/// `$lock!("SELECT …")` the text with a lock on the rows that it finds, waiting for whoever holds them; with `" SKIP LOCKED"` it
/// does not find those that somebody holds. On SQLite a writing transaction has the whole file to itself.
macro_rules! on {
    ($db:expr, $pool:ident, $begin:ident, $lock:ident => $body:expr) => {
        match $db {
            $crate::store::dialect::Db::Sqlite($pool) => {
                #[allow(unused, reason = "not every body begins a transaction")]
                const $begin: &str = "BEGIN IMMEDIATE";
                #[allow(unused_macros, reason = "not every body claims rows")]
                macro_rules! $lock {
                    ($sql:literal) => {
                        $sql
                    };
                    ($sql:literal, $skip:literal) => {
                        $sql
                    };
                }
                $body
            }
            $crate::store::dialect::Db::Postgres($pool) => {
                #[allow(unused, reason = "not every body begins a transaction")]
                const $begin: &str = "BEGIN";
                #[allow(unused_macros, reason = "not every body claims rows")]
                macro_rules! $lock {
                    ($sql:literal) => {
                        concat!($sql, " FOR UPDATE")
                    };
                    ($sql:literal, $skip:literal) => {
                        concat!($sql, " FOR UPDATE", $skip)
                    };
                }
                $body
            }
        }
    };
    ($db:expr, $pool:ident => $body:expr) => {
        $crate::store::dialect::on!($db, $pool, _BEGIN, lock => $body)
    };
}
pub(crate) use on;

/// The databases of a store.
pub struct Opened {
    /// Deliveries, builds and releases: every commit is on disk before it is answered.
    pub main: Db,
    /// The same by a way of its own, one connection on SQLite: pages that it has read stay read from one group of deliveries
    /// to the next.
    pub intake: Db,
    /// A file of its own, so that a chatty build never slows a delivery.
    pub logs: Db,
}

pub async fn open(data_dir: &Path, database: Option<&str>) -> anyhow::Result<Opened> {
    match database {
        None | Some("sqlite") => {
            let (main, logs) = (data_dir.join("landfall.db"), data_dir.join("logs.db"));
            let (full, normal) = (SqliteSynchronous::Full, SqliteSynchronous::Normal);
            let as_it_grew = SqliteAutoVacuum::None;
            // Of a file that is made from now on: `care::shrink` gives the disk back what was swept.
            let in_steps = SqliteAutoVacuum::Incremental;
            care::ensure_together(data_dir)?;
            Ok(Opened {
                main: migrated(&main, full, as_it_grew, main_migrations()).await?,
                intake: Db::Sqlite(
                    sqlite(
                        &main,
                        full,
                        1,
                        CACHE_OF_INTAKE,
                        CHECKPOINT_PAGES_OF_INTAKE,
                        as_it_grew,
                    )
                    .await?,
                ),
                logs: migrated(&logs, normal, in_steps, logs_migrations()).await?,
            })
        }
        Some(url) => {
            let main = open_postgres(url).await?;
            let (intake, logs) = (main.clone(), main.clone());
            Ok(Opened { main, intake, logs })
        }
    }
}

async fn sqlite(
    path: &Path,
    synchronous: SqliteSynchronous,
    connections: u32,
    cache: &'static str,
    checkpoint_pages: &'static str,
    auto_vacuum: SqliteAutoVacuum,
) -> anyhow::Result<SqlitePool> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(synchronous)
        .auto_vacuum(auto_vacuum)
        .busy_timeout(BUSY_TIMEOUT)
        .pragma("wal_autocheckpoint", checkpoint_pages)
        .pragma("cache_size", cache);
    SqlitePoolOptions::new()
        .max_connections(connections)
        // A file does not go away; to ask first costs as much as a small query.
        .test_before_acquire(false)
        .after_release(|connection, _| {
            Box::pin(async move {
                connection.ping().await?;
                // SQLite itself ends a transaction for which the disk is full. sqlx does not hear of it, and would refuse every
                // later one on this connection.
                Ok(!connection.is_in_transaction())
            })
        })
        .connect_with(options)
        .await
        .with_context(|| care::damaged(path))
}

async fn migrated(
    path: &Path,
    synchronous: SqliteSynchronous,
    auto_vacuum: SqliteAutoVacuum,
    mut migrator: Migrator,
) -> anyhow::Result<Db> {
    let pool = sqlite(
        path,
        synchronous,
        CONNECTIONS,
        CACHE,
        CHECKPOINT_PAGES,
        auto_vacuum,
    )
    .await?;
    let version: String = sqlx::query_scalar("SELECT sqlite_version()")
        .fetch_one(&pool)
        .await?;
    anyhow::ensure!(
        is_new_enough(&version),
        "the bundled SQLite {version} can lose writes: build Landfall with 3.51.3 or later"
    );
    // An agent one version older still works on a store that a newer one has migrated.
    migrator.set_ignore_missing(true);
    migrator
        .run(&pool)
        .await
        .with_context(|| format!("cannot bring the store {} up to date", path.display()))?;
    Ok(Db::Sqlite(pool))
}

/// What SQLite has by itself: a type for bytes, and a clock. Several statements in one text are one transaction, and the lock
/// lets one agent after the other through.
const POSTGRES_SPEAKS_SQLITE: &str = "\
    SELECT pg_advisory_xact_lock(7305); \
    DO $$ BEGIN CREATE DOMAIN blob AS bytea; EXCEPTION WHEN duplicate_object THEN NULL; END $$; \
    CREATE OR REPLACE FUNCTION unixepoch(text) RETURNS double precision LANGUAGE sql VOLATILE \
    AS 'SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS double precision)'";

async fn open_postgres(url: &str) -> anyhow::Result<Db> {
    let options = PgConnectOptions::from_str(url)
        .context("`database` is not an address like postgres://user@host/name")?;
    let pool = PgPoolOptions::new()
        .max_connections(8)
        .acquire_timeout(ACQUIRE_MAX)
        .connect_with(options)
        .await
        .context("cannot reach PostgreSQL")?;
    sqlx::raw_sql(POSTGRES_SPEAKS_SQLITE)
        .execute(&pool)
        .await
        .context("cannot prepare the PostgreSQL store")?;
    // In one database each set has a table of its own for what was applied.
    let mut logs = logs_migrations();
    logs.dangerous_set_table_name("_sqlx_migrations_of_logs");
    for mut migrator in [main_migrations(), logs] {
        migrator.set_ignore_missing(true);
        migrator
            .run(&pool)
            .await
            .context("cannot bring the PostgreSQL store up to date")?;
    }
    Ok(Db::Postgres(pool))
}

fn is_new_enough(version: &str) -> bool {
    let mut parts = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next()) >= SQLITE_VERSION_MIN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_of_the_folder_is_in_the_binary() {
        for (folder, known) in [("main", main_migrations()), ("logs", logs_migrations())] {
            let folder = format!("{}/migrations/{folder}", env!("CARGO_MANIFEST_DIR"));
            let files = std::fs::read_dir(&folder).unwrap();
            let texts = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap());
            let mut texts: Vec<String> = texts.collect();
            let mut known: Vec<String> = known
                .iter()
                .map(|one| one.sql.as_str().to_owned())
                .collect();
            texts.sort();
            known.sort();
            assert!(texts == known, "{folder}");
        }
    }

    #[test]
    fn the_bundled_sqlite_does_not_lose_writes() {
        assert!(is_new_enough("3.51.3") && is_new_enough("3.53.0") && is_new_enough("4.0.0"));
        assert!(!is_new_enough("3.51.2") && !is_new_enough("3.46.0"));
    }
}
