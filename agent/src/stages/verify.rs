//! Verify: watch the rollout until it is complete or dead, and show what stands in the end.
//!
//! `cluster::observe` looks, `cluster::rollout` judges, this stage waits in between and writes the log. What cannot be
//! seen is waited for and ends as errored; it is never a failure of the release.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::{Applied, RolledOut, Scope, StageError, StageResult};
use crate::builds::Cause;
use crate::cluster::Cluster;
use crate::cluster::observe::{self, BLIND_RETRY, Changes, Observer, Sight, Unseen};
use crate::cluster::rollout::{self, History, Standing, Trouble, Verdict};
use crate::cluster::snapshot::{Kind, Snapshot, Target};
use crate::cluster::tables;
use crate::release::{Change, Release, Unwell};

/// Rules that count seconds are looked at so often, and so often a lost watch is made up for.
const LOOK_EVERY: Duration = Duration::from_millis(750);
/// What a failure shows of the events.
const EVENTS_SHOWN: usize = 8;

/// What the log shows at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// Pods, services, deployments, status and history.
    All,
    /// Only why it failed.
    Cause,
}

/// What is known of an environment from before the apply.
#[derive(Debug, Default)]
pub struct Known {
    /// How long the rollouts of its last good releases took.
    pub usual: Option<Duration>,
    /// What failed already: it is left as it is, where it is still the same, fails in no other way and no further.
    pub unwell: Vec<Unwell>,
}

/// Waits until every workload of the release is rolled out, within pipeline.yaml's `verify: timeout_seconds`.
pub async fn run(
    scope: &Scope<'_>,
    release: &Release,
    applied: &Applied,
    known: &Known,
    shown: Show,
) -> StageResult<RolledOut> {
    let cluster = scope.cluster().await?;
    let mut targets = Target::applied(release, &applied.objects);
    // The deploy has waited for each Job's end, and its own `ttlSecondsAfterFinished` may take it away at any moment.
    targets.retain(|target| target.kind != Kind::Job);
    let limit = Duration::from_secs(release.verify.timeout_seconds);
    if applied.changed_nothing() {
        scope
            .log
            .line("The apply changed nothing; what stands is verified all the same.");
    }
    let mut rollout = Rollout {
        targets: &targets,
        observer: Observer::new(&cluster),
        histories: targets
            .iter()
            .map(|target| History::new(known.usual.filter(|_| !is_new(target, applied))))
            .collect(),
        unwell: known.unwell.clone(),
        left: vec![None; targets.len()],
        complete: vec![false; targets.len()],
        told: vec![String::new(); targets.len()],
        snapshots: Vec::new(),
        last_words: String::new(),
    };
    let judged = tokio::select! {
        biased;
        () = scope.cancel.cancelled() => Err(StageError::Canceled),
        judged = rollout.watch(scope, &cluster, limit) => judged.map_err(|error| error.masked(scope.log)),
    };
    match &judged {
        Ok(()) => {
            for (target, left) in targets.iter().zip(&rollout.left) {
                let name = target.display_name();
                scope.log.line(match left {
                    None => format!("{name} successfully rolled out"),
                    Some(why) => {
                        format!("{name} was not well before either, and is left as it is: {why}")
                    }
                });
            }
            rollout.remark(scope);
            cron_jobs(release).for_each(|line| scope.log.line(line));
            rollout.remark_claims(scope, release).await;
            if shown == Show::All {
                show(scope, &cluster).await;
            }
        }
        Err(StageError::Failed(cause) | StageError::TimedOut(cause)) => {
            scope
                .log
                .line(format!("The rollout failed: {}", cause.sentence));
            if shown == Show::All {
                show(scope, &cluster).await;
            }
            rollout.show_events(scope);
        }
        Err(_) => {}
    }
    judged?;
    let revisions = targets.iter().zip(&rollout.snapshots);
    let revisions =
        revisions.map(|(target, snapshot)| (target.display_name(), rollout::revision(snapshot)));
    let standing = targets.iter().zip(&rollout.snapshots);
    let standing =
        standing.map(|(target, snapshot)| (target.display_name(), Standing::of(target, snapshot)));
    let left = targets.iter().zip(&rollout.left);
    let left = left.filter_map(|(target, left)| left.as_ref().map(|_| target.display_name()));
    Ok(RolledOut {
        release_id: applied.release_id,
        left: left.collect(),
        standing: standing.collect(),
        revisions: revisions.collect(),
    })
}

