//! What is looked at while a workload rolls out: the workload as it is to be (`Target`) and as it is (`Snapshot`).
//!
//! Pure. The reading of Kubernetes' many optional fields is done here, so that `rollout` and `diagnose` read like the
//! rules that they are.

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    Container, ContainerStatus, Event, Pod, PodCondition, PodTemplateSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::release::{AppliedObject, Change, Release};

/// On every pod template of a release: the hash of the template and of the ConfigMaps and Secrets that it names.
pub const RELEASE_ANNOTATION: &str = "landfall.dev/release";
/// The Deployment's own number for a rollout.
pub const REVISION_ANNOTATION: &str = "deployment.kubernetes.io/revision";
const TEMPLATE_HASH_LABEL: &str = "pod-template-hash";
const CONTROLLER_HASH_LABEL: &str = "controller-revision-hash";
const TEMPLATE_GENERATION_LABEL: &str = "pod-template-generation";

/// The kinds whose rollout can be judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Deployment,
    StatefulSet,
    DaemonSet,
    Job,
}

impl Kind {
    pub fn of(kind: &str) -> Option<Self> {
        match kind {
            "Deployment" => Some(Self::Deployment),
            "StatefulSet" => Some(Self::StatefulSet),
            "DaemonSet" => Some(Self::DaemonSet),
            "Job" => Some(Self::Job),
            _ => None,
        }
    }

    /// As manifests write it.
    pub const fn as_manifest(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
            Self::Job => "Job",
        }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::StatefulSet => "statefulset",
            Self::DaemonSet => "daemonset",
            Self::Job => "job",
        }
    }
}

/// One workload of a release, as it was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub kind: Kind,
    pub name: String,
    /// Of the object that we applied; None where only the release is known (smoke test).
    pub uid: Option<String>,
    /// `metadata.generation` after our apply; 0 where it is not known.
    pub generation: i64,
    /// Our apply wrote something: whatever dies from then on is this release's.
    pub changed: bool,
    /// The template's `landfall.dev/release`; None where the manifest carries none.
    pub release: Option<String>,
    /// Container and image of the template, init containers included.
    pub images: Vec<(String, String)>,
}

impl Target {
    /// The workloads of a release in the order in which they were applied.
    pub fn applied(release: &Release, applied: &[AppliedObject]) -> Vec<Self> {
        applied
            .iter()
            .filter_map(|object| {
                let kind = Kind::of(&object.kind)?;
                let manifest = release.objects.iter().find(|manifest| {
                    let name = text(manifest, "/metadata/name");
                    // A Job is applied under its name and eight digits of its hash.
                    let is_hashed_job = kind == Kind::Job
                        && object
                            .name
                            .strip_prefix(name)
                            .is_some_and(|hash| hash.starts_with('-'));
                    text(manifest, "/kind") == object.kind && (name == object.name || is_hashed_job)
                });
                Some(Self {
                    uid: Some(object.uid.clone()),
                    generation: object.generation,
                    changed: object.change != Change::Unchanged,
                    ..Self::wanted(
                        kind,
                        &object.name,
                        manifest.unwrap_or(&serde_json::Value::Null),
                    )
                })
            })
            .collect()
    }

    /// The workloads of a release that serve: all but its Jobs.
    pub fn serving(release: &Release) -> Vec<Self> {
        let serving = release.objects.iter().filter_map(|manifest| {
            let kind = Kind::of(text(manifest, "/kind")).filter(|kind| *kind != Kind::Job)?;
            Some(Self::wanted(
                kind,
                text(manifest, "/metadata/name"),
                manifest,
            ))
        });
        serving.collect()
    }

    /// One of which only the name is known.
    pub fn named(kind: Kind, name: &str) -> Self {
        Self::wanted(kind, name, &serde_json::Value::Null)
    }

