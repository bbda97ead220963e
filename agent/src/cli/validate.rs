//! `landfall validate`: what a push would be refused for, found before it.
//!
//! The line: pipeline.yaml → Dockerfile → manifests → policy, read from a working tree by the code that a build uses.
//! Asks nobody: no engine, no cluster, no network.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use super::findings::{self, Finding};
use super::{OutputArgument, exit};
use crate::cluster::policy;
use crate::config::{self, Config, Environment};
use crate::git;
use crate::manifests::render::{self, Target};
use crate::manifests::{self, Manifest, files};
use crate::pipeline::{self, Pipeline};
use crate::stages::smoke_test::allowed_address;

const DOCKERFILE_BYTES_MAX: u64 = 1 << 20;
/// Names in one line.
const SHOWN_MAX: usize = 8;

/// Check pipeline.yaml and the manifests of a working tree, without Docker or a cluster
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall validate\n  landfall validate ../shop --config agent.yaml --environment staging\n\nExit codes: 0 a push would not be refused for these files, 2 it would"
)]
pub struct Arguments {
    /// The working tree
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// agent.yaml, for what its environments allow [default: ./agent.yaml, where there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check against the policy of this environment [default: the only one of agent.yaml]
    #[arg(long, value_name = "NAME")]
    environment: Option<String>,
    #[command(flatten)]
    output: OutputArgument,
}

#[expect(clippy::unused_async, reason = "every command is called alike")]
pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        arguments.dir.is_dir(),
        "{} is no folder",
        arguments.dir.display()
    );
    let config = load(arguments)?;
    let environment = choose(arguments, config.as_ref())?;
    let findings = look(&arguments.dir, environment);
    findings::print(&findings, arguments.output.is_json())?;
    let code = if findings::any_failed(&findings) {
        exit::USAGE
    } else {
        0
    };
    Ok(ExitCode::from(code))
}

fn load(arguments: &Arguments) -> anyhow::Result<Option<Config>> {
    let path = match (&arguments.config, &arguments.environment) {
        (Some(path), _) => path.as_path(),
        (None, Some(_)) => Path::new(config::AGENT_YAML),
        (None, None) if Path::new(config::AGENT_YAML).exists() => Path::new(config::AGENT_YAML),
        (None, None) => return Ok(None),
    };
    Config::load(path).map(Some)
}

fn choose<'a>(
    arguments: &Arguments,
    config: Option<&'a Config>,
) -> anyhow::Result<Option<&'a Environment>> {
    let Some(config) = config else {
        return Ok(None);
    };
    match (&arguments.environment, config.environments.as_slice()) {
        (Some(name), _) => config
            .environment(name)
            .map(Some)
            .with_context(|| format!("agent.yaml has no environment {name:?}")),
        (None, [only]) => Ok(Some(only)),
        (None, _) => Ok(None),
    }
}

fn look(tree: &Path, environment: Option<&Environment>) -> Vec<Finding> {
    let path = environment.map_or("pipeline.yaml", |environment| &environment.pipeline);
    let pipeline = match read_pipeline(tree, path) {
        Ok(pipeline) => pipeline,
        Err(finding) => return vec![*finding],
    };
    let mut findings = vec![Finding::ok(path, summary(&pipeline))];
    findings.extend(look_at_image(tree, path, &pipeline));
    match read_manifests(tree, &pipeline) {
        Ok(manifests) => {
            findings.push(Finding::ok("manifests", names(&manifests)));
            findings.push(look_at_images(&pipeline, environment, &manifests));
            findings.push(look_at_policy(environment, &manifests));
            findings.extend(look_at_smoke_tests(&pipeline, environment, &manifests));
        }
        Err(finding) => findings.push(*finding),
    }
    findings
}

fn read_pipeline(tree: &Path, path: &str) -> Result<Pipeline, Box<Finding>> {
    let fail = |says: String, fix: &str| Box::new(Finding::fail(path, says, fix));
    let bytes = git::tree::read_beneath(tree, path, pipeline::BYTES_MAX as u64).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => fail(
            format!("there is no {path} in {}", tree.display()),
            "write one: the README has an example, `landfall schema` tells an editor what it may hold",
        ),
        _ => fail(format!("cannot read it: {error}"), "it must be a regular file of at most 256 KiB"),
    })?;
    let text = String::from_utf8(bytes)
        .map_err(|_| fail("it is not UTF-8".to_owned(), "save it as UTF-8"))?;
    pipeline::parse(path, &text).map_err(|diagnostic| {
        fail(
            diagnostic.to_string(),
            "mend the line that the caret points at",
        )
    })
}

