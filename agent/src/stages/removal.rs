//! Taking away: what a failed release made, and what a live one no longer has.
//!
//! Only what a release of this environment created, by the UID that it had then, and while it carries a fence of ours.
//! Claims of volumes and namespaces are never removed: what is in them cannot be put back.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Preconditions};
use serde_json::Value;
use tokio::time::Instant;

use super::deploy::Way;
use super::{Scope, StageResult};
use crate::cluster::Resource;
use crate::cluster::apply::{self, Removal};
use crate::cluster::lease::Held;
use crate::cluster::observe::{BLIND_RETRY, Observer, ask};
use crate::cluster::snapshot::{Kind, Running, Target, Workload, is_ready, name, uid};
use crate::manifests::{condition, render};
use crate::release::{AppliedObject, Change, Release};

/// More than this many objects, or than half of all, are not pruned without the operator's word.
const PRUNED_MAX: usize = 20;
const KEPT: [&str; 3] = [
    "PersistentVolumeClaim",
    "Namespace",
    "CustomResourceDefinition",
];
/// How long a StatefulSet may take to see that its template is another one.
const TAKEN_UP_LIMIT: Duration = Duration::from_secs(10);
/// The usual grace of a pod, and a little more.
const JOB_ENDS_WITHIN: Duration = Duration::from_secs(35);
const POLL: Duration = Duration::from_millis(200);

/// What earlier releases created and this set does not hold; but what it names all the same stays, and that is said.
pub fn prunable(
    scope: &Scope<'_>,
    created: &[AppliedObject],
    objects: &[Value],
) -> Vec<AppliedObject> {
    let (needed, prunable): (Vec<_>, Vec<_>) = surplus(created, objects);
    for object in needed {
        let name = object.display_name();
        scope.log.line(format!(
            "{name} stays: the manifests hold it no more, and name it still"
        ));
    }
    prunable
}

/// What is none of these objects: what they name all the same, and the rest.
fn surplus(
    created: &[AppliedObject],
    objects: &[Value],
) -> (Vec<AppliedObject>, Vec<AppliedObject>) {
    let mut surplus: Vec<AppliedObject> = Vec::new();
    for object in created {
        let is_wanted = objects.iter().any(|wanted| object.is_named_by(wanted));
        let is_known = surplus.iter().any(|known| known.uid == object.uid);
        if !is_wanted && !is_known && !KEPT.contains(&object.kind.as_str()) {
            surplus.push(object.clone());
        }
    }
    let needed = render::needed(objects);
    let is_needed = |object: &AppliedObject| {
        let mut needed = needed.iter();
        needed.any(|(kind, name)| *kind == object.kind && *name == object.name)
    };
    surplus.into_iter().partition(is_needed)
}

/// None of them where there are too many; that is said.
pub fn capped(
    scope: &Scope<'_>,
    prunable: Vec<AppliedObject>,
    created: &[AppliedObject],
) -> Vec<AppliedObject> {
    // A Job leaves with each release.
    let lasting = |objects: &[AppliedObject]| objects.iter().filter(|it| it.kind != "Job").count();
    if scope.environment.prune_many || !is_too_much(lasting(&prunable), lasting(created)) {
        return prunable;
    }
    scope.log.line(format!(
        "{} of {} objects of other releases are not in this one: so many are not removed, unless the operator sets `prune_many: true` in agent.yaml",
        prunable.len(),
        created.len()
    ));
    Vec::new()
}

fn is_too_much(pruned: usize, of: usize) -> bool {
    pruned > PRUNED_MAX || (pruned > 1 && pruned * 2 > of)
}

/// What a failed release created and the one that is put back does not hold, the last made first.
pub fn left_over(failed: &[AppliedObject], back_to: Option<&Release>) -> Vec<AppliedObject> {
    let goal = back_to.map_or(&[][..], |release| &release.objects);
    let created = failed
        .iter()
        .filter(|object| object.change == Change::Created);
    created
        .filter(|object| !goal.iter().any(|wanted| object.is_named_by(wanted)))
        // A Job that has run must not run again, and one that failed tells why.
        .filter(|object| !KEPT.contains(&object.kind.as_str()) && object.kind != "Job")
        .rev()
        .cloned()
        .collect()
}