    fn wanted(kind: Kind, name: &str, manifest: &serde_json::Value) -> Self {
        let annotation = manifest
            .pointer("/spec/template/metadata/annotations")
            .and_then(|annotations| annotations.get(RELEASE_ANNOTATION))
            .and_then(serde_json::Value::as_str);
        let images = [
            "/spec/template/spec/initContainers",
            "/spec/template/spec/containers",
        ]
        .into_iter()
        .filter_map(|path| manifest.pointer(path)?.as_array())
        .flatten()
        .map(|container| {
            (
                text(container, "/name").to_owned(),
                text(container, "/image").to_owned(),
            )
        });
        Self {
            kind,
            name: name.to_owned(),
            uid: None,
            generation: 0,
            changed: false,
            release: annotation.map(str::to_owned),
            images: images.collect(),
        }
    }

    /// `deployment/hello-axum`.
    pub fn display_name(&self) -> String {
        format!("{}/{}", self.kind.as_str(), self.name)
    }
}

fn text<'a>(value: &'a serde_json::Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(serde_json::Value::as_str)
        .unwrap_or_default()
}

/// The live object.
#[derive(Debug, Clone)]
pub enum Workload {
    Deployment(Box<Deployment>),
    StatefulSet(Box<StatefulSet>),
    DaemonSet(Box<DaemonSet>),
    Job(Box<Job>),
}

impl Workload {
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Deployment(it) => &it.metadata,
            Self::StatefulSet(it) => &it.metadata,
            Self::DaemonSet(it) => &it.metadata,
            Self::Job(it) => &it.metadata,
        }
    }

    /// As the API server would show it, less what only programs read.
    pub fn json(&self) -> serde_json::Value {
        let value = match self {
            Self::Deployment(it) => serde_json::to_value(it),
            Self::StatefulSet(it) => serde_json::to_value(it),
            Self::DaemonSet(it) => serde_json::to_value(it),
            Self::Job(it) => serde_json::to_value(it),
        };
        value.unwrap_or_default()
    }

    pub fn uid(&self) -> &str {
        self.metadata().uid.as_deref().unwrap_or_default()
    }

    pub fn generation(&self) -> i64 {
        self.metadata().generation.unwrap_or_default()
    }

    pub fn template(&self) -> Option<&PodTemplateSpec> {
        match self {
            Self::Deployment(it) => it.spec.as_ref().map(|spec| &spec.template),
            Self::StatefulSet(it) => it.spec.as_ref().map(|spec| &spec.template),
            Self::DaemonSet(it) => it.spec.as_ref().map(|spec| &spec.template),
            Self::Job(it) => it.spec.as_ref().map(|spec| &spec.template),
        }
    }

    /// The labels by which its pods are listed; empty where it has no plain ones.
    pub fn match_labels(&self) -> BTreeMap<String, String> {
        let selector = match self {
            Self::Deployment(it) => it.spec.as_ref().map(|spec| &spec.selector),
            Self::StatefulSet(it) => it.spec.as_ref().map(|spec| &spec.selector),
            Self::DaemonSet(it) => it.spec.as_ref().map(|spec| &spec.selector),
            Self::Job(it) => it.spec.as_ref().and_then(|spec| spec.selector.as_ref()),
        };
        selector
            .and_then(|selector| selector.match_labels.clone())
            .unwrap_or_default()
    }
}

/// What a dying container said last, by pod and container; the first death counts, later ones say less.
pub type LastWords = BTreeMap<(String, String), String>;

/// One workload and all that belongs to it, read within one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Our clock.
    pub now: Timestamp,
    pub workload: Workload,
    /// Those that the workload's selector matches; whose they are is judged by owner.
    pub replica_sets: Vec<ReplicaSet>,
    pub pods: Vec<Pod>,
    /// Of this namespace. They explain and are never a verdict by themselves: they expire, and some get lost.
    pub events: Vec<Event>,
    /// A HorizontalPodAutoscaler sets the number of replicas.
    pub autoscaled: bool,
    pub last_words: LastWords,
    /// A pod of another workload of the release is on its way out, and makes room.
    pub others_are_leaving: bool,
    /// By the uid of a pod whose probe is refused: another of its declared ports, where somebody answers.
    pub listening: BTreeMap<String, i32>,
}

impl Snapshot {
    pub fn deployment(&self) -> Option<&Deployment> {
        match &self.workload {
            Workload::Deployment(deployment) => Some(deployment),
            _ => None,
        }
    }

