//! Is it done, may it still come to be, or is it dead: the judgement of a rollout.
//!
//! Pure: a snapshot and what was seen before it in, a verdict out. The rules are kubectl's counts, and what kubectl does
//! not look at: whose template it is, and what died since the apply. A slow start is never a failure before its time.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use super::diagnose;
use super::probes::recent_probe_failure;
use super::sign::{Patience, Sign};
use super::snapshot::{
    Running, Snapshot, Target, Workload, created, has_ended, is_ready, is_terminating, name,
    template_release, uid, whole_condition,
};
use super::words;
use crate::builds::Cause;

/// A container that died once and runs again must run for so long before the rollout counts as complete.
const CALM_MIN: Duration = Duration::from_secs(20);
/// Without a readiness probe a program is ready the moment it starts, also one that is about to die: it must live so long.
const UNPROBED_MIN: Duration = Duration::from_secs(5);
/// Where good releases came up, one that runs and is not ready for so long, and for so many times as long as theirs, is dead.
const UNREADY_MIN: Duration = Duration::from_secs(25);
const UNREADY_TIMES: u32 = 3;
/// Within this the kubelet tries a container again that it could not make.
const TRIED_AGAIN: Duration = Duration::from_secs(20);
/// A sign that was not seen for so long is a new one when it comes again (pulling is tried in turns).
const SIGN_GONE: Duration = Duration::from_secs(15);
/// Clocks of two API servers, and seconds cut off.
const CLOCK_SLACK: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Complete,
    Failed(Cause),
    /// One line for people: how far it is.
    NotYet {
        progress: String,
    },
}

/// What one watch of one workload remembers between its snapshots.
#[derive(Debug, Default)]
pub struct History {
    /// How long the rollouts of the last good releases took, or the pods that still serve, whichever took longer.
    usual: Option<Duration>,
    begun: bool,
    /// Deaths that were there already when the watch began, by pod and container.
    deaths_before: HashMap<(String, String), i32>,
    deaths: HashMap<(String, String), (i32, Timestamp)>,
    /// Since when each container has been seen to run.
    running: HashMap<(String, String), Timestamp>,
    signs: HashMap<(String, String), (Timestamp, Timestamp)>,
    moved: Option<(String, Timestamp)>,
}

/// Judges one snapshot; call it with every snapshot, in the order in which they were taken.
pub fn judge(
    target: &Target,
    snapshot: &Snapshot,
    nodes_autoscale: bool,
    history: &mut History,
) -> Verdict {
    let signs = history.take_in(target, snapshot, nodes_autoscale);
    if target
        .uid
        .as_deref()
        .is_some_and(|uid| uid != snapshot.workload.uid())
    {
        let sentence = format!(
            "{} was deleted and made anew by another while it rolled out",
            target.display_name()
        );
        return Verdict::Failed(
            Cause::new("changed_by_another", sentence).object(target.display_name()),
        );
    }
    if let Some(cause) = job_failed(target, snapshot) {
        return Verdict::Failed(cause);
    }
    let counted = counted(target, snapshot);
    let ripe = signs.iter().find(|sign| {
        // Where all counts are right, only what dies or was taken from us speaks against it.
        let counts = counted.is_err()
            || matches!(sign.cause.id.as_str(), "changed_by_another")
            || is_death(sign);
        counts && history.is_ripe(sign, target, snapshot)
    });
    if let Some(sign) = ripe {
        let told = if sign.cause.id == "progress_deadline" {
            signs.first().unwrap_or(sign)
        } else {
            sign
        };
        return Verdict::Failed(with_count(told, &signs, snapshot));
    }
    match counted.and_then(|()| history.is_calm(target, snapshot, calm_needed)) {
        Ok(()) => Verdict::Complete,
        Err(mut progress) => {
            if let Some(sign) = signs.first() {
                progress = format!("{progress}; {}", sign.cause.sentence);
            }
            Verdict::NotYet {
                progress: format!("{}: {progress}", target.display_name()),
            }
        }
    }
}

