//! One build, top to bottom: checkout, image, test, plan, apply, verify, smoke test; or, from the plan on, back.
//!
//! All control flow between stages is here and in `transaction.rs`. Before each stage the journal is asked whether it is
//! done and what its baton names still exists, so a fresh build and a resumed one are the same function and no stage knows
//! of crashes. Never calls GitHub, never answers a request.

mod rollback;
mod transaction;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::build_log::{BuildLog, FLUSH_EVERY, Masker, StageLog};
use crate::builds::{
    Build, BuildKind, Cause, Outcome, Stage, StageRow, StageStatus, Status, human_duration, now,
    short,
};
use crate::cluster::availability;
use crate::config::{Config, Environment};
use crate::fail_point;
use crate::manifests::secret_values;
use crate::release::{Evidence, Release};
use crate::stages::checkout::Checkout;
use crate::stages::{
    Built, CheckedOut, Scope, StageError, StageResult, Tested, checkout, image, test,
};
use crate::store::{Pin, Store, make_private_dir};
use rollback::Earlier;

const LOG_WAITS: Duration = Duration::from_secs(20);
const LOG_RETRY: Duration = Duration::from_millis(500);
/// A build that kills its agent again and again in one stage must not do so for ever.
const LOSSES_MAX: i64 = 3;
/// Nor one that does it in several.
pub(super) const ATTEMPTS_MAX: i64 = 20;

/// What every build of this agent shares.
pub struct Agent {
    pub config: Arc<Config>,
    pub store: Store,
    /// Holds a folder for each build that runs. Its path is no other agent's, on whichever machine.
    pub work: PathBuf,
    /// Our own binary, which runs git in a process of its own.
    pub exe: PathBuf,
    /// Who we are in the store: unique for each start.
    pub holder: String,
    /// Fires when the agent stops: a canceled build is then left to be resumed.
    pub stopping: CancellationToken,
}

impl Agent {
    /// A build's own folder; removed when the build has ended.
    pub fn work_dir(&self, build: i64) -> PathBuf {
        self.work.join(build.to_string())
    }
}

/// How a build ended.
struct Ended {
    status: Status,
    outcome: Outcome,
    cause: Option<Cause>,
}

/// Runs a claimed build to its end, or leaves it to the next agent when this one stops.
pub async fn run(agent: &Agent, build: Build, cancel: CancellationToken) {
    if let Err(error) = run_logged(agent, build.clone(), &cancel).await {
        tracing::error!(
            build = build.id,
            error = format!("{error:#}"),
            "cannot go on with a build"
        );
    }
}

async fn run_logged(
    agent: &Agent,
    mut build: Build,
    cancel: &CancellationToken,
) -> anyhow::Result<()> {
    let begun = now();
    let (next, bytes) = agent.store.log_end(build.id).await?;
    let limit = agent
        .config
        .environment(&build.environment)
        .map_or(1 << 30, |environment| environment.limits.log_bytes);
    let masker = Masker::new(agent.config.secrets());
    let log = BuildLog::new(masker, limit, bytes);
    let writer = write_log(agent.store.clone(), build.clone(), log.clone(), next);

    let ended = match agent.config.environment(&build.environment) {
        Some(environment) => {
            let named = name_commit(agent, environment, &mut build, &log, cancel).await;
            let line = Line::new(agent, environment, &build, &log, cancel);
            Ok(line.run(named).await)
        }
        None => without_environment(agent, &build).await.map(Some),
    };
    // The log's task ends with the log: whatever went wrong, that is closed first.
    let ended = ended.inspect_err(|_| log.close())?;

    let shown = log.stage(Stage::Checkout);
    let ended = ended.map(|ended| Ended {
        cause: ended.cause.map(|cause| masked(&shown, cause)),
        ..ended
    });
    if let Some(ended) = &ended {
        say_end(
            &log.stage(last_stage(agent, &build).await),
            &build,
            ended,
            now() - begun,
        );
    }
    log.close();
    if let Err(error) = writer.await {
        tracing::error!(build = build.id, %error, "the build log's task failed");
    }
    let Some(ended) = ended else {
        if agent.stopping.is_cancelled() {
            agent.store.hand_over(&build).await?;
        }
        return Ok(());
    };
    agent
        .store
        .finish(&build, ended.status, ended.outcome, ended.cause.as_ref())
        .await?;
    tracing::info!(build = build.id, status = %ended.status, outcome = %ended.outcome, "build ended");
    remove_work(&agent.work_dir(build.id)).await;
    fail_point::at("runner: folder removed");
    Ok(())
}

