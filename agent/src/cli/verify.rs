//! `landfall verify`: in the place of `kubectl rollout status`, with the cause where it fails.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use jiff::SignedDuration;

use super::standalone::{self, ClusterArguments};
use super::terminal::say;
use crate::builds::Stage;
use crate::cluster::Cluster;
use crate::cluster::observe::Observer;
use crate::cluster::rollout::{self, History, Verdict};
use crate::cluster::snapshot::{Kind, Snapshot, Target};
use crate::config::Docker;
use crate::pipeline::Verify;
use crate::release::{AppliedObject, Change};
use crate::stages::verify::{self, Known, Show};
use crate::stages::{Applied, StageError, job};

const WRITTEN_LATELY: SignedDuration = SignedDuration::from_mins(10);

/// Watch a rollout to its end, in the place of `kubectl rollout status`: says why it fails, as soon as that is known
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall verify deployment/web\n  landfall verify statefulset/db deployment/web -n shop --timeout 2m\n  kubectl apply -f app.yaml && landfall verify deployment/web\n\n\
    Exit codes: 0 rolled out, 1 failed, 2 usage, 5 the cluster is out of reach, 124 time-out"
)]
pub struct Arguments {
    /// `deployment/NAME`, `statefulset/NAME`, `daemonset/NAME` or `job/NAME`
    #[arg(value_name = "TYPE/NAME", required = true)]
    workloads: Vec<String>,
    /// How long to wait: 90s, 2m, 1h; 0s is without a limit, as for kubectl
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = standalone::duration)]
    timeout: Duration,
    /// Look once and say how far it is
    #[arg(short, long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    watch: bool,
    #[command(flatten)]
    cluster: ClusterArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let environment = arguments.cluster.environment();
    let cluster = match Cluster::connect(&environment).await {
        Ok(cluster) => cluster,
        Err(error) => return Ok(standalone::report(&StageError::Agent(error))),
    };
    let mut objects = Vec::new();
    for workload in &arguments.workloads {
        let (object, verdict) = match find(&cluster, workload).await? {
            Ok(found) => found,
            Err(error) => return Ok(standalone::report(&StageError::Agent(error))),
        };
        objects.push(object);
        match verdict {
            _ if arguments.watch => {}
            Verdict::Complete => say!("{workload} successfully rolled out"),
            Verdict::Failed(cause) => return Ok(standalone::report(&StageError::Failed(cause))),
            Verdict::NotYet { progress } => {
                say!("{progress}");
                return Ok(ExitCode::from(1));
            }
        }
    }
    if !arguments.watch {
        return Ok(ExitCode::SUCCESS);
    }
    let verify = Verify {
        timeout_seconds: arguments.timeout.as_secs(),
        soak_seconds: 0,
    };
    let release = standalone::release(&environment, verify);
    let applied = Applied {
        release_id: 0,
        objects,
        unwell: Vec::new(),
        refused: Vec::new(),
    };
    let (build, docker) = (standalone::build(0), Docker::default());
    let rolled_out = standalone::with_log(Stage::Verify, async |log, cancel| {
        let scope = standalone::scope(&build, &environment, &docker, log, cancel);
        let is_job = |object: &&AppliedObject| object.kind == "Job";
        for job in applied.objects.iter().filter(is_job) {
            job::completed(&scope, &cluster, &release, job).await?;
        }
        if !applied.objects.iter().all(|object| is_job(&object)) {
            verify::run(&scope, &release, &applied, &Known::default(), Show::Cause).await?;
        }
        Ok(())
    })
    .await?;
    Ok(match rolled_out {
        Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(error)) => standalone::report(&error),
        None => standalone::interrupted(),
    })
}

/// So that a program that dies again and again is seen to, also where it runs at this very moment.
fn may_die_again(snapshot: &Snapshot) -> bool {
    let written = snapshot.applied_at();
    let is_new = written.is_some_and(|at| snapshot.now.duration_since(at) < WRITTEN_LATELY);
    is_new && !rollout::runs_calmly(snapshot)
}

/// As it is now, and how far. The outer error is the user's, the inner one the cluster's.
async fn find(
    cluster: &Cluster,
    text: &str,
) -> anyhow::Result<anyhow::Result<(AppliedObject, Verdict)>> {
    let (kind, name) = text
        .split_once('/')
        .with_context(|| format!("{text:?} is not like deployment/NAME"))?;
    let kind = match kind.split('.').next().unwrap_or_default() {
        "deployment" | "deployments" | "deploy" => Kind::Deployment,
        "statefulset" | "statefulsets" | "sts" => Kind::StatefulSet,
        "daemonset" | "daemonsets" | "ds" => Kind::DaemonSet,
        "job" | "jobs" => Kind::Job,
        other => {
            bail!("{other:?} has no rollout: deployment, statefulset, daemonset or job")
        }
    };
    let target = Target::named(kind, name);
    let snapshot = match Observer::new(cluster).snapshot(&target).await {
        Ok(snapshot) => snapshot,
        Err(unseen) => return Ok(Err(unseen.error)),
    };
    let Some(snapshot) = snapshot else {
        let namespace = &cluster.namespace;
        bail!(
            "there is no {} in namespace {namespace}",
            target.display_name()
        );
    };
    let verdict = rollout::judge(&target, &snapshot, false, &mut History::default());
    let object = AppliedObject {
        api_version: String::new(),
        kind: kind.as_manifest().to_owned(),
        namespace: cluster.namespace.clone(),
        name: name.to_owned(),
        uid: snapshot.workload.uid().to_owned(),
        generation: snapshot.workload.generation(),
        change: match verdict {
            // What has run for weeks may have died once: only what dies from now on speaks against it.
            Verdict::Complete if !may_die_again(&snapshot) => Change::Unchanged,
            // Whatever has died since somebody last wrote it speaks of this rollout.
            _ => Change::Changed,
        },
    };
    Ok(Ok((object, verdict)))
}
