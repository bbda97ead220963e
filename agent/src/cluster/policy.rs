//! Policy: what an environment allows in a release. Manifests in, nothing or one cause out, before any API write.
//!
//! The operator's word (agent.yaml) against the repository's. It is about the level "baseline" of the pod security
//! standards, with fewer capabilities: the only one that may be added is NET_BIND_SERVICE, as in "restricted".
//! Custom resources are judged by their kind alone: who allows one trusts its controller. Pure: no IO.

use std::collections::HashSet;

use serde_json::Value;

use crate::builds::Cause;
use crate::config::Environment;
use crate::manifests::render::ACCOUNT_LABEL;
use crate::manifests::{self, Manifest, pod_pointer, text};

/// Kinds that Kubernetes itself has, with their group: `Job` in agent.yaml is never somebody else's `Job`.
const GROUPS: [(&str, &str); 20] = [
    ("ConfigMap", ""),
    ("CronJob", "batch"),
    ("CustomResourceDefinition", "apiextensions.k8s.io"),
    ("DaemonSet", "apps"),
    ("Deployment", "apps"),
    ("HorizontalPodAutoscaler", "autoscaling"),
    ("Ingress", "networking.k8s.io"),
    ("Job", "batch"),
    ("LimitRange", ""),
    ("NetworkPolicy", "networking.k8s.io"),
    ("PersistentVolumeClaim", ""),
    ("Pod", ""),
    ("PodDisruptionBudget", "policy"),
    ("ResourceQuota", ""),
    ("Role", "rbac.authorization.k8s.io"),
    ("RoleBinding", "rbac.authorization.k8s.io"),
    ("Secret", ""),
    ("Service", ""),
    ("ServiceAccount", ""),
    ("StatefulSet", "apps"),
];

const CAPABILITY_ALLOWED: &str = "NET_BIND_SERVICE";

/// Whether the environment allows every object; else `policy_denied`, with object, file and field.
pub fn check(environment: &Environment, objects: &[Manifest]) -> Result<(), Cause> {
    let accounts: HashSet<&str> = objects
        .iter()
        .filter(|manifest| manifest.kind() == "ServiceAccount")
        .map(Manifest::name)
        .collect();
    for manifest in objects {
        check_one(environment, &accounts, manifest).map_err(|problem| {
            let sentence = format!("{} in {}: {problem}", manifest.display_name(), manifest.place());
            Cause::new("policy_denied", sentence)
                .object(manifest.display_name())
                .hint(format!(
                    "change the manifest, or ask the operator of environment {} whether agent.yaml can allow it",
                    environment.name
                ))
        })?;
    }
    Ok(())
}

/// A live service account that no release made could hold any rights.
pub fn check_live_account(
    environment: &Environment,
    name: &str,
    live: &Value,
) -> Result<(), Cause> {
    let (key, value) = ACCOUNT_LABEL;
    let label = live
        .get("metadata")
        .and_then(|metadata| metadata.get("labels")?.get(key));
    if label.is_some_and(|label| label == value) {
        return Ok(());
    }
    let sentence = format!(
        "serviceaccount/{name} exists and was made by somebody else: its rights are not the repository's to use"
    );
    let command = format!(
        "kubectl -n {} label serviceaccount/{name} {key}={value}",
        environment.namespace
    );
    Err(Cause::new("policy_denied", sentence)
        .object(format!("serviceaccount/{name}"))
        .hint(format!(
            "choose another name, or let the operator hand it over: {command}"
        )))
}

