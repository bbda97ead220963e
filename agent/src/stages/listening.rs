//! Services that a build has changed and no smoke test asks: whether anybody listens where they lead.
//!
//! A Service that selects nothing, and a named port that no container has, are found in the plan; where a number leads is
//! known only to who connects. One that the build leaves as it is, before a workload that it changes, is asked where it answered
//! before: what nobody listened to already is no release's fault.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::ListParams;
use serde_json::Value;
use tokio::time::Instant;

use super::{Scope, StageError, StageResult};
use crate::builds::Cause;
use crate::cluster::observe::ask;
use crate::cluster::proxy::{self, Asked, Place};
use crate::cluster::{Cluster, wiring};
use crate::manifests::{kind, name};
use crate::release::{AppliedObject, Change, Release};

/// A program without a readiness probe may still be starting: as long as a smoke test waits where pipeline.yaml says nothing.
const REFUSED_FOR: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(1);
/// Nobody waits longer for a deploy to begin.
const HEARD_WITHIN: Duration = Duration::from_secs(2);

/// Asks each such Service by a `GET /` at each of its TCP ports. Fails where all of them are refused for `REFUSED_FOR`.
pub async fn run(
    scope: &Scope<'_>,
    release: &Release,
    touched: &[AppliedObject],
    heard: &BTreeSet<String>,
) -> StageResult<()> {
    let unasked = unasked(release, |service| {
        let mut touched = touched.iter().filter(|it| it.change != Change::Unchanged);
        heard.contains(service) || touched.any(|it| it.kind == "Service" && it.name == service)
    });
    if unasked.is_empty() {
        return Ok(());
    }
    let cluster = scope.cluster().await?;
    // Nobody has said of one that stands as it was how long its program takes to begin.
    let as_long_as_a_rollout = Duration::from_secs(release.verify.timeout_seconds);
    let checks = unasked.iter().map(|service| {
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let patience = match heard.contains(name) {
            true => as_long_as_a_rollout.max(REFUSED_FOR),
            false => REFUSED_FOR,
        };
        check(scope, &cluster, service, patience)
    });
    tokio::select! {
        biased;
        () = scope.cancel.cancelled() => Err(StageError::Canceled),
        checked = join_all(checks) => checked.into_iter().collect(),
    }
}

/// Before the apply: names of Services that the plan leaves as they are, before pods that it replaces, and that somebody answers.
pub async fn heard(scope: &Scope<'_>, release: &Release) -> BTreeSet<String> {
    let is_planned = |kind: &str, name: &str, change| {
        let shown = format!("{}/{name}", kind.to_lowercase());
        let mut plan = release.plan.iter();
        plan.any(|planned| planned.object == shown && planned.change == change)
    };
    let replaced: Vec<Value> = release
        .objects
        .iter()
        .filter(|object| is_planned(kind(object), name(object), Change::Changed))
        .cloned()
        .collect();
    let mut services = unasked(release, |service| {
        is_planned("Service", service, Change::Unchanged)
    });
    services.retain(|service| leads_to(service, &replaced));
    let ask = async {
        let Ok(cluster) = scope.cluster().await else {
            return BTreeSet::new();
        };
        let asked = services.iter().map(async |service| {
            let places = tcp_ports(service).map(|port| Place::of_service_port(service, port));
            let places: Vec<Place> = places.collect();
            let answers = places.iter().map(|place| proxy::get(&cluster, place, "/"));
            let answers = join_all(answers).await;
            let mut answers = answers.iter();
            answers
                .any(|asked| matches!(asked, Asked::Answered(_)))
                .then(|| service.metadata.name.clone())?
        });
        join_all(asked).await.into_iter().flatten().collect()
    };
    let heard = tokio::time::timeout(HEARD_WITHIN, ask).await;
    heard.unwrap_or_default()
}

async fn check(
    scope: &Scope<'_>,
    cluster: &Cluster,
    service: &Service,
    patience: Duration,
) -> StageResult<()> {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    let ports: Vec<&ServicePort> = tcp_ports(service).collect();
    let begun = Instant::now();
    loop {
        let places: Vec<Place> = ports
            .iter()
            .map(|port| Place::of_service_port(service, port))
            .collect();
        let answers = join_all(places.iter().map(|place| proxy::get(cluster, place, "/"))).await;
        let (mut refused, mut unseen) = (Vec::new(), None);
        let mut somebody_is_there = false;
        for (port, asked) in ports.iter().zip(answers) {
            match asked {
                Asked::NobodyThere(why) if is_the_pods_refusal(&why) => {
                    refused.push((port.port, why));
                }
                Asked::Answered(_) | Asked::NobodyThere(_) => somebody_is_there = true,
                Asked::Blind(why) | Asked::Unreached(why) | Asked::Forbidden(why) => {
                    unseen = Some(why);
                }
                Asked::NoEndpoints | Asked::Gone => unseen = Some("no pod is ready".to_owned()),
            }
        }
        if somebody_is_there {
            for (port, why) in &refused {
                scope.log.line(format!(
                    "Note: nobody listens where port {port} of service/{name} leads: {why}"
                ));
            }
            return Ok(());
        }
        if begun.elapsed() < patience {
            tokio::time::sleep(PAUSE).await;
            continue;
        }
        return match (unseen, refused.first()) {
            (None, Some((port, why))) if !may_be_a_policy(cluster).await => {
                Err(StageError::Failed(nobody_listens(name, *port, why)))
            }
            (unseen, refused) => {
                let why = unseen.or(refused.map(|(_, why)| why.clone()));
                scope.log.line(format!(
                    "Note: whether somebody listens where service/{name} leads could not be seen: {}",
                    why.unwrap_or_default()
                ));
                Ok(())
            }
        };
    }
}

