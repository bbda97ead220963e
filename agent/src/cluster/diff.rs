//! Differences between an object as it is and as it would be, in short lines for the plan.
//!
//! What the server keeps for itself (versions, managers, status) is no difference. Secrets are never shown. Pure: no IO.

use std::collections::BTreeSet;

use serde_json::Value;

use super::ownership::FENCE;
use crate::manifests::{kind, text};

/// Lines shown for one object.
pub const LINES_MAX: usize = 20;
const VALUE_CHARS_MAX: usize = 80;
const SERVER_FIELDS: [&str; 6] = [
    "managedFields",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "uid",
    "selfLink",
];

/// `spec.template.spec.containers[hello].image: a → b`; empty where nothing differs.
pub fn lines(before: &Value, after: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    let hide = kind(after) == "Secret";
    walk(&essence(before), &essence(after), "", hide, &mut lines);
    if lines.len() > LINES_MAX {
        let more = lines.len() - LINES_MAX + 1;
        lines.truncate(LINES_MAX - 1);
        lines.push(format!("and {more} more"));
    }
    lines
}

/// Whether the two mean the same.
pub fn is_same(before: &Value, after: &Value) -> bool {
    essence(before) == essence(after)
}

fn essence(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(members) = object.as_object_mut() {
        members.remove("status");
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in SERVER_FIELDS {
            metadata.remove(field);
        }
        // Who may write it says nothing of what it is.
        if let Some(labels) = metadata.get_mut("labels").and_then(Value::as_object_mut) {
            labels.remove(FENCE);
            if labels.is_empty() {
                metadata.remove("labels");
            }
        }
        // The controller counts revisions whenever it likes.
        if let Some(annotations) = metadata
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove("deployment.kubernetes.io/revision");
            if annotations.is_empty() {
                metadata.remove("annotations");
            }
        }
    }
    object
}

fn walk(before: &Value, after: &Value, path: &str, hide: bool, lines: &mut Vec<String>) {
    if before == after {
        return;
    }
    match (before, after) {
        (Value::Object(old), Value::Object(new)) => {
            let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
            for key in keys {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{}", quoted(key))
                };
                let hide =
                    hide && (path.contains('.') || matches!(key.as_str(), "data" | "stringData"));
                step(old.get(key), new.get(key), &path, hide, lines);
            }
        }
        (Value::Array(old), Value::Array(new)) if names(old).is_some() && names(new).is_some() => {
            let keys: BTreeSet<&str> = names(old).into_iter().chain(names(new)).flatten().collect();
            let find = |items: &'_ [Value], key: &str| {
                items
                    .iter()
                    .find(|item| text(item, "/name") == key)
                    .cloned()
            };
            for key in keys {
                step(
                    find(old, key).as_ref(),
                    find(new, key).as_ref(),
                    &format!("{path}[{key}]"),
                    hide,
                    lines,
                );
            }
        }
        (Value::Array(old), Value::Array(new)) => {
            for index in 0..old.len().max(new.len()) {
                step(
                    old.get(index),
                    new.get(index),
                    &format!("{path}[{index}]"),
                    hide,
                    lines,
                );
            }
        }
        _ => lines.push(format!(
            "{path}: {} → {}",
            show(before, hide),
            show(after, hide)
        )),
    }
}

fn step(
    before: Option<&Value>,
    after: Option<&Value>,
    path: &str,
    hide: bool,
    lines: &mut Vec<String>,
) {
    match (before, after) {
        (Some(before), Some(after)) => walk(before, after, path, hide, lines),
        (Some(before), None) => lines.push(format!("{path}: {} is removed", show(before, hide))),
        (None, Some(after)) => lines.push(format!("{path}: {} is added", show(after, hide))),
        (None, None) => {}
    }
}

/// The names of list items that all have one.
fn names(items: &[Value]) -> Option<Vec<&str>> {
    let names: Vec<&str> = items.iter().map(|item| text(item, "/name")).collect();
    let unique: BTreeSet<&&str> = names.iter().collect();
    (unique.len() == names.len() && !names.contains(&"")).then_some(names)
}

fn quoted(key: &str) -> String {
    if key.contains(['.', '/']) {
        format!("[{key}]")
    } else {
        key.to_owned()
    }
}

fn show(value: &Value, hide: bool) -> String {
    if hide {
        return "(hidden)".to_owned();
    }
    let text = match value {
        Value::String(text) if !text.is_empty() && !text.contains(char::is_whitespace) => {
            text.clone()
        }
        other => other.to_string(),
    };
    match text.char_indices().nth(VALUE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_difference_is_one_line_with_its_path() {
        let before = json!({"kind": "Deployment", "metadata": {"uid": "1", "generation": 1}, "status": {"a": 1},
            "spec": {"replicas": 3, "paused": true, "containers": [{"name": "a", "image": "x:1"}, {"name": "b"}]}});
        let after = json!({"kind": "Deployment", "metadata": {"uid": "2", "generation": 2, "labels": {"a.b/c": "d"}},
            "spec": {"replicas": 5, "containers": [{"name": "b"}, {"name": "a", "image": "x:2"}]}});
        assert_eq!(
            lines(&before, &after),
            [
                "metadata.labels: {\"a.b/c\":\"d\"} is added",
                "spec.containers[a].image: x:1 → x:2",
                "spec.paused: true is removed",
                "spec.replicas: 3 → 5",
            ]
        );
        assert!(is_same(&before, &before) && lines(&before, &before).is_empty());
    }

    #[test]
    fn a_secret_is_never_shown() {
        let before = json!({"kind": "Secret", "data": {"password": "aHVudGVyMg=="}});
        let after = json!({"kind": "Secret", "data": {"password": "Y29ycmVjdA==", "more": "aG9yc2U="}, "stringData": {"x": "battery"}});
        let text = lines(&before, &after).join("\n");
        for secret in ["aHVudGVyMg==", "Y29ycmVjdA==", "aG9yc2U=", "battery"] {
            assert!(!text.contains(secret), "{text}");
        }
        assert!(
            text.contains("data.password: (hidden) → (hidden)"),
            "{text}"
        );
    }
}
