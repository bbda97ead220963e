//! What `kubectl get` and `kubectl rollout history` would show, from objects that were read already.
//!
//! Pure: objects in, lines out, with kubectl's headings and words, so that nobody has to learn ours.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::autoscaling::v2::{HorizontalPodAutoscaler, MetricSpec, MetricStatus};
use k8s_openapi::api::core::v1::{Event, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::snapshot::{REVISION_ANNOTATION, annotation, controller_uid, created, is_terminating};
use super::words::{last_seen, message, shortened};

/// Further rows are counted and not shown.
const ROWS_MAX: usize = 40;

/// Everything that is shown of one namespace.
#[derive(Debug, Default)]
pub struct Listing {
    pub pods: Vec<Pod>,
    pub services: Vec<Service>,
    pub deployments: Vec<Deployment>,
    pub replica_sets: Vec<ReplicaSet>,
    pub autoscalers: Vec<HorizontalPodAutoscaler>,
}

/// As `kubectl get pods,services,deployments,hpa`, and the history of each Deployment.
pub fn lines(listing: &Listing, now: Timestamp) -> Vec<String> {
    let mut lines = Vec::new();
    let mut part = |title: String, headings: &[&str], rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            lines.push(String::new());
            lines.push(title);
            lines.extend(aligned(headings, &rows));
        }
    };
    let pods = listing.pods.iter().map(|pod| pod_row(pod, now)).collect();
    part(
        "Pods".to_owned(),
        &["NAME", "READY", "STATUS", "RESTARTS", "AGE"],
        pods,
    );
    let services = listing
        .services
        .iter()
        .map(|service| service_row(service, now))
        .collect();
    part(
        "Services".to_owned(),
        &[
            "NAME",
            "TYPE",
            "CLUSTER-IP",
            "EXTERNAL-IP",
            "PORT(S)",
            "AGE",
        ],
        services,
    );
    let deployments = listing
        .deployments
        .iter()
        .map(|deployment| deployment_row(deployment, now))
        .collect();
    part(
        "Deployments".to_owned(),
        &["NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE"],
        deployments,
    );
    let autoscalers = listing
        .autoscalers
        .iter()
        .map(|autoscaler| autoscaler_row(autoscaler, now))
        .collect();
    let headings = [
        "NAME",
        "REFERENCE",
        "TARGETS",
        "MINPODS",
        "MAXPODS",
        "REPLICAS",
        "AGE",
    ];
    part(
        "HorizontalPodAutoscalers".to_owned(),
        &headings,
        autoscalers,
    );
    for deployment in &listing.deployments {
        let title = format!(
            "Rollout history of deployment/{}",
            name(&deployment.metadata)
        );
        part(
            title,
            &["REVISION", "CHANGE-CAUSE"],
            history_rows(deployment, &listing.replica_sets),
        );
    }
    lines
}

/// Columns as kubectl aligns them: three blanks apart.
pub fn aligned(headings: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let heading: Vec<String> = headings.iter().map(|&heading| heading.to_owned()).collect();
    let shown: Vec<&Vec<String>> = std::iter::once(&heading)
        .chain(rows.iter().take(ROWS_MAX))
        .collect();
    let width = |column: usize| {
        shown
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let line = |row: &&Vec<String>| {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}", width = *width))
            .collect();
        cells.join("   ").trim_end().to_owned()
    };
    let mut lines: Vec<String> = shown.iter().map(line).collect();
    if rows.len() > ROWS_MAX {
        lines.push(format!("… and {} more", rows.len() - ROWS_MAX));
    }
    lines
}

fn name(metadata: &ObjectMeta) -> String {
    metadata.name.clone().unwrap_or_default()
}

fn age(metadata: &ObjectMeta, now: Timestamp) -> String {
    created(metadata).map_or_else(|| "<unknown>".to_owned(), |then| human(then, now))
}

