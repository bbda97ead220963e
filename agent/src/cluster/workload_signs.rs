//! The signs of a whole workload: another wrote it, its pods are refused, or nobody rolls it out.

use std::time::Duration;

use jiff::Timestamp;

use super::sign::{CONFIGURATION, PASSING, PERMANENT, Patience, Sign};
use super::snapshot::{Snapshot, Target, Workload, created, template_release};
use super::words::{last_seen, message, shortened};
use crate::builds::Cause;

/// The old pods' quota comes free only when they have gone.
const QUOTA_QUIET: Duration = Duration::from_secs(2);

/// Words of an API server that has not decided: it, its store or a webhook is away or busy.
const UNDECIDED: [&str; 12] = [
    "failed calling webhook",
    "timeout",
    "timed out",
    "deadline exceeded",
    "connection refused",
    "Internal error",
    "etcdserver",
    "leader changed",
    "status unknown for quota",
    "Operation cannot be fulfilled",
    "unable to handle the request",
    "too many requests",
];

/// When the newest of its pods was made.
fn newest_pod(snapshot: &Snapshot) -> Option<Timestamp> {
    let pods = snapshot.own_pods();
    pods.iter().filter_map(|pod| created(&pod.metadata)).max()
}

/// Somebody else wrote another template after our apply: what rolls out is not this release.
pub(super) fn changed_by_another(target: &Target, snapshot: &Snapshot) -> Option<Sign> {
    if target.generation == 0 || snapshot.workload.generation() <= target.generation {
        return None;
    }
    let template = snapshot.workload.template()?;
    let annotation_differs =
        target.release.is_some() && template_release(template) != target.release.as_deref();
    let spec = template.spec.as_ref()?;
    let live = |name: &str| {
        let containers = spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers);
        containers
            .into_iter()
            .find(|container| container.name == name)?
            .image
            .as_deref()
    };
    let other_image = target
        .images
        .iter()
        .find(|(name, image)| live(name).is_some_and(|live| live != image));
    let what = match other_image {
        Some((container, image)) => {
            format!(
                "container {container} is now {} and not {image}",
                live(container).unwrap_or_default()
            )
        }
        None if annotation_differs => {
            "its pod template is no longer the one of this release".to_owned()
        }
        None => return None,
    };
    let cause = Cause::new(
        "changed_by_another",
        format!(
            "{} was changed by another while it rolled out: {what}",
            target.display_name()
        ),
    )
    .hint("see who wrote last with `kubectl get -o yaml --show-managed-fields`, then build again");
    Some(Sign::new(&target.name, Patience::None, cause))
}

/// The API server refuses the pods themselves: quota, limits, pod security, a webhook.
pub(super) fn refused_pods(snapshot: &Snapshot) -> Option<Sign> {
    let told = match &snapshot.workload {
        Workload::Deployment(_) => {
            let conditions = snapshot
                .new_replica_set()?
                .status
                .as_ref()?
                .conditions
                .as_deref()?;
            let condition = conditions.iter().find(|condition| {
                condition.type_ == "ReplicaFailure" && condition.status == "True"
            })?;
            condition.message.clone()?
        }
        // These kinds have no such condition: the event is all there is.
        _ => {
            let created = snapshot.applied_at();
            let event = snapshot
                .events_of(snapshot.workload.uid())
                .filter(|event| {
                    // A pod that was made after it was not refused: the event stays for an hour.
                    event.reason.as_deref() == Some("FailedCreate")
                        && last_seen(event) >= created
                        && last_seen(event) > newest_pod(snapshot)
                })
                .max_by_key(|event| last_seen(event))?;
            message(event).to_owned()
        }
    };
    let told = told
        .trim_start_matches("(combined from similar events): ")
        .trim_start_matches("Error creating: ");
    let has = |words: &[&str]| words.iter().any(|word| told.contains(word));
    let (id, patience, hint) = if has(&["exceeded quota"]) {
        (
            "quota_exceeded",
            Patience::QuietOverRetries(QUOTA_QUIET),
            "ask for less in resources.requests, or raise the namespace's ResourceQuota",
        )
    } else if has(&["denied the request", "ValidatingAdmissionPolicy"]) {
        (
            "admission_denied",
            Patience::Seen(PERMANENT),
            "an admission rule of this cluster refuses it: mend what it names, or ask the cluster's operator",
        )
    } else if has(&UNDECIDED) {
        (
            "pods_refused",
            Patience::Seen(PASSING),
            "the API server or an admission webhook does not come to an answer; ask the cluster's operator",
        )
    } else if has(&["serviceaccount"]) {
        (
            "service_account_missing",
            Patience::Seen(CONFIGURATION),
            "add the ServiceAccount to the manifests",
        )
    } else if has(&["violates PodSecurity"]) {
        (
            "pod_security",
            Patience::Seen(PERMANENT),
            "set what the message names in securityContext, or ask for another level of the namespace",
        )
    } else if has(&["usage per", "limit to request ratio"]) {
        (
            "limit_range",
            Patience::Seen(PERMANENT),
            "keep resources within the namespace's LimitRange: `kubectl describe limitrange`",
        )
    } else {
        (
            "pods_refused",
            Patience::Seen(PERMANENT),
            "mend what the message names in the pod template",
        )
    };
    // The name of the pod that was not made changes with every try.
    let told = told
        .split_once(" is forbidden: ")
        .map_or(told, |(_, rest)| rest);
    let cause = Cause::new(
        id,
        format!("the cluster refuses the new pods: {}", shortened(told)),
    )
    .hint(hint);
    Some(Sign::new(snapshot.workload.uid(), patience, cause))
}