/// Nobody can say what it did to a cluster that is not known any more.
async fn without_environment(agent: &Agent, build: &Build) -> anyhow::Result<Ended> {
    let name = &build.environment;
    let sentence = format!("agent.yaml has no environment {name:?} any more");
    let cause = Cause::new("no_environment", sentence);
    if build.release_id.is_none() {
        return Ok(Ended::failed(cause));
    }
    agent.store.set_unsettled(build, true).await?;
    Ok(Ended {
        status: Status::Errored,
        outcome: Outcome::Unknown,
        cause: Some(cause),
    })
}

/// A cause is shown on pages and told to GitHub: no secret may be in it, whoever wrote it.
fn masked(log: &StageLog, cause: Cause) -> Cause {
    Cause {
        sentence: log.masked(&cause.sentence),
        object: cause.object.map(|text| log.masked(&text)),
        hint: cause.hint.map(|text| log.masked(&text)),
        ..cause
    }
}

/// A build that a person asked for by branch: its commit is the branch's head now, and stays so when it is resumed.
async fn name_commit(
    agent: &Agent,
    environment: &Environment,
    build: &mut Build,
    log: &BuildLog,
    cancel: &CancellationToken,
) -> StageResult<()> {
    // What stood there before us has no commit, and none is needed to bring it back.
    if build.commit.is_empty() && !build.kind.brings_back() {
        let line = Line::new(agent, environment, build, log, cancel);
        make_private_dir(&line.mirrors)?;
        let commit = checkout::head(&line.scope(&log.stage(Stage::Checkout)), &agent.exe).await?;
        agent.store.describe(build, &commit, "").await?;
        build.commit = commit;
    }
    Ok(())
}

/// Stores what the stages say, a chunk every `FLUSH_EVERY`, until the log is closed. A store that is away is waited for, once
/// for `LOG_WAITS`. Lines that it refuses then are lost, and the operator is told: a full disk must not hold up a release.
fn write_log(store: Store, build: Build, log: BuildLog, mut next: i64) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut is_away = false;
        while let Some(mut lines) = log.drain().await {
            let begun = Instant::now();
            loop {
                let error = match store.append_log(&build, next, &lines).await {
                    Ok(after) => {
                        (next, is_away) = (after, false);
                        break;
                    }
                    Err(error) => error,
                };
                // Some of them may be there: what comes next goes behind those.
                if let Ok((end, _)) = store.log_end(build.id).await {
                    let there = usize::try_from(end - next).unwrap_or(0);
                    lines.drain(..there.min(lines.len()));
                    next = end;
                }
                if is_away || begun.elapsed() >= LOG_WAITS {
                    is_away = true;
                    tracing::error!(
                        build = build.id,
                        lines = lines.len(),
                        error = format!("{error:#}"),
                        "lines of the build log are lost"
                    );
                    break;
                }
                tokio::time::sleep(LOG_RETRY).await;
            }
            tokio::time::sleep(FLUSH_EVERY).await;
        }
    })
}

async fn last_stage(agent: &Agent, build: &Build) -> Stage {
    let known = agent.store.build(build.id).await.ok().flatten();
    known
        .and_then(|build| build.stage)
        .unwrap_or(Stage::Checkout)
}

fn say_end(log: &StageLog, build: &Build, ended: &Ended, millis: i64) {
    log.line("");
    if let Some(cause) = &ended.cause {
        log.line(format!(
            "{}: {}",
            if ended.status == Status::Skipped {
                "Skipped"
            } else {
                "Cause"
            },
            cause.sentence
        ));
        if let Some(hint) = &cause.hint {
            log.line(format!("Next:  {hint}"));
        }
    }
    log.line(format!(
        "Build #{} {} after {}, outcome {}",
        build.id,
        ended.status,
        human_duration(millis),
        ended.outcome
    ));
}

fn mirrors(agent: &Agent) -> PathBuf {
    agent.config.data_dir.join("mirrors")
}

async fn remove_work(path: &Path) {
    if let Err(error) = tokio::fs::remove_dir_all(path).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove a work folder");
    }
}

/// One build on its way.
struct Line<'a> {
    agent: &'a Agent,
    environment: &'a Environment,
    build: &'a Build,
    log: &'a BuildLog,
    cancel: &'a CancellationToken,
    mirrors: PathBuf,
    work: PathBuf,
    /// Answers to the smoke test's requests that failed, until they are kept with the rest of the evidence.
    requests: Mutex<Vec<Evidence>>,
    /// Since before the first mutation of a release over one that serves.
    availability: OnceCell<Option<availability::Watch>>,
    /// Services that somebody answered before the apply, and that it leaves as they are.
    heard: OnceCell<BTreeSet<String>>,
}

