//! Test: each test of pipeline.yaml in a container of its own, with nothing that it could break.
//!
//! The line: image (a stage of the Dockerfile, or pulled) → container → its output live, byte for byte → exit code, and
//! whether it ran out of memory. The container is removed however it ends. Never mounts anything, never adds a right.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{ContainerCreateBody, HostConfig, HostConfigLogConfig};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
    ListContainersOptionsBuilder, ListImagesOptionsBuilder, RemoveContainerOptions,
    RemoveContainerOptionsBuilder, RemoveImageOptions, StartContainerOptions,
    TagImageOptionsBuilder, WaitContainerOptionsBuilder,
};
use futures_util::StreamExt;
use sha2::{Digest, Sha256};

use super::failed_tests::FailedTests;
use super::patience::{Trouble, engine, patiently};
use super::{Built, CheckedOut, Scope, StageError, StageResult, Tested, buildkit, limited};
use crate::builds::Cause;
use crate::config;
use crate::docker;
use crate::docker::registry::{self, Logins};
use crate::fail_point;
use crate::pipeline::Test;

/// Between an exit and the last look for a program of the container that was killed for memory.
const OOM_HEARD_WITHIN: [Duration; 3] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(150),
];
/// On every container that an agent made.
const LABEL_OWNER: &str = "landfall.dev/owner";
/// Repository of test images; they are never pushed, and their tags go when the test has ended.
const TEST_REPOSITORY: &str = "landfall-test";
/// How long a container may take to be killed and removed.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(30);
/// Killed from outside, which is what Docker's own memory limit does.
const EXIT_KILLED: i64 = 137;

/// Runs all tests in their order; the first that fails ends the stage.
pub async fn run(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    built: &Built,
) -> StageResult<Tested> {
    let tests = &checked_out.pipeline.test;
    if tests.is_empty() {
        scope.log.line("pipeline.yaml has no tests");
    }
    let mut passed = Vec::with_capacity(tests.len());
    for (index, test) in tests.iter().enumerate() {
        scope.log.line(format!("test {:?}", test.name));
        let image = image_of(scope, checked_out, test, index + 1).await?;
        let begun = Instant::now();
        let result = run_one(scope, checked_out, test, index + 1, &image.reference).await;
        if let Some(tag) = &image.own_tag {
            remove_tag(scope.docker, tag).await;
        }
        result?;
        let millis = i64::try_from(begun.elapsed().as_millis()).unwrap_or(i64::MAX);
        scope.log.line(format!(
            "test {:?} passed in {}",
            test.name,
            crate::builds::human_duration(millis)
        ));
        passed.push((test.name.clone(), millis));
    }
    Ok(Tested {
        digest: built.digest.clone(),
        passed,
    })
}

/// Whose containers and tags these are: the work folder of one build of one agent. Several agents may share an engine,
/// and each has a build #1.
pub fn owner(work: &Path) -> String {
    let mut digits = hex::encode(Sha256::digest(work.as_os_str().as_bytes()));
    digits.truncate(12);
    digits
}

/// A container, or a tag of a test image, that some agent made on this engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    pub build: i64,
    /// As `owner` tells it.
    pub owner: String,
    what: Thing,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Thing {
    Container(String),
    Tag(String),
}

