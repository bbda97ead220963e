//! Sweep: what nobody owns any more is taken away, at start and every minute.
//!
//! Work folders, test containers and test images of builds that do not run; mirrors of repositories that agent.yaml names no
//! more; logs past their age or their sum; images of ours past their number, their age or their sum; builds that were never
//! built, long ago. Nothing is touched that this agent did not make: names and labels say so.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::builds::{Millis, now};
use crate::fail_point;
use crate::git::process::mirror_of;
use crate::runner::Agent;
use crate::stages::{image, test};

const EVERY: Duration = Duration::from_secs(60);
/// To add up what all logs and images take is not for every turn.
const THOROUGH_EVERY: u64 = 60;
/// Turns.
const BY_AGE_AFTER: u64 = 6;
/// Smaller ones are corrections; milliseconds.
const CLOCK_STEP_MIN: u64 = 60_000;
/// Engines answer slowly while they build.
const ENGINE_MAX: Duration = Duration::from_secs(60);
const YOUNG_DAYS: u64 = 7;
const DAY: Millis = 24 * 60 * 60 * 1000;

/// Sweeps until `shutdown` fires. What cannot be removed is tried again the next time.
pub async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let mut clock = Clock::read();
    let mut steady_turns = 0;
    loop {
        steady_turns = if clock.is_steady() {
            steady_turns + 1
        } else {
            0
        };
        let is_thorough = steady_turns == 1 || steady_turns % THOROUGH_EVERY == BY_AGE_AFTER;
        let at = (steady_turns >= BY_AGE_AFTER).then_some(clock.wall);
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = sweep(&agent, is_thorough, at) => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// What goes by its age goes by this machine's clock, which may be wrong until the machine has asked for the time: nothing goes
/// in the first minutes, nor in those after the clock was set.
struct Clock {
    wall: Millis,
    steady: Instant,
}

impl Clock {
    fn read() -> Self {
        Self {
            wall: now(),
            steady: Instant::now(),
        }
    }

    /// Whether it went on as time does since it was asked last.
    fn is_steady(&mut self) -> bool {
        let before = std::mem::replace(self, Self::read());
        let passed = self.steady.duration_since(before.steady).as_millis();
        let passed = Millis::try_from(passed).unwrap_or(Millis::MAX);
        let is_steady = (self.wall - before.wall).abs_diff(passed) < CLOCK_STEP_MIN;
        if !is_steady {
            tracing::warn!(
                "this machine's clock was set: nothing is swept for its age for some minutes"
            );
        }
        is_steady
    }
}

/// `at`: the time, where the clock is believed.
async fn sweep(agent: &Agent, is_thorough: bool, at: Option<Millis>) {
    report("work folders", work_folders(agent).await);
    report("containers and images of tests", engine(agent).await);
    report("mirrors", mirrors(agent).await);
    if is_thorough {
        report("images", images(agent, at).await);
        report("logs", logs(agent, at).await);
        if let Some(at) = at {
            report("builds", builds(agent, at).await);
        }
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
    let of_all = entries(&agent.config.data_dir.join("work"))?;
    let own = entries(&agent.work)?;
    let running = running(agent).await?;
    let is_own = |path: &PathBuf| *path == agent.work;
    let is_running = |name: &OsString| {
        let build = name.to_str().and_then(|name| name.parse().ok());
        build.is_some_and(|build| running.contains(&build))
    };
    let strange = of_all.into_iter().filter(|(_, path)| !is_own(path));
    let ended = own.into_iter().filter(|(name, _)| !is_running(name));
    remove_folders(strange.chain(ended).map(|(_, path)| path)).await
}

/// Listed before the store is asked, as the folders.
async fn engine(agent: &Agent) -> anyhow::Result<usize> {
    let docker = &agent.config.docker;
    let mut left = tokio::time::timeout(ENGINE_MAX, test::left(docker)).await??;
    let running = running(agent).await?;
    left.retain(|left| {
        !running.contains(&left.build) && left.owner == test::owner(&agent.work_dir(left.build))
    });
    tokio::time::timeout(ENGINE_MAX, test::remove_left(docker, &left)).await??;
    fail_point::at("sweep: engine cleaned");
    Ok(left.len())
}

/// With what lies beside each: its lock.
async fn mirrors(agent: &Agent) -> anyhow::Result<usize> {
    let mut gone = Vec::new();
    for folder in ["mirrors", "looks"] {
        let folder = agent.config.data_dir.join(folder);
        let urls = agent.config.environments.iter().map(|it| &it.clone_url);
        let kept: HashSet<PathBuf> = urls.map(|url| mirror_of(&folder, url)).collect();
        let is_gone =
            |path: &PathBuf| path.extension() == Some("git".as_ref()) && !kept.contains(path);
        let all = entries(&folder)?.into_iter().map(|(_, path)| path);
        gone.extend(all.filter(is_gone));
    }
    for mirror in &gone {
        let _ = tokio::fs::remove_file(mirror.with_extension("lock")).await;
    }
    remove_folders(gone.into_iter()).await
}

/// All that can be removed; the first that cannot is the error.
async fn remove_folders(folders: impl Iterator<Item = PathBuf>) -> anyhow::Result<usize> {
    let (mut removed, mut first) = (0, Ok(()));
    for folder in folders {
        match tokio::fs::remove_dir_all(&folder).await {
            Ok(()) => {
                fail_point::at("sweep: folder removed");
                removed += 1;
            }
            Err(error) => {
                let error = anyhow::Error::new(error).context(folder.display().to_string());
                first = first.and(Err(error));
            }
        }
    }
    first.map(|()| removed)
}

async fn images(agent: &Agent, at: Option<Millis>) -> anyhow::Result<usize> {
    let environments = u32::try_from(agent.config.environments.len())?;
    let limit = ENGINE_MAX.saturating_mul(environments.saturating_add(1));
    let days = agent.config.retention.image_days;
    let before = at.map_or(Millis::MIN, |at| days_before(at, days));
    tokio::time::timeout(limit, image::remove_old(&agent.config, before)).await?
}

async fn logs(agent: &Agent, at: Option<Millis>) -> anyhow::Result<usize> {
    let retention = &agent.config.retention;
    let ended_before = at.map_or(0, |at| days_before(at, retention.log_days));
    agent
        .store
        .sweep_logs(ended_before, retention.log_bytes)
        .await
}

/// What is young stays, whatever agent.yaml says: GitHub may send it again, and may not have been told of it.
async fn builds(agent: &Agent, at: Millis) -> anyhow::Result<usize> {
    let retention = &agent.config.retention;
    let before = days_before(at, retention.build_days);
    let young = days_before(at, YOUNG_DAYS);
    let kept = i64::try_from(retention.builds)?;
    agent.store.sweep_builds(before, kept, young).await
}

fn days_before(at: Millis, days: u64) -> Millis {
    let days = Millis::try_from(days).unwrap_or(Millis::MAX);
    at.saturating_sub(days.saturating_mul(DAY))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_is_noticed_and_not_believed() {
        let mut clock = Clock::read();
        assert!(clock.is_steady());
        for step in [-3_600_000, 3_600_000, 315_360_000_000] {
            clock.wall += step;
            assert!(!clock.is_steady());
            assert!(clock.is_steady());
        }
        clock.wall += 5_000;
        assert!(clock.is_steady(), "a correction");
    }
}