impl<'a> Line<'a> {
    fn new(
        agent: &'a Agent,
        environment: &'a Environment,
        build: &'a Build,
        log: &'a BuildLog,
        cancel: &'a CancellationToken,
    ) -> Self {
        Self {
            agent,
            environment,
            build,
            log,
            cancel,
            mirrors: mirrors(agent),
            work: agent.work_dir(build.id),
            requests: Mutex::default(),
            availability: OnceCell::new(),
            heard: OnceCell::new(),
        }
    }

    /// `named`: whether the build's commit is known. None: the agent stops, and the next one goes on.
    async fn run(&self, named: StageResult<()>) -> Option<Ended> {
        let ended = match named {
            Ok(()) => self.prepared().await,
            Err(error) => Err(error),
        };
        match ended {
            Ok(ended) => Some(ended),
            Err(StageError::Canceled) => self.canceled().await,
            Err(error) => self.failed(error).await,
        }
    }

    async fn prepared(&self) -> StageResult<Ended> {
        make_private_dir(&self.work)?;
        make_private_dir(&self.mirrors)?;
        if self.build.attempt > 1 {
            let stage = self.build.stage.unwrap_or(Stage::Checkout);
            self.log.stage(stage).line(format!(
                "The agent was stopped; attempt {} goes on from here.",
                self.build.attempt
            ));
            if let Err(error) = self.remove_containers().await {
                tracing::warn!(
                    build = self.build.id,
                    error = format!("{error:#}"),
                    "cannot remove containers of an earlier attempt"
                );
            }
        }
        let losses = self.agent.store.losses(self.build.id).await?;
        if losses >= LOSSES_MAX || self.build.attempt > ATTEMPTS_MAX {
            let why = match losses >= LOSSES_MAX {
                true => format!("the agent died {losses} times in this stage"),
                false => format!("it was begun {} times", self.build.attempt - 1),
            };
            return Err(StageError::Agent(anyhow::anyhow!(
                "{why}; it is not begun again (`landfall rerun {}` does)",
                self.build.id
            )));
        }
        // A rollback that was begun is finished first, for the cause that it had; one that has ended is not done again.
        match self.earlier_rollback().await? {
            Some(Earlier::Ended(ended)) => return Ok(ended),
            Some(Earlier::Begun(cause)) => return Err(StageError::Failed(cause)),
            None => {}
        }
        self.walk().await
    }

    /// Those that an earlier attempt of this very build has left.
    async fn remove_containers(&self) -> anyhow::Result<()> {
        let docker = &self.agent.config.docker;
        let own = test::owner(&self.work);
        let mut left = test::left(docker).await?;
        left.retain(|left| left.owner == own);
        test::remove_left(docker, &left).await
    }

    /// The straight line.
    async fn walk(&self) -> StageResult<Ended> {
        let (release, applied) = match self.planned().await? {
            // From the plan on only the release counts: the set that is stored is applied again, and watched again. So a
            // release that is brought back is a build that was planned before it began.
            Some(release) => {
                if self.agent.store.is_served_by(self.build).await? {
                    self.tidy_up(&release).await;
                    return Ok(Ended::live());
                }
                let applied = self.apply_stored(&release).await?;
                (release, applied)
            }
            None => {
                self.settle_early().await?;
                if let Some(held_back) = self.held_back().await? {
                    return Ok(held_back);
                }
                let checked_out = match self.checkout().await? {
                    Checkout::Ready(checked_out) => checked_out,
                    Checkout::Stale { head } => {
                        // Its delivery may have come first, and have given way to this one.
                        self.agent
                            .store
                            .build_after_all(self.build, Some(&head))
                            .await?;
                        return Ok(Ended::stale(self.build, &head));
                    }
                };
                let built = self.image(&checked_out).await?;
                self.test(&checked_out, &built).await?;
                self.deploy(&checked_out, &built).await?
            }
        };
        let rolled_out = self.verify(&release, &applied).await?;
        self.smoke_test(&release, &rolled_out).await?;
        self.settle_live(&release, &rolled_out).await?;
        let live = Ended::live();
        Ok(match applied.changed_nothing() {
            true => Ended {
                outcome: Outcome::Unchanged,
                ..live
            },
            false => live,
        })
    }

