//! The way back of the release transaction: what becomes of a build that cannot go on.
//!
//! The cause → evidence → the last good set again → what the failed one made is removed → verify → smoke test. What could not
//! be seen is no verdict: the build ends as errored, and the next one settles the environment before anything else.

use std::sync::PoisonError;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::transaction::describe;
use super::{ATTEMPTS_MAX, Ended, Line};
use crate::builds::{BuildKind, Cause, Outcome, Stage, StageStatus, Status};
use crate::cluster::evidence;
use crate::cluster::lease::Held;
use crate::cluster::snapshot::Target;
use crate::pipeline::{FirstRelease, Rollback};
use crate::release::{AppliedObject, Change, Evidence, Release};
use crate::stages::deploy::{self, Way};
use crate::stages::verify::Show;
use crate::stages::{Scope, StageError, StageResult, removal, smoke_test, verify};
use crate::store::Unsealable;

/// Before anything else of a build, which goes on all the same.
const EARLY_MAX: Duration = Duration::from_secs(20);

/// Rollback's baton.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PutBack {
    /// None where what the failed release had made was removed, and nothing was there before.
    release_id: Option<i64>,
    /// What of it could not be had again, in a sentence each.
    #[serde(default)]
    refused: Vec<String>,
}

/// What an earlier attempt's rollback came to.
pub(super) enum Earlier {
    Begun(Cause),
    Ended(Ended),
}

