//! `landfall deploy`: in the place of `kubectl apply && kubectl rollout status`, and back where it fails.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;

use super::standalone::{self, ClusterArguments};
use super::terminal::say;
use crate::builds::Stage;
use crate::cluster::Cluster;
use crate::cluster::snapshot::Target as Watched;
use crate::config::{Docker, Environment};
use crate::manifests::render::{self, Places, Target, repository};
use crate::manifests::{self, Manifest, files, text};
use crate::pipeline::Verify;
use crate::release::{AppliedObject, Release};
use crate::stages::deploy::{self, Applying, Way};
use crate::stages::verify::{self, Known, Show};
use crate::stages::{Applied, Scope, StageError, StageResult, plan, removal};

/// Plan, apply and verify manifests, in the place of `kubectl apply && kubectl rollout status`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall deploy -f kubernetes/ --image web=registry.example.com/web@sha256:…  --rollback\n  landfall deploy -f app.yaml -n shop --plan\n\n\
    Exit codes: 0 live, 1 failed, 2 usage, 3 failed and rolled back, 4 rollback failed, 5 the cluster is out of reach, 124 time-out"
)]
pub struct Arguments {
    /// A file of manifests, or a folder of them
    #[arg(short, long = "filename", value_name = "FILE|DIR", required = true)]
    filenames: Vec<PathBuf>,
    /// Deploy REF where the manifests name the image NAME, whatever its tag
    #[arg(long, value_name = "NAME=REF", value_parser = image)]
    image: Vec<(String, String)>,
    /// Where it fails, put back what was there before, and verify that
    #[arg(long)]
    rollback: bool,
    /// Only say what would change
    #[arg(long)]
    plan: bool,
    /// How long the rollout may take
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = standalone::duration)]
    timeout: Duration,
    #[command(flatten)]
    cluster: ClusterArguments,
}

fn image(text: &str) -> Result<(String, String), String> {
    let pair = text
        .split_once('=')
        .filter(|(name, reference)| !name.is_empty() && !reference.is_empty());
    let (name, reference) = pair.ok_or_else(|| "an image is given as NAME=REF".to_owned())?;
    Ok((name.to_owned(), reference.to_owned()))
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut environment = arguments.cluster.environment();
    let cluster = match Cluster::connect(&environment).await {
        Ok(cluster) => cluster,
        Err(error) => return Ok(standalone::report(&StageError::Agent(error))),
    };
    let manifests = read(&arguments.filenames)?;
    environment.namespace.clone_from(&cluster.namespace);
    check_namespace(
        &manifests,
        &environment,
        arguments.cluster.namespace.is_some(),
    )?;
    let (mut release, places) = render(arguments, &environment, &manifests)?;
    let build = standalone::build(0);
    let docker = Docker::default();
    let done = standalone::with_log(Stage::Deploy, async |log, cancel| {
        let scope = standalone::scope(&build, &environment, &docker, log, cancel);
        let found = match plan::review(&scope, &cluster, &mut release, &places, &[]).await {
            Ok(live) => plan::found(&release, live),
            Err(error) => return standalone::report(&error),
        };
        if arguments.plan {
            return ExitCode::SUCCESS;
        }
        let known = found.iter().flat_map(|found: &Release| &found.objects);
        log.also_mask(&manifests::secret_values(
            &known.cloned().collect::<Vec<_>>(),
        ));
        transaction(&scope, &release, found.as_ref(), arguments.rollback).await
    })
    .await?;
    Ok(done.unwrap_or_else(standalone::interrupted))
}

/// Files are read as a build reads them; each path is a tree of its own.
fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<Manifest>> {
    let mut texts = Vec::new();
    for path in paths {
        let full = path
            .canonicalize()
            .with_context(|| format!("cannot read {}", path.display()))?;
        let (tree, inside) = match full.is_dir() {
            true => (full.as_path(), ".".to_owned()),
            false => {
                let inside = full
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned());
                (
                    full.parent().unwrap_or(Path::new("/")),
                    inside.unwrap_or_default(),
                )
            }
        };
        texts.extend(files::read(tree, &[inside]).map_err(|problem| anyhow::anyhow!("{problem}"))?);
    }
    match manifests::read(&texts) {
        Ok(manifests) => Ok(manifests),
        Err(diagnostic) => bail!("{diagnostic}"),
    }
}

fn check_namespace(
    manifests: &[Manifest],
    environment: &Environment,
    is_given: bool,
) -> anyhow::Result<()> {
    for manifest in manifests {
        let own = text(&manifest.object, "/metadata/namespace");
        ensure!(
            own.is_empty() || own == environment.namespace,
            "{} is of namespace {own}, and {} is deployed to{}",
            manifest.display_name(),
            environment.namespace,
            if is_given { "" } else { ": name one with -n" }
        );
    }
    Ok(())
}

