//! Care of the embedded store: a copy while the agent works, its way back, and whether the files are whole.
//!
//! SQLite writes the copy itself, from one moment of each file (`VACUUM INTO`), and it is read before it counts. PostgreSQL
//! has tools of its own for this.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail, ensure};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqlitePool};
use sqlx::{ConnectOptions, Connection};

use super::environments::settle_pin;
use super::{lock, make_private_dir};
use crate::builds::now;
use crate::fail_point;
use crate::own_secret::write_whole;

/// The databases of a data folder, in the order in which they are copied: no log is there without its build.
const DATABASES: [&str; 2] = ["logs.db", "landfall.db"];
const BUILDS: &str = "landfall.db";
/// What it needs beside them: without the key the Secrets of releases cannot be read.
const SECRETS: [&str; 2] = ["admin-token", "seal-key"];
/// Names the folder of what stood there, while a restore is not at its end.
const RESTORING: &str = "restoring";
/// In that folder, once all is there.
const MOVED: &str = "all-is-here";
/// What SQLite keeps beside a database.
const SIDE_FILES: [&str; 2] = ["-wal", "-shm"];

/// Copies the store of a data folder into `to`, which must be missing or empty. The agent may run.
pub async fn backup(data_dir: &Path, to: &Path) -> anyhow::Result<()> {
    ensure_at_rest(data_dir)?;
    ensure!(
        data_dir.join(BUILDS).exists(),
        "{} holds no store",
        data_dir.display()
    );
    let is_used = std::fs::read_dir(to).is_ok_and(|mut entries| entries.next().is_some());
    ensure!(!is_used, "{} is not empty: name a new folder", to.display());
    make_private_dir(to)?;
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    for name in DATABASES {
        copy_database(&data_dir.join(name), &to.join(name)).await?;
        check_file(&to.join(name)).await?;
    }
    for name in SECRETS {
        let from = data_dir.join(name);
        if from.exists() {
            copy_whole(&from, &to.join(name))?;
        }
    }
    sync(to)
}

/// Puts a copy into the place of a data folder's store, which is kept beside it; where it was moved to. No agent may run.
///
/// What takes its time, and may not fit, comes first, beside all that stands. From `begin_moving` on no agent begins before the
/// end: a run that was cut off there is gone to its end by the next.
pub async fn restore(from: &Path, data_dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    for name in DATABASES {
        check_file(&from.join(name)).await?;
    }
    let _lock = lock(data_dir)?;
    ensure!(
        from.canonicalize()? != data_dir.canonicalize()?,
        "{} is the store itself: name a folder that `landfall backup` has made",
        from.display()
    );
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    remove_unfinished(data_dir)?;
    let begun = match copy_beside(from, data_dir).await {
        Ok(()) => begin_moving(data_dir),
        Err(error) => Err(error),
    };
    if begun.is_err() {
        let _ = remove_copies(data_dir);
    }
    let aside = begun?;
    move_aside(data_dir, &aside)?;
    for name in SECRETS {
        if from.join(name).exists() {
            copy_whole(&from.join(name), &data_dir.join(name))?;
        }
    }
    fail_point::at("restore: secrets copied");
    for name in DATABASES {
        std::fs::rename(copy_of(data_dir, name), data_dir.join(name))
            .with_context(|| format!("cannot put {name} into place"))?;
        fail_point::at("restore: in place");
    }
    sync(data_dir)?;
    std::fs::remove_file(data_dir.join(RESTORING))?;
    sync(data_dir)?;
    fail_point::at("restore: done");
    remove_if_there(&aside.join(MOVED))?;
    let stood_nothing = std::fs::remove_dir(&aside).is_ok();
    Ok((!stood_nothing).then_some(aside))
}

/// A database of the backup on its way into place.
fn copy_of(data_dir: &Path, name: &str) -> PathBuf {
    data_dir.join(format!("{name}.restored"))
}

async fn copy_beside(from: &Path, data_dir: &Path) -> anyhow::Result<()> {
    for name in DATABASES {
        copy_database(&from.join(name), &copy_of(data_dir, name)).await?;
        fail_point::at("restore: copied");
    }
    let builds = copy_of(data_dir, BUILDS);
    end_builds(&builds).await?;
    std::fs::File::open(&builds)?.sync_all()?;
    fail_point::at("restore: builds ended");
    Ok(())
}

/// Copies of a restore that has not come so far as to move anything.
pub(super) fn remove_copies(data_dir: &Path) -> anyhow::Result<()> {
    for name in DATABASES {
        for end in ["", "-wal", "-shm", "-journal"] {
            remove_if_there(&data_dir.join(format!("{name}.restored{end}")))?;
        }
    }
    Ok(())
}

