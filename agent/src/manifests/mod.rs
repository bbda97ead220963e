//! Manifests: the files of a repository in, one checked object a document out.
//!
//! Reading is `yaml.rs`; here stands what makes a set of documents a set of manifests. What is done to them for one
//! release is `render.rs`, what an environment allows is `cluster/policy.rs`. Pure: no IO.

pub mod files;
mod kustomize;
pub mod render;
pub mod yaml;
pub mod yaml_scalar;

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use self::yaml::{Budget, Document};
use crate::diagnostic::Diagnostic;

/// Of all files together.
pub const BYTES_MAX: usize = 4 << 20;
/// Of all files together.
pub const DOCUMENTS_MAX: usize = 500;

/// One object as its author wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// Path in the repository.
    pub file: String,
    /// Which document of the file, from 1.
    pub document: usize,
    /// Where it begins, from 1.
    pub line: usize,
    pub object: Value,
}

impl Manifest {
    pub fn kind(&self) -> &str {
        kind(&self.object)
    }

    pub fn name(&self) -> &str {
        name(&self.object)
    }

    /// `deployment/hello-axum`, as kubectl names it.
    pub fn display_name(&self) -> String {
        display_name(&self.object)
    }

    /// `kubernetes/app.yaml:12 (document 2)`.
    pub fn place(&self) -> String {
        format!("{}:{} (document {})", self.file, self.line, self.document)
    }
}

/// `kind`, empty where there is none.
pub fn kind(object: &Value) -> &str {
    text(object, "/kind")
}

/// `apiVersion`, empty where there is none.
pub fn api_version(object: &Value) -> &str {
    text(object, "/apiVersion")
}

/// `metadata.name`, empty where there is none.
pub fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

/// `deployment/hello-axum`, as kubectl names it.
pub fn display_name(object: &Value) -> String {
    format!("{}/{}", kind(object).to_lowercase(), name(object))
}

/// Where a kind has its pod: JSON pointer of the pod's spec.
pub fn pod_pointer(kind: &str) -> Option<&'static str> {
    match kind {
        "Pod" => Some("/spec"),
        "Deployment"
        | "StatefulSet"
        | "DaemonSet"
        | "ReplicaSet"
        | "ReplicationController"
        | "Job" => Some("/spec/template/spec"),
        "CronJob" => Some("/spec/jobTemplate/spec/template/spec"),
        _ => None,
    }
}

/// The text at a JSON pointer, empty where there is none.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The condition of a live object's status, where it is true.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    let conditions = object.pointer("/status/conditions")?.as_array()?;
    conditions
        .iter()
        .find(|condition| text(condition, "/type") == kind && text(condition, "/status") == "True")
}

/// Shorter lines of a Secret (`true`, `server:`) would mask half of every log, longer ones are known by their beginning.
const SECRET_LINE_MIN: usize = 8;
const SECRET_LINE_MAX: usize = 4096;

/// The values of all Secrets among these objects, line by line, as programs see them: what no log may show. What is no text
/// is left out.
pub fn secret_values(objects: &[Value]) -> Vec<String> {
    let secrets = objects.iter().filter(|object| kind(object) == "Secret");
    let values = |object: &Value, pointer: &str| -> Vec<String> {
        let members = object.pointer(pointer).and_then(Value::as_object);
        let texts = members
            .into_iter()
            .flatten()
            .filter_map(|(_, value)| value.as_str());
        texts.map(str::to_owned).collect()
    };
    let decoded = |text: String| String::from_utf8(STANDARD.decode(text).ok()?).ok();
    let values = secrets.flat_map(|secret| {
        let encoded = values(secret, "/data").into_iter().filter_map(decoded);
        let plain = values(secret, "/stringData");
        encoded.chain(plain).collect::<Vec<_>>()
    });
    let mut lines = Vec::new();
    for value in values {
        let whole = value.lines().map(str::trim);
        let long = whole.filter(|line| line.len() >= SECRET_LINE_MIN);
        lines.extend(long.map(|line| line.chars().take(SECRET_LINE_MAX).collect()));
    }
    lines
}