    /// A push does not go where a person holds the environment, and a commit that failed there is not tried again by itself.
    async fn held_back(&self) -> anyhow::Result<Option<Ended>> {
        let store = &self.agent.store;
        let environment = &self.build.environment;
        if let Some(pin) = store.pinned(environment).await? {
            return Ok(Some(Ended::pinned(environment, &pin)));
        }
        if self.build.kind != BuildKind::Push {
            return Ok(None);
        }
        let failed = store.quarantined(environment, &self.build.commit).await?;
        Ok(failed.map(|build| Ended::quarantined(self.build, build)))
    }

    async fn checkout(&self) -> StageResult<Checkout> {
        let log = self.log.stage(Stage::Checkout);
        if let Some(Checkout::Ready(checked_out)) = self.baton(Stage::Checkout).await?
            && checkout::still_there(&checked_out)
        {
            self.agent
                .store
                .describe(self.build, &checked_out.commit, &checked_out.title)
                .await?;
            return Ok(Checkout::Ready(checked_out));
        }
        // A person who asks for a build gets it, older or not.
        let newer = match self.build.kind {
            BuildKind::Push => self.agent.store.newer_commits(self.build).await?,
            _ => Vec::new(),
        };
        let scope = self.scope(&log);
        let done = self
            .journaled(
                Stage::Checkout,
                &scope,
                checkout::run(&scope, &self.agent.exe, &newer),
            )
            .await?;
        if let Checkout::Ready(checked_out) = &done {
            self.agent
                .store
                .describe(self.build, &checked_out.commit, &checked_out.title)
                .await?;
        }
        Ok(done)
    }

    async fn image(&self, checked_out: &CheckedOut) -> StageResult<Built> {
        let log = self.log.stage(Stage::Image);
        let scope = self.scope(&log);
        let known = self.baton(Stage::Image).await?;
        let built = match known {
            Some(built) if image::still_there(&scope, &built).await => built,
            _ => {
                self.journaled(Stage::Image, &scope, image::run(&scope, checked_out))
                    .await?
            }
        };
        self.agent
            .store
            .set_image(self.build, &built.reference())
            .await?;
        Ok(built)
    }

    async fn test(&self, checked_out: &CheckedOut, built: &Built) -> StageResult<Tested> {
        // An image that had to be built anew is another one, and not tested yet.
        if let Some(tested) = self.baton::<Tested>(Stage::Test).await?
            && tested.digest == built.digest
        {
            return Ok(tested);
        }
        let log = self.log.stage(Stage::Test);
        let scope = self.scope(&log);
        let work = test::run(&scope, checked_out, built);
        self.journaled(Stage::Test, &scope, work).await
    }

    /// The release of this build, once it is planned.
    async fn planned(&self) -> anyhow::Result<Option<Release>> {
        let stored = self.agent.store.build(self.build.id).await?;
        match stored.and_then(|build| build.release_id) {
            Some(id) => self.stored_release(id).await.map(Some),
            None => Ok(None),
        }
    }

    async fn stored_release(&self, id: i64) -> anyhow::Result<Release> {
        let release = self.agent.store.release(id).await?;
        let release = release.with_context(|| format!("release {id} is not in the store"))?;
        self.mask_secrets(&release);
        Ok(release)
    }

    /// What stood in the environment before us.
    async fn adopted(&self) -> anyhow::Result<Option<Release>> {
        let adopted = self.agent.store.adopted(&self.build.environment).await?;
        if let Some(release) = &adopted {
            self.mask_secrets(release);
        }
        Ok(adopted)
    }

    fn mask_secrets(&self, release: &Release) {
        let log = self.log.stage(Stage::Deploy);
        log.also_mask(&secret_values(&release.objects));
    }

    fn scope<'s>(&'s self, log: &'s StageLog) -> Scope<'s> {
        Scope {
            build: self.build,
            environment: self.environment,
            docker: &self.agent.config.docker,
            mirrors: &self.mirrors,
            work: &self.work,
            log,
            cancel: self.cancel,
        }
    }

    /// For what comes after the first mutation: a person or a newer push waits for its end, only the agent's stop does not.
    fn unstopped<'s>(&'s self, log: &'s StageLog) -> Scope<'s> {
        Scope {
            cancel: &self.agent.stopping,
            ..self.scope(log)
        }
    }

