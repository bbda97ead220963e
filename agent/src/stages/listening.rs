//! Services that no smoke test asks: whether anybody listens where they lead.
//!
//! A Service that selects nothing, and a named port that no container has, are found in the plan; where a number leads is
//! known only to who connects. What counts is that the pod's kernel refuses every port of the Service: a port that is kept
//! for later is told of and is no fault.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Service, ServicePort};
use serde_json::Value;
use tokio::time::Instant;

use super::{Scope, StageError, StageResult};
use crate::builds::Cause;
use crate::cluster::Cluster;
use crate::cluster::proxy::{self, Asked, Place};
use crate::release::Release;

/// The Service still leads to old pods for up to a second after the rollout, and who has just become ready may bind late.
const REFUSED_FOR: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(500);

/// Asks each such Service once; again only where it is refused.
pub async fn run(scope: &Scope<'_>, release: &Release) -> StageResult<()> {
    let unasked = unasked(release);
    if unasked.is_empty() {
        return Ok(());
    }
    let cluster = scope.cluster().await?;
    for service in unasked {
        tokio::select! {
            biased;
            () = scope.cancel.cancelled() => return Err(StageError::Canceled),
            checked = check(scope, &cluster, &service) => checked?,
        }
    }
    Ok(())
}

async fn check(scope: &Scope<'_>, cluster: &Cluster, service: &Service) -> StageResult<()> {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    let ports: Vec<&ServicePort> = tcp_ports(service).collect();
    let begun = Instant::now();
    loop {
        let mut refused = Vec::new();
        for port in &ports {
            let place = Place::of_service_port(service, port);
            match proxy::get(cluster, &place, "/").await {
                Asked::NobodyThere(why) if why.contains("connection refused") => {
                    refused.push((port.port, why));
                }
                // Somebody is there, whatever they speak; or we cannot know.
                _ => {}
            }
        }
        let is_time_up = begun.elapsed() >= REFUSED_FOR;
        match refused.first() {
            None => return Ok(()),
            Some((port, why)) if is_time_up && refused.len() == ports.len() => {
                return Err(StageError::Failed(nobody_listens(name, *port, why)));
            }
            Some(_) if is_time_up => {
                for (port, why) in &refused {
                    scope.log.line(format!(
                        "Note: nobody listens where port {port} of service/{name} leads: {why}"
                    ));
                }
                return Ok(());
            }
            Some(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

fn nobody_listens(service: &str, port: i32, why: &str) -> Cause {
    let sentence = format!(
        "nobody listens where service/{service} leads: its port {port} was refused ({why})"
    );
    Cause::new("smoke_no_answer", sentence)
        .object(format!("service/{service}"))
        .hint("let targetPort be the port that the program listens on, on all addresses of its pod (0.0.0.0)")
}

fn tcp_ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter());
    ports
        .flatten()
        .filter(|port| port.protocol.as_deref().is_none_or(|it| it == "TCP"))
}

/// Services of the release that lead to pods of its own workloads by an address of their own. One without an address
/// (`clusterIP: None`) only gives names to pods, and its port is often made up.
fn unasked(release: &Release) -> Vec<Service> {
    let asked = |service: &Service| {
        let name = service.metadata.name.as_deref();
        let mut tests = release.smoke_tests.iter();
        tests.any(|test| test.service.as_deref() == name)
    };
    let leads_to_ours = |service: &Service| {
        let spec = service.spec.as_ref();
        let selector = spec.and_then(|spec| spec.selector.as_ref());
        let is_headless = spec.is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None"));
        !is_headless
            && selector.is_some_and(|selector| {
                !selector.is_empty()
                    && labels_of_pods(&release.objects).any(|labels| {
                        let mut wanted = selector.iter();
                        wanted.all(|(key, value)| labels[key].as_str() == Some(value))
                    })
            })
    };
    release
        .objects
        .iter()
        .filter(|object| object["kind"] == "Service")
        .filter_map(|object| serde_json::from_value::<Service>(object.clone()).ok())
        .filter(|service| !asked(service) && leads_to_ours(service))
        .filter(|service| tcp_ports(service).next().is_some())
        .collect()
}

/// Of workloads that go on: a Job's pod may have ended.
fn labels_of_pods(objects: &[Value]) -> impl Iterator<Item = &Value> {
    let goes_on = |object: &&Value| {
        let kind = object["kind"].as_str();
        kind.is_some_and(|kind| matches!(kind, "Deployment" | "StatefulSet" | "DaemonSet"))
            && object["spec"]["replicas"] != 0
    };
    objects
        .iter()
        .filter(goes_on)
        .map(|object| &object["spec"]["template"]["metadata"]["labels"])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pipeline::{FirstRelease, Rollback, SmokeTest, Verify};

    fn release(objects: Vec<Value>) -> Release {
        let smoke_test: SmokeTest =
            serde_json::from_value(json!({"get": "/", "service": "asked"})).unwrap();
        Release {
            id: 1,
            environment: "hello".to_owned(),
            build_id: 1,
            commit: String::new(),
            image: String::new(),
            namespace: "hello".to_owned(),
            objects,
            plan: Vec::new(),
            prune: Vec::new(),
            unwell: Vec::new(),
            pinned: std::collections::BTreeMap::new(),
            smoke_tests: vec![smoke_test],
            verify: Verify::default(),
            rollback: Rollback::Automatic,
            first_release: FirstRelease::Leave,
            set_hash: String::new(),
        }
    }

    #[test]
    fn only_services_with_an_address_that_lead_to_our_own_pods_are_asked() {
        let service = |name: &str, spec: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec});
        let (web, port) = (json!({"app": "web"}), json!([{"port": 80}]));
        let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"template": {"metadata": {"labels": {"app": "web", "tier": "front"}}}}});
        let none_wanted = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "idle"},
            "spec": {"replicas": 0, "template": {"metadata": {"labels": {"app": "idle"}}}}});
        let objects = vec![
            deployment,
            none_wanted,
            service("plain", json!({"selector": web, "ports": port})),
            service("asked", json!({"selector": web, "ports": port})),
            service("idle", json!({"selector": {"app": "idle"}, "ports": port})),
            service(
                "another",
                json!({"selector": {"app": "other"}, "ports": port}),
            ),
            service("by-hand", json!({"ports": port})),
            service(
                "names",
                json!({"clusterIP": "None", "selector": web, "ports": port}),
            ),
            service(
                "udp",
                json!({"selector": web, "ports": [{"port": 53, "protocol": "UDP"}]}),
            ),
        ];
        let unasked = unasked(&release(objects));
        let names: Vec<_> = unasked
            .iter()
            .map(|service| service.metadata.name.as_deref().unwrap())
            .collect();
        assert_eq!(names, ["plain"]);
    }
}
