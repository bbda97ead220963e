//! pipeline.yaml: parameters of fixed stages, written by the author of the repository.
//!
//! Text in, `Pipeline` or a diagnostic with snippet and caret out. It can only narrow what the operator allowed in
//! agent.yaml; nothing here names a host, a namespace or a credential. Pure: no IO, no async.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::diagnostic::{self, Diagnostic};

/// More is not a pipeline but an attack.
pub const BYTES_MAX: usize = 256 * 1024;

/// An environment is held as long as a release of it is watched.
const WAIT_SECONDS_MAX: u64 = 3600;

/// The whole of pipeline.yaml.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    pub image: Image,
    /// Containers to run before anything is deployed, in this order.
    #[serde(default)]
    pub test: Vec<Test>,
    pub deploy: Deploy,
    #[serde(default)]
    pub verify: Verify,
    #[serde(default)]
    pub smoke_test: Vec<SmokeTest>,
    /// What to do when a release fails after its first change to the cluster.
    #[serde(default)]
    pub rollback: Rollback,
    /// What to do with a failed first release, where nothing existed before.
    #[serde(default)]
    pub first_release: FirstRelease,
}

/// The one image that is built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Pushed as `IMAGE_PREFIX/NAME` and deployed by digest. Lower case, digits, `.`, `_`, `-` and `/`.
    pub name: String,
    /// Path of the Dockerfile in the repository.
    #[serde(default = "dockerfile")]
    pub dockerfile: String,
    /// Folder of the repository that is the build context.
    #[serde(default = "here")]
    pub context: String,
    /// Stage of the Dockerfile to build; the last one where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Other repositories in the manifests that mean this image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replaces: Vec<String>,
    #[serde(default = "build_timeout")]
    pub timeout_seconds: u64,
}

/// One container of the test stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Test {
    pub name: String,
    /// A stage of the Dockerfile to run in; or `image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// An image to run in; or `target`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Run by `/bin/sh -c` in the container.
    pub run: String,
    #[serde(default = "test_timeout")]
    pub timeout_seconds: u64,
    /// A network for the container; only where agent.yaml allows it too.
    #[serde(default)]
    pub network: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    /// Files, or folders whose `*.yaml`, `*.yml` and `*.json` are taken, as `kubectl apply -f` does (not recursive).
    pub manifests: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Verify {
    /// How long the rollout may take.
    pub timeout_seconds: u64,
    /// How long it must stay healthy after the smoke test.
    pub soak_seconds: u64,
}

impl Default for Verify {
    fn default() -> Self {
        Self {
            timeout_seconds: 120,
            soak_seconds: 10,
        }
    }
}

/// One request to every new pod and then through the Service; or, with `url`, to an address outside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SmokeTest {
    /// Path to GET by the cluster's API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub get: Option<String>,
    /// The Service to ask; needed with `get`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// A whole address, whose host agent.yaml lists in `smoke_test_hosts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(default)]
    pub expect: Expect,
    #[serde(default = "smoke_test_timeout")]
    pub timeout_seconds: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    pub status: u16,
    /// These members must be in the answer with these values; `$commit` stands for the commit that is built.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<serde_json::Map<String, serde_json::Value>>,
    /// The body must hold this text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_contains: Option<String>,
}

