//! The release transaction: from the plan on, a release ends proved live, or what served before is back and proved too.
//!
//! The line forward: plan → its row → apply → verify → smoke test → live → prune. The line back: the cause → evidence →
//! the last good set again → what the failed one made is removed → verify → smoke test. What could not be seen is neither:
//! the build ends as errored, and the environment is settled before anything else.

use std::sync::PoisonError;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Ended, Line};
use crate::builds::{BuildKind, Cause, Outcome, Stage, StageStatus, Status};
use crate::cluster::availability::{self, Availability};
use crate::cluster::evidence;
use crate::cluster::lease::{Held, LeaseTaken};
use crate::cluster::snapshot::Target;
use crate::pipeline::{FirstRelease, Rollback};
use crate::release::{AppliedObject, Change, Evidence, Release, Unwell};
use crate::stages::deploy::{self, Applying, KnownJobs, Way};
use crate::stages::plan::{self, Ground, Plan};
use crate::stages::verify::{Known, Show};
use crate::stages::{
    Applied, Built, CheckedOut, Live, RolledOut, Scope, StageError, StageResult, listening,
    removal, smoke_test, soak, verify,
};
use crate::store::Unsealable;

/// Of what serves, before something is brought back.
const LOOK_LIMIT: Duration = Duration::from_secs(15);
const SOAK_ASKED_EVERY: Duration = Duration::from_secs(1);
/// How often the environment is claimed for one piece of work: each agent that wakes can disturb it once.
const HOLDS_MAX: u32 = 3;

/// Rollback's baton.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PutBack {
    /// None where what the failed release had made was removed, and nothing was there before.
    release_id: Option<i64>,
}

/// What an earlier attempt's rollback came to.
pub(super) enum Earlier {
    Begun(Cause),
    Ended(Ended),
}

