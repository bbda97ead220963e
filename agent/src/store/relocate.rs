//! Takes a SQLite store over to PostgreSQL: every table, row by row, in one transaction. The files stay as they are.

use std::path::Path;

use anyhow::{Context, ensure};
use sqlx::{AssertSqlSafe, Row, Sqlite, SqlitePool};

use super::dialect::{self, Db};
use super::{care, lock};

/// Of landfall.db, then of logs.db. `agents` are those of the new store.
const TABLES: [&[&str]; 2] = [
    &[
        "counters",
        "environments",
        "deliveries",
        "builds",
        "stages",
        "releases",
        "release_objects",
        "github_outbox",
        "audit",
        "servings",
        "quarantine",
        "evidence",
        "build_objects",
    ],
    &["log_chunks"],
];
/// Of one statement, by the parameters that PostgreSQL allows.
const ROWS_MAX: i64 = 500;

/// One value of a row, by the types that our tables have.
enum Value {
    Number(Option<i64>),
    Flag(Option<bool>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
}

/// Copies the store of a data folder into an empty database; how many rows. No agent may work on either.
pub async fn relocate(data_dir: &Path, url: &str) -> anyhow::Result<u64> {
    let _lock = lock(data_dir)?;
    care::check(data_dir).await?;
    let from = dialect::open(data_dir, None).await?;
    let (Db::Sqlite(main), Db::Sqlite(logs)) = (from.main, from.logs) else {
        anyhow::bail!("{} holds no SQLite store", data_dir.display());
    };
    let Db::Postgres(to) = dialect::open(data_dir, Some(url)).await?.main else {
        anyhow::bail!("`database` names no PostgreSQL");
    };
    let mut tx = to.begin().await?;
    let builds: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM builds")
        .fetch_one(&mut *tx)
        .await?;
    ensure!(
        builds == 0,
        "the PostgreSQL store holds {builds} builds already: name an empty database"
    );
    sqlx::raw_sql("DELETE FROM counters; DELETE FROM environments")
        .execute(&mut *tx)
        .await?;
    let mut rows = 0;
    for (from, tables) in [main, logs].iter().zip(TABLES) {
        let known: Vec<String> = sqlx::query_scalar(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT IN ('_sqlx_migrations', 'agents')",
        )
        .fetch_all(from)
        .await?;
        let strange = known.iter().find(|name| !tables.contains(&name.as_str()));
        ensure!(
            strange.is_none(),
            "the table {strange:?} would be left behind"
        );
        for table in tables {
            rows += copy(from, &mut tx, table)
                .await
                .with_context(|| format!("cannot copy the table {table}"))?;
        }
    }
    tx.commit().await?;
    Ok(rows)
}

async fn copy(
    from: &SqlitePool,
    to: &mut sqlx::PgTransaction<'_>,
    table: &str,
) -> anyhow::Result<u64> {
    let columns: Vec<(String, String)> =
        sqlx::query_as("SELECT name, type FROM pragma_table_info($1)")
            .bind(table)
            .fetch_all(from)
            .await?;
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let names = names.join(", ");
    // The names are those of our own tables.
    let read =
        format!("SELECT rowid, {names} FROM {table} WHERE rowid > $1 ORDER BY rowid LIMIT $2");
    let (mut last, mut copied) = (0_i64, 0);
    loop {
        let rows = sqlx::query(AssertSqlSafe(read.clone()))
            .bind(last)
            .bind(ROWS_MAX)
            .fetch_all(from)
            .await?;
        let Some(end) = rows.last() else {
            return Ok(copied);
        };
        last = end.try_get(0)?;
        let values: Vec<Vec<Value>> = rows
            .iter()
            .map(|row| values(row, &columns))
            .collect::<anyhow::Result<_>>()?;
        let mut insert = sqlx::QueryBuilder::new(format!("INSERT INTO {table} ({names}) "));
        insert.push_values(values, |mut row, values| {
            for value in values {
                match value {
                    Value::Number(number) => row.push_bind(number),
                    Value::Flag(flag) => row.push_bind(flag),
                    // PostgreSQL stores none of those.
                    Value::Text(text) => {
                        row.push_bind(text.map(|text| text.replace('\0', "\u{fffd}")))
                    }
                    Value::Bytes(bytes) => row.push_bind(bytes),
                };
            }
        });
        copied += insert.build().execute(&mut **to).await?.rows_affected();
    }
}

/// `columns` are names and types; the row begins with its rowid.
fn values(
    row: &<Sqlite as sqlx::Database>::Row,
    columns: &[(String, String)],
) -> anyhow::Result<Vec<Value>> {
    let value = |(index, (name, kind)): (usize, &(String, String))| {
        Ok(match kind.as_str() {
            "BIGINT" => Value::Number(row.try_get(index)?),
            "BOOLEAN" => Value::Flag(row.try_get(index)?),
            "TEXT" => Value::Text(row.try_get(index)?),
            "BLOB" => Value::Bytes(row.try_get(index)?),
            other => anyhow::bail!("column {name} is of the unknown type {other}"),
        })
    };
    (1..).zip(columns).map(value).collect()
}