/// kubectl's way to say how long ago: `95s`, `3m12s`, `4h`, `2d`.
fn human(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(then).as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        ..120 => format!("{seconds}s"),
        120..600 if seconds % 60 == 0 => format!("{minutes}m"),
        120..600 => format!("{minutes}m{}s", seconds % 60),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 if minutes % 60 == 0 => format!("{hours}h"),
        10_800..28_800 => format!("{hours}h{}m", minutes % 60),
        28_800..172_800 => format!("{hours}h"),
        _ => format!("{days}d"),
    }
}

fn pod_row(pod: &Pod, now: Timestamp) -> Vec<String> {
    let status = pod.status.clone().unwrap_or_default();
    let containers = status.container_statuses.clone().unwrap_or_default();
    let ready = containers
        .iter()
        .filter(|container| container.ready)
        .count();
    let wanted = pod
        .spec
        .as_ref()
        .map_or(containers.len(), |spec| spec.containers.len());
    let restarts: i32 = containers
        .iter()
        .map(|container| container.restart_count)
        .sum();
    let last = containers
        .iter()
        .filter_map(|container| {
            container
                .last_state
                .as_ref()?
                .terminated
                .as_ref()?
                .finished_at
                .as_ref()
        })
        .max();
    let restarts = match last {
        Some(last) if restarts > 0 => format!("{restarts} ({} ago)", human(last.0, now)),
        _ => restarts.to_string(),
    };
    vec![
        name(&pod.metadata),
        format!("{ready}/{wanted}"),
        pod_status(pod),
        restarts,
        age(&pod.metadata, now),
    ]
}

/// The word that `kubectl get pods` shows: the most telling state of its containers.
pub fn pod_status(pod: &Pod) -> String {
    if is_terminating(pod) {
        return "Terminating".to_owned();
    }
    let status = pod.status.clone().unwrap_or_default();
    let phase = status
        .reason
        .or(status.phase)
        .unwrap_or_else(|| "Unknown".to_owned());
    let init = status.init_container_statuses.unwrap_or_default();
    let init_count = init.len();
    for (index, container) in init.into_iter().enumerate() {
        let state = container.state.unwrap_or_default();
        match (state.waiting, state.terminated) {
            (_, Some(dead)) if dead.exit_code == 0 => {}
            (_, Some(dead)) => {
                return format!("Init:{}", dead.reason.unwrap_or_else(|| "Error".to_owned()));
            }
            (Some(waiting), _)
                if waiting
                    .reason
                    .as_deref()
                    .is_some_and(|it| it != "PodInitializing") =>
            {
                return format!("Init:{}", waiting.reason.unwrap_or_default());
            }
            _ if container.started == Some(true) && container.ready => {}
            _ => return format!("Init:{index}/{init_count}"),
        }
    }
    let told = status
        .container_statuses
        .unwrap_or_default()
        .into_iter()
        .rev()
        .find_map(|container| {
            let state = container.state?;
            let waiting = state.waiting.and_then(|waiting| waiting.reason);
            waiting.or_else(|| {
                state.terminated.map(|dead| {
                    dead.reason
                        .unwrap_or_else(|| format!("ExitCode:{}", dead.exit_code))
                })
            })
        });
    told.unwrap_or(phase)
}

fn service_row(service: &Service, now: Timestamp) -> Vec<String> {
    let none = || "<none>".to_owned();
    let spec = service.spec.clone().unwrap_or_default();
    let type_ = spec.type_.unwrap_or_else(|| "ClusterIP".to_owned());
    let ports: Vec<String> = spec
        .ports
        .unwrap_or_default()
        .iter()
        .map(|port| {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            match port.node_port {
                Some(node_port) => format!("{}:{node_port}/{protocol}", port.port),
                None => format!("{}/{protocol}", port.port),
            }
        })
        .collect();
    let balancer = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref()?.ingress.clone());
    let mut outside: Vec<String> = spec.external_ips.unwrap_or_default();
    outside.extend(
        balancer
            .unwrap_or_default()
            .into_iter()
            .filter_map(|ingress| ingress.ip.or(ingress.hostname)),
    );
    outside.extend(spec.external_name);
    let external = match (outside.is_empty(), type_.as_str()) {
        (true, "LoadBalancer") => "<pending>".to_owned(),
        (true, _) => none(),
        (false, _) => outside.join(","),
    };
    let ports = if ports.is_empty() {
        none()
    } else {
        ports.join(",")
    };
    let ip = spec
        .cluster_ip
        .filter(|ip| !ip.is_empty())
        .unwrap_or_else(none);
    vec![
        name(&service.metadata),
        type_,
        ip,
        external,
        ports,
        age(&service.metadata, now),
    ]
}

