//! The signs of one pod: no node, no volumes, or nobody who looks after it.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use super::container_signs::missing_config;
use super::sign::{PASSING, Patience, Sign, of_missing};
use super::snapshot::{Running, Snapshot, created, name, pod_condition, uid};
use super::words::{last_seen, message, shortened};
use crate::builds::Cause;

/// No node has room, and nothing has moved.
const UNSCHEDULABLE_QUIET: Duration = Duration::from_secs(8);
/// No node has room, but new ones may come.
const UNSCHEDULABLE_AUTOSCALE: Duration = Duration::from_secs(120);
/// A kubelet that is well takes up a pod within this.
const KUBELET_MAX: SignedDuration = SignedDuration::from_secs(5);

/// Taints that come and go by themselves: a kubelet that restarts, a node that is drained or cleans up.
const NODE_IS_AWAY: [&str; 5] = [
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/unschedulable",
    "-pressure",
    "node(s) were unschedulable",
];

/// The only signal of a missing Secret or ConfigMap that is to be mounted is an event.
pub(super) fn cannot_mount(pod: &Pod, snapshot: &Snapshot) -> Option<Sign> {
    let is_waiting = |container: &Running<'_>| {
        matches!(
            container.waiting(),
            Some(("ContainerCreating" | "PodInitializing", _))
        )
    };
    let containers = Running::all(pod);
    // Mounted by now: it pulls, or its first init container runs. The event of an earlier try stays for an hour.
    let is_mounted = pod_condition(pod, "PodReadyToStartContainers")
        .is_some_and(|(status, ..)| status == "True")
        || containers
            .iter()
            .any(|it| it.is_running() || it.deaths() > 0);
    if is_mounted || !containers.iter().any(is_waiting) {
        return None;
    }
    let event = snapshot
        .events_of(uid(pod))
        .filter(|event| {
            matches!(
                event.reason.as_deref(),
                Some("FailedMount" | "FailedAttachVolume" | "FailedCreatePodSandBox")
            )
        })
        .max_by_key(|event| last_seen(event))?;
    let told = message(event);
    let is_missing = [
        "not found",
        "non-existent config key",
        "references non-existent",
    ]
    .iter()
    .any(|word| told.contains(word));
    let id = if event.reason.as_deref() == Some("FailedCreatePodSandBox") {
        "cannot_start"
    } else if is_missing {
        match missing_config(told) {
            "config_invalid" => "mount_failed",
            named => named,
        }
    } else {
        "mount_failed"
    };
    let patience = if is_missing {
        of_missing(id, true)
    } else {
        Patience::UntilDeadline
    };
    let cause = Cause::new(
        id,
        format!(
            "pod {} waits for its volumes: {}",
            name(pod),
            shortened(told)
        ),
    )
    .hint("add what is missing to the namespace or to the manifests");
    Some(Sign::new(uid(pod), patience, cause))
}

pub(super) fn unschedulable(pod: &Pod, snapshot: &Snapshot, nodes_autoscale: bool) -> Option<Sign> {
    let (_, _, told) = pod_condition(pod, "PodScheduled")
        .filter(|(status, reason, _)| *status == "False" && *reason == "Unschedulable")?;
    let nodes_may_come = nodes_autoscale
        || snapshot
            .events_of(uid(pod))
            .any(|event| event.reason.as_deref() == Some("TriggeredScaleUp"));
    let patience = if nodes_may_come {
        Patience::Seen(UNSCHEDULABLE_AUTOSCALE)
    } else if told.contains("PersistentVolumeClaim") {
        Patience::Seen(PASSING)
    } else if NODE_IS_AWAY.iter().any(|it| told.contains(it)) {
        Patience::Quiet(PASSING)
    } else {
        Patience::Quiet(UNSCHEDULABLE_QUIET)
    };
    // The second half tells about preemption and repeats the first.
    let told = told
        .split(" preemption: ")
        .next()
        .unwrap_or(told)
        .trim_end_matches(['.', ' ']);
    let told = told
        .trim_end_matches("no new claims to deallocate,")
        .trim_end_matches(['.', ' ']);
    let lower = told.to_lowercase();
    let (id, hint) = if lower.contains("persistentvolumeclaim") {
        (
            "pvc_not_bound",
            "see `kubectl get pvc,storageclass`: no volume fits the claim",
        )
    } else if lower.contains("taint")
        || lower.contains("affinity")
        || lower.contains("node selector")
    {
        (
            "unschedulable",
            "compare nodeSelector, affinity and tolerations with `kubectl get nodes --show-labels`",
        )
    } else if lower.contains("free ports") {
        (
            "unschedulable",
            "the hostPort is taken on every node: use a Service in its place",
        )
    } else {
        (
            "unschedulable",
            "ask for less in resources.requests, or give the cluster room",
        )
    };
    let cause = Cause::new(
        id,
        format!("pod {} finds no node: {}", name(pod), shortened(told)),
    )
    .hint(hint);
    Some(Sign::new(uid(pod), patience, cause))
}

/// Its kubelet has not been heard of: the pod may come back with it, or elsewhere. One that never took up a pod that it was
/// given shows that much without a right to read nodes: it sets `startTime` first of all.
pub(super) fn node_lost(pod: &Pod, now: Timestamp) -> Option<Sign> {
    let status = pod.status.as_ref()?;
    let is_placed = pod.spec.as_ref()?.node_name.is_some();
    let is_new = created(&pod.metadata).is_none_or(|made| now.duration_since(made) < KUBELET_MAX);
    let lost = status.reason.as_deref() == Some("NodeLost")
        || pod_condition(pod, "DisruptionTarget").is_some_and(|(status, reason, _)| {
            status == "True" && reason == "DeletionByTaintManager"
        })
        || (is_placed && status.start_time.is_none() && !is_new);
    lost.then(|| {
        let node = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_deref())
            .unwrap_or_default();
        let cause = Cause::new(
            "node_lost",
            format!("the node {node} of pod {} is not heard of", name(pod)),
        )
        .hint("see `kubectl get nodes`");
        Sign::new(uid(pod), Patience::UntilDeadline, cause)
    })
}
