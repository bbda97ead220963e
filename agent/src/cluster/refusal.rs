//! Refusals: what the API server answered, as one sentence that names object and field, with what to do next.
//!
//! The status of a request in, a cause or our own error out. Pure: no IO.

use anyhow::anyhow;
use kube::core::Status;
use serde_json::Value;

use super::Trouble;
use crate::builds::Cause;
use crate::manifests::display_name;

/// Longest text of the server that is repeated in a sentence.
const MESSAGE_CHARS_MAX: usize = 600;

/// Whether it says that a field is not of the kind; such an answer never changes.
pub fn is_about_schema(message: &str) -> bool {
    message.contains("field not declared in schema")
        || message.contains("failed to create typed patch object")
        || message.contains("failed to convert new object")
        || message.contains("unknown field")
}

/// Our own rights, and not an admission: nothing that a manifest could mend.
pub fn is_about_rights(status: &Status) -> bool {
    status.code == 401 || (status.code == 403 && status.message.contains("\" cannot "))
}

/// Why an object was refused.
pub fn judge(namespace: &str, object: &Value, status: &Status) -> Trouble {
    let name = display_name(object);
    let message = short(&status.message);
    if is_about_rights(status) {
        return Trouble::Agent(anyhow!(
            "the agent may not write {name}: {message}; `landfall doctor` lists the rights that it needs"
        ));
    }
    let fields = fields(status);
    let cause = |id: &str, sentence: String| Cause::new(id, sentence).object(name.clone());
    let delete = format!("kubectl -n {namespace} delete {name}");
    Trouble::Refused(
        if status.code == 403 && message.contains("being terminated") {
            cause(
                "namespace_terminating",
                format!("namespace {namespace} is being deleted, so {name} cannot be put into it"),
            )
            .hint("wait until it is gone, then build again")
        } else if status.code == 403 && message.contains("exceeded quota") {
            cause(
                "quota_exceeded",
                format!("{name} does not fit into the quota of namespace {namespace}: {message}"),
            )
            .hint("lower the requests, or let the operator raise the ResourceQuota")
        } else if status.code == 422 && message.contains("immutable") {
            let what = if fields.is_empty() {
                String::new()
            } else {
                format!(" ({fields})")
            };
            cause("immutable_field", format!("{name} changes a field that cannot be changed{what}: {message}"))
            .hint(format!("put the old value back, give the object a new name, or delete it first, which ends what runs there: {delete}"))
        } else if is_about_schema(&message) {
            cause(
                "manifest_invalid",
                format!("{name} has a field that its kind does not have: {message}"),
            )
            .hint("look for a misspelt or wrongly indented field")
        } else if matches!(status.code, 400 | 422) {
            cause(
                "manifest_invalid",
                format!("{name} is not valid: {message}"),
            )
        } else if status.code == 403 {
            cause(
                "admission_refused",
                format!("the cluster does not admit {name}: {message}"),
            )
        } else if status.code == 413 {
            cause(
                "manifest_invalid",
                format!("{name} is larger than the cluster takes"),
            )
        } else {
            cause(
                "apply_refused",
                format!("the cluster refused {name} ({}): {message}", status.code),
            )
        },
    )
}

/// `spec.selector, spec.clusterIP`: where the server names fields.
fn fields(status: &Status) -> String {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let mut fields: Vec<&str> = causes
        .map(|cause| cause.field.as_str())
        .filter(|field| !field.is_empty())
        .collect();
    fields.dedup();
    fields.join(", ")
}

/// On one line, and not without end: a refused selector repeats the whole object.
pub fn short(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MESSAGE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}