/// Whether a program that runs later works is not known now.
fn cron_jobs(release: &Release) -> impl Iterator<Item = String> {
    let of_kind = release
        .objects
        .iter()
        .filter(|object| object["kind"] == "CronJob");
    of_kind.map(|object| {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let spec = &object["spec"];
        match spec["suspend"].as_bool() {
            Some(true) => format!("cronjob/{name} is applied, and suspended: it does not run"),
            _ => format!(
                "cronjob/{name} is applied; it runs at {:?}, and what its runs do is not judged here",
                spec["schedule"].as_str().unwrap_or_default()
            ),
        }
    })
}

/// Nobody knows how long a workload takes that earlier releases did not have.
fn is_new(target: &Target, applied: &Applied) -> bool {
    let mut objects = applied.objects.iter();
    let name = target.display_name();
    objects.any(|object| object.display_name() == name && object.change == Change::Created)
}

/// What is wrong with a workload that failed before the apply, has the same template, and fails in no other way and no further.
fn as_before(
    unwell: &[Unwell],
    target: &Target,
    verdict: &Verdict,
    now: impl FnOnce() -> Option<Trouble>,
) -> Option<String> {
    let name = target.display_name();
    let before = unwell.iter().find(|before| {
        before.object == name && target.release.as_deref().unwrap_or_default() == before.template
    })?;
    match verdict {
        Verdict::Complete => return None,
        Verdict::Failed(cause)
            if !before.causes.contains(&cause.id) && cause.id != "progress_deadline" =>
        {
            return None;
        }
        Verdict::Failed(_) | Verdict::NotYet { .. } => {}
    }
    let now = now()?;
    let is_no_worse = now.causes.is_subset(&before.causes) && now.ready >= before.ready;
    is_no_worse.then_some(now.sentence)
}

struct Rollout<'a> {
    targets: &'a [Target],
    observer: Observer<'a>,
    histories: Vec<History>,
    /// Less what came to be well: if it fails again, that is another matter.
    unwell: Vec<Unwell>,
    /// What is wrong with each that failed before the apply already, and still does.
    left: Vec<Option<String>>,
    /// Which were complete when they were judged last.
    complete: Vec<bool>,
    /// The last progress line of each workload.
    told: Vec<String>,
    /// The newest of each workload.
    snapshots: Vec<Snapshot>,
    /// What was told last of a dying container: its brothers mostly say the same.
    last_words: String,
}