    /// The workload's ReplicaSets, by owner: labels alone may match another's.
    pub fn own_replica_sets(&self) -> impl Iterator<Item = &ReplicaSet> {
        self.replica_sets
            .iter()
            .filter(|set| is_owned_by(&set.metadata, self.workload.uid()))
    }

    /// The ReplicaSet of the live template; None until the controller has made it.
    pub fn new_replica_set(&self) -> Option<&ReplicaSet> {
        let wanted = self.workload.template().map(without_hash)?;
        let same = |set: &&ReplicaSet| {
            let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
            template.map(without_hash).as_ref() == Some(&wanted)
        };
        // The controller takes the oldest of equal ones.
        if let Some(set) = self
            .own_replica_sets()
            .filter(same)
            .min_by_key(|set| created(&set.metadata))
        {
            return Some(set);
        }
        // Templates written by an API server with other defaults differ; then its own number says which it is.
        let revision = annotation(self.workload.metadata(), REVISION_ANNOTATION)?;
        let release = self.workload.template().and_then(template_release)?;
        self.own_replica_sets().find(|set| {
            let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
            annotation(&set.metadata, REVISION_ANNOTATION) == Some(revision)
                && template.and_then(template_release) == Some(release)
        })
    }

    /// Every pod of the workload, old and new, terminating ones too.
    pub fn own_pods(&self) -> Vec<&Pod> {
        let sets: HashSet<&str> = match self.workload {
            Workload::Deployment(_) => self
                .own_replica_sets()
                .filter_map(|set| set.metadata.uid.as_deref())
                .collect(),
            _ => HashSet::from([self.workload.uid()]),
        };
        let owned = |pod: &&Pod| {
            let owner = controller_uid(&pod.metadata);
            owner.is_some_and(|uid| sets.contains(uid))
        };
        self.pods.iter().filter(owned).collect()
    }

    /// The pods of the live template that are to stay.
    pub fn new_pods(&self) -> Vec<&Pod> {
        let staying = self.pods.iter().filter(|pod| !is_terminating(pod));
        match &self.workload {
            Workload::Deployment(_) => {
                let Some(set) = self.new_replica_set() else {
                    return Vec::new();
                };
                let uid = set.metadata.uid.as_deref().unwrap_or_default();
                staying
                    .filter(|pod| is_owned_by(&pod.metadata, uid))
                    .collect()
            }
            Workload::StatefulSet(it) => {
                let update = it
                    .status
                    .as_ref()
                    .and_then(|status| status.update_revision.as_deref());
                let owned = staying.filter(|pod| is_owned_by(&pod.metadata, self.workload.uid()));
                owned
                    .filter(|pod| label(&pod.metadata, CONTROLLER_HASH_LABEL) == update)
                    .collect()
            }
            Workload::DaemonSet(_) => {
                let owned: Vec<&Pod> = staying
                    .filter(|pod| is_owned_by(&pod.metadata, self.workload.uid()))
                    .collect();
                let generation = |pod: &&Pod| {
                    label(&pod.metadata, TEMPLATE_GENERATION_LABEL)
                        .and_then(|text| text.parse::<i64>().ok())
                };
                let newest = owned.iter().map(generation).max().flatten();
                owned
                    .into_iter()
                    .filter(|pod| generation(pod) == newest)
                    .collect()
            }
            Workload::Job(_) => staying
                .filter(|pod| is_owned_by(&pod.metadata, self.workload.uid()))
                .collect(),
        }
    }

    /// Pods of older templates: those that still serve, and those that are on their way out.
    pub fn old_pods(&self) -> (Vec<&Pod>, Vec<&Pod>) {
        let new: HashSet<&str> = self.new_pods().into_iter().map(uid).collect();
        self.own_pods()
            .into_iter()
            .filter(|pod| !new.contains(uid(pod)) && !has_ended(pod))
            .partition(|pod| !is_terminating(pod))
    }

