//! Rendering: the manifests of a commit become the objects of one release.
//!
//! Namespace, digests, names of Jobs, the hashes that decide what is rolled, the order of apply. Nothing here knows
//! what is live: `cluster/apply.rs` adapts an object to that. Pure: no IO.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::builds::{Cause, short};

use super::{Manifest, display_name, kind, name, pod_pointer, text};
use crate::release;

/// On the pod template: what the pods were made from. Equal means: nothing to roll.
pub const RELEASE: &str = "landfall.dev/release";
/// On a workload's metadata, written only together with a changed template.
pub const HISTORY: [&str; 4] = [
    "landfall.dev/build",
    "landfall.dev/commit",
    "landfall.dev/set",
    "kubernetes.io/change-cause",
];

/// On every service account that a release made: it has no rights but those that the operator gave it knowingly.
pub const ACCOUNT_LABEL: (&str, &str) = ("landfall.dev/account", "release");

/// Digits of a template's hash: 64 bits are enough to tell releases of one workload apart.
const HASH_DIGITS: usize = 16;
const JOB_HASH_DIGITS: usize = 8;
/// Longest name of a Job, so that its pods can carry it as a label.
const JOB_NAME_MAX: usize = 63;
const TITLE_CHARS_MAX: usize = 100;

/// What a release is rendered for.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub namespace: &'a str,
    /// Repositories in the manifests that mean the image that was built: NAME, IMAGE_PREFIX/NAME, `image.replaces`. None where
    /// nothing was built.
    pub repositories: &'a [String],
    /// `PREFIX/NAME@sha256:…`.
    pub image: &'a str,
    /// What each other image is deployed as, by its reference; one that is not here stays as it is written.
    pub pinned: &'a BTreeMap<String, String>,
    pub build_id: i64,
    pub commit: &'a str,
    pub title: &'a str,
}

/// Objects in the order in which they are applied, and the hash of the set.
#[derive(Debug, Clone, PartialEq)]
pub struct Rendered {
    pub objects: Vec<Value>,
    pub set_hash: String,
    pub places: Places,
}

/// Where each object stands in the repository, by its display name: `kubernetes/app.yaml:12 (document 2)`.
pub type Places = BTreeMap<String, String>;

/// Renders a set that was read and allowed.
pub fn render(target: &Target<'_>, manifests: &[Manifest]) -> Result<Rendered, Cause> {
    let mut objects: Vec<Value> = manifests
        .iter()
        .map(|manifest| clean(target, manifest))
        .collect();
    let replaced: usize = objects
        .iter_mut()
        .map(|object| replace_images(target, object))
        .sum();
    if replaced == 0 && !target.repositories.is_empty() {
        return Err(no_image(target, &objects));
    }
    let configs = configs(&objects);
    for object in &mut objects {
        stamp_template(object, &configs)?;
    }
    for account in objects
        .iter_mut()
        .filter(|object| kind(object) == "ServiceAccount")
    {
        write(account, "labels", ACCOUNT_LABEL.0, ACCOUNT_LABEL.1);
    }
    let names = objects.iter().map(display_name);
    let places = names.zip(manifests.iter().map(Manifest::place)).collect();
    objects.sort_by_key(|object| rank(kind(object)));
    let set_hash = release::hash(&objects);
    for object in &mut objects {
        stamp_history(target, object, &set_hash);
    }
    Ok(Rendered {
        objects,
        set_hash,
        places,
    })
}

/// References of images that are built elsewhere and named without a digest.
pub fn foreign_images(repositories: &[String], manifests: &[Manifest]) -> BTreeSet<String> {
    let is_ours = |image: &str| repositories.iter().any(|name| name == repository(image));
    let mut images = all_images(manifests);
    images.retain(|image| !is_ours(image) && !image.contains('@'));
    images
}

/// The images of all containers, as the manifests write them.
pub fn all_images(manifests: &[Manifest]) -> BTreeSet<String> {
    let pods = manifests
        .iter()
        .filter_map(|manifest| manifest.object.pointer(pod_pointer(manifest.kind())?));
    pods.flat_map(|pod| {
        CONTAINER_LISTS
            .iter()
            .filter_map(|list| pod.get(list)?.as_array())
    })
    .flatten()
    .map(|container| text(container, "/image").to_owned())
    .filter(|image| !image.is_empty())
    .collect()
}

/// Workloads whose pods a release waits for, and whose history `kubectl rollout` shows.
pub fn is_workload(kind: &str) -> bool {
    matches!(kind, "Deployment" | "StatefulSet" | "DaemonSet")
}

