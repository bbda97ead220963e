//! Apply: one object of a release to the API server, by server-side apply as `landfall`, for real or as a dry run.
//!
//! Read, adapt to what is live, apply unforced; fields of people's tools are taken back by force under the version that
//! was read. It decides nothing about order or about the release: `stages/deploy.rs` does. A dry run changes nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, anyhow};
use kube::api::{
    DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy,
    ValidationDirective,
};
use kube::core::Status;
use serde_json::{Value, json};

use super::lease::{self, Held};
use super::ownership::{self, FENCE, MANAGER, MANAGER_FENCE, MANAGER_REPLICAS, Taking};
use super::{Answer, Cluster, Resource, Trouble, refusal};
use crate::builds::Cause;
use crate::fail_point;
use crate::manifests::render::{HISTORY, is_workload, template, template_hash};
use crate::manifests::{api_version, display_name, kind, name, text};
use crate::release::AppliedObject;

/// Somebody else writes the object at the same time.
const TRIES_MAX: u32 = 5;
const PAUSE: Duration = Duration::from_millis(50);

/// What holds for every object of one release.
#[derive(Clone, Default)]
pub struct Rules<'a> {
    pub taking: Taking<'a>,
    /// Kind and name of the workloads whose replicas an autoscaler has, live or in the set.
    pub autoscaled: BTreeSet<(String, String)>,
    /// The right under which we write; None for a dry run, and for the namespace.
    pub held: Option<&'a Held>,
}

/// An object before and after.
#[derive(Debug, Clone)]
pub struct Done {
    /// None where it was created.
    pub before: Option<Value>,
    pub after: Value,
    /// What the author of the push should know.
    pub notes: Vec<String>,
}

/// Applies one object. The same object twice changes nothing.
pub async fn apply(
    cluster: &Cluster,
    rules: &Rules<'_>,
    object: &Value,
    dry_run: bool,
) -> Result<Done, Trouble> {
    let Some(resource) = cluster.resource(object).await? else {
        return Err(Trouble::Refused(kind_unknown(object)));
    };
    let mut was_absent = false;
    for attempt in 0..TRIES_MAX {
        let live = cluster.get(&resource, name(object)).await;
        let live = live.map_err(|answer| trouble(cluster, object, answer))?;
        was_absent |= attempt == 0 && live.is_none();
        if let Some(done) = attempt_once(cluster, rules, &resource, object, live, dry_run).await? {
            return created_unheard(rules, &resource, was_absent, done).await;
        }
        tokio::time::sleep(PAUSE * (attempt + 1)).await;
    }
    let name = display_name(object);
    Err(Trouble::Agent(anyhow!(
        "{name} is changed by somebody else again and again: gave up after {TRIES_MAX} tries"
    )))
}

/// We made it, and the answer was lost: what is live now carries our own number.
async fn created_unheard(
    rules: &Rules<'_>,
    resource: &Resource,
    was_absent: bool,
    done: Done,
) -> Result<Done, Trouble> {
    let (Some(held), Some(before)) = (rules.held, &done.before) else {
        return Ok(done);
    };
    if !was_absent || lease::fence_of(before) != held.fence {
        return Ok(done);
    }
    let fenced = lease::fence(held, resource, &done.after).await?;
    Ok(Done {
        before: None,
        after: fenced.unwrap_or(done.after),
        notes: done.notes,
    })
}

/// Kind and name of every workload that an autoscaler of the set or of the cluster targets.
pub async fn autoscaled(
    cluster: &Cluster,
    objects: &[Value],
) -> Result<BTreeSet<(String, String)>, Trouble> {
    let resource = Resource::built_in(
        "autoscaling/v2",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        true,
    );
    let live = match cluster.list(&resource).await {
        Ok(live) => live,
        // Nothing is live in a namespace that is to be made.
        Err(Answer::Refused(status)) if status.code == 404 => Vec::new(),
        Err(answer) => {
            return Err(answer
                .into_error("list the autoscalers of the namespace")
                .into());
        }
    };
    let in_set = objects
        .iter()
        .filter(|object| kind(object) == "HorizontalPodAutoscaler");
    let target = |object: &Value, field: &str| {
        text(object, &format!("/spec/scaleTargetRef/{field}")).to_owned()
    };
    Ok(in_set
        .chain(&live)
        .map(|object| (target(object, "kind"), target(object, "name")))
        .collect())
}