impl Rollout<'_> {
    async fn watch(
        &mut self,
        scope: &Scope<'_>,
        cluster: &Cluster,
        limit: Duration,
    ) -> StageResult<()> {
        let mut deadline = Instant::now() + limit;
        let mut sight = Sight::new(Duration::from_secs(
            scope.environment.limits.unreachable_seconds,
        ));
        let mut changes = None;
        loop {
            match self.look().await {
                Ok(gone) => {
                    if let Some(away) = sight.seen() {
                        scope.log.line(format!(
                            "The cluster is in sight again after {} s.",
                            away.as_secs()
                        ));
                        // Time in which nothing could be seen is not the release's.
                        deadline += away;
                    }
                    gone.map_or(Ok(()), |cause| Err(StageError::Failed(cause)))?;
                }
                Err(unseen) => {
                    let line = format!("The cluster cannot be seen, waiting: {:#}", unseen.error);
                    if sight.unseen(unseen)? {
                        scope.log.line(line);
                    }
                    tokio::time::sleep(BLIND_RETRY).await;
                    continue;
                }
            }
            self.tell_last_words(scope);
            if self.judge(scope)? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return self.out_of_time(scope, limit);
            }
            let changes =
                changes.get_or_insert_with(|| Changes::of(cluster, self.snapshots.iter()));
            changes.next(LOOK_EVERY).await;
        }
    }

    /// Reads every workload anew; answers with a cause where one is gone.
    async fn look(&mut self) -> Result<Option<Cause>, Unseen> {
        let mut snapshots = Vec::with_capacity(self.targets.len());
        for target in self.targets {
            let Some(snapshot) = self.observer.snapshot(target).await? else {
                let name = target.display_name();
                let cause = Cause::new(
                    "changed_by_another",
                    format!("{name} was deleted by another while it rolled out"),
                );
                return Ok(Some(cause.object(name)));
            };
            snapshots.push(snapshot);
        }
        let leaving: Vec<bool> = snapshots
            .iter()
            .map(Snapshot::anything_terminating)
            .collect();
        for (index, snapshot) in snapshots.iter_mut().enumerate() {
            let mut others = leaving
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index);
            snapshot.others_are_leaving = others.any(|(_, is_leaving)| *is_leaving);
        }
        self.snapshots = snapshots;
        Ok(None)
    }

    /// True where all are complete.
    fn judge(&mut self, scope: &Scope<'_>) -> StageResult<bool> {
        let autoscale = scope.environment.nodes_autoscale;
        let parts = self
            .targets
            .iter()
            .zip(&self.snapshots)
            .zip(self.histories.iter_mut().zip(&mut self.told))
            .zip(self.complete.iter_mut().zip(&mut self.left));
        for (((target, snapshot), (history, told)), (is_complete, left)) in parts {
            let verdict = rollout::judge(target, snapshot, autoscale, history);
            let name = target.display_name();
            if verdict == Verdict::Complete {
                self.unwell.retain(|before| before.object != name);
            }
            *left = as_before(&self.unwell, target, &verdict, || {
                rollout::trouble(target, snapshot, Duration::ZERO)
            });
            *is_complete = left.is_some() || verdict == Verdict::Complete;
            let line = match (verdict, &left) {
                (_, Some(why)) => format!("{name}: not well, as before: {why}"),
                (Verdict::Complete, None) => format!("{name}: complete"),
                (Verdict::Failed(cause), None) => return Err(StageError::Failed(cause)),
                (Verdict::NotYet { progress }, None) => progress,
            };
            if *told != line {
                scope.log.line(&line);
                *told = line;
            }
        }
        Ok(self.complete.iter().all(|is_complete| *is_complete))
    }

    fn out_of_time(&mut self, scope: &Scope<'_>, limit: Duration) -> StageResult<()> {
        let parts = self
            .targets
            .iter()
            .zip(&self.snapshots)
            .zip(self.histories.iter_mut().zip(&self.told))
            .zip(&self.complete);
        let late = parts.filter(|(_, is_complete)| !**is_complete);
        let mut young = 0;
        let mut told_late = None;
        for (((target, snapshot), (history, told)), _) in late {
            if rollout::is_only_young(target, snapshot, history) {
                young += 1;
            } else if let Some(cause) = rollout::at_deadline(target, snapshot, limit, history) {
                return Err(StageError::Failed(cause));
            } else {
                told_late.get_or_insert(told);
            }
        }
        if told_late.is_none() && young > 0 {
            scope.log.line("All are ready, and what died once has lived well since: not waited for any longer.");
            return Ok(());
        }
        let slow = told_late.cloned().unwrap_or_default();
        let cause = Cause::new(
            "time_out",
            format!("the rollout took longer than {} s: {slow}", limit.as_secs()),
        )
        .hint("give it more time with `verify: timeout_seconds`");
        Err(StageError::TimedOut(cause))
    }

    fn tell_last_words(&mut self, scope: &Scope<'_>) {
        for (who, words) in self.observer.take_new_words() {
            if self.last_words == words {
                scope
                    .log
                    .line(format!("The last words of {who} were the same."));
                continue;
            }
            scope.log.line(format!("Last words of {who}:"));
            words
                .lines()
                .for_each(|line| scope.log.line(format!("  | {line}")));
            self.last_words = words;
        }
    }

    fn remark(&self, scope: &Scope<'_>) {
        for (target, snapshot) in self.targets.iter().zip(&self.snapshots) {
            for remark in rollout::remarks(target, snapshot) {
                scope.log.line(remark);
            }
        }
    }

    /// A claim that a pod waits for fails the rollout; one that none uses only fails whoever comes to use it.
    async fn remark_claims(&mut self, scope: &Scope<'_>, release: &Release) {
        let claims = release
            .objects
            .iter()
            .filter(|object| object["kind"] == "PersistentVolumeClaim");
        let names: Vec<&str> = claims
            .filter_map(|claim| claim["metadata"]["name"].as_str())
            .collect();
        // Not seen is nothing to remark.
        let unbound = self.observer.unbound_claims(&names).await;
        for (name, said) in unbound.unwrap_or_default() {
            let said = match said.as_str() {
                "" => said,
                said => format!(": {said}"),
            };
            scope.log.line(format!(
                "persistentvolumeclaim/{name} is not bound, and no pod of this release waits for it{said}"
            ));
        }
    }

    fn show_events(&self, scope: &Scope<'_>) {
        for snapshot in &self.snapshots {
            let mut own = vec![snapshot.workload.uid()];
            own.extend(
                snapshot
                    .new_replica_set()
                    .and_then(|set| set.metadata.uid.as_deref()),
            );
            own.extend(
                snapshot
                    .new_pods()
                    .into_iter()
                    .map(crate::cluster::snapshot::uid),
            );
            let events: Vec<_> = own
                .into_iter()
                .flat_map(|uid| snapshot.events_of(uid))
                .collect();
            let lines = tables::event_lines(&events, Timestamp::now(), EVENTS_SHOWN);
            if !lines.is_empty() {
                scope.log.line("\nEvents");
            }
            lines.iter().for_each(|line| scope.log.line(line));
        }
    }
}