/// Whether all that is missing is a longer life after one death, which is tolerated: counts and probes are right, no container
/// has died twice, and what died has lived for as long as is asked of those that no liveness probe looks after.
pub fn is_only_young(target: &Target, snapshot: &Snapshot, history: &History) -> bool {
    let pods = snapshot.new_pods();
    let mut containers = pods.into_iter().flat_map(Running::all);
    counted(target, snapshot).is_ok()
        && containers.all(|it| history.deaths_of(&it) <= 1)
        && history.is_calm(target, snapshot, |_| CALM_MIN).is_ok()
}

/// What is wrong with a workload that stands as it was applied, whoever brought it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// `Cause::id` of all of it.
    pub causes: BTreeSet<String>,
    /// The most telling.
    pub sentence: String,
    /// Pods that are ready all the same.
    pub ready: usize,
}

/// What keeps pods of a workload from being ready that have not been so for `least`; with no such time also what keeps it from
/// having pods. None where it has all it wants, where older pods still serve, and where another has changed its template.
pub fn trouble(target: &Target, snapshot: &Snapshot, least: Duration) -> Option<Trouble> {
    counted(target, snapshot).err()?;
    let template = snapshot.workload.template().and_then(template_release);
    let (older, _) = snapshot.old_pods();
    if !is_taken_up(target, snapshot)
        || template != target.release.as_deref()
        || older.into_iter().any(is_ready)
    {
        return None;
    }
    // What has begun again after a death may fail for another reason now.
    let deaths = |container: &Running<'_>| match container.is_running() {
        true => 0,
        false => container.deaths(),
    };
    let signs = diagnose::signs(target, snapshot, false, &deaths);
    if signs
        .iter()
        .any(|sign| sign.cause.id == "changed_by_another")
    {
        return None;
    }
    let pods = snapshot.new_pods();
    let counts = |sign: &&Sign| match pods.iter().find(|pod| sign.of.starts_with(uid(pod))) {
        Some(pod) => unready_for(pod, snapshot.now).is_some_and(|time| time >= least),
        // After ten minutes it stands beside any other.
        None => least.is_zero() && sign.cause.id != "progress_deadline",
    };
    let signs: Vec<&Sign> = signs.iter().filter(counts).collect();
    Some(Trouble {
        sentence: signs.first()?.cause.sentence.clone(),
        causes: signs.iter().map(|sign| sign.cause.id.clone()).collect(),
        ready: pods.iter().filter(|pod| is_ready(pod)).count(),
    })
}

/// None where it is ready.
fn unready_for(pod: &Pod, now: Timestamp) -> Option<Duration> {
    if is_ready(pod) {
        return None;
    }
    let changed = whole_condition(pod, "Ready").and_then(|it| it.last_transition_time.as_ref());
    let at = changed.map(|time| time.0);
    Some(since(at.or_else(|| created(&pod.metadata))?, now))
}

/// The cause of a pod's sign, with how many of the new pods show the same: `… (2 of 3 new pods)`.
fn with_count(sign: &Sign, signs: &[Sign], snapshot: &Snapshot) -> Cause {
    let mut cause = sign.cause.clone();
    let pods = snapshot.new_pods();
    let is_of = |sign: &Sign, pod: &Pod| sign.of.starts_with(uid(pod));
    if pods.len() > 1 && pods.iter().any(|pod| is_of(sign, pod)) {
        let is_same = |other: &&Sign| other.cause.id == sign.cause.id;
        let shows = |pod: &&&Pod| signs.iter().filter(is_same).any(|other| is_of(other, pod));
        let showing = pods.iter().filter(shows).count();
        cause.sentence = format!("{} ({showing} of {} new pods)", cause.sentence, pods.len());
    }
    cause
}

/// What of a workload only another changes, once it is rolled out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    uid: String,
    release: Option<String>,
    images: Vec<(String, Option<String>)>,
}

impl Standing {
    pub fn of(target: &Target, snapshot: &Snapshot) -> Self {
        let template = snapshot.workload.template();
        let spec = template.and_then(|template| template.spec.as_ref());
        let containers = spec.into_iter().flat_map(|spec| {
            let init = spec.init_containers.iter().flatten();
            init.chain(&spec.containers)
        });
        // Others are none of ours: a controller may add its own at any time.
        let is_ours = |name: &str| target.images.iter().any(|(known, _)| known == name);
        Self {
            uid: snapshot.workload.uid().to_owned(),
            release: template.and_then(template_release).map(str::to_owned),
            images: containers
                .filter(|container| is_ours(&container.name))
                .map(|container| (container.name.clone(), container.image.clone()))
                .collect(),
        }
    }
}