impl Line<'_> {
    /// What becomes of a build that cannot go on. None: the agent stops in the middle of a rollback, and the next one
    /// finishes it.
    pub(super) async fn failed(&self, error: StageError) -> Option<Ended> {
        let (status, cause) = match error {
            StageError::Failed(cause)
                if cause.id == "commit_gone" && self.build.kind == BuildKind::Push =>
            {
                // What gave way to it may be the head.
                let instead = self.agent.store.build_after_all(self.build, None).await;
                if let Err(error) = instead {
                    tracing::error!(
                        build = self.build.id,
                        "cannot queue what gave way to it: {error:#}"
                    );
                    return None;
                }
                (Status::Skipped, cause)
            }
            StageError::Failed(cause) | StageError::TimedOut(cause) => (Status::Failed, cause),
            StageError::Canceled => (
                Status::Canceled,
                Cause::new("canceled", "somebody canceled it"),
            ),
            StageError::Agent(error) => {
                let error = format!("{error:#}");
                tracing::warn!(build = self.build.id, error, "build errored");
                (Status::Errored, of_ourselves(error))
            }
        };
        // It leaves the log, and may hold what a program of ours said last.
        let cause = super::masked(&self.log.stage(Stage::Rollback), cause);
        match self.aftermath(status, cause).await {
            Ok(ended) => ended,
            Err(error) => {
                // The store could not be asked or told: the queue takes the build up again.
                tracing::error!(
                    build = self.build.id,
                    error = format!("{error:#}"),
                    "cannot go on with a failed build"
                );
                None
            }
        }
    }

    async fn aftermath(&self, status: Status, cause: Cause) -> anyhow::Result<Option<Ended>> {
        let store = &self.agent.store;
        // Who lost the build while it slept has nothing to say of how it ended.
        store.ensure_held(self.build).await?;
        let ended = |outcome, cause| {
            Some(Ended {
                status,
                outcome,
                cause: Some(cause),
            })
        };
        let planned = match self.planned().await {
            Err(error)
                if error.chain().any(|cause| cause.is::<Unsealable>())
                    || self.build.attempt > ATTEMPTS_MAX =>
            {
                // No retry helps, and a build that never ends would hold the environment for ever.
                store.set_unsettled(self.build, true).await?;
                let cause = Cause::new("agent", format!("{error:#}"));
                return Ok(Some(Ended {
                    status: Status::Errored,
                    outcome: Outcome::Unknown,
                    cause: Some(cause),
                }));
            }
            planned => planned?,
        };
        let Some(release) = planned else {
            return Ok(ended(Outcome::Unchanged, cause));
        };
        let touched: Vec<AppliedObject> = store.touched(self.build.id).await?;
        if status == Status::Errored {
            // Blind is not failed: what stands is found out before the next release.
            let begun = self.stage_begun(Stage::Deploy).await?;
            if begun {
                store.set_unsettled(self.build, true).await?;
            }
            let outcome = if begun {
                Outcome::Unknown
            } else {
                Outcome::Unchanged
            };
            return Ok(ended(outcome, cause));
        }
        let is_unchanged = touched
            .iter()
            .all(|object| object.change == Change::Unchanged);
        // Where nothing was changed, the commit may well be the one that serves.
        let is_at_fault = !is_unchanged && !self.build.kind.brings_back();
        store
            .release_failed(self.build, &release, &cause.sentence, is_at_fault)
            .await?;
        if is_unchanged {
            return Ok(ended(Outcome::Unchanged, cause));
        }
        if release.rollback == Rollback::Never {
            let log = self.log.stage(Stage::Rollback);
            self.keep_evidence(&self.unstopped(&log), &release, &touched)
                .await;
            let by_hand = deploy::undo_hint(&release.namespace, &touched);
            let whole = self.serving().await?.map(|serving| {
                let environment = &self.build.environment;
                format!(
                    "the last good release, whole: landfall undo {environment} --to {}",
                    serving.id
                )
            });
            let cause = with_hint(with_hint(cause, by_hand), whole);
            return Ok(ended(Outcome::LeftFailed, cause));
        }
        store.set_cause(self.build, &cause).await?;
        self.roll_back(&release, &touched, status, cause).await
    }

    async fn roll_back(
        &self,
        failed: &Release,
        touched: &[AppliedObject],
        status: Status,
        cause: Cause,
    ) -> anyhow::Result<Option<Ended>> {
        let store = &self.agent.store;
        let log = self.log.stage(Stage::Rollback);
        let scope = self.unstopped(&log);
        let serving = self.serving().await?;
        let is_first = serving.is_none();
        let goal = self.goal(serving, failed).await?;
        let ended = |outcome, cause| {
            Some(Ended {
                status,
                outcome,
                cause: Some(cause),
            })
        };
        let by_hand = deploy::undo_hint(&failed.namespace, touched);
        let stays = !is_first || failed.first_release == FirstRelease::Leave;
        if goal.is_none() && stays {
            self.keep_evidence(&scope, failed, touched).await;
            return Ok(ended(Outcome::LeftFailed, with_hint(cause, by_hand)));
        }
        log.line(format!("Cause: {}", cause.sentence));
        let work = async {
            self.keep_evidence(&scope, failed, touched).await;
            self.put_back(&scope, failed, touched, goal.as_ref()).await
        };
        match self.journaled(Stage::Rollback, &scope, work).await {
            Ok(PutBack {
                release_id: Some(id),
                refused,
            }) => {
                store.set_restored(self.build, id).await?;
                store.set_unsettled(self.build, false).await?;
                let lost = self
                    .availability()
                    .map_or(String::new(), |availability| format!(", {availability}"));
                let back = back_hint(id, &lost, &refused);
                let cause = with_hint(without_gone_pods(cause), Some(back));
                Ok(ended(Outcome::RolledBack, cause))
            }
            Ok(PutBack {
                release_id: None, ..
            }) => Ok(ended(
                Outcome::Removed,
                with_hint(cause, Some(REMOVED_HINT.to_owned())),
            )),
            Err(StageError::Canceled) => Ok(None),
            Err(error) => {
                let why = error.sentence();
                log.line(format!("The rollback failed: {why}"));
                store.set_unsettled(self.build, true).await?;
                if let StageError::Agent(_) = error {
                    // Not seen is not failed.
                    let hint = format!(
                        "the way back was lost from sight ({why}); the next build goes it to the end first"
                    );
                    let cause = with_hint(cause, Some(hint));
                    return Ok(Some(Ended {
                        status: Status::Errored,
                        outcome: Outcome::Unknown,
                        cause: Some(cause),
                    }));
                }
                Ok(ended(
                    Outcome::RollbackFailed,
                    with_hint(
                        cause,
                        Some(rollback_hint(
                            &self.build.environment,
                            goal.as_ref(),
                            &why,
                            by_hand,
                        )),
                    ),
                ))
            }
        }
    }

    /// What is to be put back after a failed release; None where nothing was there before it.
    async fn goal(
        &self,
        serving: Option<Release>,
        failed: &Release,
    ) -> anyhow::Result<Option<Release>> {
        match serving {
            Some(release) if release.id != failed.id => Ok(Some(release)),
            Some(_) => Ok(None),
            None => self.adopted().await,
        }
    }

    /// The goal's whole set again, without what the failed release had made, verified and smoke-tested.
    async fn put_back(
        &self,
        scope: &Scope<'_>,
        failed: &Release,
        touched: &[AppliedObject],
        goal: Option<&Release>,
    ) -> StageResult<PutBack> {
        let Some(goal) = goal else {
            scope.log.line("Removing what the failed release had made");
            // And what those before it have left, none of which went live.
            let created = self.agent.store.created(&self.build.environment).await?;
            let created: Vec<AppliedObject> = created
                .into_iter()
                .rev()
                .map(|(_, object)| object)
                .collect();
            let left_over = removal::left_over(&created, None);
            let remove = async |held: Held| {
                self.end_jobs(scope, &held, touched).await?;
                self.remove(scope, &held, &left_over).await
            };
            self.holding(scope, None, remove).await?;
            return Ok(PutBack {
                release_id: None,
                refused: Vec::new(),
            });
        };
        scope
            .log
            .line(format!("Putting back release {}", describe(goal)));
        let left_over = removal::left_over(touched, Some(goal));
        let (autoscalers, others) = removal::autoscalers_first(left_over);
        let put_back = async |held: Held| {
            self.end_jobs(scope, &held, touched).await?;
            self.remove(scope, &held, &autoscalers).await?;
            let applied = self.apply_held(scope, &held, goal, Way::Rescue).await?;
            self.remove(scope, &held, &others).await?;
            Ok(applied)
        };
        let applied = self.holding(scope, Some(goal), put_back).await?;
        // What was not well before the failed release is as good as it was, where it is no worse.
        let known = self.known(goal, self.unwell_before(failed).await?).await?;
        let rolled_out = verify::run(scope, goal, &applied, &known, Show::All).await?;
        // It has proved itself before, so that it is not soaked again.
        smoke_test::run(scope, goal, &rolled_out, &mut Vec::new()).await?;
        let but = match rolled_out.left.as_slice() {
            [] => String::new(),
            left => format!("; not well, as before: {}", left.join(", ")),
        };
        scope
            .log
            .line(format!("Release {} is back and verified{but}", goal.id));
        Ok(PutBack {
            release_id: Some(goal.id),
            refused: applied.refused,
        })
    }

    async fn remove(
        &self,
        scope: &Scope<'_>,
        held: &Held,
        objects: &[AppliedObject],
    ) -> StageResult<()> {
        self.note_removed(removal::run(scope, held, objects).await?)
            .await
    }

    async fn end_jobs(
        &self,
        scope: &Scope<'_>,
        held: &Held,
        failed: &[AppliedObject],
    ) -> StageResult<()> {
        self.note_removed(removal::end_jobs(scope, held, failed).await?)
            .await
    }

    async fn note_removed(&self, uids: Vec<String>) -> StageResult<()> {
        for uid in uids {
            self.agent.store.record_removed(&uid).await?;
        }
        Ok(())
    }

    /// What an earlier build left in an unknown state is put right before anything new: the last good release again.
    pub(super) async fn settle(&self, scope: &Scope<'_>) -> StageResult<()> {
        if self.put_right(scope).await? {
            self.agent.store.set_unsettled(self.build, false).await?;
        }
        Ok(())
    }

    /// Whether what was left unsettled is as the last good release has it.
    async fn put_right(&self, scope: &Scope<'_>) -> StageResult<bool> {
        let store = &self.agent.store;
        let environment = &self.build.environment;
        if !store.is_unsettled(environment).await? {
            return Ok(false);
        }
        let goal = match self.serving().await? {
            Some(release) => Some(release),
            None => self.adopted().await?,
        };
        let Some(goal) = goal else {
            return Ok(false);
        };
        scope.log.line(format!(
            "An earlier build lost sight of the cluster or could not be put back: release {} is applied again first",
            goal.id
        ));
        // What stands there beside it was created by releases after it, none of which is live.
        let created = store.created(environment).await?;
        let later: Vec<AppliedObject> = created
            .into_iter()
            .filter(|(release, _)| *release > goal.id)
            .map(|(_, object)| object)
            .collect();
        let left_over = removal::left_over(&later, Some(&goal));
        let settle = async |held: Held| {
            match self.apply_held(scope, &held, &goal, Way::Back).await {
                Err(StageError::Failed(cause)) => return Ok(Some(cause)),
                applied => applied?,
            };
            self.remove(scope, &held, &left_over).await?;
            Ok(None)
        };
        if let Some(cause) = self.holding(scope, Some(&goal), settle).await? {
            // It cannot be had any more; the new release may mend what stands.
            scope.log.line(format!(
                "It cannot be applied again, going on without it: {}",
                cause.sentence
            ));
            return Ok(false);
        }
        Ok(true)
    }

    /// Also for a build that is skipped, or whose tests fail; not where a person holds the environment. It counts as settled
    /// only by a deploy, which proves what it brings: what cannot be done now is done there.
    pub(super) async fn settle_early(&self) -> StageResult<()> {
        let store = &self.agent.store;
        let environment = &self.build.environment;
        let is_held = store.pinned(environment).await?;
        if is_held.is_some_and(|pin| !pin.is_of_an_undo()) {
            return Ok(());
        }
        let log = self.log.stage(Stage::Checkout);
        let scope = self.scope(&log);
        let settling = Box::pin(self.put_right(&scope));
        match tokio::time::timeout(EARLY_MAX, settling).await {
            Ok(Err(StageError::Canceled)) => return Err(StageError::Canceled),
            Ok(Err(error)) => log.line(format!(
                "What an earlier build left cannot be put right yet: {}",
                error.sentence()
            )),
            Err(_) => log.line("What an earlier build left cannot be put right yet"),
            Ok(Ok(_)) => {}
        }
        Ok(())
    }

    async fn keep_evidence(&self, scope: &Scope<'_>, failed: &Release, touched: &[AppliedObject]) {
        let kept = async {
            if !self.agent.store.evidence(self.build.id).await?.is_empty() {
                // An earlier attempt has kept it; by now the way back may have begun.
                return anyhow::Ok(0);
            }
            let cluster = crate::cluster::Cluster::connect(self.environment).await?;
            let collected = evidence::collect(&cluster, &Target::applied(failed, touched)).await;
            let masked = |text: &str| scope.log.masked(text);
            let requests =
                std::mem::take(&mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner));
            let evidence: Vec<Evidence> = requests
                .iter()
                .chain(&collected)
                .map(|one| Evidence {
                    title: masked(&one.title),
                    body: masked(&one.body),
                })
                .collect();
            self.agent
                .store
                .keep_evidence(self.build, &evidence)
                .await?;
            anyhow::Ok(evidence.len())
        };
        match kept.await {
            Ok(0) => {}
            Ok(count) => scope.log.line(format!(
                "Kept as evidence: {count} objects, logs and answers"
            )),
            Err(error) => {
                tracing::warn!(
                    build = self.build.id,
                    error = format!("{error:#}"),
                    "cannot keep evidence"
                );
                scope
                    .log
                    .line("The evidence cannot be kept; the log of this build has what was seen.");
            }
        }
    }

    /// Of a rollback that an earlier attempt could not bring about.
    async fn failed_hint(&self) -> anyhow::Result<String> {
        let environment = &self.build.environment;
        let why = "the log of the rollback says why";
        let Some(failed) = self.planned().await? else {
            return Ok(rollback_hint(environment, None, why, None));
        };
        let touched = self.agent.store.touched(self.build.id).await?;
        let by_hand = deploy::undo_hint(&failed.namespace, &touched);
        let goal = self.goal(self.serving().await?, &failed).await?;
        Ok(rollback_hint(environment, goal.as_ref(), why, by_hand))
    }

    /// A rollback that an earlier attempt began, and what it came to.
    pub(super) async fn earlier_rollback(&self) -> anyhow::Result<Option<Earlier>> {
        let stages = self.agent.store.stages(self.build.id).await?;
        let row = stages.iter().find(|row| row.stage == Stage::Rollback);
        let (Some(row), Some(cause)) = (row, self.build.cause.clone()) else {
            return Ok(None);
        };
        let (outcome, hint) = match row.status {
            StageStatus::Running | StageStatus::Canceled => return Ok(Some(Earlier::Begun(cause))),
            StageStatus::Passed => match self.baton(Stage::Rollback).await? {
                Some(PutBack {
                    release_id: Some(id),
                    refused,
                }) => {
                    self.agent.store.set_restored(self.build, id).await?;
                    (Outcome::RolledBack, back_hint(id, "", &refused))
                }
                _ => (Outcome::Removed, REMOVED_HINT.to_owned()),
            },
            StageStatus::Failed => (Outcome::RollbackFailed, self.failed_hint().await?),
            StageStatus::Errored => {
                let lost =
                    "the way back was lost from sight; the next build goes it to the end first";
                (Outcome::Unknown, lost.to_owned())
            }
        };
        let cause = match outcome {
            Outcome::RolledBack => without_gone_pods(cause),
            _ => cause,
        };
        let cause = with_hint(cause, Some(hint));
        let status = match outcome {
            Outcome::Unknown => Status::Errored,
            _ => Status::Failed,
        };
        let is_lost = matches!(outcome, Outcome::RollbackFailed | Outcome::Unknown);
        self.agent.store.set_unsettled(self.build, is_lost).await?;
        Ok(Some(Earlier::Ended(Ended {
            status,
            outcome,
            cause: Some(cause),
        })))
    }
}