fn deployment_row(deployment: &Deployment, now: Timestamp) -> Vec<String> {
    let status = deployment.status.clone().unwrap_or_default();
    let wanted = deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1);
    vec![
        name(&deployment.metadata),
        format!("{}/{wanted}", status.ready_replicas.unwrap_or_default()),
        status.updated_replicas.unwrap_or_default().to_string(),
        status.available_replicas.unwrap_or_default().to_string(),
        age(&deployment.metadata, now),
    ]
}

fn autoscaler_row(autoscaler: &HorizontalPodAutoscaler, now: Timestamp) -> Vec<String> {
    let spec = autoscaler.spec.clone().unwrap_or_default();
    let status = autoscaler.status.clone().unwrap_or_default();
    let current = status.current_metrics.unwrap_or_default();
    let targets: Vec<String> = spec
        .metrics
        .unwrap_or_default()
        .iter()
        .filter_map(|metric| metric_cell(metric, &current))
        .collect();
    let targets = if targets.is_empty() {
        "<unknown>".to_owned()
    } else {
        targets.join(", ")
    };
    vec![
        name(&autoscaler.metadata),
        format!(
            "{}/{}",
            spec.scale_target_ref.kind, spec.scale_target_ref.name
        ),
        targets,
        spec.min_replicas.unwrap_or(1).to_string(),
        spec.max_replicas.to_string(),
        status.current_replicas.unwrap_or_default().to_string(),
        age(&autoscaler.metadata, now),
    ]
}

/// `cpu: 3%/70%`; other kinds of metrics by their name only.
fn metric_cell(metric: &MetricSpec, current: &[MetricStatus]) -> Option<String> {
    let Some(wanted) = &metric.resource else {
        return Some(metric.type_.clone());
    };
    let now = current
        .iter()
        .filter_map(|status| status.resource.as_ref())
        .find(|status| status.name == wanted.name);
    let (now, target) = match wanted.target.average_utilization {
        Some(target) => {
            let now = now
                .and_then(|status| status.current.average_utilization)
                .map(|percent| format!("{percent}%"));
            (now, format!("{target}%"))
        }
        None => {
            let now = now
                .and_then(|status| status.current.average_value.as_ref())
                .map(|value| value.0.clone());
            (now, wanted.target.average_value.as_ref()?.0.clone())
        }
    };
    Some(format!(
        "{}: {}/{target}",
        wanted.name,
        now.unwrap_or_else(|| "<unknown>".to_owned())
    ))
}

fn history_rows(deployment: &Deployment, replica_sets: &[ReplicaSet]) -> Vec<Vec<String>> {
    let uid = deployment.metadata.uid.as_deref();
    let mut revisions: Vec<(i64, String)> = replica_sets
        .iter()
        .filter(|set| uid.is_some() && controller_uid(&set.metadata) == uid)
        .filter_map(|set| {
            let revision = annotation(&set.metadata, REVISION_ANNOTATION)?
                .parse()
                .ok()?;
            let cause = annotation(&set.metadata, "kubernetes.io/change-cause").unwrap_or("<none>");
            Some((revision, shortened(cause)))
        })
        .collect();
    revisions.sort_unstable();
    revisions
        .into_iter()
        .map(|(revision, cause)| vec![revision.to_string(), cause])
        .collect()
}

