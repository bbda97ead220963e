//! The stages of a build, one file each, and the batons that they hand on.
//!
//! A stage does its work, writes to its log and returns its baton. It never names another stage, the queue, the store
//! or GitHub, and it knows nothing of crashes: `runner.rs` holds all control flow between stages.

pub mod buildkit;
pub mod checkout;
pub mod context;
pub mod deploy;
pub mod expect;
pub mod failed_tests;
pub mod foreign_images;
pub mod image;
pub mod job;
pub mod listening;
pub mod patience;
pub mod plan;
pub mod removal;
pub mod smoke_test;
pub mod soak;
pub mod steps;
pub mod test;
pub mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::build_log::StageLog;
use crate::builds::{Build, Cause};
use crate::cluster::Cluster;
use crate::cluster::rollout::Standing;
use crate::config::{Docker, Environment};
use crate::pipeline::Pipeline;
use crate::release::{AppliedObject, Unwell};

/// What every stage is given.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    pub build: &'a Build,
    pub environment: &'a Environment,
    pub docker: &'a Docker,
    /// Bare mirrors, one a repository, shared by all builds of this agent.
    pub mirrors: &'a Path,
    /// This build's own folder; removed when the build has ended.
    pub work: &'a Path,
    /// Lines for the author of the push.
    pub log: &'a StageLog,
    /// Canceled by a person, a newer push or the agent's end; every wait listens to it.
    pub cancel: &'a CancellationToken,
}

impl Scope<'_> {
    /// The environment's cluster; while it is away, the build's log says so.
    pub async fn cluster(&self) -> anyhow::Result<Cluster> {
        let log = self.log.clone();
        let cluster = Cluster::connect(self.environment).await?;
        Ok(cluster.telling(move |line| log.line(line)))
    }
}

/// Why a stage did not pass. A red build is an outcome, not our error.
#[derive(Debug)]
pub enum StageError {
    /// The commit, its tests or its release are at fault.
    Failed(Cause),
    /// A limit of pipeline.yaml or agent.yaml ran out; ends as `failed` with cause `time_out`.
    TimedOut(Cause),
    /// `Scope::cancel` fired.
    Canceled,
    /// We could not do our work: Docker, the cluster or this agent. Ends as `errored`.
    Agent(anyhow::Error),
}

pub type StageResult<T> = Result<T, StageError>;

impl From<anyhow::Error> for StageError {
    fn from(error: anyhow::Error) -> Self {
        Self::Agent(error)
    }
}

impl StageError {
    pub fn failed(id: &str, sentence: impl Into<String>) -> Self {
        Self::Failed(Cause::new(id, sentence))
    }

    /// Why, in one sentence.
    pub fn sentence(&self) -> String {
        match self {
            Self::Failed(cause) | Self::TimedOut(cause) => cause.sentence.clone(),
            Self::Canceled => "it was canceled".to_owned(),
            Self::Agent(error) => format!("{error:#}"),
        }
    }

    /// Where it makes no difference whose fault it is.
    pub fn into_error(self) -> anyhow::Error {
        match self {
            Self::Agent(error) => error,
            other => anyhow::anyhow!("{}", other.sentence()),
        }
    }

    /// A cause leaves the log and may hold what a program said last: secrets are masked in it as they are there.
    #[must_use]
    pub fn masked(self, log: &StageLog) -> Self {
        let mask = |cause: Cause| Cause {
            sentence: log.masked(&cause.sentence),
            ..cause
        };
        match self {
            Self::Failed(cause) => Self::Failed(mask(cause)),
            Self::TimedOut(cause) => Self::TimedOut(mask(cause)),
            other => other,
        }
    }

    pub fn timed_out(what: &str, limit: Duration) -> Self {
        Self::TimedOut(Cause::new(
            "time_out",
            format!("{what} took longer than {} s", limit.as_secs()),
        ))
    }
}

/// Runs `work` until it ends, the limit runs out, or the build is canceled; dropping `work` must end it.
pub async fn limited<T>(
    scope: &Scope<'_>,
    what: &str,
    limit: Duration,
    work: impl Future<Output = StageResult<T>>,
) -> StageResult<T> {
    tokio::select! {
        biased;
        () = scope.cancel.cancelled() => Err(StageError::Canceled),
        result = tokio::time::timeout(limit, work) => result.unwrap_or_else(|_| Err(StageError::timed_out(what, limit))),
    }
}

/// Checkout's baton: the commit's tree on disk, and the pipeline that it holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckedOut {
    pub commit: String,
    /// Seconds since 1970; the time of every file in the build context, so that caches hold.
    pub commit_time: i64,
    pub title: String,
    pub author: String,
    pub tree: PathBuf,
    pub pipeline: Pipeline,
}

/// Image's baton.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Built {
    /// `PREFIX/NAME`, less tag and digest.
    pub repository: String,
    /// `PREFIX/NAME:COMMIT`.
    pub tag: String,
    /// `sha256:…`, as the registry answered.
    pub digest: String,
    /// The other digests that mean the same image: the engine's image id (digest of the configuration).
    pub config_digest: String,
}

impl Built {
    /// What the cluster is given: `PREFIX/NAME@sha256:…`.
    pub fn reference(&self) -> String {
        format!("{}@{}", self.repository, self.digest)
    }
}

/// Test's baton.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tested {
    /// Of the image that would go live.
    pub digest: String,
    /// Name and milliseconds of each test container that passed.
    pub passed: Vec<(String, i64)>,
}

/// Deploy's baton: the set is applied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    pub release_id: i64,
    pub objects: Vec<AppliedObject>,
    /// Where a release is brought back: what of the serving one was not well before. A push has that in its release.
    #[serde(default)]
    pub unwell: Vec<Unwell>,
    /// What could not be put back as it was, and why.
    #[serde(default)]
    pub refused: Vec<String>,
}

impl Applied {
    pub fn changed_nothing(&self) -> bool {
        self.objects
            .iter()
            .all(|object| object.change == crate::release::Change::Unchanged)
    }
}

/// Verify's baton: the rollout is complete.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolledOut {
    pub release_id: i64,
    /// Workload (`deployment/hello-axum`) and its revision.
    pub revisions: Vec<(String, String)>,
    /// Workloads that are no better than before, and no worse: nobody watches them any further.
    #[serde(default)]
    pub left: Vec<String>,
    /// By workload: what only another changes from here on.
    #[serde(default)]
    pub standing: BTreeMap<String, Standing>,
}

/// Smoke test's baton: the release is live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    pub release_id: i64,
    pub requests: u64,
}

#[cfg(test)]
mod spawned {
    use super::*;

    /// What a build owns while it runs in a task of its own.
    struct Owned {
        build: Build,
        environment: Environment,
        docker: Docker,
        log: StageLog,
        cancel: CancellationToken,
        checked_out: CheckedOut,
        built: Built,
    }

    fn needs_send<F: Future + Send + 'static>(_work: F) {}

    #[allow(dead_code)]
    fn stages_can_run_in_a_spawned_task(owned: Owned) {
        needs_send(async move {
            let scope = Scope {
                build: &owned.build,
                environment: &owned.environment,
                docker: &owned.docker,
                mirrors: Path::new("/"),
                work: Path::new("/"),
                log: &owned.log,
                cancel: &owned.cancel,
            };
            let _ = image::still_there(&scope, &owned.built).await;
            let _ = image::run(&scope, &owned.checked_out).await;
            let _ = test::left(&owned.docker).await;
            test::run(&scope, &owned.checked_out, &owned.built).await
        });
    }
}