/// A workload that was rolled out is gone, or became another's: what answers from then on is not this release. `proved` is how it
/// stood then, where that is known.
pub fn taken_over(
    target: &Target,
    proved: Option<&Standing>,
    now: Option<&Snapshot>,
) -> Option<Cause> {
    let name = target.display_name();
    let told = |what: &str| {
        let sentence = format!("{name} was {what} by another after it was rolled out");
        Some(Cause::new("changed_by_another", sentence).object(&name))
    };
    let Some(now) = now else {
        return told("deleted");
    };
    let standing = Standing::of(target, now);
    match proved {
        Some(proved) if proved.uid != standing.uid => told("deleted and made anew"),
        Some(proved) if *proved != standing => told("changed"),
        None if target.release.is_some() && standing.release != target.release => told("changed"),
        _ => None,
    }
}

/// The most telling reason why it is not complete when time has run out; None where nothing is wrong but slow.
pub fn at_deadline(
    target: &Target,
    snapshot: &Snapshot,
    limit: Duration,
    history: &mut History,
) -> Option<Cause> {
    let signs = history.take_in(target, snapshot, false);
    let mut cause = with_count(signs.first()?, &signs, snapshot);
    cause.sentence = format!("{} (after {} s)", cause.sentence, limit.as_secs());
    Some(cause)
}

fn is_death(sign: &Sign) -> bool {
    matches!(
        sign.cause.id.as_str(),
        "crash_loop"
            | "hook_failed"
            | "init_failed"
            | "oom_killed"
            | "cannot_start"
            | "wrong_architecture"
    ) || (sign.cause.id == "liveness_failed" && sign.patience == Patience::None)
}

impl History {
    pub fn new(usual: Option<Duration>) -> Self {
        Self {
            usual,
            ..Self::default()
        }
    }

    /// Takes note of a snapshot and returns its signs.
    fn take_in(
        &mut self,
        target: &Target,
        snapshot: &Snapshot,
        nodes_autoscale: bool,
    ) -> Vec<Sign> {
        let containers: Vec<Running<'_>> = snapshot
            .own_pods()
            .into_iter()
            .flat_map(Running::all)
            .collect();
        if !self.begun {
            self.begun = true;
            // Of several workloads one may always have been slower than their releases, which were mostly another's.
            self.usual = self.usual.max(usual_of(snapshot));
            self.deaths_before = containers
                .iter()
                .filter(|container| !is_since(target, snapshot, container))
                .map(|container| (container.key(), container.deaths()))
                .collect();
        }
        for container in &containers {
            if container.is_running() {
                self.running.entry(container.key()).or_insert(snapshot.now);
            } else {
                self.running.remove(&container.key());
            }
            let deaths = self.deaths_of(container);
            let seen = self
                .deaths
                .entry(container.key())
                .or_insert((deaths, snapshot.now));
            if seen.0 != deaths {
                *seen = (deaths, snapshot.now);
            }
        }
        let fingerprint = fingerprint(snapshot);
        if self
            .moved
            .as_ref()
            .is_none_or(|(before, _)| *before != fingerprint)
        {
            self.moved = Some((fingerprint, snapshot.now));
        }
        let signs = diagnose::signs(target, snapshot, nodes_autoscale, &|container| {
            self.deaths_of(container)
        });
        for sign in &signs {
            let seen = self
                .signs
                .entry(key(sign))
                .or_insert((snapshot.now, snapshot.now));
            if since(seen.1, snapshot.now) > SIGN_GONE {
                seen.0 = snapshot.now;
            }
            seen.1 = snapshot.now;
        }
        signs
    }

    /// Deaths since our apply; where it wrote nothing, since the watch began.
    fn deaths_of(&self, container: &Running<'_>) -> i32 {
        let before = self
            .deaths_before
            .get(&container.key())
            .copied()
            .unwrap_or_default();
        (container.deaths() - before).max(0)
    }

