//! Ownership: who has which field of a live object, by its managedFields, and whose fields a release may take.
//!
//! Conflicts in, a decision out; the entries of `kubectl apply` in, entries of ours out. Pure: no IO.

use kube::core::Status;
use serde_json::{Map, Value, json};

use crate::manifests::text;

/// Our field manager.
pub const MANAGER: &str = "landfall";
/// Holds the replicas of a workload that an autoscaler has, while `landfall` lets go of them.
pub const MANAGER_REPLICAS: &str = "landfall-replicas";
/// Writes the fence, and nothing else.
pub const MANAGER_FENCE: &str = "landfall-fence";
/// A label, for an annotation would come back by `kubectl rollout undo`: the number of who may write the object.
pub const FENCE: &str = "landfall.dev/fence";
/// The manager of `kubectl apply` as people use it.
const MANAGER_CLIENT_SIDE: &str = "kubectl-client-side-apply";
/// Of `kubectl rollout undo`, which writes the whole template; `rollout restart` is `kubectl-rollout`.
const MANAGER_UNDO: &str = "kubectl";
/// What the next `kubectl apply` compares with.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const LAST_APPLIED_FIELD: &str = "f:kubectl.kubernetes.io/last-applied-configuration";

/// One field that another manager has with another value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    pub manager: String,
    /// `.spec.template.spec.containers[name="hello"].image`
    pub field: String,
}

/// Conflicts that a 409 names; empty where it means a stale version.
pub fn conflicts(status: &Status) -> Vec<Conflict> {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes
        .filter(|cause| cause.reason == "FieldManagerConflict")
        .map(|cause| Conflict {
            // conflict with "kubectl-edit" using apps/v1
            manager: cause
                .message
                .split('"')
                .nth(1)
                .unwrap_or(&cause.message)
                .to_owned(),
            field: cause.field.clone(),
        })
        .collect()
}

/// Whose fields may be taken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Taking<'a> {
    /// `take_fields_from` of agent.yaml.
    pub managers: &'a [String],
    /// Everybody's: a rollback or an undo must not stop half-way. Never the fence's.
    pub all: bool,
}

impl Taking<'_> {
    /// `autoscaled`: an autoscaler has this workload's replicas, so that they stay its own.
    pub fn may_take(&self, conflict: &Conflict, autoscaled: bool) -> bool {
        let manager = conflict.manager.as_str();
        let was_autoscaler = manager == "kube-controller-manager"
            && conflict.field == ".spec.replicas"
            && !autoscaled;
        manager != MANAGER_FENCE
            && (self.all
                || was_autoscaler
                || manager.starts_with("kubectl")
                || manager == MANAGER_REPLICAS
                || self.managers.iter().any(|name| name == manager))
    }
}

/// The managedFields with which fields of people's tools are ours, so that those which the manifests no longer hold
/// really go. None where nothing is to move. `template_changes`: only then is the template of a `kubectl rollout undo`
/// taken over, for else its pods would be replaced although nothing is new.
pub fn migrated(live: &Value, template_changes: bool) -> Option<Value> {
    let mut entries = live.pointer("/metadata/managedFields")?.as_array()?.clone();
    let (moved, version) = take_out(&mut entries, template_changes);
    if moved.is_empty() {
        return None;
    }
    entries.retain(|entry| {
        entry
            .get("fieldsV1")
            .and_then(Value::as_object)
            .is_none_or(|fields| !fields.is_empty())
    });
    let ours = entries
        .iter_mut()
        .find(|entry| is_ours(entry) && text(entry, "/apiVersion") == version);
    match ours.and_then(|entry| entry.get_mut("fieldsV1")).and_then(Value::as_object_mut) {
        Some(fields) => merge(fields, moved),
        None => entries.push(json!({
            "manager": MANAGER, "operation": "Apply", "apiVersion": version, "fieldsType": "FieldsV1", "fieldsV1": moved,
        })),
    }
    Some(Value::Array(entries))
}

