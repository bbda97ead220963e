//! Wiring: whether the objects of a set lead to each other: Services to pods, named ports to containers, Ingresses to
//! Services.
//!
//! A rollout is complete although its Service leads nowhere, and no tool of Kubernetes says so. Pure: what must be asked of
//! the cluster comes out as a question, `plan` asks it.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::builds::Cause;
use crate::manifests::render::template;
use crate::manifests::{display_name, kind, name, text};

/// Labels that no template has: the controller of a StatefulSet writes them on each pod.
const OF_STATEFUL_SETS: [&str; 2] = [
    "apps.kubernetes.io/pod-index",
    "statefulset.kubernetes.io/pod-name",
];

/// A Service whose selector matches no pod template of the set: wrong, unless pods that are live carry these labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmatched {
    /// `service/hello-axum`
    pub service: String,
    /// `app=hello-axum,tier=web`, as the API server takes it.
    pub selector: String,
}

pub fn unmatched_services(objects: &[Value]) -> Vec<Unmatched> {
    services(objects)
        .filter_map(|service| {
            let selector = selector(service)?;
            let is_matched = templates(objects).any(|template| carries(template, selector));
            (!is_matched).then(|| Unmatched {
                service: display_name(service),
                selector: written(selector),
            })
        })
        .collect()
}

/// Whether a workload that goes on has just these labels in its template: then all its pods carry them.
pub fn selects_a_template<'a>(
    objects: impl IntoIterator<Item = &'a Value>,
    selector: &BTreeMap<String, String>,
) -> bool {
    let goes_on =
        |object: &&Value| matches!(kind(object), "Deployment" | "StatefulSet" | "DaemonSet");
    let of_workloads = objects.into_iter().filter(goes_on).filter_map(template);
    of_workloads.into_iter().any(|template| {
        let labels = template.pointer("/metadata/labels");
        let label = |key: &str| labels.and_then(|labels| labels.get(key)?.as_str());
        selector
            .iter()
            .all(|(key, value)| label(key) == Some(value))
    })
}

/// A workload before the release, and as it would be.
#[derive(Debug, Clone)]
pub struct Replaced {
    pub before: Value,
    /// Null where it goes with the release.
    pub after: Value,
}

impl Replaced {
    /// Whether a pod is one that goes, and carries what a Service selects, as its successor will not.
    pub fn takes_away(&self, selector: &str, labels: &BTreeMap<String, String>) -> bool {
        let selector = as_map(selector.split(',').filter_map(|pair| pair.split_once('=')));
        let labels = as_map(labels);
        let own = self.before.pointer("/spec/selector/matchLabels");
        let is_own = own.and_then(Value::as_object).is_some_and(|own| {
            !own.is_empty()
                && own
                    .iter()
                    .all(|(key, value)| labels.get(key) == Some(value))
        });
        let strategy = self.after.pointer("/spec/updateStrategy");
        let stays = strategy.is_some_and(|strategy| {
            let partition = strategy.pointer("/rollingUpdate/partition");
            text(strategy, "/type") == "OnDelete"
                || partition.and_then(Value::as_i64).unwrap_or(0) > 0
        });
        let has = |workload| template(workload).is_some_and(|it| carries(it, &selector));
        is_own && !stays && has(&self.before) && !has(&self.after)
    }
}

fn as_map<K: Into<String>, V: Into<String>>(
    pairs: impl IntoIterator<Item = (K, V)>,
) -> Map<String, Value> {
    let pairs = pairs.into_iter();
    pairs
        .map(|(key, value)| (key.into(), Value::String(value.into())))
        .collect()
}

/// What an unmatched Service is, where no live pod carries its labels either.
pub fn selects_nothing(unmatched: &Unmatched) -> Cause {
    let Unmatched { service, selector } = unmatched;
    let sentence = format!(
        "{service} selects {selector}, and no pod template of this release and no live pod carries that"
    );
    Cause::new("service_selects_nothing", sentence)
        .object(service)
        .hint("let the Service's selector match the labels of the pod template")
}