/// The pod template: `{metadata, spec}`.
pub fn template(object: &Value) -> Option<&Value> {
    let pointer = pod_pointer(kind(object))?.strip_suffix("/spec")?;
    (!pointer.is_empty()).then(|| object.pointer(pointer))?
}

/// The hash that a template carries, or carried when it was live; empty where it has none.
pub fn template_hash(object: &Value) -> &str {
    template(object).map_or("", |template| {
        text(template, "/metadata/annotations/landfall.dev~1release")
    })
}

/// Kinds of Kubernetes itself that stand in no namespace.
pub fn is_cluster_wide(kind: &str) -> bool {
    matches!(
        kind,
        "Namespace"
            | "CustomResourceDefinition"
            | "ClusterRole"
            | "ClusterRoleBinding"
            | "PersistentVolume"
            | "StorageClass"
            | "PriorityClass"
            | "IngressClass"
            | "RuntimeClass"
            | "APIService"
    )
}

fn rank(kind: &str) -> usize {
    match kind {
        "Namespace" => 0,
        "CustomResourceDefinition" => 1,
        "ServiceAccount" => 2,
        "Role" | "RoleBinding" | "ClusterRole" | "ClusterRoleBinding" => 3,
        "ConfigMap" | "Secret" => 4,
        "PersistentVolumeClaim" => 5,
        "NetworkPolicy" => 6,
        "Service" => 7,
        "Job" => 9,
        "Deployment" | "StatefulSet" | "DaemonSet" | "Pod" => 10,
        "CronJob" => 11,
        "HorizontalPodAutoscaler" => 12,
        "PodDisruptionBudget" => 13,
        "Ingress" => 14,
        // Custom resources: certificates, sealed secrets and their like, which workloads wait for.
        _ => 8,
    }
}

/// Puts the object into its namespace, without what only a server writes (as `kubectl get -o yaml` shows it).
fn clean(target: &Target<'_>, manifest: &Manifest) -> Value {
    let mut object = without_server_fields(manifest.object.clone());
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("namespace");
        if !is_cluster_wide(manifest.kind()) {
            metadata.insert("namespace".to_owned(), target.namespace.into());
        }
        remove_ours(metadata);
    }
    if let Some(metadata) =
        template_mut(&mut object).and_then(|template| template.get_mut("metadata"))
        && let Some(metadata) = metadata.as_object_mut()
    {
        remove_ours(metadata);
    }
    object
}

/// A live object, so that it can be put back as it was found.
pub fn as_found(object: Value) -> Value {
    let mut object = without_server_fields(object);
    if let Some(labels) = object
        .pointer_mut("/metadata/labels")
        .and_then(Value::as_object_mut)
    {
        labels.remove("landfall.dev/fence");
    }
    object
}

fn without_server_fields(mut object: Value) -> Value {
    if let Some(members) = object.as_object_mut() {
        members.remove("status");
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in [
            "managedFields",
            "resourceVersion",
            "uid",
            "creationTimestamp",
            "generation",
            "selfLink",
        ] {
            metadata.remove(field);
        }
        if let Some(annotations) = metadata
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
            annotations.remove("deployment.kubernetes.io/revision");
        }
    }
    if let Some(metadata) =
        template_mut(&mut object).and_then(|template| template.get_mut("metadata")?.as_object_mut())
    {
        metadata.remove("creationTimestamp");
    }
    object
}

/// `landfall.dev/` is ours: the author's value would be a lie, or a fence.
fn remove_ours(metadata: &mut Map<String, Value>) {
    for field in ["labels", "annotations"] {
        if let Some(texts) = metadata.get_mut(field).and_then(Value::as_object_mut) {
            texts.retain(|key, _| !key.starts_with("landfall.dev/"));
        }
    }
}

fn template_mut(object: &mut Value) -> Option<&mut Value> {
    let pointer = pod_pointer(kind(object))?.strip_suffix("/spec")?;
    (!pointer.is_empty()).then(|| object.pointer_mut(pointer))?
}

const CONTAINER_LISTS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

/// How many images became the one that was built.
fn replace_images(target: &Target<'_>, object: &mut Value) -> usize {
    let Some(pod) = pod_pointer(kind(object)).and_then(|pointer| object.pointer_mut(pointer))
    else {
        return 0;
    };
    let mut replaced = 0;
    for list in CONTAINER_LISTS {
        for container in pod
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            let image = text(container, "/image");
            let is_ours = target
                .repositories
                .iter()
                .any(|name| name == repository(image));
            let becomes = if is_ours {
                Some(target.image)
            } else {
                target.pinned.get(image).map(String::as_str)
            };
            if let (Some(becomes), Some(container)) = (becomes, container.as_object_mut()) {
                container.insert("image".to_owned(), becomes.into());
                replaced += usize::from(is_ours);
            }
        }
    }
    replaced
}