fn summary(pipeline: &Pipeline) -> String {
    let count = |number: usize, what: &str| match number {
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    };
    format!(
        "image {}, {}, {}",
        pipeline.image.name,
        count(pipeline.test.len(), "test"),
        count(pipeline.smoke_test.len(), "smoke test")
    )
}

fn look_at_image(tree: &Path, path: &str, pipeline: &Pipeline) -> Vec<Finding> {
    let image = &pipeline.image;
    let mut findings = Vec::new();
    if !tree.join(&image.context).is_dir() {
        findings.push(Finding::fail(
            "context",
            format!("{:?} is no folder of this tree", image.context),
            format!("set `image.context` in {path}"),
        ));
    }
    let dockerfile = &image.dockerfile;
    let text = match git::tree::read_beneath(tree, dockerfile, DOCKERFILE_BYTES_MAX) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => {
            let says = match error.kind() {
                std::io::ErrorKind::NotFound => format!("there is no {dockerfile} in this tree"),
                _ => format!("cannot read {dockerfile}: {error}"),
            };
            findings.push(Finding::fail(
                "dockerfile",
                says,
                format!("set `image.dockerfile` in {path}"),
            ));
            return findings;
        }
    };
    let stages = stages(&text);
    let targets = pipeline
        .test
        .iter()
        .filter_map(|test| test.target.as_ref())
        .chain(&image.target);
    let missing: Vec<&String> = targets
        .filter(|target| !has_stage(&stages, target))
        .collect();
    findings.push(match missing.first() {
        None => Finding::ok(
            "dockerfile",
            format!("{dockerfile}, {} stages", stages.len()),
        ),
        Some(target) => {
            let known: Vec<&str> = stages.iter().flatten().map(String::as_str).collect();
            let fix = match known.as_slice() {
                [] => format!("name a stage with `FROM … AS {target}`"),
                known => format!("its stages are called {}", known.join(", ")),
            };
            Finding::fail(
                "dockerfile",
                format!("{dockerfile} has no stage {target:?}, which {path} names as `target`"),
                fix,
            )
        }
    });
    findings
}

/// The stages of a Dockerfile, with their names where they have one.
fn stages(dockerfile: &str) -> Vec<Option<String>> {
    let lines = dockerfile
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let froms = lines.filter(|words| {
        words
            .first()
            .is_some_and(|word| word.eq_ignore_ascii_case("FROM"))
    });
    froms
        .map(|words| {
            let at = words
                .iter()
                .position(|word| word.eq_ignore_ascii_case("AS"))?;
            words.get(at + 1).map(|name| name.to_ascii_lowercase())
        })
        .collect()
}

fn has_stage(stages: &[Option<String>], target: &str) -> bool {
    let is_number = target
        .parse::<usize>()
        .is_ok_and(|number| number < stages.len());
    is_number
        || stages
            .iter()
            .flatten()
            .any(|name| name.eq_ignore_ascii_case(target))
}

fn read_manifests(tree: &Path, pipeline: &Pipeline) -> Result<Vec<Manifest>, Box<Finding>> {
    let fail = |says: String, fix: &str| Box::new(Finding::fail("manifests", says, fix));
    let files = files::read(tree, &pipeline.deploy.manifests).map_err(|says| {
        fail(
            says,
            "set `deploy.manifests` to files and folders of this repository",
        )
    })?;
    manifests::read(&files).map_err(|diagnostic| {
        fail(
            diagnostic.to_string(),
            "mend it there; `kubectl explain KIND` tells what a kind may hold",
        )
    })
}

fn names(manifests: &[Manifest]) -> String {
    let mut names: Vec<String> = manifests
        .iter()
        .take(SHOWN_MAX)
        .map(Manifest::display_name)
        .collect();
    if manifests.len() > SHOWN_MAX {
        names.push(format!("and {} more", manifests.len() - SHOWN_MAX));
    }
    names.join(", ")
}