/// Fields that `kubectl apply` has set in `live` and nobody holds after the takeover: an apply then removes them, where a dry
/// run of it, which takes nothing over, answers with `applied` and keeps them. Defaults, which kubectl's entry holds too and
/// its memory does not, come back by themselves.
pub fn let_go(live: &Value, applied: &Value) -> Vec<String> {
    let entries = |object: &Value| {
        let entries = object.pointer("/metadata/managedFields");
        entries
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    let (taken, _) = take_out(&mut entries(live), false);
    let mut held = entries(applied);
    take_out(&mut held, false);
    let mut kept = Map::new();
    for entry in held {
        if let Some(Value::Object(fields)) = entry.get("fieldsV1") {
            merge(&mut kept, fields.clone());
        }
    }
    let annotations = live.pointer("/metadata/annotations");
    let memory = annotations.and_then(|annotations| annotations.get(LAST_APPLIED)?.as_str());
    let set = memory.and_then(|memory| serde_json::from_str(memory).ok());
    let mut gone = Vec::new();
    missing(&taken, &kept, &set.unwrap_or_default(), "", &mut gone);
    gone
}

/// The paths of fields of `taken` that are in `set` and that `kept` lacks, the outermost alone.
fn missing(
    taken: &Map<String, Value>,
    kept: &Map<String, Value>,
    set: &Value,
    at: &str,
    gone: &mut Vec<String>,
) {
    for (key, inner) in taken.iter().filter(|(key, _)| *key != ".") {
        let Some(set) = element(set, key) else {
            continue;
        };
        let path = format!("{at}{}", path_element(key));
        match (inner, kept.get(key)) {
            (_, None) => gone.push(path),
            (Value::Object(inner), Some(Value::Object(kept))) => {
                missing(inner, kept, set, &path, gone);
            }
            _ => {}
        }
    }
}

/// What a key of `fieldsV1` leads to: a member, the item with these members (those with a default may be absent), or a value.
fn element<'a>(of: &'a Value, key: &str) -> Option<&'a Value> {
    match key.split_once(':')? {
        ("f", field) => of.get(field),
        ("k", keys) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).ok()?;
            of.as_array()?.iter().find(|item| {
                let is =
                    |(key, value): (&String, &Value)| item.get(key).is_none_or(|it| it == value);
                keys.iter().all(is)
            })
        }
        ("v", value) => {
            let value: Value = serde_json::from_str(value).ok()?;
            of.as_array()?.iter().find(|item| **item == value)
        }
        _ => None,
    }
}

/// As conflicts name it: `.spec`, `[name="hello"]`. <https://pkg.go.dev/sigs.k8s.io/structured-merge-diff/v4/fieldpath>
fn path_element(key: &str) -> String {
    match key.split_once(':') {
        Some(("f", field)) => format!(".{field}"),
        Some(("k", keys)) => match serde_json::from_str(keys) {
            Ok(Value::Object(keys)) => {
                let keys: Vec<String> = keys
                    .iter()
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect();
                format!("[{}]", keys.join(","))
            }
            _ => format!("[{keys}]"),
        },
        Some(("v", value)) => format!("[={value}]"),
        _ => format!("[{key}]"),
    }
}

/// Takes fields of people's tools out of their entries; with them the API version of the entries.
fn take_out(entries: &mut [Value], template_changes: bool) -> (Map<String, Value>, String) {
    let mut moved = Map::new();
    let mut version = String::new();
    for entry in entries {
        if text(entry, "/operation") != "Update" || !text(entry, "/subresource").is_empty() {
            continue;
        }
        let manager = text(entry, "/manager").to_owned();
        let entry_version = text(entry, "/apiVersion").to_owned();
        let Some(fields) = entry.get_mut("fieldsV1").and_then(Value::as_object_mut) else {
            continue;
        };
        let taken = match manager.as_str() {
            MANAGER_CLIENT_SIDE => without_last_applied(fields),
            MANAGER_UNDO if template_changes => take_template(fields),
            _ => continue,
        };
        if !taken.is_empty() {
            merge(&mut moved, taken);
            version = entry_version;
        }
    }
    (moved, version)
}