    /// Whether the workload is to have any pod.
    pub fn wants_pods(&self) -> bool {
        let wanted = match &self.workload {
            Workload::Deployment(it) => it.spec.as_ref().and_then(|spec| spec.replicas),
            Workload::StatefulSet(it) => it.spec.as_ref().and_then(|spec| spec.replicas),
            Workload::DaemonSet(it) => {
                let status = it.status.as_ref();
                status.map(|status| status.desired_number_scheduled)
            }
            Workload::Job(_) => None,
        };
        wanted.unwrap_or(1) > 0
    }

    /// A pod of a StatefulSet that its partition leaves at the older template.
    pub fn is_held_back(&self, pod: &Pod) -> bool {
        let Workload::StatefulSet(set) = &self.workload else {
            return false;
        };
        let strategy = set
            .spec
            .as_ref()
            .and_then(|spec| spec.update_strategy.as_ref());
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let partition = rolling.and_then(|rolling| rolling.partition).unwrap_or(0);
        let ordinal = name(pod)
            .rsplit('-')
            .next()
            .and_then(|text| text.parse().ok());
        ordinal.is_some_and(|ordinal: i32| ordinal < partition)
    }

    /// A pod that the workload's selector matches is on its way out.
    pub fn anything_terminating(&self) -> bool {
        self.pods.iter().any(is_terminating)
    }

    pub fn events_of<'a>(&'a self, object_uid: &'a str) -> impl Iterator<Item = &'a Event> {
        self.events
            .iter()
            .filter(move |event| event.involved_object.uid.as_deref() == Some(object_uid))
    }

    /// When our apply was written, by the API server's clock.
    pub fn applied_at(&self) -> Option<Timestamp> {
        let entries = self
            .workload
            .metadata()
            .managed_fields
            .as_deref()
            .unwrap_or_default();
        let writers = entries
            .iter()
            .filter(|entry| entry.subresource.as_deref().unwrap_or_default().is_empty());
        let ours = writers
            .clone()
            .filter(|entry| entry.manager.as_deref() == Some("landfall"));
        let others = writers.filter(|entry| entry.manager.as_deref() != Some("landfall-fence"));
        let time = |entry: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry| {
            entry.time.as_ref().map(|time| time.0)
        };
        ours.filter_map(time)
            .max()
            .or_else(|| others.filter_map(time).max())
    }
}

/// The template less what the Deployment's controller writes into it.
fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    if let Some(metadata) = &mut template.metadata {
        metadata.creation_timestamp = None;
        if let Some(labels) = &mut metadata.labels {
            labels.remove(TEMPLATE_HASH_LABEL);
        }
    }
    template
}

pub fn template_release(template: &PodTemplateSpec) -> Option<&str> {
    annotation(template.metadata.as_ref()?, RELEASE_ANNOTATION)
}

pub fn annotation<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

pub fn label<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(key).map(String::as_str)
}

pub fn controller_uid(metadata: &ObjectMeta) -> Option<&str> {
    let owners = metadata.owner_references.as_deref().unwrap_or_default();
    owners
        .iter()
        .find(|owner| owner.controller == Some(true))
        .map(|owner| owner.uid.as_str())
}

fn is_owned_by(metadata: &ObjectMeta, uid: &str) -> bool {
    controller_uid(metadata) == Some(uid)
}

pub fn created(metadata: &ObjectMeta) -> Option<Timestamp> {
    metadata.creation_timestamp.as_ref().map(|time| time.0)
}

pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Evicted, or a finished pod of a Job: it will never run again.
pub fn has_ended(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

pub fn is_ready(pod: &Pod) -> bool {
    pod_condition(pod, "Ready").is_some_and(|(status, _, _)| status == "True")
}

/// Status, reason and message of one of the pod's conditions.
pub fn pod_condition<'a>(pod: &'a Pod, type_: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let condition = whole_condition(pod, type_)?;
    Some((
        &condition.status,
        condition.reason.as_deref().unwrap_or_default(),
        condition.message.as_deref().unwrap_or_default(),
    ))
}

/// As `pod_condition`, with its times.
pub fn whole_condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_deref()?;
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// One container of a pod: what it is to be, where the pod says so, and how it is.
#[derive(Debug, Clone, Copy)]
pub struct Running<'a> {
    pub pod: &'a Pod,
    pub spec: Option<&'a Container>,
    pub status: &'a ContainerStatus,
    /// It runs before the others and is to end by itself.
    pub is_init: bool,
}