/// An image less its tag and digest: `localhost:5001/a/b:1@sha256:…` is `localhost:5001/a/b`.
pub fn repository(image: &str) -> &str {
    let image = image.split_once('@').map_or(image, |(name, _)| name);
    match image.rsplit_once(':') {
        // A colon before a slash stands before a port.
        Some((name, tag)) if !tag.contains('/') => name,
        _ => image,
    }
}

fn no_image(target: &Target<'_>, objects: &[Value]) -> Cause {
    let found: Vec<&str> = objects
        .iter()
        .filter_map(|object| object.pointer(pod_pointer(kind(object))?))
        .flat_map(|pod| {
            pod.get("containers")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
        })
        .map(|container| text(container, "/image"))
        .collect();
    let found = if found.is_empty() {
        "no container at all".to_owned()
    } else {
        found.join(", ")
    };
    Cause::new(
        "image_not_in_manifests",
        format!("no container of the manifests runs the image that was built ({}); they hold {found}", target.repositories.join(" or ")),
    )
    .hint("write `image: NAME` in the Deployment, with NAME as in pipeline.yaml, or list the other name in `image.replaces`")
}

type Configs = BTreeMap<(&'static str, String), Value>;

/// The content of every ConfigMap and Secret of the set.
fn configs(objects: &[Value]) -> Configs {
    objects
        .iter()
        .filter_map(|object| {
            let kind = match kind(object) {
                "ConfigMap" => "ConfigMap",
                "Secret" => "Secret",
                _ => return None,
            };
            let content = json!([
                object.get("data"),
                object.get("binaryData"),
                object.get("stringData")
            ]);
            Some(((kind, name(object).to_owned()), content))
        })
        .collect()
}

/// Writes the template's hash into it; a Job gets it into its name too.
fn stamp_template(object: &mut Value, configs: &Configs) -> Result<(), Cause> {
    let Some(found) = template(object) else {
        return Ok(());
    };
    let mut parts = vec![found.clone()];
    for named in named_configs(found) {
        if let Some(content) = configs.get(&named) {
            parts.push(json!([named.0, named.1, content]));
        }
    }
    if kind(object) == "Job" {
        // All of a Job is immutable, not only its template.
        parts.push(object.get("spec").cloned().unwrap_or_default());
    }
    let hash = release::hash(&parts);
    let digits = hash.get(..HASH_DIGITS).unwrap_or_default();
    if let Some(template) = template_mut(object) {
        write(template, "annotations", RELEASE, digits);
    }
    if kind(object) == "Job" {
        let suffix = hash.get(..JOB_HASH_DIGITS).unwrap_or_default();
        let full = format!("{}-{suffix}", name(object));
        if full.len() > JOB_NAME_MAX {
            let sentence = format!(
                "{} has a name of more than {} characters",
                display_name(object),
                JOB_NAME_MAX - JOB_HASH_DIGITS - 1
            );
            return Err(Cause::new("manifest_invalid", sentence).object(display_name(object)));
        }
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("name".to_owned(), full.into());
        }
    }
    Ok(())
}

/// What these objects name and cannot do without, by kind and name: ConfigMaps, Secrets and ServiceAccounts of their pods, the
/// Service of a StatefulSet, the certificates of an Ingress.
pub fn needed(objects: &[Value]) -> BTreeSet<(&'static str, String)> {
    let mut needed = BTreeSet::new();
    for object in objects {
        if kind(object) == "StatefulSet" {
            needed.insert(("Service", text(object, "/spec/serviceName").to_owned()));
        }
        let certificates = object
            .pointer("/spec/tls")
            .filter(|_| kind(object) == "Ingress");
        for tls in certificates.and_then(Value::as_array).into_iter().flatten() {
            needed.insert(("Secret", text(tls, "/secretName").to_owned()));
        }
        let Some(template) = template(object) else {
            continue;
        };
        needed.extend(named_configs(template));
        let account = text(template, "/spec/serviceAccountName");
        needed.insert(("ServiceAccount", account.to_owned()));
        let secrets = template.pointer("/spec/imagePullSecrets");
        for secret in secrets.and_then(Value::as_array).into_iter().flatten() {
            needed.insert(("Secret", text(secret, "/name").to_owned()));
        }
    }
    needed
}