/// The folder for what stands there: that of a run that was cut off, else a new one, of which a file tells.
fn begin_moving(data_dir: &Path) -> anyhow::Result<PathBuf> {
    if let Some(aside) = cut_off(data_dir)? {
        make_private_dir(&aside)?;
        return Ok(aside);
    }
    let name = format!("before-restore-{}", now());
    let aside = data_dir.join(&name);
    make_private_dir(&aside)?;
    write_whole(&data_dir.join(RESTORING), &name)?;
    fail_point::at("restore: begun");
    Ok(aside)
}

/// Where a restore that has not come to its end keeps what stood there.
fn cut_off(data_dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    match std::fs::read_to_string(data_dir.join(RESTORING)) {
        Ok(name) => Ok(Some(data_dir.join(name.trim_end()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {RESTORING}")),
    }
}

/// The databases last: a folder that holds only a part of what stood there is no store.
fn names() -> Vec<String> {
    let beside = DATABASES
        .iter()
        .flat_map(|name| SIDE_FILES.map(|end| format!("{name}{end}")));
    let others = SECRETS.iter().chain(&DATABASES);
    beside.chain(others.map(|&name| name.to_owned())).collect()
}

/// Where a run was cut off after all that stood there was aside: what lies in its place now is of that run.
fn remove_unfinished(data_dir: &Path) -> anyhow::Result<()> {
    remove_copies(data_dir)?;
    let Some(aside) = cut_off(data_dir)? else {
        return Ok(());
    };
    let Ok(moved) = std::fs::read_to_string(aside.join(MOVED)) else {
        return Ok(());
    };
    // SQLite takes a side file away with the last who reads.
    let is_beside = |name: &str| SIDE_FILES.iter().any(|end| name.ends_with(end));
    for name in moved.lines().filter(|name| !is_beside(name)) {
        ensure!(
            aside.join(name).exists(),
            "{name} is not in {} any more, where a restore that was cut off kept it: put it back there. To have what is in {} now \
             as the store, remove {RESTORING} in it",
            aside.display(),
            data_dir.display()
        );
    }
    for name in names() {
        remove_if_there(&data_dir.join(name))?;
    }
    Ok(())
}

fn move_aside(data_dir: &Path, aside: &Path) -> anyhow::Result<()> {
    if aside.join(MOVED).exists() {
        return Ok(());
    }
    let mut moved = Vec::new();
    for name in names() {
        let (stands, kept) = (data_dir.join(&name), aside.join(&name));
        if stands.exists() {
            ensure!(
                !kept.exists(),
                "{name} is in {} and in {}: remove the one that you do not want to keep",
                data_dir.display(),
                aside.display()
            );
            std::fs::rename(&stands, &kept)
                .with_context(|| format!("cannot move {name} to {}", aside.display()))?;
        }
        if kept.exists() {
            moved.push(name);
        }
        fail_point::at("restore: moved aside");
    }
    sync(aside)?;
    sync(data_dir)?;
    write_whole(&aside.join(MOVED), &moved.join("\n"))?;
    fail_point::at("restore: all is aside");
    Ok(())
}

/// By SQLite itself, from one moment of the file and of what lies beside it.
async fn copy_database(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut source = open(from).await?;
    let copied = sqlx::query("VACUUM INTO $1")
        .bind(to.display().to_string())
        .execute(&mut source)
        .await;
    copied.with_context(|| format!("cannot copy {}", from.display()))?;
    source.close().await?;
    // On disk before anybody relies on it.
    Ok(std::fs::File::open(to)?.sync_all()?)
}

fn copy_whole(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(std::fs::File::open(to)?.sync_all()?)
}

/// A folder: what was made in it, moved and removed.
fn sync(folder: &Path) -> anyhow::Result<()> {
    Ok(std::fs::File::open(folder)?.sync_all()?)
}

fn remove_if_there(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What waited or ran at the time of the backup would lead back behind all that came after it. It counts as no push either, so
/// that the branch's head is looked at.
async fn end_builds(path: &Path) -> anyhow::Result<()> {
    let cause = crate::builds::Cause::new(
        "restored",
        "the store was restored from a backup in which this build had not ended",
    );
    let cause = serde_json::to_string(&cause)?;
    let mut builds = open(path).await?;
    let mut tx = builds.begin().await?;
    // GitHub may have been told of their end, which the backup does not know.
    for statement in [
        "INSERT INTO github_outbox (build_id, told) SELECT id, 'silent' FROM builds WHERE status IN ('queued', 'running') \
         ON CONFLICT (build_id) DO UPDATE SET told = 'silent'",
        "UPDATE builds SET status = 'canceled', cause = $1, finished_at = $2, superseded_by = id WHERE status IN ('queued', 'running')",
    ] {
        let ended = sqlx::query(statement).bind(&cause).bind(now());
        ended
            .execute(&mut *tx)
            .await
            .context("cannot end the builds of the backup")?;
    }
    let environments: Vec<String> = sqlx::query_scalar("SELECT name FROM environments")
        .fetch_all(&mut *tx)
        .await?;
    for environment in &environments {
        settle_pin!(tx, environment);
    }
    tx.commit().await?;
    builds.close().await?;
    Ok(())
}

/// Gives the disk back what was swept out of a database, once that is a quarter of it: in small steps, so that nobody waits
/// long. A file of before is written anew for it, once.
pub(super) async fn shrink(pool: &SqlitePool) -> anyhow::Result<()> {
    let mut database = pool.acquire().await?;
    let mode: i64 = sqlx::query_scalar("PRAGMA auto_vacuum")
        .fetch_one(&mut *database)
        .await?;
    loop {
        let free: i64 = sqlx::query_scalar("PRAGMA freelist_count")
            .fetch_one(&mut *database)
            .await?;
        let pages: i64 = sqlx::query_scalar("PRAGMA page_count")
            .fetch_one(&mut *database)
            .await?;
        if free < FREE_PAGES_MIN || free * 4 < pages {
            return Ok(());
        }
        if mode == 0 {
            sqlx::query("PRAGMA auto_vacuum = INCREMENTAL")
                .execute(&mut *database)
                .await?;
            sqlx::query("VACUUM").execute(&mut *database).await?;
            return Ok(());
        }
        // Each step frees one page: all of them are asked for.
        sqlx::query(STEP).fetch_all(&mut *database).await?;
        tokio::task::yield_now().await;
    }
}

/// Whether the databases of a data folder are whole. The agent may run.
pub async fn check(data_dir: &Path) -> anyhow::Result<()> {
    ensure_at_rest(data_dir)?;
    for name in DATABASES {
        check_file(&data_dir.join(name)).await?;
    }
    Ok(())
}

/// Nothing is opened, or made, in the middle of a restore.
pub(super) fn ensure_at_rest(data_dir: &Path) -> anyhow::Result<()> {
    if let Some(aside) = cut_off(data_dir)? {
        bail!(
            "a `landfall restore` into {} was cut off: run it again, with this backup or another. What stood there before is kept in {}, \
             from where it can be restored too once it is whole",
            data_dir.display(),
            aside.display()
        );
    }
    Ok(())
}

/// Builds' numbers would begin anew beside the logs of those that had them.
pub(super) fn ensure_together(data_dir: &Path) -> anyhow::Result<()> {
    let bytes = |name: &str| std::fs::metadata(data_dir.join(name)).map_or(0, |file| file.len());
    let builds = data_dir.join(BUILDS);
    if bytes(BUILDS) > 0 && bytes("logs.db") == 0 {
        tracing::error!(
            "logs.db is missing or empty beside {}: the logs of its builds are lost, and it begins anew",
            builds.display()
        );
    }
    ensure!(
        bytes(BUILDS) > 0 || bytes("logs.db") == 0,
        "{} is missing or empty, and the logs of its builds are there. {HELP}",
        builds.display()
    );
    Ok(())
}

async fn check_file(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let mut database = open(path).await?;
    let found: Vec<String> = sqlx::query_scalar("PRAGMA integrity_check(20)")
        .fetch_all(&mut database)
        .await
        .with_context(|| damaged(path))?;
    if found != ["ok"] {
        bail!("{shown} is damaged:\n  {}\n{HELP}", found.join("\n  "));
    }
    let _: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM _sqlx_migrations")
        .fetch_one(&mut database)
        .await
        .with_context(|| format!("{shown} is not a store of Landfall"))?;
    Ok(database.close().await?)
}

/// 16 MiB.
const FREE_PAGES_MIN: i64 = 4096;
const STEP: &str = "PRAGMA incremental_vacuum(1000)";

const HELP: &str = "Stop the agent, and `landfall restore` a backup. Without one, move landfall.db and logs.db away, both: the agent then begins with an empty history.";

/// What is said of a file that SQLite cannot read; it is never made anew by itself.
pub(super) fn damaged(path: &Path) -> String {
    format!("{} cannot be read as a store. {HELP}", path.display())
}

async fn open(path: &Path) -> anyhow::Result<SqliteConnection> {
    ensure!(path.exists(), "{} is missing", path.display());
    let options = SqliteConnectOptions::from_str("sqlite:")?.filename(path);
    options.connect().await.with_context(|| damaged(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builds::{BuildKind, Status};
    use crate::store::{Store, pushed};

    async fn builds(data_dir: &Path) -> usize {
        let store = Store::open(data_dir, None).await.unwrap();
        store
            .builds(&crate::store::Filter::default())
            .await
            .unwrap()
            .len()
    }

    #[tokio::test]
    async fn a_copy_of_a_store_in_use_comes_back_and_what_was_there_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (data, copy) = (folder.path().join("data"), folder.path().join("copy"));
        let store = Store::open(&data, None).await.unwrap();
        store
            .enqueue("hello", &pushed("a"), BuildKind::Push)
            .await
            .unwrap();
        backup(&data, &copy).await.unwrap();
        let again = backup(&data, &copy).await.unwrap_err();
        assert!(again.to_string().contains("is not empty"), "{again:#}");
        store
            .enqueue("hello", &pushed("b"), BuildKind::Push)
            .await
            .unwrap();
        let in_use = restore(&copy, &data).await.unwrap_err();
        assert!(
            in_use.to_string().contains("another agent is working"),
            "{in_use:#}"
        );
        drop(store);
        let aside = restore(&copy, &data).await.unwrap().unwrap();
        assert_eq!(builds(&data).await, 1);
        assert_eq!(builds(&aside).await, 2);
        // It had not ended then, and is not built behind all that came after it.
        let store = Store::open(&data, None).await.unwrap();
        let old = store.build(1).await.unwrap().unwrap();
        assert_eq!(
            (old.status, old.cause.unwrap().id.as_str()),
            (Status::Canceled, "restored")
        );
        assert_eq!(store.newest_push("hello", "main").await.unwrap(), None);
        drop(store);
        check(&data).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_swept_is_given_back_to_the_disk() {
        for is_of_before in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.db");
            let mode = match is_of_before {
                true => sqlx::sqlite::SqliteAutoVacuum::None,
                false => sqlx::sqlite::SqliteAutoVacuum::Incremental,
            };
            let options = SqliteConnectOptions::new()
                .filename(&path)
                .create_if_missing(true);
            let options = options.auto_vacuum(mode);
            let pool = SqlitePool::connect_with(options).await.unwrap();
            let bytes = || std::fs::metadata(&path).unwrap().len();
            for statement in [
                "CREATE TABLE t (body BLOB)",
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40) INSERT INTO t SELECT zeroblob(1 << 20) FROM n",
                "DELETE FROM t WHERE rowid > 4",
            ] {
                sqlx::query(statement).execute(&pool).await.unwrap();
            }
            assert!(bytes() > 40 << 20);
            shrink(&pool).await.unwrap();
            assert!(bytes() < 24 << 20, "{} of {is_of_before}", bytes());
        }
    }

    #[tokio::test]
    async fn builds_that_are_gone_from_beside_their_logs_are_not_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        drop(Store::open(folder.path(), None).await.unwrap());
        let builds = folder.path().join(BUILDS);
        std::fs::write(&builds, "").unwrap();
        for end in SIDE_FILES {
            let _ = std::fs::remove_file(folder.path().join(format!("{BUILDS}{end}")));
        }
        for _ in 0..2 {
            let error = Store::open(folder.path(), None).await.err().unwrap();
            assert!(
                format!("{error:#}").contains("missing or empty"),
                "{error:#}"
            );
            let _ = std::fs::remove_file(&builds);
        }
        std::fs::remove_file(folder.path().join("logs.db")).unwrap();
        Store::open(folder.path(), None).await.unwrap();
    }

    #[tokio::test]
    async fn a_damaged_file_is_told_and_never_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (data, copy) = (folder.path().join("data"), folder.path().join("copy"));
        drop(Store::open(&data, None).await.unwrap());
        // A copy has no log beside it that would hide the damage.
        backup(&data, &copy).await.unwrap();
        let path = copy.join("landfall.db");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes
            .iter_mut()
            .skip(4096)
            .take(20_000)
            .for_each(|byte| *byte = 0xaa);
        std::fs::write(&path, &bytes).unwrap();
        let told = check(&copy).await.unwrap_err();
        assert!(format!("{told:#}").contains("landfall restore"), "{told:#}");

        std::fs::write(&path, "not a database, but long enough to be taken for one").unwrap();
        let Err(told) = Store::open(&copy, None).await else {
            panic!("a file that is no store was opened");
        };
        assert!(format!("{told:#}").contains("landfall restore"), "{told:#}");
        assert!(
            std::fs::read_to_string(&path)
                .unwrap()
                .starts_with("not a database")
        );
    }
}