/// What agents have made on this engine for their tests and not removed yet; of builds that run, too.
pub async fn left(settings: &config::Docker) -> anyhow::Result<Vec<Left>> {
    let docker = docker::connect(settings).await?;
    let filters = HashMap::from([("label", vec![LABEL_OWNER.to_owned()])]);
    let options = ListContainersOptionsBuilder::default()
        .all(true)
        .filters(&filters)
        .build();
    let mut left = Vec::new();
    for container in docker.list_containers(Some(options)).await? {
        let labels = container.labels.unwrap_or_default();
        let build = labels
            .get(buildkit::LABEL_BUILD)
            .and_then(|id| id.parse().ok());
        if let (Some(id), Some(build), Some(owner)) = (container.id, build, labels.get(LABEL_OWNER))
        {
            left.push(Left {
                build,
                owner: owner.clone(),
                what: Thing::Container(id),
            });
        }
    }
    // The engine's own filter by name does not see names with a slash.
    let options = ListImagesOptionsBuilder::default().build();
    let images = docker.list_images(Some(options)).await?;
    for tag in images.into_iter().flat_map(|image| image.repo_tags) {
        if let Some((build, owner)) = owner_of_tag(&tag) {
            left.push(Left {
                build,
                owner: owner.to_owned(),
                what: Thing::Tag(tag),
            });
        }
    }
    Ok(left)
}

/// Removes all of it that can be removed; the first that cannot is the error.
pub async fn remove_left(settings: &config::Docker, left: &[Left]) -> anyhow::Result<()> {
    let docker = docker::connect(settings).await?;
    let mut removed = Ok(());
    for left in left {
        let one = match &left.what {
            Thing::Container(id) => remove(&docker, id).await,
            Thing::Tag(tag) => {
                let one = docker.remove_image(tag, None::<RemoveImageOptions>, None);
                one.await.map(|_| ()).map_err(anyhow::Error::from)
            }
        };
        removed = removed.and(one);
    }
    removed
}

/// `landfall-test/NAME:BUILD-OWNER-NUMBER`, as `image_of` tags it.
fn owner_of_tag(tag: &str) -> Option<(i64, &str)> {
    let (_, tag) = tag.strip_prefix(TEST_REPOSITORY)?.rsplit_once(':')?;
    let mut parts = tag.split('-');
    Some((parts.next()?.parse().ok()?, parts.next()?))
}

struct Image {
    reference: String,
    /// A tag that is removed after the test.
    own_tag: Option<String>,
}

async fn image_of(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    test: &Test,
    number: usize,
) -> StageResult<Image> {
    let Some(target) = &test.target else {
        let reference = test.image.clone().unwrap_or_default();
        pull(scope, &reference).await?;
        return Ok(Image {
            reference,
            own_tag: None,
        });
    };
    let repository = format!("{TEST_REPOSITORY}/{}", checked_out.pipeline.image.name);
    let tag = format!("{}-{}-{number}", scope.build.id, owner(scope.work));
    let docker = engine(scope).await?;
    let options = TagImageOptionsBuilder::default()
        .repo(&repository)
        .tag(&tag)
        .build();
    let mut id = buildkit::build_target(scope, checked_out, Some(target)).await?;
    let mut tagged = docker.tag_image(&id, Some(options.clone())).await;
    if matches!(
        &tagged,
        Err(Error::DockerResponseServerError {
            status_code: 404,
            ..
        })
    ) {
        // Another build of the same tree removed its tag, and the image with it, before ours was there.
        id = buildkit::build_target(scope, checked_out, Some(target)).await?;
        tagged = docker.tag_image(&id, Some(options)).await;
    }
    tagged.map_err(|error| anyhow!(error).context("cannot tag the test's image"))?;
    Ok(Image {
        reference: id,
        own_tag: Some(format!("{repository}:{tag}")),
    })
}

/// Only the tag: BuildKit keeps the layers in its own cache.
async fn remove_tag(settings: &config::Docker, tag: &str) {
    let work = async {
        let docker = docker::connect(settings).await?;
        docker
            .remove_image(tag, None::<RemoveImageOptions>, None)
            .await
    };
    if let Ok(Err(error)) = tokio::time::timeout(REMOVE_TIMEOUT, work).await {
        tracing::warn!(%tag, "cannot remove the tag of a test's image: {error:#}");
    }
}