/// ConfigMaps and Secrets that a pod template names, in a stable order.
fn named_configs(template: &Value) -> Vec<(&'static str, String)> {
    let mut named = Vec::new();
    let mut name = |kind, value: Option<&Value>| {
        if let Some(text) = value.and_then(Value::as_str) {
            named.push((kind, text.to_owned()));
        }
    };
    let list = |parent: &Value, field: &str| {
        parent
            .get(field)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    let pod = template.get("spec").cloned().unwrap_or_default();
    for containers in ["initContainers", "containers"] {
        for container in list(&pod, containers) {
            for source in list(&container, "envFrom") {
                name("ConfigMap", source.pointer("/configMapRef/name"));
                name("Secret", source.pointer("/secretRef/name"));
            }
            for variable in list(&container, "env") {
                name(
                    "ConfigMap",
                    variable.pointer("/valueFrom/configMapKeyRef/name"),
                );
                name("Secret", variable.pointer("/valueFrom/secretKeyRef/name"));
            }
        }
    }
    for volume in list(&pod, "volumes") {
        name("ConfigMap", volume.pointer("/configMap/name"));
        name("Secret", volume.pointer("/secret/secretName"));
        for source in volume
            .pointer("/projected/sources")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            name("ConfigMap", source.pointer("/configMap/name"));
            name("Secret", source.pointer("/secret/name"));
        }
    }
    named.sort_unstable();
    named.dedup();
    named
}

fn stamp_history(target: &Target<'_>, object: &mut Value, set_hash: &str) {
    if !is_workload(kind(object)) {
        return;
    }
    let title: String = target
        .title
        .chars()
        .filter(|c| !c.is_control())
        .take(TITLE_CHARS_MAX)
        .collect();
    let cause = format!(
        "Landfall #{}: {} {title}",
        target.build_id,
        short(target.commit)
    );
    let values = [
        &target.build_id.to_string(),
        target.commit,
        set_hash,
        cause.trim_end(),
    ];
    for (key, value) in HISTORY.iter().zip(values) {
        write(object, "annotations", key, value);
    }
}

