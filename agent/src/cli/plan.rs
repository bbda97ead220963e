//! `landfall plan`: what a push of a working tree would change in an environment, asked of its cluster by a dry run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;

use super::OutputArgument;
use super::standalone;
use super::terminal::{self, say};
use crate::builds::Stage;
use crate::cluster::{Cluster, policy};
use crate::config::{self, Config, Environment};
use crate::git::tree::read_beneath;
use crate::manifests::render::{self, Places, Target};
use crate::manifests::{self, files};
use crate::pipeline::{self, Pipeline};
use crate::release::Release;
use crate::stages::plan;

/// Show what a push of this working tree would change: created, changed field by field, unchanged
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall plan\n  landfall plan ../shop --config agent.yaml --environment staging --image ghcr.io/acme/web@sha256:…\n\n\
    Nothing is changed: the cluster is asked by a dry run. What a release would prune is known to the agent alone.\n\n\
    Exit codes: 0 it could be applied, 1 it would be refused, 2 usage, 5 the cluster is out of reach"
)]
pub struct Arguments {
    /// The working tree
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// agent.yaml, for the environment's cluster and policy
    #[arg(long, value_name = "FILE", default_value = config::AGENT_YAML)]
    config: PathBuf,
    /// The environment [default: the only one of agent.yaml]
    #[arg(long, value_name = "NAME")]
    environment: Option<String>,
    /// The image that would be built [default: one that does not exist yet]
    #[arg(long, value_name = "REF")]
    image: Option<String>,
    #[command(flatten)]
    output: OutputArgument,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let config = Config::load(&arguments.config)?;
    let environment = choose(&config, arguments.environment.as_deref())?;
    let (mut release, places) = render(arguments, environment)?;
    let cluster = match Cluster::connect(environment).await {
        Ok(cluster) => cluster,
        Err(error) => return Ok(standalone::report(&error.into())),
    };
    let build = standalone::build(0);
    let review = async |release: &mut Release, log: &_, cancel: &_| {
        let scope = standalone::scope(&build, environment, &config.docker, log, cancel);
        plan::review(&scope, &cluster, release, &places, &[]).await
    };
    let reviewed = if arguments.output.is_json() {
        let log = crate::build_log::BuildLog::new(crate::build_log::Masker::default(), 1 << 20, 0);
        review(
            &mut release,
            &log.stage(Stage::Deploy),
            &tokio_util::sync::CancellationToken::new(),
        )
        .await
    } else {
        let shown = standalone::with_log(Stage::Deploy, async |log, cancel| {
            review(&mut release, log, cancel).await
        });
        match shown.await? {
            Some(reviewed) => reviewed,
            None => return Ok(standalone::interrupted()),
        }
    };
    if let Err(error) = reviewed {
        return Ok(standalone::report(&error));
    }
    if arguments.output.is_json() {
        terminal::print_json(
            &serde_json::json!({"environment": environment.name, "plan": release.plan}),
        )?;
    } else if arguments.image.is_none() {
        say!("the image is a placeholder: a push names the one that it builds");
    }
    Ok(ExitCode::SUCCESS)
}

fn choose<'a>(config: &'a Config, named: Option<&str>) -> anyhow::Result<&'a Environment> {
    match (named, config.environments.as_slice()) {
        (Some(name), _) => config
            .environment(name)
            .with_context(|| format!("agent.yaml has no environment {name:?}")),
        (None, [only]) => Ok(only),
        (None, _) => bail!("say which environment with --environment"),
    }
}

fn render(arguments: &Arguments, environment: &Environment) -> anyhow::Result<(Release, Places)> {
    let pipeline = read_pipeline(&arguments.dir, &environment.pipeline)?;
    let texts = files::read(&arguments.dir, &pipeline.deploy.manifests)
        .map_err(|problem| anyhow::anyhow!("{problem}"))?;
    let manifests = match manifests::read(&texts) {
        Ok(manifests) => manifests,
        Err(diagnostic) => bail!("{diagnostic}"),
    };
    if let Err(cause) = policy::check(environment, &manifests) {
        bail!("{}", cause.sentence);
    }
    let name = &pipeline.image.name;
    let built = format!("{}/{name}", environment.image_prefix);
    let image = arguments
        .image
        .clone()
        .unwrap_or_else(|| format!("{built}@sha256:{}", "0".repeat(64)));
    let repositories: Vec<String> = [name.clone(), built]
        .into_iter()
        .chain(pipeline.image.replaces.iter().cloned())
        .collect();
    let target = Target {
        namespace: &environment.namespace,
        repositories: &repositories,
        image: &image,
        pinned: &std::collections::BTreeMap::new(),
        build_id: 0,
        commit: "",
        title: "landfall plan",
    };
    let rendered = match render::render(&target, &manifests) {
        Ok(rendered) => rendered,
        Err(cause) => bail!("{}", cause.sentence),
    };
    let release = Release {
        image,
        objects: rendered.objects,
        set_hash: rendered.set_hash,
        ..standalone::release(environment, pipeline.verify)
    };
    Ok((release, rendered.places))
}

fn read_pipeline(tree: &Path, path: &str) -> anyhow::Result<Pipeline> {
    let bytes = read_beneath(tree, path, pipeline::BYTES_MAX as u64)
        .with_context(|| format!("cannot read {path} in {}", tree.display()))?;
    let text = String::from_utf8(bytes).with_context(|| format!("{path} is not UTF-8"))?;
    match pipeline::parse(path, &text) {
        Ok(pipeline) => Ok(pipeline),
        Err(diagnostic) => bail!("{diagnostic}"),
    }
}