fn check_one(
    environment: &Environment,
    accounts: &HashSet<&str>,
    manifest: &Manifest,
) -> Result<(), String> {
    let object = &manifest.object;
    if manifest.kind() == "Namespace" && group(object).is_empty() {
        return check_namespace(environment, manifest);
    }
    if !kind_is_allowed(environment, object) {
        return Err(format!(
            "kind {} of {} is not allowed in environment {}",
            manifest.kind(),
            manifests::api_version(object),
            environment.name
        ));
    }
    match object.pointer("/metadata/namespace") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if *name == environment.namespace => {}
        Some(other) => {
            return Err(format!(
                "metadata.namespace is {other}, and this environment is {}",
                environment.namespace
            ));
        }
    }
    if manifest.kind() == "Service" && !is_empty(object.pointer("/spec/externalIPs")) {
        return Err("spec.externalIPs is not allowed: it takes the traffic of addresses that belong to others".to_owned());
    }
    match pod_pointer(manifest.kind()) {
        Some(pointer) => match object.pointer(pointer) {
            Some(pod) => check_pod(accounts, pod).map_err(|problem| {
                let prefix = pointer.trim_start_matches('/').replace('/', ".");
                format!("{prefix}.{problem}")
            }),
            None => Ok(()),
        },
        None => Ok(()),
    }
}

fn check_namespace(environment: &Environment, manifest: &Manifest) -> Result<(), String> {
    if manifest.name() != environment.namespace {
        return Err(format!(
            "the only namespace that it may hold is its own, {}",
            environment.namespace
        ));
    }
    let labels = manifest
        .object
        .pointer("/metadata/labels")
        .and_then(Value::as_object);
    let level = labels.and_then(|labels| {
        labels
            .keys()
            .find(|key| key.contains("pod-security.kubernetes.io/"))
    });
    match level {
        Some(label) => Err(format!("metadata.labels.{label} is the operator's to set")),
        None => Ok(()),
    }
}

fn group(object: &Value) -> &str {
    manifests::api_version(object)
        .split_once('/')
        .map_or("", |(group, _)| group)
}

/// agent.yaml says `Certificate`, or `Certificate.cert-manager.io` for one group only.
fn kind_is_allowed(environment: &Environment, object: &Value) -> bool {
    let (kind, group) = (manifests::kind(object), group(object));
    let own = GROUPS
        .iter()
        .find(|(name, _)| *name == kind)
        .map(|(_, group)| *group);
    environment.kind_is_allowed(&format!("{kind}.{group}"))
        || (environment.kind_is_allowed(kind) && own.is_none_or(|own| own == group))
}

fn check_pod(accounts: &HashSet<&str>, pod: &Value) -> Result<(), String> {
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        if is_set(pod.get(field)) {
            return Err(format!("{field} is not allowed"));
        }
    }
    // `serviceAccount` is the old name, and still counts.
    for field in ["serviceAccountName", "serviceAccount"] {
        match pod.get(field) {
            None | Some(Value::Null) => {}
            Some(Value::String(name))
                if name.is_empty() || name == "default" || accounts.contains(name.as_str()) => {}
            Some(other) => {
                return Err(format!(
                    "{field} is {other}: only default, or one that is in the set"
                ));
            }
        }
    }
    for (index, volume) in items(pod, "volumes") {
        if volume.get("hostPath").is_some() {
            return Err(format!("volumes[{index}].hostPath is not allowed"));
        }
    }
    check_security("securityContext", pod.get("securityContext"))?;
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for (index, container) in items(pod, list) {
            check_container(container).map_err(|problem| format!("{list}[{index}].{problem}"))?;
        }
    }
    Ok(())
}

