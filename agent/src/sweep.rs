//! Sweep: what nobody owns any more is taken away, at start and every minute.
//!
//! Work folders, test containers and test images of builds that do not run; mirrors of repositories that agent.yaml names no
//! more; logs past their age or their sum. Nothing is touched that this agent did not make: names and labels say so.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::builds::{Millis, now};
use crate::git::process::mirror_of;
use crate::runner::Agent;
use crate::stages::test;

const EVERY: Duration = Duration::from_secs(60);
/// To add up what all logs take is not for every turn.
const LOGS_EVERY: u64 = 60;
/// Engines answer slowly while they build.
const ENGINE_MAX: Duration = Duration::from_secs(60);
const DAY: Millis = 24 * 60 * 60 * 1000;

/// Sweeps until `shutdown` fires. What cannot be removed is tried again the next time.
pub async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    for turn in 0_u64.. {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = sweep(&agent, turn.is_multiple_of(LOGS_EVERY)) => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn sweep(agent: &Agent, logs_too: bool) {
    report("work folders", work_folders(agent).await);
    report("containers and images of tests", engine(agent).await);
    report("mirrors", mirrors(agent));
    if logs_too {
        report("logs", logs(agent).await);
    }
}

fn report(what: &str, swept: anyhow::Result<usize>) {
    match swept {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "swept {what} that nobody owns any more"),
        Err(error) => tracing::warn!(error = format!("{error:#}"), "cannot sweep {what}"),
    }
}

async fn running(agent: &Agent) -> anyhow::Result<HashSet<i64>> {
    let running = agent.store.running().await?;
    Ok(running.into_iter().map(|build| build.id).collect())
}

/// Listed before the store is asked: what is claimed in between has no folder yet.
async fn work_folders(agent: &Agent) -> anyhow::Result<usize> {
    let folders = entries(&agent.config.data_dir.join("work"))?;
    let running = running(agent).await?;
    let mut swept = 0;
    for (name, path) in folders {
        let build: Option<i64> = name.to_str().and_then(|name| name.parse().ok());
        if build.is_some_and(|build| !running.contains(&build)) {
            tokio::fs::remove_dir_all(path).await?;
            swept += 1;
        }
    }
    Ok(swept)
}

async fn engine(agent: &Agent) -> anyhow::Result<usize> {
    let running = running(agent).await?;
    let is_left = |build, owner: &str| {
        !running.contains(&build) && owner == test::owner(&agent.work_dir(build))
    };
    tokio::time::timeout(ENGINE_MAX, test::sweep(&agent.config.docker, is_left)).await?
}

/// With what lies beside each: its lock.
fn mirrors(agent: &Agent) -> anyhow::Result<usize> {
    let mut swept = 0;
    for folder in ["mirrors", "looks"] {
        let folder = agent.config.data_dir.join(folder);
        let urls = agent.config.environments.iter().map(|it| &it.clone_url);
        let kept: HashSet<PathBuf> = urls.map(|url| mirror_of(&folder, url)).collect();
        for (_, path) in entries(&folder)? {
            if path.extension() == Some("git".as_ref()) && !kept.contains(&path) {
                std::fs::remove_dir_all(&path)?;
                let _ = std::fs::remove_file(path.with_extension("lock"));
                swept += 1;
            }
        }
    }
    Ok(swept)
}

async fn logs(agent: &Agent) -> anyhow::Result<usize> {
    let retention = &agent.config.retention;
    let age = Millis::try_from(retention.log_days)?.saturating_mul(DAY);
    let ended_before = now().saturating_sub(age);
    agent
        .store
        .sweep_logs(ended_before, retention.log_bytes)
        .await
}

/// Empty where the folder is missing.
fn entries(folder: &Path) -> std::io::Result<Vec<(OsString, PathBuf)>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| (entry.file_name(), entry.path())))
            .collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