    /// Runs a stage between two lines of the journal: begun, and how it ended, with its baton. `scope` is the stage's own:
    /// what ends it also keeps it from beginning.
    async fn journaled<T: Serialize>(
        &self,
        stage: Stage,
        scope: &Scope<'_>,
        work: impl Future<Output = StageResult<T>>,
    ) -> StageResult<T> {
        if scope.cancel.is_cancelled() {
            return Err(StageError::Canceled);
        }
        self.agent.store.begin_stage(self.build, stage).await?;
        let result = work.await;
        let (status, baton) = match &result {
            Ok(baton) => (
                StageStatus::Passed,
                Some(serde_json::to_string(baton).context("cannot store a baton")?),
            ),
            Err(StageError::Failed(_) | StageError::TimedOut(_)) => (StageStatus::Failed, None),
            // Left as running for the agent that resumes it.
            Err(StageError::Canceled) if self.agent.stopping.is_cancelled() => return result,
            Err(StageError::Canceled) => (StageStatus::Canceled, None),
            Err(StageError::Agent(_)) => (StageStatus::Errored, None),
        };
        self.agent
            .store
            .end_stage(self.build, stage, status, baton.as_deref())
            .await?;
        result
    }

    /// What a stage that passed has handed on.
    async fn baton<T: DeserializeOwned>(&self, stage: Stage) -> anyhow::Result<Option<T>> {
        let row = self.stage_row(stage).await?;
        Ok(row
            .filter(|row| row.status == StageStatus::Passed)
            .and_then(baton))
    }

    /// What a stage has handed on or, where it did not pass, had kept for whoever comes after it.
    async fn kept_baton<T: DeserializeOwned>(&self, stage: Stage) -> anyhow::Result<Option<T>> {
        Ok(self.stage_row(stage).await?.and_then(baton))
    }

    async fn stage_row(&self, stage: Stage) -> anyhow::Result<Option<StageRow>> {
        let stages = self.agent.store.stages(self.build.id).await?;
        Ok(stages.into_iter().find(|row| row.stage == stage))
    }

    async fn canceled(&self) -> Option<Ended> {
        let build = self.agent.store.build(self.build.id).await.ok().flatten();
        if self.agent.stopping.is_cancelled()
            && build
                .as_ref()
                .is_none_or(|build| build.release_id.is_some())
        {
            // It may have been applied: whoever asked for its end, the next agent goes on to a safe place.
            return None;
        }
        let cause = match build {
            Some(Build {
                superseded_by: Some(newer),
                ..
            }) => Cause::new("superseded", format!("build #{newer} took its place")),
            Some(Build {
                cancel_requested: true,
                ..
            }) => Cause::new("canceled", "somebody canceled it"),
            // The agent stops: nothing has failed, and the next one goes on.
            _ if self.agent.stopping.is_cancelled() => return None,
            _ => match self.held_back().await.ok().flatten() {
                // Pinned while it was built.
                Some(held_back) => return Some(held_back),
                None => return None,
            },
        };
        // Nothing was applied: from there on a build is let through.
        Some(Ended {
            status: if cause.id == "superseded" {
                Status::Superseded
            } else {
                Status::Canceled
            },
            outcome: Outcome::Unchanged,
            cause: Some(cause),
        })
    }
}

/// A baton that this version cannot read is one that is not there.
fn baton<T: DeserializeOwned>(row: StageRow) -> Option<T> {
    serde_json::from_str(&row.baton?).ok()
}

impl Ended {
    fn failed(cause: Cause) -> Self {
        Self {
            status: Status::Failed,
            outcome: Outcome::Unchanged,
            cause: Some(cause),
        }
    }

    fn live() -> Self {
        Self {
            status: Status::Passed,
            outcome: Outcome::Live,
            cause: None,
        }
    }

    fn skipped(cause: Cause) -> Self {
        Self {
            status: Status::Skipped,
            outcome: Outcome::Unchanged,
            cause: Some(cause),
        }
    }

    fn pinned(environment: &str, pin: &Pin) -> Self {
        let sentence = format!("{environment} is pinned by {}: {}", pin.by, pin.reason);
        Self::skipped(Cause::new("pinned", sentence).hint(format!(
            "`landfall unpin {environment}` lets it go, and builds the head of its branch"
        )))
    }

    fn quarantined(build: &Build, failed: i64) -> Self {
        let sentence = format!(
            "commit {} failed here in build #{failed}",
            short(&build.commit)
        );
        Self::skipped(
            Cause::new("quarantined", sentence)
                .hint(format!("`landfall rerun {failed}` deploys it all the same")),
        )
    }

    fn stale(build: &Build, head: &str) -> Self {
        let sentence = format!(
            "stale: commit {} is older than what is deployed or was pushed, and the head of {} is {}",
            short(&build.commit),
            build.branch,
            short(head)
        );
        Self::skipped(Cause::new("stale", sentence))
    }
}