    fn is_ripe(&self, sign: &Sign, target: &Target, snapshot: &Snapshot) -> bool {
        let seen = self
            .signs
            .get(&key(sign))
            .map_or(Duration::ZERO, |(first, _)| since(*first, snapshot.now));
        match sign.patience {
            Patience::None => true,
            Patience::Seen(patience) if is_of_an_older_pod(sign, target, snapshot) => {
                seen >= patience.max(TRIED_AGAIN)
            }
            Patience::Seen(patience) => seen >= patience,
            Patience::Quiet(patience) | Patience::QuietOverRetries(patience) => {
                let still = self
                    .moved
                    .as_ref()
                    .map_or(Duration::ZERO, |(_, at)| since(*at, snapshot.now));
                let tried_for = seen.saturating_sub(still);
                let next_try = match sign.patience {
                    Patience::QuietOverRetries(_) => tried_for + tried_for / 2,
                    _ => tried_for,
                };
                let tried_again = still >= next_try;
                let may_get_room = snapshot.anything_terminating() || snapshot.others_are_leaving;
                let has_lasted = seen >= patience && still >= patience;
                has_lasted && tried_again && !may_get_room
            }
            Patience::Unlike(allowed) => self.usual.is_some_and(|usual| {
                let patience = UNREADY_MIN.max(usual.saturating_mul(UNREADY_TIMES));
                seen >= patience.saturating_add(allowed)
            }),
            Patience::UntilDeadline => false,
        }
    }