/// Whether `spec.replicas` would be ours alone after the migration: then it must be handed over before it is dropped.
pub fn has_replicas(live: &Value) -> bool {
    let entries = live
        .pointer("/metadata/managedFields")
        .and_then(Value::as_array);
    entries.into_iter().flatten().any(|entry| {
        let counts = is_ours(entry) || text(entry, "/manager") == MANAGER_CLIENT_SIDE;
        counts && entry.pointer("/fieldsV1/f:spec/f:replicas").is_some()
    })
}

fn is_ours(entry: &Value) -> bool {
    text(entry, "/manager") == MANAGER
        && text(entry, "/operation") == "Apply"
        && text(entry, "/subresource").is_empty()
}

/// Takes all fields out but the annotation that the next `kubectl apply` needs; it stays with kubectl.
fn without_last_applied(fields: &mut Map<String, Value>) -> Map<String, Value> {
    let mut taken = std::mem::take(fields);
    let annotations = taken
        .get_mut("f:metadata")
        .and_then(|metadata| metadata.get_mut("f:annotations"));
    let last_applied = annotations
        .and_then(Value::as_object_mut)
        .and_then(|annotations| annotations.remove(LAST_APPLIED_FIELD));
    if let Some(last_applied) = last_applied {
        fields.insert(
            "f:metadata".to_owned(),
            json!({"f:annotations": {LAST_APPLIED_FIELD: last_applied}}),
        );
    }
    prune(&mut taken, "f:annotations");
    taken
}

/// Takes `spec.template` out.
fn take_template(fields: &mut Map<String, Value>) -> Map<String, Value> {
    let Some(spec) = fields.get_mut("f:spec").and_then(Value::as_object_mut) else {
        return Map::new();
    };
    let Some(template) = spec.remove("f:template") else {
        return Map::new();
    };
    if spec.is_empty() {
        fields.remove("f:spec");
    }
    Map::from_iter([("f:spec".to_owned(), json!({"f:template": template}))])
}

/// Drops `f:metadata` where only the hull of an annotation is left in it.
fn prune(taken: &mut Map<String, Value>, member: &str) {
    if let Some(metadata) = taken.get_mut("f:metadata").and_then(Value::as_object_mut) {
        let is_hull = |value: &Value| {
            value
                .as_object()
                .is_some_and(|fields| fields.keys().all(|key| key == "."))
        };
        if metadata.get(member).is_some_and(is_hull) {
            metadata.remove(member);
        }
        if metadata.is_empty() {
            taken.remove("f:metadata");
        }
    }
}