/// The environment's namespace; None where it is missing.
pub async fn namespace(cluster: &Cluster) -> Result<Option<Value>, Trouble> {
    let resource = Resource::built_in("v1", "Namespace", "namespaces", false);
    let live = cluster.get(&resource, &cluster.namespace).await;
    live.map_err(|answer| {
        answer
            .into_error(&format!("read the namespace {}", cluster.namespace))
            .into()
    })
}

/// One pod of a workload's template as a dry run: only so do quota, limits and pod security speak before a rollout.
/// Some: it could not be asked, and why. `live` is the workload that it will replace.
pub async fn dry_run_pod(
    cluster: &Cluster,
    object: &Value,
    live: Option<&Value>,
) -> Result<Option<String>, Trouble> {
    let Some(mut pod) = pod_of(cluster, object) else {
        return Ok(None);
    };
    for with_account in [true, false] {
        if !with_account {
            remove_account(&mut pod);
        }
        let Err(status) = create_dry(cluster, &pod).await? else {
            return Ok(None);
        };
        if status.message.contains("error looking up service account") {
            // It comes with this very set, or the namespace is a moment old: asked again with the default one.
            continue;
        }
        if refusal::is_about_rights(&status) {
            return Ok(Some(
                "the agent may not create pods, so that quota and pod security are not checked"
                    .to_owned(),
            ));
        }
        if status.message.contains("exceeded quota") && live.is_some_and(makes_room) {
            return Ok(Some(format!(
                "there is no room for one more pod: {}",
                refusal::short(&status.message)
            )));
        }
        return Err(refusal::judge(&cluster.namespace, object, &status));
    }
    Ok(Some(
        "quota and pod security are not checked: its service account is not there yet".to_owned(),
    ))
}

/// None: the object changed since it was read; read it again.
async fn attempt_once(
    cluster: &Cluster,
    rules: &Rules<'_>,
    resource: &Resource,
    object: &Value,
    live: Option<Value>,
    dry_run: bool,
) -> Result<Option<Done>, Trouble> {
    let mut notes = Vec::new();
    let before = live.clone();
    let mut live = live;
    let key = (kind(object).to_owned(), name(object).to_owned());
    let autoscaled = rules.autoscaled.contains(&key);
    if let Some(seen) = &live
        && !dry_run
    {
        let Some(prepared) =
            make_ours(cluster, resource, object, seen, autoscaled, &mut notes).await?
        else {
            return Ok(None);
        };
        live = Some(prepared);
    }
    let mut desired = adapt(resource, object, live.as_ref(), autoscaled, dry_run);
    if let Some(held) = rules.held {
        if live.is_none() {
            // Nothing of an object that is not there can be compared by the server.
            lease::ensure_newest(held, object).await?;
        }
        let fence = held.fence;
        // Not forced, so that the server compares it: left out it would fail open.
        set_label(&mut desired, FENCE, &fence.to_string());
    }
    let status = match patch(cluster, resource, &desired, MANAGER, false, dry_run).await {
        Ok(after) => {
            let after = match (rules.held, &before) {
                // New objects are fenced at once: from here on another's apply is refused.
                (Some(held), None) => lease::fence(held, resource, &after)
                    .await?
                    // Removed again by somebody else: the next look says so.
                    .unwrap_or(after),
                _ => after,
            };
            return Ok(Some(Done {
                before,
                after,
                notes,
            }));
        }
        Err(Answer::Refused(status)) => status,
        Err(answer) => return Err(trouble(cluster, object, answer)),
    };
    if is_stale(&status) {
        return Ok(None);
    }
    let conflicts = ownership::conflicts(&status);
    let (true, Some(live)) = (!conflicts.is_empty(), live.as_ref()) else {
        return Err(refusal::judge(&cluster.namespace, object, &status));
    };
    let is_fenced = |conflict: &ownership::Conflict| conflict.manager == MANAGER_FENCE;
    if let Some(held) = rules.held
        && (lease::fence_of(live) != held.fence || conflicts.iter().any(is_fenced))
    {
        // An older holder has made it since we looked, and is outdone; a newer one outdoes us.
        lease::fence(held, resource, object).await?;
        return Ok(None);
    }
    if let Some(conflict) = conflicts
        .iter()
        .find(|conflict| !rules.taking.may_take(conflict, autoscaled))
    {
        return Err(Trouble::Refused(field_conflict(object, conflict)));
    }
    set(
        &mut desired,
        "resourceVersion",
        text(live, "/metadata/resourceVersion"),
    );
    match patch(cluster, resource, &desired, MANAGER, true, dry_run).await {
        Ok(after) => {
            notes.extend(
                conflicts.iter().map(|conflict| {
                    format!("took {} back from {}", conflict.field, conflict.manager)
                }),
            );
            Ok(Some(Done {
                before,
                after,
                notes,
            }))
        }
        Err(Answer::Refused(status)) if is_stale(&status) => Ok(None),
        Err(answer) => Err(trouble(cluster, object, answer)),
    }
}