/// The events that tell something, oldest first, as `kubectl get events` shows them.
pub fn event_lines(events: &[&Event], now: Timestamp, at_most: usize) -> Vec<String> {
    let mut events: Vec<&&Event> = events
        .iter()
        .filter(|event| event.type_.as_deref() == Some("Warning"))
        .collect();
    events.sort_by_key(|event| last_seen(event));
    let skipped = events.len().saturating_sub(at_most);
    let rows: Vec<Vec<String>> = events
        .into_iter()
        .skip(skipped)
        .map(|event| {
            let of = &event.involved_object;
            vec![
                last_seen(event).map_or_else(|| "<unknown>".to_owned(), |then| human(then, now)),
                event.reason.clone().unwrap_or_default(),
                format!(
                    "{}/{}",
                    of.kind.as_deref().unwrap_or_default().to_lowercase(),
                    of.name.as_deref().unwrap_or_default()
                ),
                shortened(message(event)),
            ]
        })
        .collect();
    if rows.is_empty() {
        Vec::new()
    } else {
        aligned(&["LAST SEEN", "REASON", "OBJECT", "MESSAGE"], &rows)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ages_are_said_as_kubectl_does() {
        let then = Timestamp::UNIX_EPOCH;
        let ages = [
            0, 119, 120, 192, 600, 10_799, 10_800, 11_100, 28_800, 172_799, 172_800,
        ];
        let said = ages.map(|seconds| human(then, Timestamp::from_second(seconds).unwrap()));
        assert_eq!(
            said,
            [
                "0s", "119s", "2m", "3m12s", "10m", "179m", "3h", "3h5m", "8h", "47h", "2d"
            ]
        );
    }

    #[test]
    fn columns_are_aligned_and_long_tables_cut() {
        let rows: Vec<Vec<String>> = (0..50)
            .map(|row| vec!["x".repeat(row % 3 + 1), row.to_string()])
            .collect();
        let lines = aligned(&["NAME", "N"], &rows);
        assert_eq!(lines[0], "NAME   N");
        assert_eq!(lines[3], "xxx    2");
        assert_eq!(lines.last().unwrap(), "… and 10 more");
    }

    #[test]
    fn a_listing_shows_what_kubectl_shows() {
        let listing = Listing {
            services: vec![serde_json::from_value(json!({"metadata": {"name": "web", "creationTimestamp": "2026-11-23T10:00:00Z"},
                "spec": {"type": "NodePort", "clusterIP": "10.96.1.2", "ports": [{"port": 80, "nodePort": 30008, "protocol": "TCP"}]}})).unwrap()],
            autoscalers: vec![serde_json::from_value(json!({"metadata": {"name": "web"},
                "spec": {"minReplicas": 2, "maxReplicas": 10, "scaleTargetRef": {"kind": "Deployment", "name": "web"},
                    "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}}]},
                "status": {"desiredReplicas": 3, "currentReplicas": 3}})).unwrap()],
            ..Listing::default()
        };
        let text = lines(&listing, "2026-11-23T10:01:00Z".parse().unwrap()).join("\n");
        assert!(
            text.contains("web    NodePort   10.96.1.2    <none>        80:30008/TCP   60s"),
            "{text}"
        );
        assert!(
            text.contains("Deployment/web   cpu: <unknown>/70%   2         10        3"),
            "{text}"
        );
    }

    #[test]
    fn a_pod_shows_its_most_telling_state() {
        let status = |status: serde_json::Value| {
            pod_status(&serde_json::from_value(json!({"metadata": {}, "status": status})).unwrap())
        };
        let waiting = json!({"phase": "Running", "containerStatuses": [{"name": "a", "image": "", "imageID": "", "ready": false, "restartCount": 1,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]});
        assert_eq!(status(waiting), "CrashLoopBackOff");
        let init = json!({"phase": "Pending", "initContainerStatuses": [{"name": "a", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"running": {}}}]});
        assert_eq!(status(init), "Init:0/1");
        assert_eq!(
            status(json!({"phase": "Failed", "reason": "Evicted"})),
            "Evicted"
        );
        assert_eq!(status(json!({})), "Unknown");
    }
}