/// Whether any container runs the image that is built.
fn look_at_images(
    pipeline: &Pipeline,
    environment: Option<&Environment>,
    manifests: &[Manifest],
) -> Finding {
    let name = &pipeline.image.name;
    let prefixed = environment.map(|environment| format!("{}/{name}", environment.image_prefix));
    let image = format!(
        "{}@sha256:{}",
        prefixed.as_ref().unwrap_or(name),
        "0".repeat(64)
    );
    let repositories: Vec<String> = [name.clone()]
        .into_iter()
        .chain(prefixed)
        .chain(pipeline.image.replaces.iter().cloned())
        .collect();
    let namespace = environment.map_or("default", |environment| &environment.namespace);
    let target = Target {
        namespace,
        repositories: &repositories,
        image: &image,
        pinned: &std::collections::BTreeMap::new(),
        build_id: 1,
        commit: "",
        title: "",
    };
    match (render::render(&target, manifests), environment) {
        (Ok(_), _) => Finding::ok(
            "image",
            format!("the containers of {name} get what is built"),
        ),
        (Err(cause), Some(_)) => {
            Finding::fail("image", cause.sentence, cause.hint.unwrap_or_default())
        }
        (Err(cause), None) => {
            let fix = format!(
                "write {name}, or check with --config and --environment where it stands behind an `image_prefix`"
            );
            Finding::warn("image", cause.sentence, fix)
        }
    }
}

fn look_at_policy(environment: Option<&Environment>, manifests: &[Manifest]) -> Finding {
    let Some(environment) = environment else {
        return Finding::warn(
            "policy",
            "not checked: what is allowed stands in agent.yaml",
            "give --config agent.yaml --environment NAME",
        );
    };
    match policy::check(environment, manifests) {
        Ok(()) => Finding::ok(
            "policy",
            format!("environment {} allows all of it", environment.name),
        ),
        Err(cause) => Finding::fail("policy", cause.sentence, cause.hint.unwrap_or_default()),
    }
}

fn look_at_smoke_tests(
    pipeline: &Pipeline,
    environment: Option<&Environment>,
    manifests: &[Manifest],
) -> Vec<Finding> {
    let services: Vec<&str> = manifests
        .iter()
        .filter(|one| one.kind() == "Service")
        .map(Manifest::name)
        .collect();
    let look_at_one = |test: &pipeline::SmokeTest| match (&test.service, &test.url) {
        (Some(service), _) if !services.contains(&service.as_str()) => {
            let says = format!("service {service:?} is not among the manifests");
            Some(Finding::warn(
                "smoke test",
                says,
                "name one of them, unless it is in the namespace already",
            ))
        }
        (_, Some(url)) => {
            let allowed = &environment?.smoke_test_hosts;
            allowed_address(url, allowed).is_none().then(|| {
                Finding::fail(
                    "smoke test",
                    format!("{url} is on no host of `smoke_test_hosts`"),
                    "ask the operator, or use `get` and `service`",
                )
            })
        }
        _ => None,
    };
    let findings: Vec<Finding> = pipeline.smoke_test.iter().filter_map(look_at_one).collect();
    match (pipeline.smoke_test.as_slice(), findings.as_slice()) {
        ([], _) => vec![Finding::warn(
            "smoke test",
            "there is none: nobody asks the new pods whether they work",
            "add `smoke_test` with `get` and `service`",
        )],
        (tests, []) => vec![Finding::ok("smoke test", format!("{} in all", tests.len()))],
        _ => findings,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_found_however_they_are_written() {
        let stages = stages(
            "ARG X\nFROM a AS Base\n# FROM no AS comment\nfrom --platform=linux/amd64 b\nRUN echo FROM x AS y\nFROM Base as test\n",
        );
        assert_eq!(
            stages,
            [Some("base".to_owned()), None, Some("test".to_owned())]
        );
        assert!(has_stage(&stages, "TEST") && has_stage(&stages, "1"));
        assert!(!has_stage(&stages, "3") && !has_stage(&stages, "y"));
    }
}