/// Before the first apply over what people's tools wrote: their fields become ours, and the replicas of an autoscaled
/// workload are let go without falling to 1. The object as it is then; None where somebody else was faster.
async fn make_ours(
    cluster: &Cluster,
    resource: &Resource,
    object: &Value,
    live: &Value,
    autoscaled: bool,
    notes: &mut Vec<String>,
) -> Result<Option<Value>, Trouble> {
    let mut live = live.clone();
    if autoscaled && ownership::has_replicas(&live) {
        match hand_over(cluster, resource, &live).await {
            Ok(after) => live = after,
            // The autoscaler has just written another number: then it is the owner, which is as good.
            Err(Answer::Refused(status)) if status.code == 409 => return Ok(None),
            Err(answer) => return Err(trouble(cluster, object, answer)),
        }
        notes.push("left the number of replicas to its autoscaler".to_owned());
    }
    let template_changes = template_hash(&live) != template_hash(object);
    if let Some(entries) = ownership::migrated(&live, template_changes) {
        match migrate(cluster, resource, &live, entries).await {
            Ok(after) => live = after,
            Err(Answer::Refused(status)) if status.code == 409 || status.code == 422 => {
                return Ok(None);
            }
            Err(answer) => return Err(trouble(cluster, object, answer)),
        }
        notes.push(
            "took over what kubectl had applied: fields that the manifests do not hold are removed"
                .to_owned(),
        );
    }
    Ok(Some(live))
}

async fn hand_over(cluster: &Cluster, resource: &Resource, live: &Value) -> Result<Value, Answer> {
    let replicas = live.pointer("/spec/replicas").cloned().unwrap_or_default();
    let desired = json!({
        "apiVersion": api_version(live), "kind": kind(live),
        "metadata": {"name": name(live), "uid": text(live, "/metadata/uid")},
        "spec": {"replicas": replicas},
    });
    patch(cluster, resource, &desired, MANAGER_REPLICAS, false, false).await
}

/// Only the owners change, under the version that was read: no field gets another value.
async fn migrate(
    cluster: &Cluster,
    resource: &Resource,
    live: &Value,
    entries: Value,
) -> Result<Value, Answer> {
    let merge = json!({"metadata": {
        "resourceVersion": text(live, "/metadata/resourceVersion"),
        "uid": text(live, "/metadata/uid"),
        "managedFields": entries,
    }});
    let parameters = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let request = cluster
        .request(resource)
        .patch(name(live), &parameters, &Patch::Merge(&merge));
    let request = request.map_err(|error| Answer::Away(error.into()))?;
    cluster
        .send(&format!("take over {}", display_name(live)), &request)
        .await
}

async fn patch(
    cluster: &Cluster,
    resource: &Resource,
    desired: &Value,
    manager: &str,
    force: bool,
    dry_run: bool,
) -> Result<Value, Answer> {
    let parameters = PatchParams {
        dry_run,
        force,
        field_manager: Some(manager.to_owned()),
        field_validation: Some(ValidationDirective::Strict),
    };
    let request =
        cluster
            .request(resource)
            .patch(name(desired), &parameters, &Patch::Apply(desired));
    let request = request.map_err(|error| Answer::Away(error.into()))?;
    let applied = cluster
        .send(&format!("apply {}", display_name(desired)), &request)
        .await?;
    if !dry_run {
        fail_point::at("cluster: applied");
    }
    Ok(applied)
}