async fn pull(scope: &Scope<'_>, reference: &str) -> StageResult<()> {
    let limit = Duration::from_secs(scope.environment.limits.build_timeout_seconds);
    let logins = Logins::read(scope.docker, scope.environment).await?;
    let who = format!("registry {}", registry::host(reference));
    let work = patiently(scope, &who, || async {
        let docker = engine(scope).await?;
        let here = docker.inspect_image(reference).await.is_ok();
        if here && reference.contains('@') {
            return Ok(());
        }
        let pulled = pull_once(&docker, reference, &logins).await;
        match pulled {
            Err(Trouble::Away(error)) if here => {
                scope.log.line(format!("{who} does not answer, so the copy of {reference} that is here is used: {error:#}"));
                Ok(())
            }
            pulled => pulled,
        }
    });
    limited(scope, &format!("the pull of {reference}"), limit, work).await
}

async fn pull_once(docker: &Docker, reference: &str, logins: &Logins) -> Result<(), Trouble> {
    let (name, version) = registry::split(reference);
    let options = CreateImageOptionsBuilder::default()
        .from_image(name)
        .tag(version)
        .build();
    let mut stream = pin!(docker.create_image(Some(options), None, logins.of(reference)));
    while let Some(item) = stream.next().await {
        let words = match item {
            Ok(_) => continue,
            Err(
                Error::DockerStreamError { error: words }
                | Error::DockerResponseServerError { message: words, .. },
            ) => words,
            Err(error) => return Err(Trouble::of(error, format!("cannot pull {reference}"))),
        };
        let words = logins.scrub(&words);
        if docker::registry_is_away(&words) {
            return Err(Trouble::Away(anyhow!("cannot pull {reference}: {words}")));
        }
        let cause = Cause::new(
            "test_image_unavailable",
            format!("the image {reference} of a test cannot be pulled: {words}"),
        )
        .object("pipeline.yaml")
        .hint("check its name, and that the agent's login may pull it");
        return Err(Trouble::Final(StageError::Failed(cause)));
    }
    Ok(())
}

/// A test whose engine is lost is begun anew once it is back.
async fn run_one(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    test: &Test,
    number: usize,
    image: &str,
) -> StageResult<()> {
    let docker = engine(scope).await?;
    patiently(scope, "Docker", || async {
        let tried = try_one(scope, &docker, checked_out, test, number, image).await;
        tried.map_err(|error| match error {
            StageError::Agent(error) if is_lost(&error) => Trouble::Away(error),
            error => Trouble::Final(error),
        })
    })
    .await
}

fn is_lost(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(docker::is_away)
}

async fn try_one(
    scope: &Scope<'_>,
    docker: &Docker,
    checked_out: &CheckedOut,
    test: &Test,
    number: usize,
    image: &str,
) -> StageResult<()> {
    let name = format!("landfall-{}-{}-{number}", scope.build.id, owner(scope.work));
    let container = Container::create(
        scope,
        docker,
        &name,
        body(scope, docker, checked_out, test, image).await?,
    )
    .await?;
    let limit = Duration::from_secs(
        scope
            .environment
            .limits
            .test_timeout_seconds
            .min(test.timeout_seconds),
    );
    let what = format!("the test {:?}", test.name);
    let mut failed = FailedTests::default();
    let result = limited(
        scope,
        &what,
        limit,
        watch(scope, docker, test, &container.id, &mut failed),
    )
    .await;
    let out_of_memory = match &result {
        Ok(_) => ran_out_of_memory(docker, &container.id).await,
        Err(_) => Ok(false),
    };
    container.remove().await;
    let code = result?;
    judge(scope, test, code, out_of_memory?, &failed)
}

/// The engine hears of it by another way than of the exit, and now and then a moment later.
async fn ran_out_of_memory(docker: &Docker, id: &str) -> StageResult<bool> {
    for pause in OOM_HEARD_WITHIN {
        let state = docker
            .inspect_container(id, None)
            .await
            .map_err(lost)?
            .state;
        if state.unwrap_or_default().oom_killed == Some(true) {
            return Ok(true);
        }
        tokio::time::sleep(pause).await;
    }
    let state = docker
        .inspect_container(id, None)
        .await
        .map_err(lost)?
        .state;
    Ok(state.unwrap_or_default().oom_killed == Some(true))
}