/// Reads files, given as path and text, in their order.
pub fn read(files: &[(String, String)]) -> Result<Vec<Manifest>, Diagnostic> {
    let bytes: usize = files.iter().map(|(_, text)| text.len()).sum();
    let first = files.first().map_or("manifests", |(path, _)| path);
    if bytes > BYTES_MAX {
        let problem = format!(
            "the manifests are larger than {} MiB in all",
            BYTES_MAX >> 20
        );
        return Err(Diagnostic::plain(first, problem));
    }
    let mut budget = Budget::default();
    let mut manifests: Vec<Manifest> = Vec::new();
    let mut places = HashMap::new();
    for (path, text) in files {
        let documents = yaml::documents(text, &mut budget).map_err(|problem| {
            Diagnostic::at(path, text, (problem.line, problem.column), problem.message)
        })?;
        for document in documents {
            let at = |problem: String| {
                let problem = format!("document {}: {problem}", document.number);
                Diagnostic::at(path, text, (document.line, 1), problem)
            };
            if manifests.len() == DOCUMENTS_MAX {
                return Err(at(format!(
                    "there are more than {DOCUMENTS_MAX} documents in all"
                )));
            }
            check(&document.value).map_err(at)?;
            let manifest = manifest(path, document.clone());
            if let Some(before) = places.insert(identity(&manifest.object), manifest.place()) {
                return Err(at(format!(
                    "{} is in the set already, in {before}",
                    manifest.display_name()
                )));
            }
            manifests.push(manifest);
        }
    }
    if manifests.is_empty() {
        return Err(Diagnostic::plain(
            first,
            "there is no manifest in this file or folder: nothing would be deployed",
        ));
    }
    Ok(manifests)
}

fn manifest(path: &str, document: Document) -> Manifest {
    Manifest {
        file: path.to_owned(),
        document: document.number,
        line: document.line,
        object: document.value,
    }
}

/// Group, kind and name: two versions of one group mean the same object.
fn identity(object: &Value) -> (String, String, String) {
    let group = api_version(object)
        .split_once('/')
        .map_or("", |(group, _)| group);
    (
        group.to_owned(),
        kind(object).to_owned(),
        name(object).to_owned(),
    )
}

fn check(object: &Value) -> Result<(), String> {
    let Value::Object(members) = object else {
        return Err("is not a mapping with apiVersion, kind and metadata".to_owned());
    };
    // These become parts of the URL that is asked, so that nothing else may be in them.
    let api_version = required(object, "/apiVersion", "apiVersion")?;
    let is_lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-');
    let parts: Vec<_> = api_version.split('/').collect();
    if parts.len() > 2
        || parts
            .iter()
            .any(|part| part.is_empty() || part.starts_with('.') || !part.chars().all(is_lower))
    {
        return Err(format!(
            "`apiVersion: {api_version}` is not one like v1 or apps/v1"
        ));
    }
    let kind = required(object, "/kind", "kind")?;
    if !kind.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(format!("`kind: {kind}` is not the name of a kind"));
    }
    if kind == "List" || (kind.ends_with("List") && members.contains_key("items")) {
        return Err(format!(
            "`kind: {kind}` is a list: write each object as its own document, between lines of ---"
        ));
    }
    if object.pointer("/metadata/generateName").is_some() {
        return Err(
            "`generateName` would make a new object with every release: give it a `name`"
                .to_owned(),
        );
    }
    let name = required(object, "/metadata/name", "metadata.name")?;
    let is_known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
    if name.len() > 253 || name.starts_with('.') || !name.chars().all(is_known) {
        return Err(format!(
            "`name: {name}` is not a name: lower case letters, digits, '-' and '.'"
        ));
    }
    for field in ["labels", "annotations"] {
        let texts = object.pointer(&format!("/metadata/{field}"));
        for (key, value) in texts.and_then(Value::as_object).into_iter().flatten() {
            if !value.is_string() {
                return Err(format!(
                    "metadata.{field}.{key} is {value} and must be text: put it in quotes"
                ));
            }
        }
    }
    Ok(())
}