/// What kept us from our work.
fn of_ourselves(error: String) -> Cause {
    let lower = error.to_lowercase();
    let is_full = [
        "no space left on device",
        "disk quota exceeded",
        "disk is full",
    ];
    match is_full.iter().any(|sign| lower.contains(sign)) {
        true => Cause::new("disk_full", format!("a disk is full: {error}")).hint(
            "make room where it says, then `landfall rerun`: `landfall doctor` shows the agent's disk, `docker system df` what the engine holds",
        ),
        false => Cause::new("agent", error),
    }
}

/// The pod that a hint would lead to is gone once something else is back.
fn without_gone_pods(cause: Cause) -> Cause {
    let hint = cause.hint.filter(|hint| !hint.contains("kubectl logs"));
    Cause { hint, ..cause }
}

const REMOVED_HINT: &str = "nothing was there before: what it had made is removed";

fn back_hint(release_id: i64, lost: &str, refused: &[String]) -> String {
    let but: String = refused.iter().map(|why| format!(", but {why}")).collect();
    format!(
        "release {release_id} is back and verified{lost}{but}; what failed is kept with this build as evidence"
    )
}

fn rollback_hint(
    environment: &str,
    goal: Option<&Release>,
    why: &str,
    by_hand: Option<String>,
) -> String {
    match (goal, by_hand) {
        (Some(goal), _) => format!(
            "the rollback failed ({why}); try it again: landfall undo {environment} --to {}",
            goal.id
        ),
        (None, Some(commands)) => format!("the rollback failed ({why}); by hand: {commands}"),
        (None, None) => format!("the rollback failed ({why})"),
    }
}

fn with_hint(cause: Cause, more: Option<String>) -> Cause {
    let hint = match (&cause.hint, more) {
        (Some(own), Some(more)) => Some(format!("{own}; {more}")),
        (own, more) => more.or_else(|| own.clone()),
    };
    Cause { hint, ..cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_a_cause_of_its_own() {
        use anyhow::Context;
        let full = std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        let full = Err::<(), _>(full).context("cannot write data/work/1/tree/a");
        for error in [
            format!("{:#}", full.unwrap_err()),
            "cannot store: error returned from database: (code: 13) database or disk is full"
                .to_owned(),
        ] {
            let cause = of_ourselves(error.clone());
            assert_eq!(cause.id, "disk_full");
            assert!(
                cause.sentence.ends_with(&error) && cause.hint.is_some(),
                "{cause:?}"
            );
        }
        assert_eq!(
            of_ourselves("Docker does not answer".to_owned()).id,
            "agent"
        );
    }
}
