//! Evidence: what a failed rollout shows, read before anything of it is undone.
//!
//! Objects, events, and the last lines of every container that is not well, also of the one before its restart. What
//! cannot be read in time is left out: evidence never holds up a rollback. Nothing here changes anything.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::LogParams;
use serde::Serialize;

use super::Cluster;
use super::observe::{Observer, ask};
use super::snapshot::{Running, Snapshot, Target, Workload, has_ended, is_ready, name, uid};
use super::tables;
use crate::release::Evidence;

/// For all of it: the release before waits to come back.
const LIMIT: Duration = Duration::from_secs(6);
const PODS_MAX: usize = 4;
const LOG_LINES: i64 = 100;
const EVENTS_MAX: usize = 40;
const BODY_BYTES_MAX: usize = 64 * 1024;

/// What can be read of these workloads within the limit.
pub async fn collect(cluster: &Cluster, targets: &[Target]) -> Vec<Evidence> {
    let mut evidence = Vec::new();
    // What was read until then is kept.
    let _ = tokio::time::timeout(LIMIT, async {
        let mut observer = Observer::new(cluster);
        let mut snapshots = Vec::new();
        for target in targets {
            if let Ok(Some(snapshot)) = observer.snapshot(target).await {
                snapshots.push((target, snapshot));
            }
        }
        // First what is gone first.
        for (_, snapshot) in &snapshots {
            logs(cluster, snapshot, &mut evidence).await;
        }
        for (target, snapshot) in &snapshots {
            objects(target, snapshot, &mut evidence);
        }
    })
    .await;
    evidence
}

/// Those that are not ready or have died; where none is, all of them: one of them may have answered wrongly.
fn unwell(snapshot: &Snapshot) -> Vec<&Pod> {
    let mut pods = snapshot.new_pods();
    pods.retain(|pod| !has_ended(pod) || matches!(snapshot.workload, Workload::Job(_)));
    let is_unwell =
        |pod: &Pod| !is_ready(pod) || Running::all(pod).iter().any(|it| it.deaths() > 0);
    if pods.iter().any(|pod| is_unwell(pod)) {
        pods.retain(|pod| is_unwell(pod));
    }
    pods.truncate(PODS_MAX);
    pods
}

async fn logs(cluster: &Cluster, snapshot: &Snapshot, evidence: &mut Vec<Evidence>) {
    for pod in unwell(snapshot) {
        for container in Running::all(pod) {
            for previous in [true, false] {
                if previous && container.deaths() == 0 {
                    continue;
                }
                let parameters = LogParams {
                    container: Some(container.status.name.clone()),
                    previous,
                    tail_lines: Some(LOG_LINES),
                    ..LogParams::default()
                };
                let api = cluster.api::<Pod>();
                let asked = ask("read a log", || api.logs(name(pod), &parameters)).await;
                let Some(text) = asked.ok().filter(|text| !text.trim().is_empty()) else {
                    continue;
                };
                let which = if previous { ", before its restart" } else { "" };
                let title = format!("pod/{}: log of {}{which}", name(pod), container.status.name);
                evidence.push(Evidence {
                    title,
                    body: bounded(&text),
                });
            }
        }
    }
}

fn objects(target: &Target, snapshot: &Snapshot, evidence: &mut Vec<Evidence>) {
    let mut own = vec![snapshot.workload.uid().to_owned()];
    own.extend(
        snapshot
            .new_replica_set()
            .and_then(|set| set.metadata.uid.clone()),
    );
    own.extend(
        snapshot
            .new_pods()
            .into_iter()
            .map(|pod| uid(pod).to_owned()),
    );
    let events: Vec<_> = own.iter().flat_map(|uid| snapshot.events_of(uid)).collect();
    let lines = tables::event_lines(&events, snapshot.now, EVENTS_MAX);
    if !lines.is_empty() {
        evidence.push(Evidence {
            title: format!("{}: events", target.display_name()),
            body: bounded(&lines.join("\n")),
        });
    }
    evidence.push(yaml(&target.display_name(), &snapshot.workload.json()));
    for pod in unwell(snapshot) {
        evidence.push(yaml(
            &format!("pod/{}", name(pod)),
            &serde_json::to_value(pod).unwrap_or_default(),
        ));
    }
}

fn yaml(title: &str, object: &impl Serialize) -> Evidence {
    let mut value = serde_json::to_value(object).unwrap_or_default();
    if let Some(metadata) = value
        .get_mut("metadata")
        .and_then(serde_json::Value::as_object_mut)
    {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata
            .get_mut("annotations")
            .and_then(serde_json::Value::as_object_mut)
        {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    hide_values(&mut value);
    Evidence {
        title: title.to_owned(),
        body: bounded(&serde_yaml::to_string(&value).unwrap_or_default()),
    }
}

/// What a variable is set to may be a password; its name tells enough.
fn hide_values(object: &mut serde_json::Value) {
    for path in ["/spec/template/spec", "/spec"] {
        for list in ["containers", "initContainers"] {
            let containers = object.pointer_mut(&format!("{path}/{list}"));
            let containers = containers.and_then(serde_json::Value::as_array_mut);
            for container in containers.into_iter().flatten() {
                let variables = container
                    .get_mut("env")
                    .and_then(serde_json::Value::as_array_mut);
                for variable in variables.into_iter().flatten() {
                    if let Some(value) = variable.get_mut("value") {
                        *value = "(hidden)".into();
                    }
                }
            }
        }
    }
}

/// The end of it counts.
fn bounded(text: &str) -> String {
    let mut cut = text.len().saturating_sub(BODY_BYTES_MAX);
    while !text.is_char_boundary(cut) {
        cut += 1;
    }
    // PostgreSQL stores no NUL in a text.
    text.get(cut..)
        .unwrap_or_default()
        .replace('\0', "\u{fffd}")
}
