//! One build of the Dockerfile, up to a stage of it, by the engine's BuildKit: shared by the stages that need an image.
//!
//! The line: context → build with a session (its auth provider gives the registries' logins) → steps in the log as they
//! go → the image's id. Dropping it ends it in the engine too. Tags nothing and pushes nothing.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use anyhow::anyhow;
use bollard::Docker;
use bollard::body_try_stream;
use bollard::errors::Error;
use bollard::models::{BuildInfo, BuildInfoAux};
use bollard::query_parameters::{BuildImageOptions, BuildImageOptionsBuilder, BuilderVersion};
use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::context::{self, Context, Source};
use super::patience::{Trouble, engine, patiently};
use super::steps::Steps;
use super::{CheckedOut, Scope, StageError, StageResult, limited};
use crate::builds::Cause;
use crate::docker;
use crate::docker::registry::Logins;

/// Labels of what we build and run; `sweep` looks for them.
pub const LABEL_BUILD: &str = "landfall.dev/build";
pub const LABEL_ENVIRONMENT: &str = "landfall.dev/environment";
pub const LABEL_COMMIT: &str = "landfall.dev/commit";

/// Builds the Dockerfile's stage (the last one where none is named) within the build's time limit; the image's id.
pub async fn build_target(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    target: Option<&str>,
) -> StageResult<String> {
    let limits = &scope.environment.limits;
    let limit = limits
        .build_timeout_seconds
        .min(checked_out.pipeline.image.timeout_seconds);
    let limit = Duration::from_secs(limit);
    let what = match target {
        Some(target) => format!("the build of the Dockerfile's stage {target:?}"),
        None => "the build of the image".to_owned(),
    };
    let logins = Logins::read(scope.docker, scope.environment).await?;
    let work = patiently(scope, "Docker or a registry", || async {
        let docker = engine(scope).await?.with_timeout(limit);
        check_builder(&docker).await?;
        build_once(scope, checked_out, target, &docker, &logins).await
    });
    limited(scope, &what, limit, work).await
}

async fn build_once(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    target: Option<&str>,
    docker: &Docker,
    logins: &Logins,
) -> Result<String, Trouble> {
    // Ends the thread that reads files, however this function ends.
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let context = read_context(scope, checked_out, &stop).await?;
    check_frontend(&context)?;
    scope.log.line(format!(
        "build context: {} files, {} bytes",
        context.files, context.bytes
    ));
    let options = options(scope, checked_out, target, &context.dockerfile);
    let dockerfile = checked_out.pipeline.image.dockerfile.as_str();
    let (body, sender) = context::stream(context, stop);
    let mut steps = Steps::default();
    let mut image = None;
    let result = {
        let stream = docker.build_image(
            options,
            Some(logins.for_buildkit()),
            Some(body_try_stream(body)),
        );
        let mut stream = pin!(stream);
        loop {
            match stream.next().await {
                None => break Ok(()),
                Some(Err(error)) => break Err(error),
                Some(Ok(BuildInfo {
                    aux: Some(BuildInfoAux::BuildKit(status)),
                    ..
                })) => {
                    let text = steps.update(&status);
                    scope.log.output(&text).await;
                }
                Some(Ok(BuildInfo {
                    aux: Some(BuildInfoAux::Default(id)),
                    ..
                })) => image = id.id,
                Some(Ok(_)) => {}
            }
        }
    };
    scope.log.output(&steps.flush()).await;
    if let (Ok(()), Some(image)) = (&result, image) {
        return Ok(image);
    }
    // What could not be read explains why Docker says that the body broke off.
    sender
        .await
        .map_err(|error| StageError::Agent(error.into()))??;
    Err(match result {
        Err(Error::DockerStreamError { error }) => judge(&logins.scrub(&error), &steps, dockerfile),
        Err(Error::DockerResponseServerError {
            status_code: 400,
            message,
        }) => judge(&logins.scrub(&message), &steps, dockerfile),
        Err(error) => Trouble::of(error, "the build broke off"),
        Ok(()) => Trouble::Away(anyhow!("the build broke off without a word")),
    })
}