impl Default for Expect {
    fn default() -> Self {
        Self {
            status: 200,
            json: None,
            body_contains: None,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rollback {
    #[default]
    Automatic,
    Never,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FirstRelease {
    #[default]
    Leave,
    Remove,
}

fn dockerfile() -> String {
    "Dockerfile".to_owned()
}
fn here() -> String {
    ".".to_owned()
}
const fn build_timeout() -> u64 {
    1800
}
const fn test_timeout() -> u64 {
    900
}
const fn smoke_test_timeout() -> u64 {
    30
}

/// Reads pipeline.yaml. `path` is only for the diagnostic.
pub fn parse(path: &str, text: &str) -> Result<Pipeline, Diagnostic> {
    if text.len() > BYTES_MAX {
        return Err(Diagnostic::plain(
            path,
            format!("is larger than {} KiB", BYTES_MAX / 1024),
        ));
    }
    let pipeline: Pipeline = diagnostic::parse_yaml(path, text)?;
    check(&pipeline).map_err(|(key, problem)| Diagnostic::at_key(path, text, key, problem))?;
    Ok(pipeline)
}

/// What types cannot say. The key is what the caret will point to.
fn check(pipeline: &Pipeline) -> Result<(), (&'static str, String)> {
    if !is_image_name(&pipeline.image.name) {
        return Err((
            "name",
            format!(
                "{:?} is not a name for an image: lower case letters, digits, '.', '_', '-' and '/'",
                pipeline.image.name
            ),
        ));
    }
    for (key, path) in [
        ("dockerfile", &pipeline.image.dockerfile),
        ("context", &pipeline.image.context),
    ]
    .into_iter()
    .chain(
        pipeline
            .deploy
            .manifests
            .iter()
            .map(|path| ("manifests", path)),
    ) {
        if !stays_inside(path) {
            return Err((
                key,
                format!("{path:?} must be a relative path inside the repository"),
            ));
        }
    }
    if pipeline.deploy.manifests.is_empty() {
        return Err((
            "manifests",
            "names no file: nothing would be deployed".to_owned(),
        ));
    }
    for test in &pipeline.test {
        if test.target.is_some() == test.image.is_some() {
            return Err((
                "test",
                format!(
                    "test {:?} needs either `target` (a stage of the Dockerfile) or `image`",
                    test.name
                ),
            ));
        }
    }
    let waits = [
        ("timeout_seconds", pipeline.verify.timeout_seconds),
        ("soak_seconds", pipeline.verify.soak_seconds),
    ];
    let requests = pipeline
        .smoke_test
        .iter()
        .map(|request| ("timeout_seconds", request.timeout_seconds));
    if let Some((key, seconds)) = waits
        .into_iter()
        .chain(requests)
        .find(|(_, seconds)| *seconds > WAIT_SECONDS_MAX)
    {
        return Err((
            key,
            format!("{seconds} s is more than {WAIT_SECONDS_MAX} s"),
        ));
    }
    if let Some(service) = pipeline
        .smoke_test
        .iter()
        .filter_map(|request| request.service.as_ref())
        .find(|name| !is_object_name(name))
    {
        return Err((
            "service",
            format!("{service:?} is not the name of a Service: lower case letters, digits and '-'"),
        ));
    }
    for request in &pipeline.smoke_test {
        match (&request.get, &request.service, &request.url) {
            (Some(path), Some(_), None) if path.starts_with('/') => {}
            (None, None, Some(_)) => {}
            (Some(path), Some(_), None) => {
                return Err(("get", format!("{path:?} must begin with '/'")));
            }
            _ => {
                return Err((
                    "smoke_test",
                    "needs `get` and `service`, or `url`".to_owned(),
                ));
            }
        }
    }
    Ok(())
}

/// A DNS label, as Kubernetes names Services: it becomes part of a path of the API server.
fn is_object_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Docker's grammar of repository names, less the host.
fn is_image_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && name.split('/').all(|part| {
            part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && part.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && part.chars().all(|c| {
                    c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-')
                })
        })
}

/// Whether a path of the repository stays in it, judged by its text alone.
pub fn stays_inside(path: &str) -> bool {
    use std::path::Component;
    !path.is_empty()
        && !path.contains('\0')
        && std::path::Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "image:\n  name: hello-axum\ntest:\n  - name: unit tests\n    target: test\n    run: cargo test\ndeploy:\n  manifests: [kubernetes/]\n";

    #[test]
    fn the_shortest_pipeline_takes_its_defaults() {
        let pipeline = parse("pipeline.yaml", GOOD).unwrap();
        assert_eq!(pipeline.image.dockerfile, "Dockerfile");
        assert_eq!(pipeline.verify.timeout_seconds, 120);
        assert_eq!(pipeline.rollback, Rollback::Automatic);
    }

    #[test]
    fn a_typo_is_shown_with_line_caret_and_what_was_meant() {
        let text = GOOD.replace("manifests", "manifest");
        let report = parse("pipeline.yaml", &text).unwrap_err().to_string();
        assert!(report.contains("pipeline.yaml:8"), "{report}");
        assert!(report.contains('^'), "{report}");
        assert!(report.contains("did you mean `manifests`"), "{report}");
    }

    #[test]
    fn a_path_that_leaves_the_repository_is_refused() {
        for path in ["../other", "/etc/passwd", "a/../../b"] {
            let report = parse("pipeline.yaml", &GOOD.replace("kubernetes/", path))
                .unwrap_err()
                .to_string();
            assert!(
                report.contains("inside the repository"),
                "{path:?}: {report}"
            );
        }
    }

    #[test]
    fn an_alias_bomb_is_refused_at_once() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
        for n in 1..12 {
            let (last, aliases) = (n - 1, vec![format!("*a{}", n - 1); 9].join(","));
            let _ = last;
            text.push_str(&format!("a{n}: &a{n} [{aliases}]\n"));
        }
        assert!(parse("pipeline.yaml", &text).is_err());
    }
}