    /// Nothing died lately. A program that is killed for memory or by its liveness probe looks complete in between.
    fn is_calm(
        &self,
        target: &Target,
        snapshot: &Snapshot,
        needed: impl Fn(&Running<'_>) -> Duration,
    ) -> Result<(), String> {
        if matches!(snapshot.workload, Workload::Job(_)) {
            return Ok(());
        }
        for pod in snapshot
            .new_pods()
            .into_iter()
            .filter(|pod| !has_ended(pod))
        {
            for container in Running::all(pod) {
                let Some((deaths, at)) = self
                    .deaths
                    .get(&container.key())
                    .filter(|(deaths, _)| *deaths > 0)
                else {
                    continue;
                };
                let calm = needed(&container);
                if !container.is_init && since(*at, snapshot.now) < calm {
                    let seconds = calm.as_secs();
                    return Err(format!(
                        "ready, but {} was restarted ({deaths}): it must run {seconds} s without another",
                        container.display_name()
                    ));
                }
            }
            if target.changed
                && Running::all(pod)
                    .iter()
                    .any(|it| self.has_just_begun(it, snapshot))
            {
                return Err(format!(
                    "pod {} has just begun, and no readiness probe says that it is well",
                    name(pod)
                ));
            }
            // With nothing changed, the probes of last week do not hold it up.
            if target.changed && recent_probe_failure(pod, snapshot, "Liveness").is_some() {
                return Err(format!(
                    "ready, but the liveness probe of pod {} has just failed",
                    name(pod)
                ));
            }
        }
        Ok(())
    }
}

impl History {
    fn has_just_begun(&self, container: &Running<'_>, snapshot: &Snapshot) -> bool {
        let is_probed = container
            .spec
            .is_none_or(|spec| spec.readiness_probe.is_some() || spec.startup_probe.is_some());
        if is_probed || container.is_init {
            return false;
        }
        let seen = self.running.get(&container.key()).copied();
        let began = seen.into_iter().chain(container.running_since()).min();
        began.is_none_or(|began| since(began, snapshot.now) < UNPROBED_MIN)
    }
}

/// How long the pods that still serve took to be ready, the quickest of them: others may have lost their readiness since.
fn usual_of(snapshot: &Snapshot) -> Option<Duration> {
    let (serving, _) = snapshot.old_pods();
    let took = serving.into_iter().filter_map(|pod| {
        let ready = whole_condition(pod, "Ready").filter(|it| it.status == "True")?;
        Some(since(
            pod.status.as_ref()?.start_time.as_ref()?.0,
            ready.last_transition_time.as_ref()?.0,
        ))
    });
    took.min()
}

const CALM_SECONDS_MAX: i64 = 3600;

/// Long enough for the container's own liveness probe to end it again.
fn calm_needed(container: &Running<'_>) -> Duration {
    let probe = container.spec.and_then(|spec| spec.liveness_probe.as_ref());
    let seconds = probe.map_or(0, |probe| {
        let period = i64::from(probe.period_seconds.unwrap_or(10));
        let rounds = i64::from(probe.failure_threshold.unwrap_or(3)) + 1;
        // Both come from the repository and may be as large as the API server allows.
        (i64::from(probe.initial_delay_seconds.unwrap_or(0)) + period * rounds)
            .min(CALM_SECONDS_MAX)
    });
    CALM_MIN.max(Duration::from_secs(
        u64::try_from(seconds).unwrap_or_default(),
    ))
}

/// Whether every program of the new pods has run for long enough to be believed.
pub fn runs_calmly(snapshot: &Snapshot) -> bool {
    let pods = snapshot.new_pods().into_iter();
    let programs = pods
        .flat_map(Running::all)
        .filter(|container| !container.is_init);
    programs.into_iter().all(|container| {
        let runs = container.running_since();
        runs.is_some_and(|at| since(at, snapshot.now) >= calm_needed(&container))
    })
}

/// What it says may be over: somebody has mended what was missing, and the kubelet has not tried again.
fn is_of_an_older_pod(sign: &Sign, target: &Target, snapshot: &Snapshot) -> bool {
    let own_pods = snapshot.own_pods();
    let of = own_pods.iter().filter(|pod| sign.of.starts_with(uid(pod)));
    let mut containers = of.copied().flat_map(Running::all);
    containers.any(|container| !is_since(target, snapshot, &container))
}

/// Born after our apply: all its deaths are this release's.
fn is_since(target: &Target, snapshot: &Snapshot, container: &Running<'_>) -> bool {
    let (Some(applied), Some(born)) = (snapshot.applied_at(), created(&container.pod.metadata))
    else {
        return target.changed;
    };
    target.changed && born + CLOCK_SLACK >= applied
}

fn since(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

fn key(sign: &Sign) -> (String, String) {
    (sign.of.clone(), sign.cause.id.clone())
}

/// All that changes when something of the workload moves.
fn fingerprint(snapshot: &Snapshot) -> String {
    let mut pods: Vec<String> = snapshot
        .pods
        .iter()
        .map(|pod| {
            let containers: Vec<String> = Running::all(pod)
                .iter()
                .map(|it| {
                    format!(
                        "{} {} {} {:?}",
                        it.status.name,
                        it.status.ready,
                        it.deaths(),
                        it.waiting().map(|it| it.0)
                    )
                })
                .collect();
            let node = pod
                .spec
                .as_ref()
                .and_then(|spec| spec.node_name.as_deref())
                .unwrap_or_default();
            format!("{} {} {node} {containers:?}", uid(pod), is_terminating(pod))
        })
        .collect();
    pods.sort_unstable();
    format!("{} {pods:?}", snapshot.workload.generation())
}

/// Whether its controller has seen our apply.
fn is_taken_up(target: &Target, snapshot: &Snapshot) -> bool {
    let observed = match &snapshot.workload {
        Workload::Deployment(it) => it
            .status
            .as_ref()
            .and_then(|status| status.observed_generation),
        Workload::StatefulSet(it) => it
            .status
            .as_ref()
            .and_then(|status| status.observed_generation),
        Workload::DaemonSet(it) => it
            .status
            .as_ref()
            .and_then(|status| status.observed_generation),
        Workload::Job(_) => Some(i64::MAX),
    };
    observed.unwrap_or_default() >= snapshot.workload.generation().max(target.generation)
}

/// kubectl's rules, against the live number of replicas; `Err` says how far it is.
fn counted(target: &Target, snapshot: &Snapshot) -> Result<(), String> {
    if !is_taken_up(target, snapshot) {
        return Err("the cluster has not taken up the change yet".to_owned());
    }
    match &snapshot.workload {
        Workload::Deployment(_) => deployment_counted(target, snapshot),
        Workload::StatefulSet(_) => stateful_set_counted(snapshot),
        Workload::DaemonSet(_) => daemon_set_counted(snapshot),
        Workload::Job(_) => job_counted(snapshot),
    }
}

fn deployment_counted(target: &Target, snapshot: &Snapshot) -> Result<(), String> {
    let (Some(spec), Some(status)) = (
        snapshot.deployment().and_then(|it| it.spec.as_ref()),
        snapshot.deployment().and_then(|it| it.status.as_ref()),
    ) else {
        return Err("the cluster has not taken up the change yet".to_owned());
    };
    let wanted = spec.replicas.unwrap_or(1);
    let live_release = template_release(&spec.template);
    if target.release.is_some() && live_release != target.release.as_deref() {
        return Err("its pod template is not the one of this release".to_owned());
    }
    if wanted == 0 && status.replicas.unwrap_or_default() == 0 {
        return Ok(());
    }
    let Some(set) = snapshot.new_replica_set() else {
        return Err("its new ReplicaSet is not made yet".to_owned());
    };
    let of_set = set.status.as_ref();
    let available = of_set
        .and_then(|status| status.available_replicas)
        .unwrap_or_default();
    let updated = status.updated_replicas.unwrap_or_default();
    let new = snapshot.new_pods();
    let ready = i32::try_from(new.iter().filter(|pod| is_ready(pod)).count()).unwrap_or(i32::MAX);
    let done = updated >= wanted
        && status.replicas.unwrap_or_default() <= updated
        && status.available_replicas.unwrap_or_default() >= updated
        && available >= wanted
        && ready >= wanted;
    if done {
        Ok(())
    } else {
        Err(pods_progress(snapshot, ready, wanted))
    }
}

/// `2 of 3 new pods ready, 1 old pod terminating`.
fn pods_progress(snapshot: &Snapshot, ready: i32, wanted: i32) -> String {
    let plural = |count: usize| if count == 1 { "pod" } else { "pods" };
    let (old, leaving) = snapshot.old_pods();
    let by = if snapshot.autoscaled {
        " (its autoscaler's number)"
    } else {
        ""
    };
    let mut progress = format!("{ready} of {wanted} new pods ready{by}");
    if !old.is_empty() {
        progress = format!(
            "{progress}, {} old {} serving",
            old.len(),
            plural(old.len())
        );
    }
    if !leaving.is_empty() {
        progress = format!(
            "{progress}, {} old {} terminating",
            leaving.len(),
            plural(leaving.len())
        );
    }
    progress
}

fn stateful_set_counted(snapshot: &Snapshot) -> Result<(), String> {
    let Workload::StatefulSet(set) = &snapshot.workload else {
        return Ok(());
    };
    let (Some(spec), Some(status)) = (&set.spec, &set.status) else {
        return Err("the cluster has not taken up the change yet".to_owned());
    };
    let wanted = spec.replicas.unwrap_or(1);
    let ready = status.ready_replicas.unwrap_or_default();
    let updated = status.updated_replicas.unwrap_or_default();
    let rolling = spec
        .update_strategy
        .as_ref()
        .and_then(|strategy| strategy.rolling_update.as_ref());
    let partition = rolling
        .and_then(|rolling| rolling.partition)
        .unwrap_or_default();
    let to_update = (wanted - partition).max(0);
    let strategy = spec.update_strategy.as_ref();
    let is_by_hand = strategy.is_some_and(|it| it.type_.as_deref() == Some("OnDelete"));
    // Where people roll it by deleting pods, the controller leaves the current revision as it was.
    let same_revision = partition > 0
        || wanted == 0
        || is_by_hand
        || status.update_revision == status.current_revision;
    if ready >= wanted && updated >= to_update && same_revision {
        return Ok(());
    }
    Err(format!(
        "{updated} of {to_update} pods updated, {ready} of {wanted} ready"
    ))
}

fn daemon_set_counted(snapshot: &Snapshot) -> Result<(), String> {
    let Workload::DaemonSet(set) = &snapshot.workload else {
        return Ok(());
    };
    let Some(status) = &set.status else {
        return Err("the cluster has not taken up the change yet".to_owned());
    };
    let wanted = status.desired_number_scheduled;
    let updated = status.updated_number_scheduled.unwrap_or_default();
    let available = status.number_available.unwrap_or_default();
    if updated >= wanted && available >= wanted {
        return Ok(());
    }
    Err(format!(
        "{updated} of {wanted} pods updated, {available} of {wanted} available"
    ))
}

fn job_condition<'a>(snapshot: &'a Snapshot, types: &[&str]) -> Option<&'a str> {
    let Workload::Job(job) = &snapshot.workload else {
        return None;
    };
    let conditions = job.status.as_ref()?.conditions.as_deref()?;
    let condition = conditions.iter().find(|condition| {
        types.contains(&condition.type_.as_str()) && condition.status == "True"
    })?;
    Some(condition.message.as_deref().unwrap_or_default())
}