fn render(
    arguments: &Arguments,
    environment: &Environment,
    manifests: &[Manifest],
) -> anyhow::Result<(Release, Places)> {
    let mut pinned = BTreeMap::new();
    for (wanted, reference) in &arguments.image {
        let named = render::all_images(manifests);
        let mut named = named
            .iter()
            .filter(|image| repository(image) == wanted)
            .peekable();
        ensure!(
            named.peek().is_some(),
            "no container of the manifests runs the image {wanted}"
        );
        pinned.extend(named.map(|image| (image.clone(), reference.clone())));
    }
    let target = Target {
        namespace: &environment.namespace,
        repositories: &[],
        image: "",
        pinned: &pinned,
        build_id: 0,
        commit: "",
        title: "landfall deploy",
    };
    let rendered = match render::render(&target, manifests) {
        Ok(rendered) => rendered,
        Err(cause) => bail!("{}", cause.sentence),
    };
    let verify = Verify {
        timeout_seconds: arguments.timeout.as_secs(),
        soak_seconds: 0,
    };
    let release = Release {
        objects: rendered.objects,
        set_hash: rendered.set_hash,
        ..standalone::release(environment, verify)
    };
    Ok((release, rendered.places))
}

async fn transaction(
    scope: &Scope<'_>,
    release: &Release,
    found: Option<&Release>,
    rollback: bool,
) -> ExitCode {
    let mut objects = Vec::new();
    let error = match forward(scope, release, &mut objects).await {
        Ok(()) => {
            say!("live");
            return ExitCode::SUCCESS;
        }
        Err(error) => error,
    };
    let code = standalone::report(&error);
    let is_verdict = matches!(error, StageError::Failed(_) | StageError::TimedOut(_));
    let has_changed = objects
        .iter()
        .any(|object: &AppliedObject| object.change != crate::release::Change::Unchanged);
    if !is_verdict || !has_changed {
        return code;
    }
    if !rollback {
        if let Some(commands) = deploy::undo_hint(&release.namespace, &objects) {
            say!("  back: {commands}");
        }
        return code;
    }
    match back(scope, &objects, found).await {
        Ok(refused) => {
            let but: String = refused.iter().map(|why| format!(", but {why}")).collect();
            match found {
                Some(_) => say!("what was there before is back and verified{but}"),
                None => say!("nothing was there before: what it had made is removed"),
            }
            ExitCode::from(3)
        }
        Err(error) => {
            if let StageError::Agent(_) = &error {
                say!("the way back was lost from sight:");
                return standalone::report(&error);
            }
            say!("the rollback failed:");
            standalone::report(&error);
            if let Some(commands) = deploy::undo_hint(&release.namespace, &objects) {
                say!("  by hand: {commands}");
            }
            ExitCode::from(4)
        }
    }
}

async fn forward(
    scope: &Scope<'_>,
    release: &Release,
    objects: &mut Vec<AppliedObject>,
) -> StageResult<()> {
    let held = deploy::hold(scope, Some(release)).await?;
    let mut applying = Applying::begin(scope, &held, release, Way::Forward).await?;
    while let Some((_, object)) = applying.next().await? {
        objects.push(object);
    }
    let targets = Watched::applied(release, objects);
    removal::free_stuck_pods(scope, &held, &targets, Way::Forward).await;
    let applied = Applied {
        release_id: 0,
        objects: objects.clone(),
        unwell: Vec::new(),
        refused: Vec::new(),
    };
    verify::run(scope, release, &applied, &Known::default(), Show::Cause)
        .await
        .map(drop)
}

async fn back(
    scope: &Scope<'_>,
    failed: &[AppliedObject],
    found: Option<&Release>,
) -> StageResult<Vec<String>> {
    let held = deploy::hold(scope, found).await?;
    removal::end_jobs(scope, &held, failed).await?;
    let left_over = removal::left_over(failed, found);
    let Some(found) = found else {
        removal::run(scope, &held, &left_over).await?;
        return Ok(Vec::new());
    };
    scope.log.line("Putting back what was there before");
    let (autoscalers, others) = removal::autoscalers_first(left_over);
    removal::run(scope, &held, &autoscalers).await?;
    let mut applying = Applying::begin(scope, &held, found, Way::Rescue).await?;
    let mut objects = Vec::new();
    while let Some((_, object)) = applying.next().await? {
        objects.push(object);
    }
    let targets = Watched::applied(found, &objects);
    removal::free_stuck_pods(scope, &held, &targets, Way::Rescue).await;
    removal::run(scope, &held, &others).await?;
    let applied = Applied {
        release_id: 0,
        objects,
        unwell: Vec::new(),
        refused: Vec::new(),
    };
    verify::run(scope, found, &applied, &Known::default(), Show::Cause).await?;
    Ok(applying.refused)
}
