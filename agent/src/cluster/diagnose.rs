//! Why a workload does not come up: the signs that a snapshot shows, the most telling first.
//!
//! Pure. Each sign is a cause and the patience that it deserves; `rollout` holds the clock and decides. Texts of
//! Kubernetes and of containerd are read here and nowhere else. Nothing here is ever a verdict by itself.

use k8s_openapi::api::core::v1::Pod;

use super::container_signs::{died, pulls, waits};
use super::pod_signs::{cannot_mount, node_lost, unschedulable};
use super::probes::{fails_liveness, never_ready};
use super::sign::Sign;
use super::snapshot::{Kind, Running, Snapshot, Target, has_ended};
use super::workload_signs::{
    changed_by_another, deadline_exceeded, on_delete, paused, refused_pods,
};

/// The signs of a snapshot, the most telling first. `deaths` says how often a container died since our apply.
pub fn signs(
    target: &Target,
    snapshot: &Snapshot,
    nodes_autoscale: bool,
    deaths: &dyn Fn(&Running<'_>) -> i32,
) -> Vec<Sign> {
    let mut signs = Vec::new();
    signs.extend(changed_by_another(target, snapshot));
    let is_job = target.kind == Kind::Job;
    let pods: Vec<&Pod> = snapshot
        .new_pods()
        .into_iter()
        .filter(|pod| !has_ended(pod))
        .collect();
    for pod in &pods {
        for container in Running::all(pod) {
            if !is_job {
                signs.extend(died(&container, snapshot, deaths(&container)));
            }
            signs.extend(waits(&container));
        }
    }
    for pod in &pods {
        signs.extend(cannot_mount(pod, snapshot));
        for container in Running::all(pod) {
            signs.extend(pulls(&container, snapshot));
        }
        signs.extend(unschedulable(pod, snapshot, nodes_autoscale));
    }
    signs.extend(pods.iter().filter_map(|pod| node_lost(pod, snapshot.now)));
    signs.extend(refused_pods(snapshot));
    signs.extend(paused(target, snapshot));
    signs.extend(on_delete(target, snapshot));
    for pod in &pods {
        signs.extend(fails_liveness(pod, snapshot));
        signs.extend(never_ready(pod, snapshot));
    }
    signs.extend(deadline_exceeded(target, snapshot));
    signs.into_iter().map(|sign| named(target, sign)).collect()
}

fn named(target: &Target, mut sign: Sign) -> Sign {
    sign.cause
        .object
        .get_or_insert_with(|| target.display_name());
    sign
}