fn job_counted(snapshot: &Snapshot) -> Result<(), String> {
    if job_condition(snapshot, &["Complete", "SuccessCriteriaMet"]).is_some() {
        return Ok(());
    }
    let Workload::Job(job) = &snapshot.workload else {
        return Ok(());
    };
    if job
        .spec
        .as_ref()
        .and_then(|spec| spec.suspend)
        .unwrap_or_default()
    {
        return Err("it is suspended".to_owned());
    }
    let status = job.status.clone().unwrap_or_default();
    Err(format!(
        "{} running, {} failed",
        status.active.unwrap_or_default(),
        status.failed.unwrap_or_default()
    ))
}

fn job_failed(target: &Target, snapshot: &Snapshot) -> Option<Cause> {
    let told = job_condition(snapshot, &["Failed", "FailureTarget"])?;
    let words = snapshot
        .last_words
        .values()
        .rev()
        .find_map(|words| words::last_line(words));
    let words = words.map(|line| format!(": {line}")).unwrap_or_default();
    let sentence = format!(
        "{} failed ({}){words}",
        target.display_name(),
        words::shortened(told)
    );
    let hint = format!("see `kubectl logs {}`", target.display_name());
    Some(
        Cause::new("job_failed", sentence)
            .object(target.display_name())
            .hint(hint),
    )
}

