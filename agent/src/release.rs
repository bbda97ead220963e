//! A release: image digests, the full set of rendered manifests and the smoke tests. The unit that goes live and that
//! is put back.
//!
//! Pure: no IO, no async. Rendering is done by `render.rs`, applying by `cluster/apply.rs`.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::pipeline::{FirstRelease, Rollback, SmokeTest, Verify};

/// What one environment is to look like. Stored before the first mutation of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// The store's number; 0 until it is stored.
    #[serde(default)]
    pub id: i64,
    pub environment: String,
    pub build_id: i64,
    pub commit: String,
    /// `PREFIX/NAME@sha256:…`, the image that was built.
    pub image: String,
    pub namespace: String,
    /// Every object, rendered, in the order in which it is applied.
    pub objects: Vec<serde_json::Value>,
    /// What it was to change, by the dry run.
    #[serde(default)]
    pub plan: Vec<Planned>,
    /// What earlier releases made and this one no longer has: removed once it is live.
    #[serde(default)]
    pub prune: Vec<AppliedObject>,
    /// What of the serving release was not well before anything was changed.
    #[serde(default)]
    pub unwell: Vec<Unwell>,
    /// Images that are built elsewhere: the manifest's reference, and the one with a digest that it was resolved to.
    #[serde(default)]
    pub pinned: BTreeMap<String, String>,
    pub smoke_tests: Vec<SmokeTest>,
    pub verify: Verify,
    pub rollback: Rollback,
    pub first_release: FirstRelease,
    /// Hash of `objects` before build, commit and change-cause are written into them.
    pub set_hash: String,
}

/// A workload that failed before a release changed anything: as long as it is the same and fails in no other way and no further,
/// that is not the release's doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unwell {
    /// `deployment/worker`.
    pub object: String,
    /// The hash of its template and of the ConfigMaps and Secrets of the set that it names; empty where it stood there before
    /// Landfall.
    pub template: String,
    /// `Cause::id` of all that is wrong with it.
    pub causes: BTreeSet<String>,
    /// Its pods that are ready all the same.
    pub ready: usize,
}

/// One object as it was applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedObject {
    pub api_version: String,
    pub kind: String,
    /// Empty for a kind that has none.
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// `metadata.generation` after our apply; 0 where the kind has none.
    pub generation: i64,
    pub change: Change,
}

crate::builds::named! {
    /// What an apply does to one object.
    Change {
        Created = "created",
        Changed = "changed",
        Unchanged = "unchanged",
        /// An earlier release made it, and this one no longer has it.
        Removed = "removed",
    }
}

/// What one object of a release would come to, as the dry run saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// `deployment/hello-axum`
    pub object: String,
    pub change: Change,
    /// `spec.replicas: 3 → 4`; what is secret is masked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<String>,
    /// What is taken from whom, and what could not be checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A text that shows what failed, kept before anything is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// `pod/hello-5d9: log of main, before its restart`
    pub title: String,
    pub body: String,
}

impl AppliedObject {
    /// `deployment/hello-axum`, as kubectl names it.
    pub fn display_name(&self) -> String {
        format!("{}/{}", self.kind.to_lowercase(), self.name)
    }

    /// Whether it is the object of this manifest, in whichever version of its group.
    pub fn is_named_by(&self, manifest: &serde_json::Value) -> bool {
        let text = |pointer| {
            manifest
                .pointer(pointer)
                .and_then(serde_json::Value::as_str)
                .unwrap_or_default()
        };
        let group = |version: &str| {
            version
                .rsplit_once('/')
                .map_or(String::new(), |(group, _)| group.to_owned())
        };
        text("/kind") == self.kind
            && text("/metadata/name") == self.name
            && group(text("/apiVersion")) == group(&self.api_version)
    }
}

/// Stable hash of JSON values, independent of the order of keys: 64 hex digits.
pub fn hash(values: &[serde_json::Value]) -> String {
    let mut hasher = Sha256::new();
    for value in values {
        hasher.update(canonical(value).as_bytes());
        hasher.update(b"\n");
    }
    hex::encode(hasher.finalize())
}

/// JSON text with the keys of every object sorted.
fn canonical(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.iter().collect();
            keys.sort_by_key(|(key, _)| key.as_str());
            let members: Vec<_> = keys
                .into_iter()
                .map(|(key, value)| format!("{}:{}", Value::from(key.as_str()), canonical(value)))
                .collect();
            format!("{{{}}}", members.join(","))
        }
        Value::Array(items) => format!(
            "[{}]",
            items.iter().map(canonical).collect::<Vec<_>>().join(",")
        ),
        scalar => scalar.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_hash_does_not_depend_on_the_order_of_keys() {
        assert_eq!(
            hash(&[json!({"a": 1, "b": [1, 2]})]),
            hash(&[json!({"b": [1, 2], "a": 1})])
        );
        assert_ne!(hash(&[json!({"b": [2, 1]})]), hash(&[json!({"b": [1, 2]})]));
    }
}