/// Not that of a proxy between the API server and its nodes.
fn is_the_pods_refusal(why: &str) -> bool {
    why.contains("dial tcp") && why.contains("connection refused") && !why.contains("proxy")
}

/// Some network plugins reject what a NetworkPolicy forbids, which looks the same from afar.
async fn may_be_a_policy(cluster: &Cluster) -> bool {
    let few = ListParams::default().limit(1);
    let policies = cluster.api::<NetworkPolicy>();
    let policies = ask("list networkpolicies", || policies.list(&few)).await;
    policies.map_or(true, |policies| !policies.items.is_empty())
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

/// Services of which no smoke test asks and that lead to pods of our own workloads by an address of their own. One without an
/// address (`clusterIP: None`) only gives names to pods, and its port is often made up.
fn unasked(release: &Release, is_meant: impl Fn(&str) -> bool) -> Vec<Service> {
    let is_tested = |service: &str| {
        let mut tests = release.smoke_tests.iter();
        tests.any(|test| test.service.as_deref() == Some(service))
    };
    release
        .objects
        .iter()
        .filter(|object| kind(object) == "Service")
        .filter(|object| is_meant(name(object)) && !is_tested(name(object)))
        .filter_map(|object| serde_json::from_value::<Service>(object.clone()).ok())
        .filter(|service| leads_to(service, &release.objects))
        .filter(|service| tcp_ports(service).next().is_some())
        .collect()
}

fn leads_to(service: &Service, objects: &[Value]) -> bool {
    let spec = service.spec.as_ref();
    let selector = spec.and_then(|spec| spec.selector.as_ref());
    let is_headless = spec.is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None"));
    let with_pods = objects
        .iter()
        .filter(|object| object["spec"]["replicas"] != 0);
    !is_headless
        && selector.is_some_and(|selector| {
            !selector.is_empty() && wiring::selects_a_template(with_pods, selector)
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pipeline::SmokeTest;

    fn release(objects: Vec<Value>) -> Release {
        let smoke_test: SmokeTest =
            serde_json::from_value(json!({"get": "/", "service": "asked"})).unwrap();
        Release {
            objects,
            smoke_tests: vec![smoke_test],
            ..Release::default()
        }
    }

    #[test]
    fn a_refusal_is_the_pods_own_or_counts_for_nothing() {
        for (why, counts) in [
            ("dial tcp 10.1.2.3:9999: connect: connection refused", true),
            ("dial tcp [fd00::7]:9999: connect: connection refused", true),
            (
                "proxy error: dial tcp 10.0.0.9:8090: connect: connection refused",
                false,
            ),
            (
                "dial unix /run/konnectivity: connect: connection refused",
                false,
            ),
            ("EOF", false),
        ] {
            assert_eq!(is_the_pods_refusal(why), counts, "{why}");
        }
    }

    #[test]
    fn only_changed_services_with_an_address_that_lead_to_our_own_pods_are_asked() {
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
            service("as-before", json!({"selector": web, "ports": port})),
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
        let touched: Vec<AppliedObject> = objects
            .iter()
            .map(|object| AppliedObject {
                api_version: String::new(),
                kind: object["kind"].as_str().unwrap().to_owned(),
                namespace: "hello".to_owned(),
                name: object["metadata"]["name"].as_str().unwrap().to_owned(),
                uid: String::new(),
                generation: 0,
                change: match object["metadata"]["name"] == "as-before" {
                    true => Change::Unchanged,
                    false => Change::Changed,
                },
            })
            .collect();
        let changed = |service: &str| {
            let mut touched = touched.iter();
            touched.any(|it| it.name == service && it.change == Change::Changed)
        };
        let unasked = unasked(&release(objects), changed);
        let names: Vec<_> = unasked
            .iter()
            .map(|service| service.metadata.name.as_deref().unwrap())
            .collect();
        assert_eq!(names, ["plain"]);
    }
}