/// Forward.
impl Line<'_> {
    /// Plan, then the last moment to stop, then the release's row, then the first mutation.
    pub(super) async fn deploy(
        &self,
        checked_out: &CheckedOut,
        built: &Built,
    ) -> StageResult<(Release, Applied)> {
        let log = self.log.stage(Stage::Deploy);
        let scope = self.scope(&log);
        let mut planned = None;
        let work = async {
            self.settle(&self.unstopped(&log)).await?;
            let release = self.plan(&scope, checked_out, built).await?;
            let applied = self
                .apply(&self.unstopped(&log), &release, Way::Forward)
                .await;
            planned = Some(release);
            applied
        };
        let applied = self.journaled(Stage::Deploy, &scope, work).await?;
        let release =
            planned.ok_or_else(|| anyhow::anyhow!("a release was applied without a plan"))?;
        Ok((release, applied))
    }

    /// The set of a release that was planned: by an attempt that died, or long ago.
    pub(super) async fn apply_stored(&self, release: &Release) -> StageResult<Applied> {
        if let Some(applied) = self.baton(Stage::Deploy).await? {
            return Ok(applied);
        }
        let log = self.log.stage(Stage::Deploy);
        let begun = self.stage_begun(Stage::Deploy).await?;
        // A return that has not begun can still be canceled.
        if !begun && !self.agent.store.begin_deploying(self.build).await? {
            return Err(StageError::Canceled);
        }
        let scope = self.unstopped(&log);
        let way = if self.build.kind.brings_back() {
            log.line(format!("Bringing back release {}", describe(release)));
            Way::Back
        } else {
            Way::Forward
        };
        let work = async {
            let unwell = match way {
                Way::Back => self.unwell_now(&scope).await,
                _ => release.unwell.clone(),
            };
            let applied = self.apply(&scope, release, way).await?;
            Ok(Applied { unwell, ..applied })
        };
        self.journaled(Stage::Deploy, &scope, work).await
    }

    /// What is not well before something is brought back. What an attempt that died has changed is not told from that. Nobody is
    /// kept from going back by a look that does not come about.
    async fn unwell_now(&self, scope: &Scope<'_>) -> Vec<Unwell> {
        let store = &self.agent.store;
        let look = async {
            let is_first_look = store.touched(self.build.id).await?.is_empty()
                && store.is_at_rest(&self.build.environment).await?;
            if !is_first_look {
                return Ok(Vec::new());
            }
            match self.serving().await? {
                Some(serving) => plan::unwell_now(scope, &serving).await,
                None => Ok(Vec::new()),
            }
        };
        match tokio::time::timeout(LOOK_LIMIT, Box::pin(look)).await {
            Ok(Ok(unwell)) => unwell,
            Ok(Err(_)) | Err(_) => {
                scope
                    .log
                    .line("What was not well before could not be seen: going on without it");
                Vec::new()
            }
        }
    }

    /// Looked at anew after every restart: what was true then may not be true now.
    pub(super) async fn verify(
        &self,
        release: &Release,
        applied: &Applied,
    ) -> StageResult<RolledOut> {
        let log = self.log.stage(Stage::Verify);
        let scope = self.unstopped(&log);
        // By the store: an object that an attempt before this one changed is unchanged to the next.
        let touched = self.agent.store.touched(self.build.id).await?;
        let before = match self.build.kind.brings_back() {
            true => &applied.unwell,
            false => &release.unwell,
        };
        let unwell = unchanged(before, &touched);
        let known = self.known(release, unwell).await?;
        let work = verify::run(&scope, release, applied, &known, Show::All);
        self.journaled(Stage::Verify, &scope, work).await
    }

    pub(super) async fn smoke_test(
        &self,
        release: &Release,
        rolled_out: &RolledOut,
    ) -> StageResult<Live> {
        let log = self.log.stage(Stage::SmokeTest);
        let scope = self.unstopped(&log);
        let mut evidence = Vec::new();
        let work = async {
            let live = smoke_test::run(&scope, release, rolled_out, &mut evidence).await?;
            // What is brought back has served before.
            if !self.build.kind.brings_back() {
                let touched = self.agent.store.touched(self.build.id).await?;
                listening::run(&scope, release, &touched).await?;
            }
            soak::run(&scope, release, &rolled_out.left, self.soaked_enough()).await?;
            Ok(live)
        };
        let live = self.journaled(Stage::SmokeTest, &scope, work).await;
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = evidence;
        live
    }

    /// Comes back when somebody waits for the end of the soak: a person who canceled the build, or the next build.
    async fn soaked_enough(&self) -> String {
        let store = &self.agent.store;
        let mut changes = store.watch();
        loop {
            // What cannot be read is asked for again: the soak has an end of its own.
            if let Ok(Some(next)) = store.waits_behind(self.build).await {
                return format!("build #{next} waits");
            }
            if let Ok(Some(build)) = store.build(self.build.id).await
                && build.cancel_requested
            {
                return "somebody canceled the build".to_owned();
            }
            let _ = tokio::time::timeout(SOAK_ASKED_EVERY, changes.changed()).await;
            tokio::time::sleep(SOAK_ASKED_EVERY / 10).await;
        }
    }

    /// The release serves by our word; then what it no longer has is taken away.
    pub(super) async fn settle_live(
        &self,
        release: &Release,
        rolled_out: &RolledOut,
    ) -> StageResult<()> {
        let store = &self.agent.store;
        store
            .release_is_live(self.build, release, &rolled_out.revisions)
            .await?;
        if let Some(availability) = self.availability() {
            let log = self.log.stage(Stage::SmokeTest);
            log.line(format!("Release {} is live, {availability}", release.id));
        }
        self.tidy_up(release).await;
        Ok(())
    }

    /// Takes away what the release that serves no longer has.
    pub(super) async fn tidy_up(&self, release: &Release) {
        let log = self.log.stage(Stage::SmokeTest);
        if let Err(error) = self.prune(&self.unstopped(&log), release).await {
            // The next release tries again: what is left over does no harm.
            log.line(format!(
                "Not everything that the manifests no longer hold was removed: {error}"
            ));
        }
    }

    async fn plan(
        &self,
        scope: &Scope<'_>,
        checked_out: &CheckedOut,
        built: &Built,
    ) -> StageResult<Release> {
        let store = &self.agent.store;
        let environment = &self.build.environment;
        let created = store.created(environment).await?;
        let ground = Ground {
            serving: self.serving().await?,
            is_at_rest: store.is_at_rest(environment).await?,
            created: created.into_iter().map(|(_, object)| object).collect(),
        };
        let Plan { release, found } = plan::run(scope, checked_out, built, &ground).await?;
        if !store.begin_deploying(self.build).await? {
            return Err(StageError::Canceled);
        }
        // What an earlier first release of ours has left there is not what was found.
        if let Some(found) = found
            && store.is_as_found(environment).await?
        {
            store.adopt(self.build, &found).await?;
        }
        let id = store.plan_release(self.build, &release).await?;
        Ok(Release { id, ..release })
    }

    async fn apply(&self, scope: &Scope<'_>, release: &Release, way: Way) -> StageResult<Applied> {
        self.watch_availability().await;
        let apply = async |held: Held| self.apply_held(scope, &held, release, way).await;
        self.holding(scope, Some(release), apply).await
    }

    /// From here to the end of the build, whichever it is. Nothing is said of what an earlier attempt may have cost, nor of a
    /// release that cannot be read.
    async fn watch_availability(&self) {
        if self.build.attempt > 1 {
            return;
        }
        let begin = async {
            let serving = self.serving().await.ok().flatten()?;
            availability::Watch::begin(self.environment, &serving).await
        };
        self.availability.get_or_init(|| Box::pin(begin)).await;
    }

    fn availability(&self) -> Option<Availability> {
        Some(self.availability.get()?.as_ref()?.so_far())
    }

    /// Works under the environment's next fence. An agent that lost the environment while it slept may have claimed the Lease
    /// too, before the store told it so: whoever has the store's word claims it anew, and does the same again.
    async fn holding<T>(
        &self,
        scope: &Scope<'_>,
        release: Option<&Release>,
        work: impl AsyncFn(Held) -> StageResult<T>,
    ) -> StageResult<T> {
        for _ in 1..HOLDS_MAX {
            let held = self.hold(scope, release).await?;
            match Box::pin(work(held)).await {
                Err(StageError::Agent(error))
                    if error.chain().any(|cause| cause.is::<LeaseTaken>()) =>
                {
                    self.agent.store.ensure_held(self.build).await?;
                    scope
                        .log
                        .line(format!("Claiming the environment anew: {error:#}"));
                }
                done => return done,
            }
        }
        Box::pin(work(self.hold(scope, release).await?)).await
    }

    async fn hold(&self, scope: &Scope<'_>, release: Option<&Release>) -> StageResult<Held> {
        self.agent.store.ensure_held(self.build).await?;
        let held = deploy::hold(scope, release).await?;
        // Who slept between the store's word and the cluster's lease is told here, before it writes.
        self.agent.store.ensure_held(self.build).await?;
        Ok(held)
    }

    async fn apply_held(
        &self,
        scope: &Scope<'_>,
        held: &Held,
        release: &Release,
        way: Way,
    ) -> StageResult<Applied> {
        let store = &self.agent.store;
        // What is put back after a failure is not what the failed build has done.
        let is_own = self.planned_id().await? == Some(release.id);
        let jobs = KnownJobs {
            completed: store.completed_jobs(&self.build.environment).await?,
            begun: store.touched(self.build.id).await?,
        };
        let mut applying = Applying::begin(scope, held, release, way)
            .await?
            .knowing(jobs);
        let mut objects = Vec::new();
        while let Some((ordinal, object)) = applying.next().await? {
            store
                .record_applied(self.build, release.id, ordinal, &object)
                .await?;
            if is_own {
                store.record_touched(self.build, ordinal, &object).await?;
            }
            objects.push(object);
        }
        let targets = Target::applied(release, &objects);
        removal::free_stuck_pods(scope, held, &targets, way).await;
        Ok(Applied {
            release_id: release.id,
            objects,
            unwell: release.unwell.clone(),
        })
    }

    async fn prune(&self, scope: &Scope<'_>, release: &Release) -> anyhow::Result<()> {
        let surplus = if self.build.kind.brings_back() {
            // Whatever other releases have made beside it.
            let created = self.agent.store.created(&self.build.environment).await?;
            let created: Vec<AppliedObject> =
                created.into_iter().map(|(_, object)| object).collect();
            removal::prunable(&created, &release.objects)
        } else {
            release.prune.clone()
        };
        if surplus.is_empty() {
            return Ok(());
        }
        let remove = async |held: Held| removal::run(scope, &held, &surplus).await;
        let pruned = self.holding(scope, Some(release), remove).await;
        for uid in pruned.map_err(StageError::into_error)? {
            self.agent.store.record_removed(&uid).await?;
        }
        Ok(())
    }
}