fn check_container(container: &Value) -> Result<(), String> {
    for (index, port) in items(container, "ports") {
        if port
            .get("hostPort")
            .is_some_and(|port| !port.is_null() && *port != 0)
        {
            return Err(format!("ports[{index}].hostPort is not allowed"));
        }
    }
    let security = container.get("securityContext");
    check_security("securityContext", security)?;
    let added = security.and_then(|security| security.pointer("/capabilities/add"));
    for capability in added.and_then(Value::as_array).into_iter().flatten() {
        if capability != CAPABILITY_ALLOWED {
            return Err(format!(
                "securityContext.capabilities.add holds {capability}: only {CAPABILITY_ALLOWED} may be added"
            ));
        }
    }
    let handlers = [
        "livenessProbe",
        "readinessProbe",
        "startupProbe",
        "lifecycle/postStart",
        "lifecycle/preStop",
    ];
    for handler in handlers {
        for action in ["httpGet", "tcpSocket"] {
            // Else the node's own network could be asked through the kubelet.
            if !text(container, &format!("/{handler}/{action}/host")).is_empty() {
                let handler = handler.replace('/', ".");
                return Err(format!(
                    "{handler}.{action}.host is not allowed: a probe asks its own pod"
                ));
            }
        }
    }
    Ok(())
}

/// What pod and container say in the same words.
fn check_security(field: &str, security: Option<&Value>) -> Result<(), String> {
    let Some(security) = security else {
        return Ok(());
    };
    if is_set(security.get("privileged")) {
        return Err(format!("{field}.privileged is not allowed"));
    }
    if is_set(security.pointer("/windowsOptions/hostProcess")) {
        return Err(format!("{field}.windowsOptions.hostProcess is not allowed"));
    }
    for profile in ["seccompProfile", "appArmorProfile"] {
        if text(security, &format!("/{profile}/type")) == "Unconfined" {
            return Err(format!("{field}.{profile}.type Unconfined is not allowed"));
        }
    }
    if !matches!(text(security, "/procMount"), "" | "Default") {
        return Err(format!("{field}.procMount is not allowed"));
    }
    Ok(())
}

/// Anything but false: a wrong type is not for us to interpret.
fn is_set(value: Option<&Value>) -> bool {
    !matches!(value, None | Some(Value::Null | Value::Bool(false)))
}

fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Array(items)) => items.is_empty(),
        Some(_) => false,
    }
}