/// `objects` in two turns: autoscalers, and the rest. While an autoscaler is there, an apply leaves the number of pods to it.
pub fn autoscalers_first(objects: Vec<AppliedObject>) -> (Vec<AppliedObject>, Vec<AppliedObject>) {
    objects
        .into_iter()
        .partition(|object| object.kind == "HorizontalPodAutoscaler")
}

/// Ends the Jobs of a failed release that have not ended, also between two of their tries: nothing may change the data under
/// what is put back. Those that have ended stay, and tell why. Answers the UIDs that are there no more.
pub async fn end_jobs(
    scope: &Scope<'_>,
    held: &Held,
    failed: &[AppliedObject],
) -> StageResult<Vec<String>> {
    let resource = Resource::built_in("batch/v1", "Job", "jobs", true);
    let mut unended = Vec::new();
    let created = failed
        .iter()
        .filter(|object| object.kind == "Job" && object.change == Change::Created);
    for job in created {
        let live = held.cluster.get(&resource, &job.name).await;
        let what = format!("read {}", job.display_name());
        let live = live.map_err(|answer| answer.into_error(&what))?;
        if live.is_some_and(|live| !has_ended(&live)) {
            unended.push(job.clone());
        }
    }
    let gone = run(scope, held, &unended).await?;
    let begun = Instant::now();
    let pods = held.cluster.api::<Pod>();
    for job in &unended {
        let own =
            ListParams::default().labels(&format!("batch.kubernetes.io/job-name={}", job.name));
        // Where pods cannot be listed, the time is given to them all the same.
        while begun.elapsed() < JOB_ENDS_WITHIN
            && !ask("list pods", || pods.list(&own))
                .await
                .is_ok_and(|pods| pods.items.is_empty())
        {
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(gone)
}

fn has_ended(job: &Value) -> bool {
    condition(job, "Complete").is_some() || condition(job, "Failed").is_some()
}

/// Removes these objects; answers the UIDs that are there no more.
pub async fn run(
    scope: &Scope<'_>,
    held: &Held,
    objects: &[AppliedObject],
) -> StageResult<Vec<String>> {
    let mut gone = Vec::new();
    for object in objects {
        let shown = object.display_name();
        match apply::remove(held, object).await? {
            Removal::Removed => scope.log.line(format!("{shown} removed")),
            Removal::Gone => scope.log.line(format!("{shown} is gone already")),
            Removal::Another => {
                scope.log.line(format!(
                    "{shown} was made anew or taken over by another since: it stays"
                ));
            }
        }
        gone.push(object.uid.clone());
    }
    Ok(gone)
}

/// Pods of a StatefulSet that rolled out badly: in order, the next is made only when they are well, which they never are. On the
/// way back all that are not ready; forward the one that its controller waits for, if it waits for what does not come.
pub async fn free_stuck_pods(scope: &Scope<'_>, held: &Held, targets: &[Target], way: Way) {
    let mut observer = Observer::new(&held.cluster);
    let pods = held.cluster.api::<Pod>();
    for target in targets
        .iter()
        .filter(|target| target.kind == Kind::StatefulSet && (target.changed || way.is_back()))
    {
        let begun = Instant::now();
        let snapshot = loop {
            match observer.snapshot(target).await {
                Ok(Some(snapshot)) if is_taken_up(&snapshot.workload) => break Some(snapshot),
                _ if begun.elapsed() >= TAKEN_UP_LIMIT => break None,
                Ok(_) => tokio::time::sleep(POLL).await,
                Err(_) => tokio::time::sleep(BLIND_RETRY).await,
            }
        };
        let Some(snapshot) = snapshot else { continue };
        let (serving, _) = snapshot.old_pods();
        for pod in serving
            .into_iter()
            .filter(|pod| !is_ready(pod) && (way.is_back() || is_broken(pod)))
            .take(if way.is_back() { usize::MAX } else { 1 })
        {
            let parameters = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: Some(uid(pod).to_owned()),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            let freed = ask("free a pod", || pods.delete(name(pod), &parameters)).await;
            scope.log.line(match freed {
                Ok(_) => format!(
                    "pod/{} is not well and of another release: removed, so that its StatefulSet goes on",
                    name(pod)
                ),
                Err(unseen) => format!(
                    "pod/{} is not well and of another release, and cannot be removed: {:#}",
                    name(pod),
                    unseen.error
                ),
            });
        }
    }
}

fn is_broken(pod: &Pod) -> bool {
    Running::all(pod).iter().any(|container| {
        let waiting = container.waiting().map(|(reason, _)| reason);
        !matches!(
            waiting,
            None | Some("ContainerCreating" | "PodInitializing")
        )
    })
}

fn is_taken_up(workload: &Workload) -> bool {
    let Workload::StatefulSet(set) = workload else {
        return true;
    };
    let observed = set
        .status
        .as_ref()
        .and_then(|status| status.observed_generation);
    observed.unwrap_or_default() >= workload.generation()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(kind: &str, name: &str, change: Change) -> AppliedObject {
        AppliedObject {
            api_version: if kind == "Deployment" {
                "apps/v1"
            } else {
                "v1"
            }
            .to_owned(),
            kind: kind.to_owned(),
            namespace: "demo".to_owned(),
            name: name.to_owned(),
            uid: format!("uid-of-{name}"),
            generation: 0,
            change,
        }
    }

    fn names(objects: &[AppliedObject]) -> Vec<&str> {
        objects.iter().map(|object| object.name.as_str()).collect()
    }

    #[test]
    fn only_what_is_wanted_no_more_is_pruned_and_never_data() {
        let created = [
            object("ConfigMap", "old", Change::Created),
            object("ConfigMap", "old", Change::Created),
            object("PersistentVolumeClaim", "data", Change::Created),
            object("Deployment", "web", Change::Created),
            object("ConfigMap", "named", Change::Created),
            object("ServiceAccount", "runner", Change::Created),
            object("Secret", "pull", Change::Created),
            object("Secret", "certificate", Change::Created),
            object("Service", "database", Change::Created),
        ];
        let pod = json!({"serviceAccountName": "runner", "imagePullSecrets": [{"name": "pull"}],
            "containers": [{"envFrom": [{"configMapRef": {"name": "named"}}]}]});
        let set = [
            json!({"apiVersion": "apps/v1beta1", "kind": "Deployment", "metadata": {"name": "web"},
                "spec": {"template": {"spec": pod}}}),
            json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "database"}, "spec": {"serviceName": "database"}}),
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "web"}, "spec": {"tls": [{"secretName": "certificate"}]}}),
        ];
        let (needed, prunable) = surplus(&created, &set);
        assert_eq!(names(&prunable), ["old"]);
        assert_eq!(
            names(&needed),
            ["named", "runner", "pull", "certificate", "database"]
        );
    }

    #[test]
    fn more_than_half_or_twenty_needs_a_word() {
        assert!(!is_too_much(1, 1) && !is_too_much(2, 4) && is_too_much(3, 5));
        assert!(!is_too_much(20, 40) && is_too_much(21, 100));
    }

    #[test]
    fn a_rollback_removes_what_the_failed_release_created_in_the_other_order() {
        let failed = [
            object("ConfigMap", "new", Change::Created),
            object("ConfigMap", "kept", Change::Created),
            object("Service", "changed", Change::Changed),
            object("Deployment", "worker", Change::Created),
        ];
        let set_hash = String::new();
        let goal: Release = serde_json::from_value(json!({
            "environment": "e", "build_id": 1, "commit": "", "image": "", "namespace": "demo", "set_hash": set_hash,
            "objects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}}],
            "smoke_tests": [], "verify": {}, "rollback": "automatic", "first_release": "leave",
        }))
        .unwrap();
        assert_eq!(names(&left_over(&failed, Some(&goal))), ["worker", "new"]);
        assert_eq!(names(&left_over(&failed, None)), ["worker", "kept", "new"]);
    }
}
