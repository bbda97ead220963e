//! One build, top to bottom: checkout, image, test, plan, apply, verify, smoke test.
//!
//! All control flow between stages is here. Before each stage the journal is asked whether it is done and what its
//! baton names still exists, so a fresh build and a resumed one are the same function and no stage knows of crashes.
//! Never calls GitHub, never answers a request.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::build_log::{BuildLog, FLUSH_EVERY, Masker, StageLog};
use crate::builds::{
    Build, BuildKind, Cause, Outcome, Stage, StageStatus, Status, human_duration, now, short,
};
use crate::config::{Config, Environment};
use crate::release::Release;
use crate::stages::checkout::Checkout;
use crate::stages::{
    Applied, Built, CheckedOut, Live, RolledOut, Scope, StageError, StageResult, Tested, checkout,
    deploy, image, smoke_test, test, verify,
};
use crate::store::{Store, make_private_dir};

/// A build that kills its agent again and again must not do so for ever.
const ATTEMPTS_MAX: i64 = 5;

/// What every build of this agent shares.
pub struct Agent {
    pub config: Arc<Config>,
    pub store: Store,
    /// Our own binary, which runs git in a process of its own.
    pub exe: PathBuf,
    /// Who we are in the store: unique for each start.
    pub holder: String,
    /// Fires when the agent stops: a canceled build is then left to be resumed.
    pub stopping: CancellationToken,
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
    let log = BuildLog::new(masker.clone(), limit, bytes);
    let writer = write_log(agent.store.clone(), build.id, log.clone(), next);

    let ended = match agent.config.environment(&build.environment) {
        Some(environment) => match name_commit(agent, environment, &mut build).await {
            Ok(()) => {
                Line::new(agent, environment, &build, &log, cancel)
                    .run()
                    .await
            }
            Err(error) => Some(Ended::errored(&error)),
        },
        None => Some(Ended::failed(Cause::new(
            "no_environment",
            format!(
                "agent.yaml has no environment {:?} any more",
                build.environment
            ),
        ))),
    };

