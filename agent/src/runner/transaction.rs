//! The release transaction: from the plan on, a release ends proved live, or what served before is back and proved too.
//!
//! The line forward: plan → its row → apply → verify → smoke test → live → prune. The line back is in `rollback`.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::Context;

use super::Line;
use crate::builds::Stage;
use crate::cluster::availability::{self, Availability};
use crate::cluster::lease::{Held, LeaseTaken};
use crate::cluster::snapshot::Target;
use crate::release::{AppliedObject, Change, Release, Unwell};
use crate::stages::deploy::{self, Applying, KnownJobs, Way};
use crate::stages::plan::{self, Ground, Plan};
use crate::stages::verify::{Known, Show};
use crate::stages::{
    Applied, Built, CheckedOut, Live, RolledOut, Scope, StageError, StageResult, listening,
    removal, smoke_test, soak, verify,
};

/// Of what serves, before something is brought back.
const LOOK_LIMIT: Duration = Duration::from_secs(15);
const SOAK_ASKED_EVERY: Duration = Duration::from_secs(1);
/// How often the environment is claimed for one piece of work: each agent that wakes can disturb it once.
const HOLDS_MAX: u32 = 3;

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
            let _ = self.heard.set(listening::heard(&scope, &release).await);
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
        let earlier: Option<Applied> = self.kept_baton(Stage::Deploy).await?;
        let work = async {
            let unwell = match (way.is_back(), earlier) {
                (false, _) => Vec::new(),
                (true, Some(earlier)) => earlier.unwell,
                (true, None) => self.unwell_now(&scope).await,
            };
            if way.is_back() {
                self.keep_unwell(release, &unwell).await?;
            }
            let applied = self.apply(&scope, release, way).await?;
            Ok(Applied { unwell, ..applied })
        };
        self.journaled(Stage::Deploy, &scope, work).await
    }

    /// For an attempt after this one, which could not tell it from what this one has changed.
    async fn keep_unwell(&self, release: &Release, unwell: &[Unwell]) -> anyhow::Result<()> {
        let begun = Applied {
            release_id: release.id,
            objects: Vec::new(),
            unwell: unwell.to_vec(),
            refused: Vec::new(),
        };
        let begun = serde_json::to_string(&begun).context("cannot store a baton")?;
        let store = &self.agent.store;
        store.keep_baton(self.build, Stage::Deploy, &begun).await
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
        let unwell = unchanged(&self.unwell_before(release).await?, &touched);
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
                // Nothing is known of before an attempt that died.
                let nobody = BTreeSet::new();
                let heard = self.heard.get().unwrap_or(&nobody);
                listening::run(&scope, release, &touched, heard).await?;
            }
            soak::run(&scope, release, rolled_out, self.soaked_enough()).await?;
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
        let serving = self.serving().await?;
        let is_at_rest = match &serving {
            Some(_) => store.is_at_rest(environment).await?,
            None => store.is_as_found(environment).await?,
        };
        let ground = Ground {
            serving,
            is_at_rest,
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

    pub(super) fn availability(&self) -> Option<Availability> {
        Some(self.availability.get()?.as_ref()?.so_far())
    }

    /// Works under the environment's next fence. An agent that lost the environment while it slept may have claimed the Lease
    /// too, before the store told it so: whoever has the store's word claims it anew, and does the same again.
    pub(super) async fn holding<T>(
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

    pub(super) async fn apply_held(
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
            unwell: Vec::new(),
            refused: applying.refused,
        })
    }

    async fn prune(&self, scope: &Scope<'_>, release: &Release) -> anyhow::Result<()> {
        let surplus = if self.build.kind.brings_back() {
            // Whatever other releases have made beside it.
            let created = self.agent.store.created(&self.build.environment).await?;
            let created: Vec<AppliedObject> =
                created.into_iter().map(|(_, object)| object).collect();
            removal::capped(
                scope,
                removal::prunable(scope, &created, &release.objects),
                &created,
            )
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

/// What the store knows.
impl Line<'_> {
    async fn planned_id(&self) -> anyhow::Result<Option<i64>> {
        let build = self.agent.store.build(self.build.id).await?;
        Ok(build.and_then(|build| build.release_id))
    }

    pub(super) async fn stage_begun(&self, stage: Stage) -> anyhow::Result<bool> {
        let stages = self.agent.store.stages(self.build.id).await?;
        Ok(stages.iter().any(|row| row.stage == stage))
    }

    /// The release that serves by our own word.
    pub(super) async fn serving(&self) -> anyhow::Result<Option<Release>> {
        match self.agent.store.deployed(&self.build.environment).await?.1 {
            Some(id) => self.stored_release(id).await.map(Some),
            None => Ok(None),
        }
    }

    /// What was not well before this build's release was applied. What was seen when a release was planned says nothing of the
    /// day on which it is brought back.
    pub(super) async fn unwell_before(&self, release: &Release) -> anyhow::Result<Vec<Unwell>> {
        if !self.build.kind.brings_back() {
            return Ok(release.unwell.clone());
        }
        let applied: Option<Applied> = self.kept_baton(Stage::Deploy).await?;
        Ok(applied.map_or_else(Vec::new, |applied| applied.unwell))
    }

    pub(super) async fn known(
        &self,
        release: &Release,
        unwell: Vec<Unwell>,
    ) -> anyhow::Result<Known> {
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

pub(super) fn describe(release: &Release) -> String {
    match crate::builds::short(&release.commit) {
        "" => format!("{} (what stood here before Landfall)", release.id),
        commit => format!(
            "{} (commit {commit}, build #{})",
            release.id, release.build_id
        ),
    }
}