fn judge(
    scope: &Scope<'_>,
    test: &Test,
    code: i64,
    out_of_memory: bool,
    failed: &FailedTests,
) -> StageResult<()> {
    let name = &test.name;
    let cause = match (out_of_memory, code) {
        (false, 0) => return Ok(()),
        (true, _) => {
            let mebibytes = scope.environment.limits.test_memory_bytes >> 20;
            Cause::new("tests_failed", format!("the test {name:?} ran out of memory: its limit is {mebibytes} MiB"))
                .hint("let it use less, or have the operator raise limits.test_memory_bytes in agent.yaml")
        }
        (false, EXIT_KILLED) => Cause::new(
            "tests_failed",
            format!("the test {name:?} was killed (exit code {EXIT_KILLED}){failed}"),
        )
        .hint("its output is in the log above"),
        (false, code) => Cause::new(
            "tests_failed",
            format!("the test {name:?} ended with exit code {code}{failed}"),
        )
        .hint("its output is in the log above"),
    };
    Err(StageError::Failed(cause.object("pipeline.yaml")))
}

/// All that a test container gets. No binds, no devices, no host namespaces, no added rights, by construction.
async fn body(
    scope: &Scope<'_>,
    docker: &Docker,
    checked_out: &CheckedOut,
    test: &Test,
    image: &str,
) -> StageResult<ContainerCreateBody> {
    let limits = &scope.environment.limits;
    let info = docker.info().await.map_err(lost)?;
    // Docker refuses more than the machine has.
    let cpus = i64::try_from(limits.test_cpus)
        .unwrap_or(i64::MAX)
        .min(info.ncpu.unwrap_or(i64::MAX))
        .max(1);
    let memory = i64::try_from(limits.test_memory_bytes).unwrap_or(i64::MAX);
    let has_network = test.network && limits.test_network;
    if test.network && !has_network {
        scope.log.line("this test asks for a network, which agent.yaml does not allow (limits.test_network): it has none");
    }
    let host = HostConfig {
        memory: Some(memory),
        memory_swap: Some(memory),
        nano_cpus: Some(cpus.saturating_mul(1_000_000_000)),
        pids_limit: Some(i64::try_from(limits.test_processes).unwrap_or(i64::MAX)),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        network_mode: Some(if has_network { "bridge" } else { "none" }.to_owned()),
        ipc_mode: Some("private".to_owned()),
        // The output is read as it comes; Docker keeps no second copy.
        log_config: Some(HostConfigLogConfig {
            typ: Some("none".to_owned()),
            config: None,
        }),
        ..HostConfig::default()
    };
    let labels = HashMap::from([
        (buildkit::LABEL_BUILD.to_owned(), scope.build.id.to_string()),
        (
            buildkit::LABEL_ENVIRONMENT.to_owned(),
            scope.environment.name.clone(),
        ),
        (LABEL_OWNER.to_owned(), owner(scope.work)),
    ]);
    Ok(ContainerCreateBody {
        image: Some(image.to_owned()),
        entrypoint: Some(vec!["/bin/sh".to_owned(), "-c".to_owned()]),
        cmd: Some(vec![test.run.clone()]),
        env: Some(vec![
            "CI=true".to_owned(),
            format!("GIT_COMMIT={}", checked_out.commit),
        ]),
        labels: Some(labels),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        host_config: Some(host),
        ..ContainerCreateBody::default()
    })
}