/// What stands now; a cluster that cannot be seen just then is no reason to fail.
async fn show(scope: &Scope<'_>, cluster: &Cluster) {
    match observe::listing(cluster).await {
        Ok(listing) => tables::lines(&listing, Timestamp::now())
            .iter()
            .for_each(|line| scope.log.line(line)),
        Err(unseen) => scope
            .log
            .line(format!("What stands cannot be shown: {:#}", unseen.error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_the_same_and_fails_in_no_other_way_is_left_as_it_was() {
        let target = Target {
            release: Some("aaaa".to_owned()),
            ..Target::named(Kind::Deployment, "worker")
        };
        let causes = |ids: &[&str]| ids.iter().map(|&id| id.to_owned()).collect();
        let trouble = |ids: &[&str], ready| Trouble {
            causes: causes(ids),
            sentence: "it fails".to_owned(),
            ready,
        };
        let before = Unwell {
            object: "deployment/worker".to_owned(),
            template: "aaaa".to_owned(),
            causes: causes(&["crash_loop"]),
            ready: 1,
        };
        let failed = |id: &str| Verdict::Failed(Cause::new(id, "it fails"));
        let waiting = Verdict::NotYet {
            progress: String::new(),
        };
        let same = trouble(&["crash_loop"], 1);
        for (verdict, now, is_left) in [
            (failed("crash_loop"), Some(same.clone()), true),
            (waiting.clone(), Some(same.clone()), true),
            (waiting.clone(), Some(trouble(&["crash_loop"], 2)), true),
            (failed("progress_deadline"), Some(same.clone()), true),
            (Verdict::Complete, Some(same.clone()), false),
            (failed("oom_killed"), Some(same.clone()), false),
            (waiting.clone(), None, false),
            (waiting.clone(), Some(trouble(&["crash_loop"], 0)), false),
            (
                waiting.clone(),
                Some(trouble(&["crash_loop", "probe_refused"], 1)),
                false,
            ),
            (
                failed("progress_deadline"),
                Some(trouble(&["oom_killed"], 1)),
                false,
            ),
        ] {
            let left = as_before(std::slice::from_ref(&before), &target, &verdict, || {
                now.clone()
            });
            assert_eq!(left.is_some(), is_left, "{verdict:?} {now:?}");
        }
        let another = Target {
            release: Some("bbbb".to_owned()),
            ..target.clone()
        };
        let left = as_before(&[before], &another, &waiting, || Some(same.clone()));
        assert_eq!(left, None);
        assert_eq!(as_before(&[], &target, &waiting, || Some(same)), None);
    }

    /// A build runs as a task; a closure that borrows for any lifetime would forbid it, and say so far from here.
    #[test]
    fn the_stage_can_run_as_a_task() {
        fn run_as_task<'a>(
            scope: &'a Scope<'a>,
            release: &'a Release,
            applied: &'a Applied,
            known: &'a Known,
        ) -> impl Send + 'a {
            run(scope, release, applied, known, Show::All)
        }
        let _ = run_as_task;
    }
}