/// A container's death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Death<'a> {
    pub exit_code: i32,
    pub reason: &'a str,
    pub message: &'a str,
    /// When the container that died had begun to run.
    pub began: Option<Timestamp>,
    /// The dead one is not the current one: its log is the `previous` one.
    pub is_previous: bool,
}

impl<'a> Running<'a> {
    pub fn all(pod: &'a Pod) -> Vec<Self> {
        let Some(status) = &pod.status else {
            return Vec::new();
        };
        let spec = pod.spec.as_ref();
        let init_specs = spec
            .and_then(|spec| spec.init_containers.as_deref())
            .unwrap_or_default();
        let specs = spec
            .map(|spec| spec.containers.as_slice())
            .unwrap_or_default();
        let running = |specs: &'a [Container], status: &'a ContainerStatus, among_init: bool| {
            let spec = specs.iter().find(|container| container.name == status.name);
            // An init container that is restarted always is a sidecar and is to live as long as its pod.
            let is_sidecar =
                spec.is_some_and(|spec| spec.restart_policy.as_deref() == Some("Always"));
            Self {
                pod,
                spec,
                status,
                is_init: among_init && !is_sidecar,
            }
        };
        let init = status
            .init_container_statuses
            .iter()
            .flatten()
            .map(|it| running(init_specs, it, true));
        let others = status
            .container_statuses
            .iter()
            .flatten()
            .map(|it| running(specs, it, false));
        init.chain(others).collect()
    }

    /// Reason and message of why it does not run.
    pub fn waiting(&self) -> Option<(&'a str, &'a str)> {
        let waiting = self.status.state.as_ref()?.waiting.as_ref()?;
        Some((
            waiting.reason.as_deref().unwrap_or_default(),
            waiting.message.as_deref().unwrap_or_default(),
        ))
    }

    /// Since when it runs, by the node's clock; 1970 where the node does not say.
    pub fn running_since(&self) -> Option<Timestamp> {
        let running = self.status.state.as_ref()?.running.as_ref()?;
        Some(
            running
                .started_at
                .as_ref()
                .map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        )
    }

    pub fn is_running(&self) -> bool {
        self.status
            .state
            .as_ref()
            .is_some_and(|state| state.running.is_some())
    }

    /// The newest death that still shows; an init container that ended well has not died.
    pub fn death(&self) -> Option<Death<'a>> {
        let states = [
            (self.status.state.as_ref(), false),
            (self.status.last_state.as_ref(), true),
        ];
        states.into_iter().find_map(|(state, is_previous)| {
            let dead = state?.terminated.as_ref()?;
            let ended_well = self.is_init && dead.exit_code == 0;
            (!ended_well).then(|| Death {
                exit_code: dead.exit_code,
                reason: dead.reason.as_deref().unwrap_or_default(),
                message: dead.message.as_deref().unwrap_or_default(),
                began: dead.started_at.as_ref().map(|time| time.0),
                is_previous,
            })
        })
    }

    /// How often it has died: restarts, and one more where the current one is dead too.
    pub fn deaths(&self) -> i32 {
        if self.death().is_none() {
            return 0;
        }
        let state = self.status.state.as_ref();
        let is_dead = state.is_some_and(|state| {
            state
                .terminated
                .as_ref()
                .is_some_and(|dead| !self.is_init || dead.exit_code != 0)
        });
        // While it waits for its next start the count still names the dead one.
        let waits_after_death = state.is_some_and(|state| state.waiting.is_some())
            && self
                .status
                .last_state
                .as_ref()
                .is_some_and(|last| last.terminated.is_some());
        self.status.restart_count + i32::from(is_dead || waits_after_death)
    }

    /// `container app of pod hello-axum-5d9-x2v`.
    pub fn display_name(&self) -> String {
        let what = if self.is_init {
            "init container"
        } else {
            "container"
        };
        format!("{what} {} of pod {}", self.status.name, name(self.pod))
    }

    pub fn key(&self) -> (String, String) {
        (uid(self.pod).to_owned(), self.status.name.clone())
    }
}