/// The union of two sets of fields.
fn merge(into: &mut Map<String, Value>, from: Map<String, Value>) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Object(into)), Value::Object(value)) => merge(into, value),
            (Some(_), _) => {}
            (None, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(manager: &str, operation: &str, fields: &Value) -> Value {
        json!({"manager": manager, "operation": operation, "apiVersion": "apps/v1", "fieldsV1": fields})
    }

    fn live(entries: &[Value]) -> Value {
        json!({"metadata": {"managedFields": entries}})
    }

    #[test]
    fn fields_of_kubectl_apply_become_ours_but_its_memory_stays() {
        let theirs = json!({
            "f:metadata": {"f:annotations": {".": {}, LAST_APPLIED_FIELD: {}}},
            "f:spec": {"f:paused": {}, "f:replicas": {}},
        });
        let ours = json!({"f:spec": {"f:replicas": {}, "f:selector": {}}});
        let live = live(&[
            entry(MANAGER_CLIENT_SIDE, "Update", &theirs),
            entry(MANAGER, "Apply", &ours),
        ]);
        let migrated = migrated(&live, false).unwrap();
        assert_eq!(
            migrated[0]["fieldsV1"],
            json!({"f:metadata": {"f:annotations": {LAST_APPLIED_FIELD: {}}}})
        );
        assert_eq!(
            migrated[1]["fieldsV1"],
            json!({"f:spec": {"f:replicas": {}, "f:selector": {}, "f:paused": {}}})
        );
        assert_eq!(
            super::migrated(&json!({"metadata": {"managedFields": migrated}}), false),
            None
        );
    }

    #[test]
    fn what_nobody_holds_after_the_takeover_is_let_go() {
        let env = |names: &[&str]| {
            let keys = names.iter().map(|name| {
                (
                    format!("k:{{\"name\":\"{name}\"}}"),
                    json!({".": {}, "f:name": {}, "f:value": {}}),
                )
            });
            json!({"f:spec": {"f:containers": {"k:{\"name\":\"web\"}": {".": {}, "f:env": Map::from_iter(keys), "f:imagePullPolicy": {}}}}})
        };
        let theirs = json!({
            "f:metadata": {"f:annotations": {".": {}, LAST_APPLIED_FIELD: {}}, "f:finalizers": {"v:\"theirs\"": {}}},
            "f:spec": {"f:paused": {}, "f:replicas": {}, "f:strategy": {}, "f:template": env(&["OLD", "NEW"])},
        });
        let set = json!({
            "metadata": {"finalizers": ["theirs"]},
            "spec": {"paused": true, "replicas": 3, "template": {"spec": {"containers": [
                {"name": "web", "env": [{"name": "OLD", "value": "1"}, {"name": "NEW", "value": "1"}]}]}}},
        });
        let mut before = live(&[entry(MANAGER_CLIENT_SIDE, "Update", &theirs)]);
        before["metadata"]["annotations"] = json!({LAST_APPLIED: set.to_string()});
        let ours = json!({"f:spec": {"f:template": env(&["NEW"])}});
        let after = live(&[
            entry(MANAGER_CLIENT_SIDE, "Update", &theirs),
            entry(MANAGER, "Apply", &ours),
            entry(
                "kube-controller-manager",
                "Update",
                &json!({"f:spec": {"f:replicas": {}}}),
            ),
        ]);
        assert_eq!(
            let_go(&before, &after),
            [
                ".metadata.finalizers",
                ".spec.paused",
                r#".spec.template.spec.containers[name="web"].env[name="OLD"]"#
            ]
        );
        assert!(let_go(&before, &live(&[entry(MANAGER, "Apply", &theirs)])).is_empty());
        assert!(let_go(&after, &after).is_empty());
    }

    #[test]
    fn only_an_undo_whose_template_we_replace_is_taken_over() {
        let live = live(&[entry(
            MANAGER_UNDO,
            "Update",
            &json!({"f:spec": {"f:template": {}, "f:paused": {}}}),
        )]);
        assert_eq!(migrated(&live, false), None);
        let migrated = migrated(&live, true).unwrap();
        assert_eq!(migrated[0]["fieldsV1"], json!({"f:spec": {"f:paused": {}}}));
        assert_eq!(text(&migrated[1], "/manager"), MANAGER);
        assert_eq!(text(&migrated[1], "/operation"), "Apply");
        assert_eq!(
            migrated[1]["fieldsV1"],
            json!({"f:spec": {"f:template": {}}})
        );
    }

    #[test]
    fn only_the_fields_of_peoples_tools_are_taken() {
        let conflict = |manager: &str, field: &str| Conflict {
            manager: manager.to_owned(),
            field: field.to_owned(),
        };
        let named = ["argocd".to_owned()];
        let taking = Taking {
            managers: &named,
            all: false,
        };
        for manager in [
            "kubectl",
            "kubectl-edit",
            "kubectl-set",
            "argocd",
            MANAGER_REPLICAS,
        ] {
            assert!(
                taking.may_take(&conflict(manager, ".spec.x"), false),
                "{manager}"
            );
        }
        for manager in [
            "helm",
            "flux",
            "kube-controller-manager",
            "landfall-fence",
            "Kubectl",
        ] {
            assert!(
                !taking.may_take(&conflict(manager, ".spec.x"), false),
                "{manager}"
            );
        }
        assert!(taking.may_take(
            &conflict("kube-controller-manager", ".spec.replicas"),
            false
        ));
        assert!(!taking.may_take(&conflict("kube-controller-manager", ".spec.replicas"), true));
        let all = Taking {
            all: true,
            ..taking
        };
        assert!(all.may_take(&conflict("helm", ".spec.x"), false));
        assert!(!all.may_take(&conflict("landfall-fence", ".metadata.labels"), false));
    }
}