async fn check_builder(docker: &Docker) -> Result<(), Trouble> {
    match docker::lacks_buildkit(docker).await {
        Ok(None) => Ok(()),
        Ok(Some(problem)) => Err(Trouble::Final(StageError::Agent(anyhow!(problem)))),
        Err(error) => Err(Trouble::of(error, "cannot ask Docker for its version")),
    }
}

async fn read_context(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    stop: &CancellationToken,
) -> StageResult<Context> {
    let image = &checked_out.pipeline.image;
    let source = Source {
        tree: checked_out.tree.clone(),
        context: image.context.clone(),
        dockerfile: image.dockerfile.clone(),
        time: checked_out.commit_time,
        bytes_max: scope.environment.limits.context_bytes,
        files_max: scope.environment.limits.context_files,
    };
    let stop = stop.clone();
    tokio::task::spawn_blocking(move || context::read(&source, &stop))
        .await
        .map_err(|error| StageError::Agent(error.into()))?
}

fn options(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    target: Option<&str>,
    dockerfile: &str,
) -> BuildImageOptions {
    let mut arguments: HashMap<String, String> =
        scope.environment.build_args.clone().into_iter().collect();
    arguments.insert("GIT_COMMIT".to_owned(), checked_out.commit.clone());
    let labels = HashMap::from([
        (LABEL_ENVIRONMENT, scope.environment.name.clone()),
        (LABEL_COMMIT, checked_out.commit.clone()),
    ]);
    let options = BuildImageOptionsBuilder::default()
        .dockerfile(dockerfile)
        .buildargs(&arguments)
        .labels(&labels)
        .version(BuilderVersion::BuilderBuildKit)
        .session(&session_id(scope, target));
    match target {
        Some(target) => options.target(target),
        None => options,
    }
    .build()
}

/// A name that no other build has at the same time.
fn session_id(scope: &Scope<'_>, target: Option<&str>) -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static SESSIONS: AtomicU64 = AtomicU64::new(0);
    let session = SESSIONS.fetch_add(1, Ordering::Relaxed);
    let process = std::process::id();
    let now = crate::builds::now();
    let text = format!(
        "{} {} {target:?} {process} {session} {now}",
        scope.build.id, scope.build.attempt
    );
    hex::encode(Sha256::digest(text).get(..16).unwrap_or_default())
}

/// A `# syntax=` line makes BuildKit run somebody's image as its frontend: only Docker's own are allowed.
fn check_frontend(context: &Context) -> StageResult<()> {
    let Some(frontend) = frontend(&context.dockerfile_text) else {
        return Ok(());
    };
    let (name, _) = crate::docker::registry::split(frontend);
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    if matches!(name, "docker/dockerfile" | "docker/dockerfile-upstream") {
        return Ok(());
    }
    Err(StageError::Failed(
        Cause::new(
            "frontend_not_allowed",
            format!(
                "the Dockerfile asks to be read by {frontend:?}, which is not Docker's own frontend"
            ),
        )
        .object("Dockerfile:1")
        .hint("remove the `# syntax=` line, or use docker/dockerfile:1"),
    ))
}

/// The image of the `syntax` directive, in any of the comment forms that BuildKit knows.
fn frontend(dockerfile: &str) -> Option<&str> {
    let text = dockerfile.strip_prefix('\u{feff}').unwrap_or(dockerfile);
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if index == 0 && line.starts_with("#!") {
            continue;
        }
        if index == 0 && line.starts_with('{') {
            let (_, rest) = text.split_once("\"syntax\"")?;
            return rest.split('"').nth(1);
        }
        let comment = line.strip_prefix("//").or_else(|| line.strip_prefix('#'))?;
        let (key, value) = comment.split_once('=')?;
        if key.trim().eq_ignore_ascii_case("syntax") {
            return value.split_whitespace().next();
        }
    }
    None
}

const DISK_FULL: &str = "no space left on device";