/// Sets `metadata.LIST[key]`, with the list `labels` or `annotations`.
fn write(parent: &mut Value, list: &str, key: &str, value: &str) {
    let mut at = parent;
    for field in ["metadata", list] {
        let Some(members) = at.as_object_mut() else {
            return;
        };
        let next = members.entry(field).or_insert(Value::Null);
        if next.is_null() {
            *next = json!({});
        }
        at = next;
    }
    if let Some(texts) = at.as_object_mut() {
        texts.insert(key.to_owned(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests;

    const IMAGE: &str = "localhost:5002/hello@sha256:1111111111111111111111111111111111111111111111111111111111111111";

    const SET: &str = "
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
  namespace: demo
  resourceVersion: '5'
  labels: {landfall.dev/fence: '99', app: web}
spec:
  replicas: 3
  template:
    metadata: {labels: {app: web}}
    spec:
      imagePullSecrets: [{name: pull}]
      initContainers: [{name: init, image: 'localhost:5002/hello:old'}]
      containers:
        - {name: hello, image: hello, envFrom: [{configMapRef: {name: settings}}]}
        - {name: side, image: 'docker.io/library/busybox:1'}
status: {replicas: 3}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: database}
spec:
  template:
    spec: {containers: [{name: db, image: 'postgres@sha256:2222'}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {greeting: GREETING}
---
apiVersion: batch/v1
kind: Job
metadata: {name: migrate}
spec:
  template:
    spec: {containers: [{name: a, image: 'registry.example:5000/x/hello:1@sha256:33'}]}
";

    fn render_set(set: &str, build_id: i64) -> Result<Rendered, Cause> {
        let read = manifests::read(&[("app.yaml".to_owned(), set.to_owned())]).unwrap();
        let repositories = [
            "hello",
            "localhost:5002/hello",
            "registry.example:5000/x/hello",
        ]
        .map(str::to_owned);
        let target = Target {
            namespace: "demo",
            repositories: &repositories,
            image: IMAGE,
            pinned: &BTreeMap::from([(
                "docker.io/library/busybox:1".to_owned(),
                "docker.io/library/busybox:1@sha256:44".to_owned(),
            )]),
            build_id,
            commit: "0123456789abcdef0123456789abcdef01234567",
            title: "Say hello\u{7}",
        };
        render(&target, &read)
    }

    fn find<'a>(rendered: &'a Rendered, name: &str) -> &'a Value {
        let found = rendered
            .objects
            .iter()
            .find(|object| display_name(object).starts_with(name));
        found.unwrap_or_else(|| panic!("no {name}"))
    }

    #[test]
    fn images_namespace_and_order_are_those_of_the_release() {
        let rendered = render_set(SET, 7).unwrap();
        let kinds: Vec<_> = rendered.objects.iter().map(kind).collect();
        assert_eq!(
            kinds,
            [
                "ConfigMap",
                "Job",
                "Deployment",
                "Deployment",
                "PodDisruptionBudget"
            ]
        );
        let web = find(&rendered, "deployment/web");
        assert_eq!(
            text(web, "/spec/template/spec/initContainers/0/image"),
            IMAGE
        );
        assert_eq!(text(web, "/spec/template/spec/containers/0/image"), IMAGE);
        assert_eq!(
            text(web, "/spec/template/spec/containers/1/image"),
            "docker.io/library/busybox:1@sha256:44"
        );
        assert_eq!(
            text(web, "/spec/template/spec/imagePullSecrets/0/name"),
            "pull"
        );
        assert_eq!(
            text(
                find(&rendered, "deployment/database"),
                "/spec/template/spec/containers/0/image"
            ),
            "postgres@sha256:2222"
        );
        assert_eq!(
            text(
                find(&rendered, "job/migrate-"),
                "/spec/template/spec/containers/0/image"
            ),
            IMAGE
        );
        for object in &rendered.objects {
            assert_eq!(text(object, "/metadata/namespace"), "demo");
        }
        assert_eq!(
            web.pointer("/metadata/labels"),
            Some(&json!({"app": "web"}))
        );
        assert!(web.get("status").is_none() && web.pointer("/metadata/resourceVersion").is_none());
        assert_eq!(
            text(web, "/metadata/annotations/kubernetes.io~1change-cause"),
            "Landfall #7: 0123456789ab Say hello"
        );
    }

    #[test]
    fn only_what_a_template_is_made_from_changes_its_hash() {
        let first = render_set(SET, 7).unwrap();
        let again = render_set(SET, 8).unwrap();
        let other = render_set(&SET.replace("GREETING", "hi"), 9).unwrap();
        let scaled = render_set(&SET.replace("replicas: 3", "replicas: 4"), 9).unwrap();
        let hash = |rendered: &Rendered, name: &str| template_hash(find(rendered, name)).to_owned();
        assert_eq!(first.set_hash, again.set_hash);
        assert_ne!(first.set_hash, other.set_hash);
        assert_eq!(
            hash(&first, "deployment/web"),
            hash(&again, "deployment/web")
        );
        assert_ne!(
            hash(&first, "deployment/web"),
            hash(&other, "deployment/web")
        );
        assert_eq!(
            hash(&first, "deployment/database"),
            hash(&other, "deployment/database")
        );
        assert_eq!(
            hash(&first, "deployment/web"),
            hash(&scaled, "deployment/web")
        );
        assert_eq!(hash(&first, "deployment/web").len(), HASH_DIGITS);
        let job = |rendered: &Rendered| name(find(rendered, "job/")).to_owned();
        assert_eq!(job(&first), job(&other));
        assert_ne!(
            job(&first),
            job(&render_set(&SET.replace("{name: a,", "{name: b,"), 7).unwrap())
        );
    }

    #[test]
    fn a_set_without_the_image_is_an_error_that_says_what_it_holds() {
        let cause = render_set("{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}, spec: {template: {spec: {containers: [{image: 'helloo:1'}]}}}}", 1).unwrap_err();
        assert_eq!(cause.id, "image_not_in_manifests");
        assert!(
            cause.sentence.contains("helloo:1") && cause.sentence.contains("localhost:5002/hello"),
            "{}",
            cause.sentence
        );
        assert_eq!(
            render_set("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}}", 1)
                .unwrap_err()
                .id,
            "image_not_in_manifests"
        );
    }

    #[test]
    fn a_repository_is_an_image_less_tag_and_digest() {
        assert_eq!(
            repository("localhost:5001/a/b:1@sha256:33"),
            "localhost:5001/a/b"
        );
        assert_eq!(repository("localhost:5001/a"), "localhost:5001/a");
        assert_eq!(repository("a:1"), "a");
        assert_eq!(repository("a"), "a");
    }

    #[test]
    fn images_built_elsewhere_are_found_less_those_with_a_digest() {
        let read = manifests::read(&[("app.yaml".to_owned(), SET.to_owned())]).unwrap();
        let ours = ["hello", "localhost:5002/hello"].map(str::to_owned);
        let foreign = foreign_images(&ours, &read);
        assert_eq!(
            foreign.into_iter().collect::<Vec<_>>(),
            ["docker.io/library/busybox:1"]
        );
    }
}
