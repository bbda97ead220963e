//! The soak: for a while after the smoke test no new pod restarts or loses its readiness.
//!
//! A pod that leaves (an autoscaler, a drained node) is no fault. A build that is cut short here has passed already.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

use super::{RolledOut, Scope, StageError, StageResult};
use crate::builds::Cause;
use crate::cluster::Cluster;
use crate::cluster::observe::{self, Observer, Sight, Unseen};
use crate::cluster::probes::recent_probe_failure;
use crate::cluster::rollout;
use crate::cluster::snapshot::{self, Running, Snapshot, Target};
use crate::cluster::words::{last_line, shortened};
use crate::release::Release;

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A probe that fails once in between is no lost readiness.
const UNREADY_FOR: Duration = Duration::from_secs(2);

/// Watches the workloads of a release, but those that verify left, for as long as its `soak_seconds` say. `cut` answers why it
/// is to end before: what it saw until then counts, and the release stays live.
pub async fn run(
    scope: &Scope<'_>,
    release: &Release,
    proved: &RolledOut,
    cut: impl Future<Output = String>,
) -> StageResult<()> {
    let length = Duration::from_secs(release.verify.soak_seconds);
    let mut targets = Target::serving(release);
    targets.retain(|target| !proved.left.contains(&target.display_name()));
    if length.is_zero() || targets.is_empty() {
        return Ok(());
    }
    let cluster = scope.cluster().await?;
    let seconds = length.as_secs();
    scope.log.line(format!("Soak: watching for {seconds} s."));
    let watched = tokio::select! {
        biased;
        // Resumed, it is watched from the beginning.
        () = scope.cancel.cancelled() => return Err(StageError::Canceled),
        watched = watch(scope, &cluster, &targets, proved, length, cut) => watched,
    };
    match watched.map_err(|error| error.masked(scope.log))? {
        None => scope.log.line(format!(
            "Soak: {seconds} s without a restart or a lost readiness."
        )),
        Some(cut) => scope.log.line(format!(
            "The soak is cut short after {} s of {seconds}: {}. Until here nothing restarted.",
            cut.after.as_secs(),
            cut.why
        )),
    }
    Ok(())
}

/// Why a soak ended before its time, and when.
struct Cut {
    why: String,
    after: Duration,
}

/// What is remembered of one pod.
#[derive(Debug, Default)]
struct Seen {
    was_ready: bool,
    unready_since: Option<Instant>,
    deaths: HashMap<String, i32>,
}

async fn watch(
    scope: &Scope<'_>,
    cluster: &Cluster,
    targets: &[Target],
    proved: &RolledOut,
    length: Duration,
    cut: impl Future<Output = String>,
) -> StageResult<Option<Cut>> {
    let begun = Instant::now();
    let mut end = begun + length;
    let mut was_cut = None;
    let mut cut = std::pin::pin!(cut);
    let mut sight = Sight::new(Duration::from_secs(
        scope.environment.limits.unreachable_seconds,
    ));
    let mut observer = Observer::new(cluster);
    let mut pods: HashMap<String, Seen> = HashMap::new();
    loop {
        match look(&mut observer, targets).await {
            Ok(snapshots) => {
                sight.seen();
                for (target, snapshot) in targets.iter().zip(&snapshots) {
                    let proved = proved.standing.get(&target.display_name());
                    let taken_over = rollout::taken_over(target, proved, snapshot.as_ref());
                    taken_over.map_or(Ok(()), |cause| Err(StageError::Failed(cause)))?;
                }
                for snapshot in snapshots.iter().flatten() {
                    if let Some(cause) = judge(cluster, snapshot, &mut pods).await {
                        return Err(StageError::Failed(cause));
                    }
                }
                // The last look is after the end, also where it came early: what was not seen is not called well.
                if Instant::now() >= end {
                    return Ok(was_cut);
                }
            }
            Err(unseen) => {
                let line = format!("The cluster cannot be seen, waiting: {:#}", unseen.error);
                if sight.unseen(unseen)? {
                    scope.log.line(line);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            why = &mut cut, if was_cut.is_none() => {
                end = Instant::now();
                let after = begun.elapsed();
                was_cut = Some(Cut { why, after });
            }
        }
    }
}

/// None for a workload that is gone.
async fn look(
    observer: &mut Observer<'_>,
    targets: &[Target],
) -> Result<Vec<Option<Snapshot>>, Unseen> {
    let mut snapshots = Vec::with_capacity(targets.len());
    for target in targets {
        snapshots.push(observer.snapshot(target).await?);
    }
    Ok(snapshots)
}

async fn judge(
    cluster: &Cluster,
    snapshot: &Snapshot,
    pods: &mut HashMap<String, Seen>,
) -> Option<Cause> {
    let staying = snapshot.new_pods().into_iter();
    for pod in staying.filter(|pod| !is_taken_away(pod)) {
        let is_known = pods.contains_key(snapshot::uid(pod));
        let seen = pods.entry(snapshot::uid(pod).to_owned()).or_default();
        for container in Running::all(pod) {
            let deaths = container.deaths();
            let before = seen
                .deaths
                .insert(container.status.name.clone(), deaths)
                .unwrap_or_default();
            if is_known && deaths > before {
                return Some(died(cluster, &container).await);
            }
        }
        let is_ready = snapshot::is_ready(pod);
        seen.was_ready |= is_ready;
        if is_ready || !seen.was_ready {
            seen.unready_since = None;
            continue;
        }
        let since = *seen.unready_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= UNREADY_FOR {
            let probe = recent_probe_failure(pod, snapshot, "Readiness");
            let told = probe
                .map(|told| format!(": {}", shortened(told)))
                .unwrap_or_default();
            let sentence = format!(
                "pod {} lost its readiness after the smoke test{told}",
                snapshot::name(pod)
            );
            return Some(
                Cause::new("crash_in_soak", sentence)
                    .object(format!("pod/{}", snapshot::name(pod))),
            );
        }
    }
    None
}

/// By its node, or for another pod: not the program's doing, and another takes its place.
fn is_taken_away(pod: &Pod) -> bool {
    let condition = snapshot::pod_condition(pod, "DisruptionTarget");
    condition.is_some_and(|(status, ..)| status == "True")
}

async fn died(cluster: &Cluster, container: &Running<'_>) -> Cause {
    let death = container.death();
    let words = match death {
        Some(death) => observe::last_words(cluster, container, death.is_previous)
            .await
            .unwrap_or_default(),
        None => String::new(),
    };
    let last = last_line(&words)
        .map(|line| format!(": {line}"))
        .unwrap_or_default();
    let how = match death {
        Some(death) if death.reason == "OOMKilled" => {
            "was killed for using too much memory".to_owned()
        }
        Some(death) => format!("exited with code {}", death.exit_code),
        None => "was restarted".to_owned(),
    };
    let name = snapshot::name(container.pod);
    Cause::new(
        "crash_in_soak",
        format!(
            "{} {how} after the smoke test{last}",
            container.display_name()
        ),
    )
    .object(format!("pod/{name}"))
    .hint(format!(
        "see `kubectl logs {name} -c {} --previous`",
        container.status.name
    ))
}