/// Services whose named targetPort no container of the pods that they select has.
pub fn unknown_ports(objects: &[Value]) -> Vec<Cause> {
    let mut causes = Vec::new();
    for service in services(objects) {
        let Some(selector) = selector(service) else {
            continue;
        };
        let matched: Vec<&Value> = templates(objects)
            .filter(|template| carries(template, selector))
            .collect();
        for port in list(service, "/spec/ports") {
            let wanted = text(port, "/targetPort");
            if matched.is_empty() || wanted.is_empty() {
                continue;
            }
            let known: Vec<&str> = matched
                .iter()
                .flat_map(|template| port_names(template))
                .collect();
            if !known.contains(&wanted) {
                let shown = display_name(service);
                let known = if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                };
                let sentence = format!(
                    "{shown} leads to the port {wanted:?}, and no container of its pods has a port of that name (they have {known})"
                );
                causes.push(
                    Cause::new("service_port_unknown", sentence)
                        .object(shown)
                        .hint("give the container's port that name, or write its number in `targetPort`"),
                );
            }
        }
    }
    causes
}

/// An Ingress's way to a Service that the set does not hold: it must be live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    pub ingress: String,
    pub service: String,
}

/// Backends outside of the set, and what is wrong with those within it.
pub fn backends(objects: &[Value]) -> (Vec<Backend>, Vec<Cause>) {
    let (mut outside, mut causes) = (Vec::new(), Vec::new());
    for ingress in objects.iter().filter(|object| kind(object) == "Ingress") {
        let default = ingress.pointer("/spec/defaultBackend");
        let paths = list(ingress, "/spec/rules")
            .into_iter()
            .flat_map(|rule| list(rule, "/http/paths"))
            .filter_map(|path| path.get("backend"));
        for backend in default.into_iter().chain(paths) {
            let service = text(backend, "/service/name");
            if service.is_empty() {
                continue;
            }
            let shown = display_name(ingress);
            let mut all = objects.iter().filter(|object| kind(object) == "Service");
            match all.find(|object| name(object) == service) {
                None => outside.push(Backend {
                    ingress: shown,
                    service: service.to_owned(),
                }),
                Some(found) if !has_port(found, backend) => {
                    let port = backend
                        .pointer("/service/port")
                        .cloned()
                        .unwrap_or_default();
                    let port = port
                        .get("name")
                        .or(port.get("number"))
                        .cloned()
                        .unwrap_or_default();
                    causes.push(
                        Cause::new("ingress_backend_missing", format!("{shown} leads to port {port} of service/{service}, which it does not have"))
                            .object(shown)
                            .hint("name a port of the Service"),
                    );
                }
                Some(_) => {}
            }
        }
    }
    outside.dedup();
    (outside, causes)
}

/// A Service that a smoke test asks, and that this very release takes away.
pub fn asked_and_removed(service: &str) -> Cause {
    let sentence =
        format!("the smoke test asks service/{service}, which the manifests hold no more");
    Cause::new("smoke_no_endpoint", sentence)
        .object(format!("service/{service}"))
        .hint("put the Service back into the manifests, or let the smoke test ask another")
}

/// A backend that this very release takes away.
pub fn backend_removed(backend: &Backend) -> Cause {
    let Backend { ingress, service } = backend;
    let sentence =
        format!("{ingress} leads to service/{service}, which the manifests hold no more");
    Cause::new("ingress_backend_missing", sentence)
        .object(ingress)
        .hint("put the Service back into the manifests, or let the Ingress lead to another")
}

pub fn backend_missing(backend: &Backend) -> Cause {
    let Backend { ingress, service } = backend;
    Cause::new("ingress_backend_missing", format!("{ingress} leads to service/{service}, which is neither in this release nor in the namespace"))
        .object(ingress)
        .hint("add the Service to the manifests, or correct its name")
}

fn has_port(service: &Value, backend: &Value) -> bool {
    let (wanted_name, wanted_number) = (
        text(backend, "/service/port/name"),
        backend
            .pointer("/service/port/number")
            .and_then(Value::as_i64),
    );
    list(service, "/spec/ports").into_iter().any(|port| {
        let number = port.get("port").and_then(Value::as_i64);
        (!wanted_name.is_empty() && text(port, "/name") == wanted_name)
            || (wanted_number.is_some() && number == wanted_number)
    })
}