    let ended = ended.map(|ended| Ended {
        cause: ended.cause.map(|cause| masked(&masker, cause)),
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
    let Some(ended) = ended else { return Ok(()) };
    agent
        .store
        .finish(&build, ended.status, ended.outcome, ended.cause.as_ref())
        .await?;
    tracing::info!(build = build.id, status = %ended.status, outcome = %ended.outcome, "build ended");
    remove_work(&work_dir(agent, &build)).await;
    Ok(())
}

/// A cause is shown on pages and told to GitHub: no secret may be in it, whoever wrote it.
fn masked(masker: &Masker, cause: Cause) -> Cause {
    Cause {
        sentence: masker.mask_text(&cause.sentence),
        object: cause.object.map(|text| masker.mask_text(&text)),
        hint: cause.hint.map(|text| masker.mask_text(&text)),
        ..cause
    }
}

/// A build that a person asked for by branch: its commit is the branch's head now, and stays so when it is resumed.
async fn name_commit(
    agent: &Agent,
    environment: &Environment,
    build: &mut Build,
) -> anyhow::Result<()> {
    if build.commit.is_empty() {
        let mirrors = mirrors(agent);
        make_private_dir(&mirrors)?;
        build.commit = checkout::resolve(environment, &agent.exe, &mirrors, &build.branch).await?;
        agent.store.describe(build, &build.commit, "").await?;
    }
    Ok(())
}

/// Stores what the stages say, a chunk every `FLUSH_EVERY`, until the log is closed. Lines that the store refuses are
/// lost, and the operator is told: a full disk must not hold up a release.
fn write_log(store: Store, build_id: i64, log: BuildLog, mut next: i64) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Some(lines) = log.drain().await {
            match store.append_log(build_id, next, &lines).await {
                Ok(after) => next = after,
                Err(error) => {
                    tracing::error!(
                        build = build_id,
                        lines = lines.len(),
                        error = format!("{error:#}"),
                        "lines of the build log are lost"
                    );
                }
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

fn work_dir(agent: &Agent, build: &Build) -> PathBuf {
    agent
        .config
        .data_dir
        .join("work")
        .join(build.id.to_string())
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
    /// Never fires: what has begun to change the cluster is let through.
    unstoppable: CancellationToken,
    mirrors: PathBuf,
    work: PathBuf,
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
            unstoppable: CancellationToken::new(),
            mirrors: mirrors(agent),
            work: work_dir(agent, build),
        }
    }

    /// None: the agent stops, and the next one goes on.
    async fn run(&self) -> Option<Ended> {
        match self.prepared().await {
            Ok(ended) => Some(ended),
            Err(StageError::Canceled) => self.canceled().await,
            Err(error) => Some(self.failed(error).await),
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
            if let Err(error) = test::sweep(&self.agent.config.docker, &self.work).await {
                tracing::warn!(
                    build = self.build.id,
                    error = format!("{error:#}"),
                    "cannot remove containers of an earlier attempt"
                );
            }
        }
        if self.build.attempt > ATTEMPTS_MAX {
            return Err(StageError::Agent(anyhow::anyhow!(
                "the agent died {ATTEMPTS_MAX} times while it ran this build; it is not begun again (`landfall rerun {}` does)",
                self.build.id
            )));
        }
        self.walk().await
    }

    /// The straight line.
    async fn walk(&self) -> StageResult<Ended> {
        let applied = match self.planned().await? {
            // From the plan on only the release counts: the set that is stored is applied again, and watched again.
            Some(release) => self.apply_stored(&release).await?,
            None => {
                let checked_out = match self.checkout().await? {
                    Checkout::Ready(checked_out) => checked_out,
                    Checkout::Stale { head } => return Ok(Ended::stale(self.build, &head)),
                };
                let built = self.image(&checked_out).await?;
                self.test(&checked_out, &built).await?;
                self.deploy(&checked_out, &built).await?
            }
        };
        let release = self.stored_release(applied.release_id).await?;
        let rolled_out = self.verify(&release, &applied).await?;
        self.smoke_test(&release, &rolled_out).await?;
        self.agent
            .store
            .release_is_live(self.build, &release)
            .await?;
        let outcome = if applied.changed_nothing() {
            Outcome::Unchanged
        } else {
            Outcome::Live
        };
        Ok(Ended {
            status: Status::Passed,
            outcome,
            cause: None,
        })
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
        let deployed = match self.build.kind {
            BuildKind::Push => self.agent.store.deployed(&self.build.environment).await?.0,
            BuildKind::Manual | BuildKind::Rerun => None,
        };
        let scope = self.scope(&log);
        let done = self
            .journaled(
                Stage::Checkout,
                checkout::run(&scope, &self.agent.exe, deployed.as_deref()),
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
                self.journaled(Stage::Image, image::run(&scope, checked_out))
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
        self.journaled(
            Stage::Test,
            test::run(&self.scope(&log), checked_out, built),
        )
        .await
    }

    async fn deploy(&self, checked_out: &CheckedOut, built: &Built) -> StageResult<Applied> {
        let log = self.log.stage(Stage::Deploy);
        self.journaled(
            Stage::Deploy,
            self.plan_and_apply(&self.scope(&log), checked_out, built),
        )
        .await
    }

    async fn apply_stored(&self, release: &Release) -> StageResult<Applied> {
        if let Some(applied) = self.baton(Stage::Deploy).await? {
            return Ok(applied);
        }
        let log = self.log.stage(Stage::Deploy);
        self.journaled(Stage::Deploy, self.apply(&self.scope(&log), release))
            .await
    }

    /// Looked at anew after every restart: what was true then may not be true now.
    async fn verify(&self, release: &Release, applied: &Applied) -> StageResult<RolledOut> {
        let log = self.log.stage(Stage::Verify);
        self.journaled(
            Stage::Verify,
            verify::run(&self.unstopped(&log), release, applied),
        )
        .await
    }

    async fn smoke_test(&self, release: &Release, rolled_out: &RolledOut) -> StageResult<Live> {
        let log = self.log.stage(Stage::SmokeTest);
        self.journaled(
            Stage::SmokeTest,
            smoke_test::run(&self.unstopped(&log), release, rolled_out),
        )
        .await
    }

    /// Plan, then the last moment to stop, then the release's row, then the first mutation.
    async fn plan_and_apply(
        &self,
        scope: &Scope<'_>,
        checked_out: &CheckedOut,
        built: &Built,
    ) -> StageResult<Applied> {
        let serving = match self.agent.store.deployed(&self.build.environment).await?.1 {
            Some(id) => Some(self.stored_release(id).await?),
            None => None,
        };
        let release = deploy::plan(scope, checked_out, built, serving.as_ref()).await?;
        if !self.agent.store.begin_deploying(self.build).await? {
            return Err(StageError::Canceled);
        }
        let id = self.agent.store.plan_release(self.build, &release).await?;
        self.apply(scope, &Release { id, ..release }).await
    }

    async fn apply(&self, scope: &Scope<'_>, release: &Release) -> StageResult<Applied> {
        let scope = Scope {
            cancel: &self.unstoppable,
            ..*scope
        };
        let applied = deploy::apply(&scope, release).await?;
        self.agent
            .store
            .record_applied(self.build, release.id, &applied.objects)
            .await?;
        Ok(applied)
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
        self.agent
            .store
            .release(id)
            .await?
            .with_context(|| format!("release {id} is not in the store"))
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

    /// For the stages after the first mutation: a person or a newer push waits for their end, only the agent's stop does not.
    fn unstopped<'s>(&'s self, log: &'s StageLog) -> Scope<'s> {
        Scope {
            cancel: &self.agent.stopping,
            ..self.scope(log)
        }
    }

    fn may_still_stop(&self, stage: Stage) -> bool {
        !matches!(stage, Stage::Verify | Stage::SmokeTest) || self.agent.stopping.is_cancelled()
    }

    /// Runs a stage between two lines of the journal: begun, and how it ended, with its baton.
    async fn journaled<T: Serialize>(
        &self,
        stage: Stage,
        work: impl Future<Output = StageResult<T>>,
    ) -> StageResult<T> {
        if self.may_still_stop(stage) && self.cancel.is_cancelled() {
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
        let stages = self.agent.store.stages(self.build.id).await?;
        let passed = stages
            .into_iter()
            .find(|row| row.stage == stage && row.status == StageStatus::Passed);
        // A baton that this version cannot read is one that is not there.
        Ok(passed
            .and_then(|row| row.baton)
            .and_then(|baton| serde_json::from_str(&baton).ok()))
    }

    async fn canceled(&self) -> Option<Ended> {
        let build = self.agent.store.build(self.build.id).await.ok().flatten();
        if !build
            .as_ref()
            .is_some_and(|build| build.cancel_requested || build.superseded_by.is_some())
        {
            // The agent stops: nothing has failed, and the next one goes on.
            return None;
        }
        let (outcome, hint) = self.outcome_of_failure(Outcome::LeftFailed).await;
        match build {
            Some(Build {
                superseded_by: Some(newer),
                ..
            }) => {
                let cause = Cause::new(
                    "superseded",
                    format!("build #{newer} of a newer push took its place"),
                );
                Some(Ended {
                    status: Status::Superseded,
                    outcome,
                    cause: Some(cause),
                })
            }
            Some(Build {
                cancel_requested: true,
                ..
            }) => {
                let cause = Cause {
                    hint,
                    ..Cause::new("canceled", "somebody canceled it")
                };
                Some(Ended {
                    status: Status::Canceled,
                    outcome,
                    cause: Some(cause),
                })
            }
            _ => None,
        }
    }

    async fn failed(&self, error: StageError) -> Ended {
        let (status, blind, mut cause) = match error {
            StageError::Failed(cause)
                if cause.id == "commit_gone" && self.build.kind == BuildKind::Push =>
            {
                (Status::Skipped, false, cause)
            }
            StageError::Failed(cause) | StageError::TimedOut(cause) => {
                (Status::Failed, false, cause)
            }
            StageError::Canceled => (
                Status::Canceled,
                false,
                Cause::new("canceled", "somebody canceled it"),
            ),
            StageError::Agent(error) => {
                tracing::warn!(
                    build = self.build.id,
                    error = format!("{error:#}"),
                    "build errored"
                );
                (
                    Status::Errored,
                    true,
                    Cause::new("agent", format!("{error:#}")),
                )
            }
        };
        let (outcome, hint) = self
            .outcome_of_failure(if blind {
                Outcome::Unknown
            } else {
                Outcome::LeftFailed
            })
            .await;
        if let Some(hint) = hint {
            cause.hint = Some(match cause.hint.take() {
                Some(own) => format!("{own}; {hint}"),
                None => hint,
            });
        }
        Ended {
            status,
            outcome,
            cause: Some(cause),
        }
    }

    /// Unchanged before the first mutation; afterwards `touched`, and the command that brings the last release back.
    async fn outcome_of_failure(&self, touched: Outcome) -> (Outcome, Option<String>) {
        self.what_stands(touched).await.unwrap_or_else(|error| {
            tracing::error!(
                build = self.build.id,
                error = format!("{error:#}"),
                "cannot tell what a failed build left"
            );
            (Outcome::Unknown, None)
        })
    }

    async fn what_stands(&self, touched: Outcome) -> anyhow::Result<(Outcome, Option<String>)> {
        let Some(release) = self.planned().await? else {
            return Ok((Outcome::Unchanged, None));
        };
        self.agent
            .store
            .release_failed(self.build, release.id, "its build failed")
            .await?;
        let applied: Option<Applied> = self.baton(Stage::Deploy).await?;
        if applied.as_ref().is_some_and(Applied::changed_nothing) {
            return Ok((Outcome::Unchanged, None));
        }
        Ok((touched, deploy::undo_hint(&release, applied.as_ref())))
    }
}

impl Ended {
    fn failed(cause: Cause) -> Self {
        Self {
            status: Status::Failed,
            outcome: Outcome::Unchanged,
            cause: Some(cause),
        }
    }

    fn errored(error: &anyhow::Error) -> Self {
        Self {
            status: Status::Errored,
            outcome: Outcome::Unchanged,
            cause: Some(Cause::new("agent", format!("{error:#}"))),
        }
    }

    fn stale(build: &Build, head: &str) -> Self {
        let sentence = format!(
            "stale: commit {} is older than what is deployed, and the head of {} is {}",
            short(&build.commit),
            build.branch,
            short(head)
        );
        Self {
            status: Status::Skipped,
            outcome: Outcome::Unchanged,
            cause: Some(Cause::new("stale", sentence)),
        }
    }
}