/// Back.
impl Line<'_> {
    /// What becomes of a build that cannot go on. None: the agent stops in the middle of a rollback, and the next one
    /// finishes it.
    pub(super) async fn failed(&self, error: StageError) -> Option<Ended> {
        let (status, cause) = match error {
            StageError::Failed(cause)
                if cause.id == "commit_gone" && self.build.kind == BuildKind::Push =>
            {
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
                (Status::Errored, Cause::new("agent", error))
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
            Err(error) if error.chain().any(|cause| cause.is::<Unsealable>()) => {
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
        let goal = match serving {
            Some(release) if release.id != failed.id => Some(release),
            Some(_) => None,
            None => self.adopted().await?,
        };
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
            }) => {
                store.set_restored(self.build, id).await?;
                store.set_unsettled(self.build, false).await?;
                // The pod that a hint would lead to is gone by now.
                let hint = cause
                    .hint
                    .clone()
                    .filter(|hint| !hint.contains("kubectl logs"));
                let lost = self
                    .availability()
                    .map_or(String::new(), |availability| format!(", {availability}"));
                let back = format!(
                    "release {id} is back and verified{lost}; what failed is kept with this build as evidence"
                );
                let cause = Cause { hint, ..cause };
                Ok(ended(Outcome::RolledBack, with_hint(cause, Some(back))))
            }
            Ok(PutBack { release_id: None }) => {
                let removed = "nothing was there before: what it had made is removed".to_owned();
                Ok(ended(Outcome::Removed, with_hint(cause, Some(removed))))
            }
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

    /// The goal's whole set again, without what the failed release had made, verified and smoke-tested.
    async fn put_back(
        &self,
        scope: &Scope<'_>,
        failed: &Release,
        touched: &[AppliedObject],
        goal: Option<&Release>,
    ) -> StageResult<PutBack> {
        let left_over = removal::left_over(touched, goal);
        let Some(goal) = goal else {
            scope.log.line("Removing what the failed release had made");
            let remove = async |held: Held| {
                self.end_jobs(scope, &held, touched).await?;
                self.remove(scope, &held, &left_over).await
            };
            self.holding(scope, None, remove).await?;
            return Ok(PutBack { release_id: None });
        };
        scope
            .log
            .line(format!("Putting back release {}", describe(goal)));
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
    async fn settle(&self, scope: &Scope<'_>) -> StageResult<()> {
        let store = &self.agent.store;
        let environment = &self.build.environment;
        if !store.is_unsettled(environment).await? {
            return Ok(());
        }
        let goal = match self.serving().await? {
            Some(release) => Some(release),
            None => self.adopted().await?,
        };
        let Some(goal) = goal else {
            return Ok(());
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
            return Ok(());
        }
        store.set_unsettled(self.build, false).await?;
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

    /// A rollback that an earlier attempt began, and what it came to.
    pub(super) async fn earlier_rollback(&self) -> anyhow::Result<Option<Earlier>> {
        let stages = self.agent.store.stages(self.build.id).await?;
        let row = stages.iter().find(|row| row.stage == Stage::Rollback);
        let (Some(row), Some(cause)) = (row, self.build.cause.clone()) else {
            return Ok(None);
        };
        let outcome = match row.status {
            StageStatus::Running | StageStatus::Canceled => return Ok(Some(Earlier::Begun(cause))),
            StageStatus::Passed => {
                let put_back: Option<PutBack> = self.baton(Stage::Rollback).await?;
                match put_back.and_then(|put_back| put_back.release_id) {
                    Some(id) => {
                        self.agent.store.set_restored(self.build, id).await?;
                        Outcome::RolledBack
                    }
                    None => Outcome::Removed,
                }
            }
            StageStatus::Failed => Outcome::RollbackFailed,
            StageStatus::Errored => Outcome::Unknown,
        };
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

    async fn planned_id(&self) -> anyhow::Result<Option<i64>> {
        let build = self.agent.store.build(self.build.id).await?;
        Ok(build.and_then(|build| build.release_id))
    }

    async fn stage_begun(&self, stage: Stage) -> anyhow::Result<bool> {
        let stages = self.agent.store.stages(self.build.id).await?;
        Ok(stages.iter().any(|row| row.stage == stage))
    }

    /// The release that serves by our own word.
    async fn serving(&self) -> anyhow::Result<Option<Release>> {
        match self.agent.store.deployed(&self.build.environment).await?.1 {
            Some(id) => self.stored_release(id).await.map(Some),
            None => Ok(None),
        }
    }

    /// What was not well before the release that failed. What was seen when it was planned says nothing of the day on which it
    /// was brought back.
    async fn unwell_before(&self, failed: &Release) -> anyhow::Result<Vec<Unwell>> {
        if !self.build.kind.brings_back() {
            return Ok(failed.unwell.clone());
        }
        let applied: Option<Applied> = self.baton(Stage::Deploy).await?;
        Ok(applied.map_or_else(Vec::new, |applied| applied.unwell))
    }

    async fn known(&self, release: &Release, unwell: Vec<Unwell>) -> anyhow::Result<Known> {
        let store = &self.agent.store;
        let millis = store.usual_rollout(&self.build.environment).await?;
        let usual = millis.and_then(|millis| u64::try_from(millis).ok());
        // Where no workload is well, nothing would prove it.
        let counts = unwell.len() < Target::serving(release).len();
        Ok(Known {
            usual: usual.map(Duration::from_millis),
            unwell: if counts { unwell } else { Vec::new() },
        })
    }
}

/// Those of which the build changed nothing.
fn unchanged(unwell: &[Unwell], touched: &[AppliedObject]) -> Vec<Unwell> {
    let is_unchanged = |unwell: &&Unwell| {
        let mut touched = touched.iter();
        touched.any(|object| {
            object.change == Change::Unchanged && object.display_name() == unwell.object
        })
    };
    unwell.iter().filter(is_unchanged).cloned().collect()
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

fn describe(release: &Release) -> String {
    match crate::builds::short(&release.commit) {
        "" => format!("{} (what stood here before Landfall)", release.id),
        commit => format!(
            "{} (commit {commit}, build #{})",
            release.id, release.build_id
        ),
    }
}