/// The object as it is sent, given what is live.
fn adapt(
    resource: &Resource,
    object: &Value,
    live: Option<&Value>,
    autoscaled: bool,
    dry_run: bool,
) -> Value {
    let mut desired = object.clone();
    if !resource.namespaced
        && let Some(metadata) = desired.get_mut("metadata").and_then(Value::as_object_mut)
    {
        metadata.remove("namespace");
    }
    let Some(live) = live else {
        // Version 1 is no object's: "only create". One that appears meanwhile is a stale version, and read again.
        set(&mut desired, "resourceVersion", "1");
        return desired;
    };
    // An object of the same name that was made anew is another one.
    set(&mut desired, "uid", text(live, "/metadata/uid"));
    if autoscaled && let Some(spec) = desired.get_mut("spec").and_then(Value::as_object_mut) {
        spec.remove("replicas");
        // A dry run hands nothing over, and would show the default of 1.
        if dry_run && let Some(replicas) = live.pointer("/spec/replicas") {
            spec.insert("replicas".to_owned(), replicas.clone());
        }
    }
    if is_workload(kind(object))
        && !template_hash(live).is_empty()
        && template_hash(live) == template_hash(object)
    {
        keep_history(&mut desired, live);
    }
    desired
}

/// A later change-cause would replace the text of the revision that runs.
fn keep_history(desired: &mut Value, live: &Value) {
    let Some(annotations) = desired
        .pointer_mut("/metadata/annotations")
        .and_then(Value::as_object_mut)
    else {
        return;
    };
    for key in HISTORY {
        match live
            .get("metadata")
            .and_then(|metadata| metadata.get("annotations")?.get(key))
        {
            Some(value) => annotations.insert(key.to_owned(), value.clone()),
            None => annotations.remove(key),
        };
    }
}

fn set(object: &mut Value, field: &str, value: &str) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert(field.to_owned(), value.into());
    }
}

fn set_label(object: &mut Value, key: &str, value: &str) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        let labels = metadata.entry("labels").or_insert_with(|| json!({}));
        if labels.is_null() {
            *labels = json!({});
        }
        if let Some(labels) = labels.as_object_mut() {
            labels.insert(key.to_owned(), value.into());
        }
    }
}

/// What came of taking an object away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    Removed,
    /// It was not there any more.
    Gone,
    /// Somebody made it anew, or took it over, since: not ours.
    Another,
}

/// Removes the very object that was recorded, with what its controller made of it.
pub async fn remove(held: &Held, object: &AppliedObject) -> Result<Removal, Trouble> {
    let cluster = &held.cluster;
    let manifest = json!({
        "apiVersion": object.api_version, "kind": object.kind, "metadata": {"name": object.name},
    });
    let what = format!("remove {}", object.display_name());
    let Some(resource) = cluster.resource(&manifest).await? else {
        return Ok(Removal::Gone);
    };
    for attempt in 0..TRIES_MAX {
        let live = cluster.get(&resource, &object.name).await;
        let Some(live) = live.map_err(|answer| answer.into_error(&what))? else {
            return Ok(Removal::Gone);
        };
        // Without the label somebody has taken it over.
        if text(&live, "/metadata/uid") != object.uid || lease::fence_of(&live) == 0 {
            return Ok(Removal::Another);
        }
        if lease::fence_of(&live) > held.fence {
            let theirs = lease::fence_of(&live).to_string();
            return Err(lease::lost(&manifest, &theirs, held.fence));
        }
        if !text(&live, "/metadata/deletionTimestamp").is_empty() {
            return Ok(Removal::Removed);
        }
        let parameters = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            preconditions: Some(Preconditions {
                uid: Some(object.uid.clone()),
                resource_version: Some(text(&live, "/metadata/resourceVersion").to_owned()),
            }),
            ..DeleteParams::default()
        };
        let request = cluster
            .request(&resource)
            .delete(&object.name, &parameters)
            .with_context(|| format!("cannot {what}"))?;
        match cluster.send(&what, &request).await {
            Ok(_) => {
                fail_point::at("cluster: removed");
                return Ok(Removal::Removed);
            }
            Err(Answer::Refused(status)) if status.code == 404 => return Ok(Removal::Gone),
            Err(Answer::Refused(status)) if status.code == 409 => {}
            Err(answer) => return Err(trouble(cluster, &manifest, answer)),
        }
        tokio::time::sleep(PAUSE * (attempt + 1)).await;
    }
    Err(anyhow!("cannot {what}: it is changed by somebody else again and again").into())
}