/// What BuildKit's error means, and for whom.
fn judge(error: &str, steps: &Steps, dockerfile: &str) -> Trouble {
    let ended_by_engine = ["context canceled", "code = Unavailable", "code = Canceled"];
    let failed = steps.failed();
    if failed.is_none() && ended_by_engine.iter().any(|sign| error.contains(sign)) {
        return Trouble::Away(anyhow!("the build broke off: {error}"));
    }
    let about = failed.map_or(error, |(_, problem)| problem);
    let base = failed.and_then(|(name, _)| base_image(name));
    if let Some(base) = base.or_else(|| base_image_of(error)) {
        return base_is_missing(base, about, dockerfile);
    }
    // A full disk of the engine is nobody's fault who pushes. What a program of a step met has an exit code, and is in the log.
    if exit_code(about).is_none() && about.contains(DISK_FULL) {
        return Trouble::Final(StageError::Agent(anyhow!(
            "Docker cannot go on with the build: {about}"
        )));
    }
    if let Some(problem) = error.split("dockerfile parse error").nth(1) {
        return Trouble::Final(StageError::Failed(parse_error(problem, dockerfile)));
    }
    let sentence = match failed {
        Some((name, problem)) => match exit_code(problem) {
            Some(code) => format!("the step {name:?} ended with exit code {code}"),
            None => format!("the step {name:?} failed: {}", plain(problem)),
        },
        None => match exit_code(error) {
            Some(code) => format!("a step of the Dockerfile ended with exit code {code}"),
            None => format!("the Dockerfile cannot be built: {}", plain(error)),
        },
    };
    let hint = match failed.and_then(|(_, problem)| exit_code(problem)) {
        Some("137") => "it was killed, perhaps because Docker's machine ran out of memory",
        _ => "its last lines are in the log above",
    };
    Trouble::Final(StageError::Failed(
        Cause::new("image_build_failed", sentence)
            .object(dockerfile)
            .hint(hint),
    ))
}

fn base_is_missing(base: &str, problem: &str, dockerfile: &str) -> Trouble {
    let problem = plain(problem);
    let sentence = format!("the base image {base} cannot be loaded: {problem}");
    if docker::registry_is_away(problem) {
        return Trouble::Away(anyhow!(sentence));
    }
    if problem.contains(DISK_FULL) {
        return Trouble::Final(StageError::Agent(anyhow!(sentence)));
    }
    let hint = "check its name, and that the agent's `registry` login (or Docker's config.json) may pull it";
    Trouble::Final(StageError::Failed(
        Cause::new("image_build_failed", sentence)
            .object(dockerfile)
            .hint(hint),
    ))
}

/// `[internal] load metadata for docker.io/library/debian:12`.
fn base_image(step: &str) -> Option<&str> {
    step.strip_prefix("[internal] load metadata for ")
}

/// The image of an error that no step has: `…: debian:none: not found`, `failed to resolve source metadata for X: …`.
fn base_image_of(error: &str) -> Option<&str> {
    let (_, rest) = error.split_once("failed to resolve source metadata for ")?;
    Some(rest.split(": ").next().unwrap_or(rest))
}

/// ` line 3: unknown instruction: FRUM`, or without the line.
fn parse_error(problem: &str, dockerfile: &str) -> Cause {
    let problem = problem.trim_start_matches([' ', ':']);
    let problem = problem.strip_prefix("on ").unwrap_or(problem);
    let numbered = problem
        .strip_prefix("line ")
        .and_then(|rest| rest.split_once(": "))
        .filter(|(line, _)| line.bytes().all(|byte| byte.is_ascii_digit()));
    let object = match numbered {
        Some((line, _)) => format!("{dockerfile}:{line}"),
        None => dockerfile.to_owned(),
    };
    let problem = numbered.map_or(problem, |(_, problem)| problem);
    Cause::new(
        "image_build_failed",
        format!("{object}: {}", plain(problem)),
    )
    .object(object)
    .hint("mend the Dockerfile")
}

fn exit_code(problem: &str) -> Option<&str> {
    let (_, code) = problem.rsplit_once("exit code: ")?;
    let end = code.bytes().take_while(u8::is_ascii_digit).count();
    code.get(..end).filter(|code| !code.is_empty())
}