fn services(objects: &[Value]) -> impl Iterator<Item = &Value> {
    let of_names = |object: &&Value| text(object, "/spec/type") != "ExternalName";
    objects
        .iter()
        .filter(|object| kind(object) == "Service")
        .filter(of_names)
}

fn templates(objects: &[Value]) -> impl Iterator<Item = &Value> {
    objects.iter().filter_map(template)
}

/// A Service without a selector has endpoints that somebody else writes.
fn selector(service: &Value) -> Option<&Map<String, Value>> {
    service
        .pointer("/spec/selector")?
        .as_object()
        .filter(|selector| !selector.is_empty())
}

fn carries(template: &Value, selector: &Map<String, Value>) -> bool {
    let labels = template
        .pointer("/metadata/labels")
        .and_then(Value::as_object);
    selector.iter().all(|(key, value)| {
        OF_STATEFUL_SETS.contains(&key.as_str())
            || labels.and_then(|labels| labels.get(key)) == Some(value)
    })
}

fn written(selector: &Map<String, Value>) -> String {
    let pairs: Vec<String> = selector
        .iter()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    pairs.join(",")
}

fn port_names(template: &Value) -> Vec<&str> {
    ["/spec/containers", "/spec/initContainers"]
        .into_iter()
        .flat_map(|path| list(template, path))
        .flat_map(|container| list(container, "/ports"))
        .map(|port| text(port, "/name"))
        .filter(|name| !name.is_empty())
        .collect()
}

fn list<'a>(object: &'a Value, pointer: &str) -> Vec<&'a Value> {
    let items = object.pointer(pointer).and_then(Value::as_array);
    items.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(selector: &str, port: &Value, backend: &Value) -> Vec<Value> {
        vec![
            json!({"kind": "Service", "metadata": {"name": "web"},
                "spec": {"selector": {"app": selector}, "ports": [{"name": "http", "port": 80, "targetPort": port}]}}),
            json!({"kind": "Deployment", "metadata": {"name": "web"}, "spec": {"template": {
                "metadata": {"labels": {"app": "web", "tier": "front"}},
                "spec": {"containers": [{"name": "a", "ports": [{"name": "web", "containerPort": 5000}]}]}}}}),
            json!({"kind": "Ingress", "metadata": {"name": "web"}, "spec": {"defaultBackend": {"service": backend}}}),
        ]
    }

    fn good() -> Value {
        json!({"name": "web", "port": {"number": 80}})
    }

    #[test]
    fn a_set_that_leads_to_itself_is_well() {
        for port in [json!(5000), json!("web"), Value::Null] {
            let set = set("web", &port, &good());
            assert_eq!(unmatched_services(&set), []);
            assert_eq!(unknown_ports(&set), []);
            assert_eq!(backends(&set), (Vec::new(), Vec::new()));
        }
    }

    #[test]
    fn a_selector_that_matches_no_template_is_a_question_to_the_cluster() {
        let found = unmatched_services(&set("wbe", &json!(5000), &good()));
        assert_eq!(found[0].selector, "app=wbe");
        let cause = selects_nothing(&found[0]);
        assert!(
            cause
                .sentence
                .starts_with("service/web selects app=wbe, and no pod template"),
            "{}",
            cause.sentence
        );
    }

    #[test]
    fn a_named_port_that_no_container_has_is_named_with_those_that_there_are() {
        let causes = unknown_ports(&set("web", &json!("http"), &good()));
        assert!(
            causes[0].sentence.contains("(they have web)"),
            "{}",
            causes[0].sentence
        );
        assert_eq!(causes[0].id, "service_port_unknown");
    }

    #[test]
    fn an_ingress_must_lead_to_a_service_and_one_of_its_ports() {
        let (outside, causes) = backends(&set(
            "web",
            &json!(1),
            &json!({"name": "other", "port": {"number": 80}}),
        ));
        assert_eq!((outside[0].service.as_str(), causes.len()), ("other", 0));
        let (outside, causes) = backends(&set(
            "web",
            &json!(1),
            &json!({"name": "web", "port": {"name": "https"}}),
        ));
        assert_eq!((outside.len(), causes.len()), (0, 1));
    }
}