/// Changed, made or removed since it was read.
fn is_stale(status: &Status) -> bool {
    (status.code == 409 && ownership::conflicts(status).is_empty())
        || (status.code == 422 && status.message.contains("metadata.uid"))
}

fn trouble(cluster: &Cluster, object: &Value, answer: Answer) -> Trouble {
    match answer {
        Answer::Refused(status) => refusal::judge(&cluster.namespace, object, &status),
        Answer::Away(error) => Trouble::Agent(error),
    }
}

fn kind_unknown(object: &Value) -> Cause {
    let sentence = format!(
        "{}: this cluster has no kind {} in {}",
        display_name(object),
        kind(object),
        api_version(object)
    );
    Cause::new("kind_unknown", sentence)
        .object(display_name(object))
        .hint("look at `kubectl api-resources`: the version may be too old, or its CustomResourceDefinition is missing")
}

fn field_conflict(object: &Value, conflict: &ownership::Conflict) -> Cause {
    let (name, field, manager) = (display_name(object), &conflict.field, &conflict.manager);
    Cause::new("field_conflict", format!("{name}: the field {field} belongs to {manager}, which gave it another value"))
        .object(name)
        .hint(format!("remove the field from the manifest, or let the operator list {manager} in `take_fields_from` of agent.yaml"))
}

/// A pod of the template, as its controller would make it.
fn pod_of(cluster: &Cluster, object: &Value) -> Option<Value> {
    let template = template(object)?;
    let mut metadata = template
        .get("metadata")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    metadata.insert(
        "generateName".to_owned(),
        format!("{}-", name(object)).into(),
    );
    metadata.insert("namespace".to_owned(), cluster.namespace.clone().into());
    let mut spec = template.get("spec")?.clone();
    let claims = object
        .pointer("/spec/volumeClaimTemplates")
        .and_then(Value::as_array);
    if let (Some(claims), Some(spec)) = (claims, spec.as_object_mut()) {
        let volumes = spec.entry("volumes").or_insert_with(|| json!([]));
        if let Some(volumes) = volumes.as_array_mut() {
            volumes.extend(
                claims
                    .iter()
                    .map(|claim| json!({"name": name(claim), "emptyDir": {}})),
            );
        }
    }
    Some(json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))
}

fn remove_account(pod: &mut Value) {
    if let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) {
        spec.remove("serviceAccountName");
        spec.remove("serviceAccount");
    }
}

async fn create_dry(cluster: &Cluster, pod: &Value) -> Result<Result<(), Box<Status>>, Trouble> {
    let resource = Resource::built_in("v1", "Pod", "pods", true);
    let parameters = PostParams {
        dry_run: true,
        field_manager: Some(MANAGER.to_owned()),
    };
    let body = serde_json::to_vec(pod).context("cannot write a pod as JSON")?;
    let request = cluster
        .request(&resource)
        .create(&parameters, body)
        .context("cannot ask for a pod")?;
    match cluster.send("try a pod of the template", &request).await {
        Ok(_) => Ok(Ok(())),
        Err(Answer::Refused(status)) => Ok(Err(status)),
        Err(Answer::Away(error)) => Err(Trouble::Agent(error)),
    }
}

/// Whether its rollout ends an old pod before it makes a new one, so that a full quota does not stop it.
fn makes_room(live: &Value) -> bool {
    if kind(live) != "Deployment" || text(live, "/spec/strategy/type") == "Recreate" {
        return true;
    }
    let replicas = live
        .pointer("/spec/replicas")
        .and_then(Value::as_u64)
        .unwrap_or(1);
    match live.pointer("/spec/strategy/rollingUpdate/maxUnavailable") {
        Some(Value::Number(number)) => number.as_u64() != Some(0),
        Some(Value::String(percent)) => {
            let percent: u64 = percent.trim_end_matches('%').parse().unwrap_or(25);
            percent * replicas / 100 > 0
        }
        _ => replicas >= 4,
    }
}