fn items<'a>(parent: &'a Value, list: &str) -> impl Iterator<Item = (usize, &'a Value)> {
    parent
        .get(list)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .enumerate()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(more: &str) -> Environment {
        let text = format!(
            "name: hello\nrepository: acme/hello\nbranch: main\nclone_url: https://example.org/hello\nnamespace: hello\nimage_prefix: localhost:5002\n{more}"
        );
        crate::diagnostic::parse_yaml("agent.yaml", &text).unwrap()
    }

    fn judge(more: &str, manifests: &str) -> Result<(), Cause> {
        let read = manifests::read(&[("app.yaml".to_owned(), manifests.to_owned())]).unwrap();
        check(&environment(more), &read)
    }

    fn pod(kind: &str, spec: &str) -> String {
        let template = format!("{{spec: {spec}}}");
        match kind {
            "CronJob" => format!(
                "{{apiVersion: batch/v1, kind: CronJob, metadata: {{name: a}}, spec: {{jobTemplate: {{spec: {{template: {template}}}}}}}}}"
            ),
            "Job" => format!(
                "{{apiVersion: batch/v1, kind: Job, metadata: {{name: a}}, spec: {{template: {template}}}}}"
            ),
            _ => format!(
                "{{apiVersion: apps/v1, kind: {kind}, metadata: {{name: a}}, spec: {{template: {template}}}}}"
            ),
        }
    }

    /// Pods that reach out of their namespace, and the field that must be named.
    const PODS: [(&str, &str); 30] = [
        ("{hostNetwork: true}", "hostNetwork"),
        ("{hostNetwork: 'true'}", "hostNetwork"),
        ("{hostPID: true}", "hostPID"),
        ("{hostIPC: yes}", "hostIPC"),
        ("{serviceAccountName: admin}", "serviceAccountName"),
        ("{serviceAccount: admin}", "serviceAccount"),
        ("{serviceAccountName: [default]}", "serviceAccountName"),
        (
            "{volumes: [{name: a, emptyDir: {}}, {name: b, hostPath: {path: /}}]}",
            "volumes[1].hostPath",
        ),
        (
            "{volumes: [{name: b, hostPath: null}]}",
            "volumes[0].hostPath",
        ),
        (
            "{containers: [{securityContext: {privileged: true}}]}",
            "containers[0].securityContext.privileged",
        ),
        (
            "{containers: [{}, {securityContext: {privileged: on}}]}",
            "containers[1].securityContext.privileged",
        ),
        (
            "{initContainers: [{securityContext: {privileged: true}}]}",
            "initContainers[0].securityContext",
        ),
        (
            "{ephemeralContainers: [{securityContext: {privileged: true}}]}",
            "ephemeralContainers[0]",
        ),
        (
            "{containers: [{securityContext: {capabilities: {add: [SYS_ADMIN]}}}]}",
            "capabilities.add",
        ),
        (
            "{containers: [{securityContext: {capabilities: {add: [NET_BIND_SERVICE, NET_RAW]}}}]}",
            "NET_RAW",
        ),
        (
            "{containers: [{securityContext: {capabilities: {add: [ALL]}}}]}",
            "ALL",
        ),
        (
            "{initContainers: [{securityContext: {capabilities: {add: [CHOWN]}}}]}",
            "CHOWN",
        ),
        (
            "{containers: [{ports: [{containerPort: 80}, {hostPort: 80}]}]}",
            "ports[1].hostPort",
        ),
        ("{containers: [{ports: [{hostPort: '80'}]}]}", "hostPort"),
        (
            "{containers: [{securityContext: {procMount: Unmasked}}]}",
            "procMount",
        ),
        (
            "{containers: [{securityContext: {seccompProfile: {type: Unconfined}}}]}",
            "seccompProfile",
        ),
        (
            "{securityContext: {seccompProfile: {type: Unconfined}}}",
            "securityContext.seccompProfile",
        ),
        (
            "{securityContext: {appArmorProfile: {type: Unconfined}}}",
            "appArmorProfile",
        ),
        (
            "{securityContext: {windowsOptions: {hostProcess: true}}}",
            "hostProcess",
        ),
        (
            "{containers: [{securityContext: {windowsOptions: {hostProcess: true}}}]}",
            "hostProcess",
        ),
        (
            "{containers: [{livenessProbe: {httpGet: {host: 127.0.0.1, port: 10250}}}]}",
            "livenessProbe.httpGet.host",
        ),
        (
            "{containers: [{readinessProbe: {tcpSocket: {host: a, port: 1}}}]}",
            "readinessProbe.tcpSocket.host",
        ),
        (
            "{containers: [{startupProbe: {httpGet: {host: a, port: 1}}}]}",
            "startupProbe",
        ),
        (
            "{containers: [{lifecycle: {postStart: {httpGet: {host: a, port: 1}}}}]}",
            "lifecycle.postStart",
        ),
        (
            "{containers: [{lifecycle: {preStop: {tcpSocket: {host: a, port: 1}}}}]}",
            "lifecycle.preStop",
        ),
    ];

    #[test]
    fn a_pod_that_reaches_out_of_its_namespace_is_denied_in_every_kind() {
        for kind in ["Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob"] {
            for (spec, field) in PODS {
                let cause = judge("", &pod(kind, spec)).expect_err(spec);
                assert_eq!(cause.id, "policy_denied");
                assert!(cause.sentence.contains(field), "{spec}: {}", cause.sentence);
                assert!(
                    cause.sentence.contains("template.spec."),
                    "{spec}: {}",
                    cause.sentence
                );
                assert!(
                    cause
                        .sentence
                        .starts_with(&format!("{}/a in app.yaml:1", kind.to_lowercase()))
                );
            }
        }
    }

    #[test]
    fn a_modest_pod_is_allowed() {
        for spec in [
            "{}",
            "{hostNetwork: false, serviceAccountName: default}",
            "{containers: [{securityContext: {privileged: false, capabilities: {add: [NET_BIND_SERVICE], drop: [ALL]}}}]}",
            "{containers: [{ports: [{containerPort: 80, hostPort: 0}], livenessProbe: {httpGet: {port: 80}}}]}",
            "{securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}}",
        ] {
            judge("", &pod("Deployment", spec)).expect(spec);
        }
        let own = format!(
            "{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: b}}}}\n---\n{}",
            pod("Job", "{serviceAccountName: b}")
        );
        judge("", &own).unwrap();
    }

    #[test]
    fn kinds_outside_the_list_are_denied() {
        let object = |version: &str, kind: &str| {
            format!("{{apiVersion: {version}, kind: {kind}, metadata: {{name: a}}}}")
        };
        for (version, kind) in [
            ("v1", "Secret"),
            ("v1", "Pod"),
            ("v1", "PersistentVolume"),
            ("v1", "Node"),
            ("v1", "ResourceQuota"),
            ("rbac.authorization.k8s.io/v1", "Role"),
            ("rbac.authorization.k8s.io/v1", "RoleBinding"),
            ("rbac.authorization.k8s.io/v1", "ClusterRole"),
            ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
            (
                "admissionregistration.k8s.io/v1",
                "MutatingWebhookConfiguration",
            ),
            (
                "admissionregistration.k8s.io/v1",
                "ValidatingAdmissionPolicy",
            ),
            ("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
            ("apiregistration.k8s.io/v1", "APIService"),
            ("batch.volcano.sh/v1alpha1", "Job"),
            ("apps.example.org/v1", "Deployment"),
            ("v1", "deployment"),
        ] {
            let cause = judge("", &object(version, kind)).expect_err(kind);
            assert!(
                cause
                    .sentence
                    .contains(&format!("kind {kind} of {version} is not allowed")),
                "{cause:?}"
            );
        }
        judge("allowed_kinds: [Secret]", &object("v1", "Secret")).unwrap();
        judge(
            "allowed_kinds: [Job.batch.volcano.sh]",
            &object("batch.volcano.sh/v1", "Job"),
        )
        .unwrap();
        judge(
            "allowed_kinds: [Job.batch.volcano.sh]",
            &object("batch/v1", "Job"),
        )
        .unwrap_err();
        judge(
            "allowed_kinds: [Certificate]",
            &object("cert-manager.io/v1", "Certificate"),
        )
        .unwrap();
    }

    #[test]
    fn another_namespace_is_denied_and_ones_own_keeps_its_pod_security() {
        let configmap = |namespace: &str| {
            format!(
                "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: a, namespace: {namespace}}}}}"
            )
        };
        judge("", &configmap("hello")).unwrap();
        assert!(
            judge("", &configmap("kube-system"))
                .unwrap_err()
                .sentence
                .contains("\"kube-system\"")
        );
        judge("", &configmap("[hello]")).unwrap_err();
        let namespace = |name: &str, labels: &str| {
            format!(
                "{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {labels}}}}}"
            )
        };
        judge("", &namespace("hello", "{team: a}")).unwrap();
        judge("", &namespace("other", "{}")).unwrap_err();
        let label = "{pod-security.kubernetes.io/enforce: privileged}";
        assert!(
            judge("", &namespace("hello", label))
                .unwrap_err()
                .sentence
                .contains("pod-security")
        );
        judge(
            "",
            "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {externalIPs: [10.0.0.1]}}",
        )
        .unwrap_err();
    }

    #[test]
    fn a_service_account_of_somebody_else_is_denied() {
        let (key, value) = ACCOUNT_LABEL;
        let ours = serde_json::json!({"metadata": {"labels": {key: value}}});
        let theirs =
            serde_json::json!({"metadata": {"managedFields": [{"manager": "kubectl-create"}]}});
        assert!(check_live_account(&environment(""), "admin", &theirs).is_err());
        assert!(check_live_account(&environment(""), "admin", &ours).is_ok());
    }
}