/// BuildKit's words without the layers that they came through, and in one line.
fn plain(error: &str) -> &str {
    const LAYERS: [&str; 6] = [
        "failed to solve with frontend dockerfile.v0: ",
        "failed to solve: ",
        "failed to create LLB definition: ",
        "rpc error: code = Unknown desc = ",
        "failed to compute cache key: ",
        "failed to build LLB: ",
    ];
    let mut error = error.lines().next().unwrap_or(error);
    while let Some(rest) = LAYERS.iter().find_map(|layer| error.strip_prefix(layer)) {
        error = rest;
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(trouble: Trouble) -> Cause {
        match trouble {
            Trouble::Final(StageError::Failed(cause)) => cause,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_full_disk_of_the_engine_is_no_fault_of_the_commit() {
        for full in [
            "failed to solve: failed to prepare extraction: mkdir /var/lib/docker/tmp: no space left on device",
            "failed to solve: debian:12: failed to resolve source metadata for docker.io/library/debian:12: write \
             /var/lib/docker/buildkit/content/ingest/1/data: no space left on device",
        ] {
            let trouble = judge(full, &Steps::default(), "Dockerfile");
            assert!(
                matches!(&trouble, Trouble::Final(StageError::Agent(error)) if error.to_string().contains(DISK_FULL)),
                "{trouble:?}"
            );
        }
        // Of a registry it is for the registry to say.
        let away = "failed to solve: debian:12: failed to resolve source metadata for docker.io/library/debian:12: \
                    unexpected status from HEAD request: 500 Internal Server Error: no space left on device";
        assert!(
            matches!(
                judge(away, &Steps::default(), "Dockerfile"),
                Trouble::Away(_)
            ),
            "a registry that is full is away"
        );
    }

    #[test]
    fn a_parse_error_names_its_line() {
        let error = "failed to solve with frontend dockerfile.v0: failed to create LLB definition: dockerfile parse error line 3: unknown instruction: FRUM";
        let cause = failed(judge(error, &Steps::default(), "app/Dockerfile"));
        assert_eq!(cause.object.as_deref(), Some("app/Dockerfile:3"));
        assert_eq!(
            cause.sentence,
            "app/Dockerfile:3: unknown instruction: FRUM"
        );
        let error = "dockerfile parse error on line 1: unknown instruction: FRUM";
        assert_eq!(
            failed(judge(error, &Steps::default(), "Dockerfile"))
                .object
                .as_deref(),
            Some("Dockerfile:1")
        );
    }

    #[test]
    fn an_engine_that_ends_the_build_is_away() {
        let trouble = judge(
            "rpc error: code = Unavailable desc = transport is closing",
            &Steps::default(),
            "Dockerfile",
        );
        assert!(matches!(trouble, Trouble::Away(_)), "{trouble:?}");
    }

    #[test]
    fn frontends_are_found_in_every_form() {
        assert_eq!(
            frontend("# syntax=docker/dockerfile:1\nFROM x"),
            Some("docker/dockerfile:1")
        );
        assert_eq!(
            frontend("#!/bin/x\n# escape=`\n#SYNTAX = evil/front end\n"),
            Some("evil/front")
        );
        assert_eq!(frontend("// syntax=evil/x\n"), Some("evil/x"));
        assert_eq!(frontend("{\"syntax\": \"evil/x\"}"), Some("evil/x"));
        assert_eq!(frontend("FROM x\n# syntax=evil/x\n"), None);
        assert_eq!(frontend("# hello\n# syntax=evil/x\n"), None);
    }

    #[test]
    fn exit_codes_are_read_from_old_and_new_words() {
        assert_eq!(
            exit_code("executor failed running [/bin/sh -c false]: exit code: 7"),
            Some("7")
        );
        assert_eq!(
            exit_code("process \"/bin/sh -c x\" did not complete successfully: exit code: 101"),
            Some("101")
        );
        assert_eq!(exit_code("\"/x\" not found"), None);
    }
}