fn required<'a>(object: &'a Value, pointer: &str, field: &str) -> Result<&'a str, String> {
    match object.pointer(pointer) {
        None | Some(Value::Null) => Err(format!("has no `{field}`")),
        Some(Value::String(text)) if text.is_empty() => Err(format!("has an empty `{field}`")),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!(
            "`{field}` is {other} and must be text: put it in quotes"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_one(text: &str) -> Result<Vec<Manifest>, Diagnostic> {
        read(&[("app.yaml".to_owned(), text.to_owned())])
    }

    fn configmap(name: &str) -> String {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {name}\n")
    }

    #[test]
    fn a_set_is_read_with_file_document_and_line() {
        let read = read_one(&format!("{}---\n{}", configmap("a"), configmap("b"))).unwrap();
        assert_eq!(read[1].place(), "app.yaml:6 (document 2)");
        assert_eq!(read[1].display_name(), "configmap/b");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let two = format!("{}---\n{}", configmap("a"), configmap("a"));
        let table = [
            ("", "no manifest"),
            ("# nothing\n---\n", "no manifest"),
            (
                &two,
                "app.yaml:6:1: document 2: configmap/a is in the set already, in app.yaml:1",
            ),
            ("- a\n", "document 1: is not a mapping"),
            (
                "kind: ConfigMap\nmetadata: {name: a}\n",
                "has no `apiVersion`",
            ),
            ("apiVersion: v1\nmetadata: {name: a}\n", "has no `kind`"),
            (
                "apiVersion: v1\nkind: ConfigMap\n",
                "has no `metadata.name`",
            ),
            (
                "apiVersion: v1\nkind: ConfigMap\nmetadata: []\n",
                "has no `metadata.name`",
            ),
            (
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: yes}\n",
                "must be text",
            ),
            (
                "apiVersion: 1\nkind: ConfigMap\nmetadata: {name: a}\n",
                "must be text",
            ),
            (
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: ../secrets/x}\n",
                "is not a name",
            ),
            (
                "apiVersion: ../v1\nkind: ConfigMap\nmetadata: {name: x}\n",
                "is not one like v1",
            ),
            (
                "apiVersion: v1\nkind: Config/Map\nmetadata: {name: x}\n",
                "not the name of a kind",
            ),
            ("apiVersion: v1\nkind: List\nitems: []\n", "is a list"),
            (
                "apiVersion: v1\nkind: ConfigMapList\nitems: []\n",
                "is a list",
            ),
            (
                "apiVersion: batch/v1\nkind: Job\nmetadata: {generateName: a}\n",
                "generateName",
            ),
            (
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, labels: {on: 1}}\n",
                "in quotes",
            ),
            ("a: [1\n", "app.yaml:"),
        ];
        for (text, expected) in table {
            let error = read_one(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn the_values_of_secrets_are_found() {
        let objects = [
            serde_json::json!({"kind": "Secret", "data": {"a": "Y29ycmVjdC1ob3JzZQ==", "b": "/w=="}, "stringData": {"c": "true\nbattery-staple\n"}}),
            serde_json::json!({"kind": "ConfigMap", "data": {"a": "open"}}),
        ];
        assert_eq!(secret_values(&objects), ["correct-horse", "battery-staple"]);
    }

    #[test]
    fn two_files_cannot_hold_the_same_object_either() {
        let file = |path: &str, version: &str| {
            let text =
                format!("apiVersion: apps/{version}\nkind: Deployment\nmetadata: {{name: web}}\n");
            (path.to_owned(), text)
        };
        let error = read(&[file("a.yaml", "v1"), file("b.yaml", "v1beta1")])
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("b.yaml:1:1") && error.contains("a.yaml:1"),
            "{error}"
        );
    }

    #[test]
    fn sizes_are_bounded() {
        let many: String = (0..=DOCUMENTS_MAX)
            .map(|i| format!("{}---\n", configmap(&format!("c{i}"))))
            .collect();
        assert!(
            read_one(&many)
                .unwrap_err()
                .to_string()
                .contains("more than 500 documents")
        );
        assert!(read_one(&"---\n".repeat(1_000_000)).is_err());
        let large = format!("a: {}", "x".repeat(BYTES_MAX));
        assert!(
            read_one(&large)
                .unwrap_err()
                .to_string()
                .contains("larger than 4 MiB")
        );
    }
}