/// Starts the container and passes its output on until it has ended: its exit code.
async fn watch(
    scope: &Scope<'_>,
    docker: &Docker,
    test: &Test,
    id: &str,
    failed: &mut FailedTests,
) -> StageResult<i64> {
    let options = AttachContainerOptionsBuilder::default()
        .stdout(true)
        .stderr(true)
        .stream(true)
        .build();
    let mut output = docker
        .attach_container(id, Some(options))
        .await
        .map_err(lost)?
        .output;
    docker
        .start_container(id, None::<StartContainerOptions>)
        .await
        .map_err(|error| cannot_start(test, error))?;
    let drained = async {
        while let Some(piece) = output.next().await {
            let bytes = piece.map_err(lost)?.into_bytes();
            failed.see(&bytes);
            scope.log.output(&bytes).await;
        }
        Ok(())
    };
    // Asked from the start, so that an engine that goes away is seen, and its end not taken for the test's.
    let (drained, code) = tokio::join!(drained, exit_code(docker, id));
    drained.and(code)
}

async fn exit_code(docker: &Docker, id: &str) -> StageResult<i64> {
    let options = WaitContainerOptionsBuilder::default()
        .condition("not-running")
        .build();
    let mut stream = pin!(docker.wait_container(id, Some(options)));
    match stream.next().await {
        Some(Ok(end)) => Ok(end.status_code),
        Some(Err(Error::DockerContainerWaitError { code, .. })) => Ok(code),
        Some(Err(error)) => Err(lost(error)),
        // Its answer was cut off.
        None => Err(lost(Error::IOError {
            err: std::io::ErrorKind::UnexpectedEof.into(),
        })),
    }
}

fn lost(error: Error) -> StageError {
    StageError::Agent(anyhow!(error).context("Docker was lost while a test ran"))
}

fn cannot_start(test: &Test, error: Error) -> StageError {
    match &error {
        Error::DockerResponseServerError { message, .. } if message.contains("/bin/sh") => StageError::Failed(
            Cause::new("tests_failed", format!("the test {:?} cannot start: its image has no /bin/sh", test.name))
                .object("pipeline.yaml")
                .hint("`run` needs a shell: name a stage of the Dockerfile, or an image, that has one"),
        ),
        _ => StageError::Agent(anyhow!(error).context(format!("cannot start the container of the test {:?}", test.name))),
    }
}

/// A container that is removed when we let go of it.
struct Container {
    docker: Docker,
    id: String,
    removed: bool,
}

impl Container {
    async fn create(
        scope: &Scope<'_>,
        docker: &Docker,
        name: &str,
        body: ContainerCreateBody,
    ) -> StageResult<Self> {
        if scope.cancel.is_cancelled() {
            return Err(StageError::Canceled);
        }
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        let mut created = docker
            .create_container(Some(options.clone()), body.clone())
            .await;
        if matches!(
            &created,
            Err(Error::DockerResponseServerError {
                status_code: 409,
                ..
            })
        ) {
            // Of an agent that was killed in this very attempt.
            remove(docker, name).await?;
            created = docker.create_container(Some(options), body).await;
        }
        let created = created
            .map_err(|error| anyhow!(error).context("cannot create the test's container"))?;
        fail_point::at("test: container created");
        Ok(Self {
            docker: docker.clone(),
            id: created.id,
            removed: false,
        })
    }

    async fn remove(mut self) {
        self.removed = true;
        if let Err(error) = remove(&self.docker, &self.id).await {
            tracing::warn!(container = %self.id, "cannot remove a test's container; the sweep will: {error:#}");
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        let (docker, id) = (self.docker.clone(), std::mem::take(&mut self.id));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { remove(&docker, &id).await });
        }
    }
}

/// Kills and removes it with its anonymous volumes; one that is gone is fine.
async fn remove(docker: &Docker, id: &str) -> anyhow::Result<()> {
    let options: RemoveContainerOptions = RemoveContainerOptionsBuilder::default()
        .force(true)
        .v(true)
        .build();
    let removed =
        tokio::time::timeout(REMOVE_TIMEOUT, docker.remove_container(id, Some(options))).await?;
    match removed {
        Err(Error::DockerResponseServerError {
            status_code: 404 | 409,
            ..
        })
        | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