pub(super) fn paused(target: &Target, snapshot: &Snapshot) -> Option<Sign> {
    let spec = snapshot.deployment()?.spec.as_ref()?;
    spec.paused.unwrap_or_default().then(|| {
        let object = target.display_name();
        let cause = Cause::new(
            "paused",
            format!("{object} is paused: the cluster does not roll it out"),
        )
        .hint(format!(
            "`kubectl rollout resume {object}`, or take `paused: true` out of the manifest"
        ));
        Sign::new(&target.name, Patience::None, cause)
    })
}

/// Such a workload rolls out when somebody deletes its pods: nobody will.
pub(super) fn on_delete(target: &Target, snapshot: &Snapshot) -> Option<Sign> {
    let observed = match &snapshot.workload {
        Workload::StatefulSet(it) => it.status.as_ref()?.observed_generation,
        Workload::DaemonSet(it) => it.status.as_ref()?.observed_generation,
        _ => None,
    };
    // What the status says may be of the template before.
    if observed < snapshot.workload.metadata().generation {
        return None;
    }
    let (strategy, has_old_pods) = match &snapshot.workload {
        Workload::StatefulSet(it) => (
            it.spec.as_ref()?.update_strategy.as_ref()?.type_.as_deref(),
            !snapshot.old_pods().0.is_empty(),
        ),
        Workload::DaemonSet(it) => (
            it.spec.as_ref()?.update_strategy.as_ref()?.type_.as_deref(),
            it.status.as_ref().is_some_and(|status| {
                status.updated_number_scheduled.unwrap_or(0) < status.current_number_scheduled
            }),
        ),
        _ => return None,
    };
    (strategy == Some("OnDelete") && has_old_pods).then(|| {
        let cause = Cause::new("update_on_delete", format!("{} has the update strategy OnDelete: its pods stay old until somebody deletes them", target.display_name()))
            .hint("use the update strategy RollingUpdate");
        Sign::new(&target.name, Patience::None, cause)
    })
}

/// The manifest's own patience, `progressDeadlineSeconds`, has run out.
pub(super) fn deadline_exceeded(target: &Target, snapshot: &Snapshot) -> Option<Sign> {
    let deployment = snapshot.deployment()?;
    let condition = deployment
        .status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| {
            condition.type_ == "Progressing"
                && condition.reason.as_deref() == Some("ProgressDeadlineExceeded")
        })?;
    // The last rollout's may still be there.
    let updated = condition.last_update_time.as_ref().map(|time| time.0);
    if target.changed && updated < snapshot.applied_at() {
        return None;
    }
    let seconds = deployment
        .spec
        .as_ref()?
        .progress_deadline_seconds
        .unwrap_or(600);
    let cause = Cause::new(
        "progress_deadline",
        format!(
            "{} made no progress for {seconds} s (its progressDeadlineSeconds)",
            target.display_name()
        ),
    );
    Some(Sign::new(&target.name, Patience::None, cause))
}