/// What is worth saying and is never a verdict: a container of the release that runs another digest than it names.
/// Registries and runtimes may show an index's platform manifest or its configuration instead, which is the same image.
pub fn remarks(target: &Target, snapshot: &Snapshot) -> Vec<String> {
    let mut remarks = Vec::new();
    for pod in snapshot.new_pods() {
        for container in Running::all(pod) {
            let digest = |reference: &str| {
                reference
                    .rsplit_once("sha256:")
                    .map(|(_, hex)| hex.to_owned())
            };
            let wanted = target
                .images
                .iter()
                .find(|(name, _)| *name == container.status.name);
            let wanted = wanted.and_then(|(_, image)| digest(image));
            let (Some(wanted), Some(runs)) = (wanted, digest(&container.status.image_id)) else {
                continue;
            };
            if wanted != runs {
                let short = |hex: &str| hex.get(..12).unwrap_or(hex).to_owned();
                remarks.push(format!(
                    "{} names the image sha256:{} and the node says sha256:{}: an index and its platform's manifest differ so",
                    container.display_name(), short(&wanted), short(&runs)
                ));
            }
        }
    }
    remarks
}

/// The number that `kubectl rollout history` shows; for other kinds the hash of their template.
pub fn revision(snapshot: &Snapshot) -> String {
    use super::snapshot::{REVISION_ANNOTATION, annotation};
    match &snapshot.workload {
        Workload::Deployment(it) => annotation(&it.metadata, REVISION_ANNOTATION)
            .unwrap_or_default()
            .to_owned(),
        Workload::StatefulSet(it) => it
            .status
            .as_ref()
            .and_then(|status| status.update_revision.clone())
            .unwrap_or_default(),
        Workload::DaemonSet(it) => it.metadata.generation.unwrap_or_default().to_string(),
        Workload::Job(_) => String::new(),
    }
}

#[cfg(test)]
#[path = "rollout_tests.rs"]
mod tests;
