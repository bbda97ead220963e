//! Deploy: plan and apply.
//!
//! `plan` reads the manifests, renders them, asks policy and then the cluster by a dry run of everything; it changes
//! nothing. `apply` puts the stored release there, object by object, in its order; the same release twice is unchanged.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

use super::{Applied, Built, CheckedOut, Scope, StageError, StageResult, foreign_images, limited};
use crate::builds::Cause;
use crate::cluster::apply::{self, Done, Rules};
use crate::cluster::ownership::Taking;
use crate::cluster::{Cluster, Resource, Trouble, diff, policy};
use crate::manifests::render::{self, Target, is_workload, template_hash};
use crate::manifests::{self, Manifest, api_version, display_name, files, kind, name, text};
use crate::pipeline::Pipeline;
use crate::release::{AppliedObject, Change, Release};

/// Of a dry run of 500 objects on a slow server.
const PLAN_LIMIT: Duration = Duration::from_secs(600);
/// Of all objects, and of the Jobs between them, which have limits of their own.
const APPLY_LIMIT: Duration = Duration::from_secs(3600);
const ESTABLISHED_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(250);

impl From<Trouble> for StageError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Refused(cause) => Self::Failed(cause),
            Trouble::Agent(error) => Self::Agent(error),
        }
    }
}

/// Everything that can be known before the first mutation, given what serves now. The release's `id` is 0: it is the
/// runner's to store.
pub async fn plan(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    built: &Built,
    serving: Option<&Release>,
) -> StageResult<Release> {
    let manifests = read(scope, checked_out).await?;
    let repositories = repositories(&checked_out.pipeline, built);
    let foreign = render::foreign_images(&repositories, &manifests);
    let kept = serving.map(|release| &release.pinned);
    let pinned = foreign_images::pin(scope, foreign, kept).await?;
    let target = Target {
        namespace: &scope.environment.namespace,
        repositories: &repositories,
        image: &built.reference(),
        pinned: &pinned,
        build_id: scope.build.id,
        commit: &checked_out.commit,
        title: &checked_out.title,
    };
    let rendered = render::render(&target, &manifests).map_err(StageError::Failed)?;
    let cluster = Cluster::connect(scope.environment).await?;
    limited(
        scope,
        "the plan",
        PLAN_LIMIT,
        dry_run(scope, &cluster, &rendered.objects),
    )
    .await?;
    let pipeline = &checked_out.pipeline;
    Ok(Release {
        id: 0,
        environment: scope.environment.name.clone(),
        build_id: scope.build.id,
        commit: checked_out.commit.clone(),
        image: built.reference(),
        namespace: scope.environment.namespace.clone(),
        objects: rendered.objects,
        pinned,
        smoke_tests: pipeline.smoke_test.clone(),
        verify: pipeline.verify.clone(),
        rollback: pipeline.rollback,
        first_release: pipeline.first_release,
        set_hash: rendered.set_hash,
    })
}

/// Puts the release into the cluster. Safe to do again, whole or after a crash in the middle.
pub async fn apply(scope: &Scope<'_>, release: &Release) -> StageResult<Applied> {
    let cluster = Cluster::connect(scope.environment).await?;
    let objects = limited(
        scope,
        "applying the release",
        APPLY_LIMIT,
        apply_all(scope, &cluster, release),
    )
    .await?;
    Ok(Applied {
        release_id: release.id,
        objects,
    })
}

/// The commands of kubectl that bring the last release back, for a build that left a failed one. `applied` is None
/// where the build failed in the middle of it.
pub fn undo_hint(release: &Release, applied: Option<&Applied>) -> Option<String> {
    let namespace = &release.namespace;
    let command = |name: &str, change: Change| match change {
        Change::Created => Some(format!("kubectl -n {namespace} delete {name}")),
        Change::Changed => Some(format!("kubectl -n {namespace} rollout undo {name}")),
        Change::Unchanged => None,
    };
    let commands: Vec<String> = match applied {
        Some(applied) => applied
            .objects
            .iter()
            .filter(|object| is_workload(&object.kind))
            .filter_map(|object| command(&object.display_name(), object.change))
            .collect(),
        None => release
            .objects
            .iter()
            .filter(|object| is_workload(kind(object)))
            .filter_map(|object| command(&display_name(object), Change::Changed))
            .collect(),
    };
    (!commands.is_empty()).then(|| commands.join(" && "))
}

/// The manifests of the commit, each of them allowed.
async fn read(scope: &Scope<'_>, checked_out: &CheckedOut) -> StageResult<Vec<Manifest>> {
    let (tree, paths) = (
        checked_out.tree.clone(),
        checked_out.pipeline.deploy.manifests.clone(),
    );
    let texts = tokio::task::spawn_blocking(move || files::read(&tree, &paths))
        .await
        .context("cannot read the manifests")?
        .map_err(|problem| StageError::failed("manifest_invalid", problem))?;
    let manifests = manifests::read(&texts).map_err(|diagnostic| {
        let shown = diagnostic.to_string();
        scope.log.line(&shown);
        let sentence = shown.lines().next().unwrap_or_default().to_owned();
        StageError::Failed(Cause::new("manifest_invalid", sentence).object(diagnostic.path))
    })?;
    policy::check(scope.environment, &manifests).map_err(StageError::Failed)?;
    scope.log.line(format!(
        "{} objects from {} files",
        manifests.len(),
        texts.len()
    ));
    Ok(manifests)
}

fn repositories(pipeline: &Pipeline, built: &Built) -> Vec<String> {
    let own = [pipeline.image.name.clone(), built.repository.clone()];
    own.into_iter()
        .chain(pipeline.image.replaces.iter().cloned())
        .collect()
}

/// The whole set against the cluster, changing nothing; every refusal is logged, the first one is the cause.
async fn dry_run(scope: &Scope<'_>, cluster: &Cluster, objects: &[Value]) -> StageResult<()> {
    if !namespace_is_there(scope, cluster).await? {
        let namespace = &cluster.namespace;
        scope.log.line(format!(
            "namespace/{namespace} will be created; what goes into it cannot be checked before"
        ));
        return Ok(());
    }
    let rules = rules(scope, cluster, objects).await?;
    let mut unsettled = BTreeSet::new();
    let mut refused: Vec<Cause> = Vec::new();
    for object in objects {
        match plan_one(scope, cluster, &rules, object, &mut unsettled).await {
            Ok(()) => {}
            Err(Trouble::Refused(cause)) => {
                scope.log.line(format!("refused: {}", cause.sentence));
                refused.push(cause);
            }
            Err(Trouble::Agent(error)) => return Err(StageError::Agent(error)),
        }
    }
    let more = refused.len().saturating_sub(1);
    match refused.into_iter().next() {
        None => Ok(()),
        Some(mut first) => {
            if more > 0 {
                first.sentence = format!("{} (and {more} more, in the log)", first.sentence);
            }
            Err(StageError::Failed(first))
        }
    }
}

async fn plan_one(
    scope: &Scope<'_>,
    cluster: &Cluster,
    rules: &Rules<'_>,
    object: &Value,
    unsettled: &mut BTreeSet<(String, String)>,
) -> Result<(), Trouble> {
    let shown = display_name(object);
    let group = api_version(object)
        .split_once('/')
        .map_or("", |(group, _)| group);
    if unsettled.contains(&(group.to_owned(), kind(object).to_owned())) {
        scope.log.line(format!(
            "{shown}: not checked, its CustomResourceDefinition is part of this release"
        ));
        return Ok(());
    }
    if kind(object) == "Namespace" {
        return compare_namespace(scope, cluster, object).await;
    }
    let done = apply::apply(cluster, rules, object, true).await?;
    if let ("ServiceAccount", Some(live)) = (kind(object), &done.before) {
        policy::check_live_account(scope.environment, name(object), live)
            .map_err(Trouble::Refused)?;
    }
    let change = change(&done);
    log_plan(scope, object, &done, change);
    if kind(object) == "CustomResourceDefinition" && change != Change::Unchanged {
        let kind = (
            text(object, "/spec/group").to_owned(),
            text(object, "/spec/names/kind").to_owned(),
        );
        unsettled.insert(kind);
    }
    let rolls = done
        .before
        .as_ref()
        .is_none_or(|live| template_hash(live) != template_hash(object));
    if rolls
        && let Some(unchecked) = apply::dry_run_pod(cluster, object, done.before.as_ref()).await?
    {
        scope.log.line(format!("{shown}: {unchecked}"));
    }
    Ok(())
}

fn log_plan(scope: &Scope<'_>, object: &Value, done: &Done, change: Change) {
    let shown = display_name(object);
    match change {
        Change::Created => scope.log.line(format!("{shown} will be created")),
        Change::Unchanged => scope.log.line(format!("{shown} is unchanged")),
        Change::Changed => {
            scope.log.line(format!("{shown} will be changed"));
            for line in done
                .before
                .iter()
                .flat_map(|before| diff::lines(before, &done.after))
            {
                scope.log.line(format!("  {line}"));
            }
        }
    }
    for note in &done.notes {
        scope.log.line(format!("  {note}"));
    }
}

/// Of a namespace that exists, differences are only said: its labels are the operator's.
async fn compare_namespace(
    scope: &Scope<'_>,
    cluster: &Cluster,
    object: &Value,
) -> Result<(), Trouble> {
    let shown = display_name(object);
    let Some(live) = apply::namespace(cluster).await? else {
        return Ok(());
    };
    let mut differs = false;
    for field in ["labels", "annotations"] {
        let wanted = object
            .pointer(&format!("/metadata/{field}"))
            .and_then(Value::as_object);
        for (key, value) in wanted.into_iter().flatten() {
            let is = live
                .get("metadata")
                .and_then(|metadata| metadata.get(field)?.get(key));
            if is != Some(value) {
                differs = true;
                let is = is.map_or("missing".to_owned(), Value::to_string);
                scope.log.line(format!("{shown}: {field}.{key} is {is}, the manifest says {value}; a namespace that exists is not changed"));
            }
        }
    }
    if !differs {
        scope.log.line(format!("{shown} is unchanged"));
    }
    Ok(())
}

/// False where it is missing and may be made.
async fn namespace_is_there(scope: &Scope<'_>, cluster: &Cluster) -> StageResult<bool> {
    let namespace = &cluster.namespace;
    match apply::namespace(cluster).await? {
        Some(live) if text(&live, "/status/phase") == "Terminating" => Err(StageError::Failed(
            Cause::new(
                "namespace_terminating",
                format!("namespace {namespace} is being deleted"),
            )
            .object(format!("namespace/{namespace}"))
            .hint("wait until it is gone, then build again"),
        )),
        Some(_) => Ok(true),
        None if scope.environment.create_namespace => Ok(false),
        None => Err(StageError::Failed(
            Cause::new(
                "namespace_missing",
                format!("namespace {namespace} does not exist, and `create_namespace` is false"),
            )
            .object(format!("namespace/{namespace}"))
            .hint(format!("make it: kubectl create namespace {namespace}")),
        )),
    }
}

async fn rules<'a>(
    scope: &Scope<'a>,
    cluster: &Cluster,
    objects: &[Value],
) -> StageResult<Rules<'a>> {
    Ok(Rules {
        taking: Taking {
            managers: &scope.environment.take_fields_from,
            all: false,
        },
        autoscaled: apply::autoscaled(cluster, objects).await?,
    })
}

async fn apply_all(
    scope: &Scope<'_>,
    cluster: &Cluster,
    release: &Release,
) -> StageResult<Vec<AppliedObject>> {
    let mut applied = Vec::new();
    if !namespace_is_there(scope, cluster).await? {
        applied.push(create_namespace(scope, cluster, release).await?);
    }
    let rules = rules(scope, cluster, &release.objects).await?;
    // Not yet: the fence (`scope.build.fence`) is to be claimed here, before the first object, and carried by every
    // apply below.
    for object in &release.objects {
        let object = match kind(object) {
            "Namespace" if !applied.is_empty() => continue,
            "Namespace" => kept_namespace(scope, cluster, object).await?,
            "Job" => run_job(scope, cluster, &rules, release, object).await?,
            _ => apply_one(scope, cluster, &rules, object).await?,
        };
        applied.push(object);
    }
    Ok(applied)
}

async fn apply_one(
    scope: &Scope<'_>,
    cluster: &Cluster,
    rules: &Rules<'_>,
    object: &Value,
) -> StageResult<AppliedObject> {
    let done = apply::apply(cluster, rules, object, false).await?;
    let mut applied = applied_object(&done);
    if applied.change == Change::Unchanged && was_written_by(scope, &done) {
        // An attempt of this very build changed it, and was killed before it could say so.
        applied.change = Change::Changed;
    }
    for note in &done.notes {
        scope
            .log
            .line(format!("{}: {note}", applied.display_name()));
    }
    scope.log.line(format!(
        "{} {}",
        applied.display_name(),
        word(applied.change)
    ));
    if applied.kind == "CustomResourceDefinition" && applied.change != Change::Unchanged {
        wait_established(cluster, object).await?;
    }
    Ok(applied)
}

async fn create_namespace(
    scope: &Scope<'_>,
    cluster: &Cluster,
    release: &Release,
) -> StageResult<AppliedObject> {
    let own = release
        .objects
        .iter()
        .find(|object| kind(object) == "Namespace");
    let bare =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.namespace}});
    apply_one(scope, cluster, &Rules::default(), own.unwrap_or(&bare)).await
}

async fn kept_namespace(
    scope: &Scope<'_>,
    cluster: &Cluster,
    object: &Value,
) -> StageResult<AppliedObject> {
    compare_namespace(scope, cluster, object).await?;
    let live = apply::namespace(cluster).await?;
    let live =
        live.with_context(|| format!("the namespace {} has just gone", cluster.namespace))?;
    Ok(applied_object(&Done {
        before: Some(live.clone()),
        after: live,
        notes: Vec::new(),
    }))
}

/// A Job runs once for one content, by its name: where it is there already, only its end is awaited.
async fn run_job(
    scope: &Scope<'_>,
    cluster: &Cluster,
    rules: &Rules<'_>,
    release: &Release,
    object: &Value,
) -> StageResult<AppliedObject> {
    let resource = Resource::built_in("batch/v1", "Job", "jobs", true);
    let live = cluster.get(&resource, name(object)).await;
    let live =
        live.map_err(|answer| answer.into_error(&format!("read {}", display_name(object))))?;
    let applied = match live {
        Some(live) => applied_object(&Done {
            before: Some(live.clone()),
            after: live,
            notes: Vec::new(),
        }),
        None => apply_one(scope, cluster, rules, object).await?,
    };
    let own = object
        .pointer("/spec/activeDeadlineSeconds")
        .and_then(Value::as_u64);
    let limit = Duration::from_secs(own.map_or(release.verify.timeout_seconds, |seconds| {
        seconds.saturating_add(30)
    }));
    let shown = display_name(object);
    limited(
        scope,
        &shown,
        limit,
        wait_for_job(scope, cluster, &resource, object),
    )
    .await?;
    Ok(applied)
}

async fn wait_for_job(
    scope: &Scope<'_>,
    cluster: &Cluster,
    resource: &Resource,
    object: &Value,
) -> StageResult<()> {
    let shown = display_name(object);
    let logs = format!("kubectl -n {} logs {shown}", cluster.namespace);
    loop {
        let live = cluster.get(resource, name(object)).await;
        let live = live.map_err(|answer| answer.into_error(&format!("read {shown}")))?;
        let Some(live) = live else {
            let sentence = format!("{shown} was deleted before it was complete");
            return Err(StageError::Failed(
                Cause::new("job_failed", sentence).object(shown),
            ));
        };
        if condition(&live, "Complete").is_some() {
            scope.log.line(format!("{shown} is complete"));
            return Ok(());
        }
        if let Some(failed) = condition(&live, "Failed") {
            let sentence = format!(
                "{shown} failed ({}): {}",
                text(failed, "/reason"),
                text(failed, "/message")
            );
            let hint = format!(
                "see {logs}; to run the same Job again: kubectl -n {} delete {shown}",
                cluster.namespace
            );
            return Err(StageError::Failed(
                Cause::new("job_failed", sentence).object(shown).hint(hint),
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The condition, where it is true.
fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    let conditions = object.pointer("/status/conditions")?.as_array()?;
    conditions
        .iter()
        .find(|condition| text(condition, "/type") == kind && text(condition, "/status") == "True")
}

/// A new kind can be used only when the server says so; what discovery said before is old.
async fn wait_established(cluster: &Cluster, object: &Value) -> StageResult<()> {
    let resource = Resource::built_in(
        "apiextensions.k8s.io/v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        false,
    );
    let shown = display_name(object);
    let begun = tokio::time::Instant::now();
    loop {
        let live = cluster.get(&resource, name(object)).await;
        let live = live.map_err(|answer| answer.into_error(&format!("read {shown}")))?;
        if live
            .as_ref()
            .is_some_and(|live| condition(live, "Established").is_some())
        {
            cluster.forget_resources();
            return Ok(());
        }
        if begun.elapsed() > ESTABLISHED_LIMIT {
            let sentence = format!(
                "{shown} is not established after {} s",
                ESTABLISHED_LIMIT.as_secs()
            );
            return Err(StageError::Failed(
                Cause::new("crd_not_established", sentence).object(shown),
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The annotation is written only together with a changed template.
fn was_written_by(scope: &Scope<'_>, done: &Done) -> bool {
    let build = done
        .after
        .pointer("/metadata/annotations/landfall.dev~1build")
        .and_then(Value::as_str);
    build.is_some_and(|build| build == scope.build.id.to_string())
}

fn change(done: &Done) -> Change {
    match &done.before {
        None => Change::Created,
        Some(before) if diff::is_same(before, &done.after) => Change::Unchanged,
        Some(_) => Change::Changed,
    }
}

fn applied_object(done: &Done) -> AppliedObject {
    let after = &done.after;
    AppliedObject {
        api_version: api_version(after).to_owned(),
        kind: kind(after).to_owned(),
        namespace: text(after, "/metadata/namespace").to_owned(),
        name: name(after).to_owned(),
        uid: text(after, "/metadata/uid").to_owned(),
        generation: after
            .pointer("/metadata/generation")
            .and_then(Value::as_i64)
            .unwrap_or(0),
        change: change(done),
    }
}

fn word(change: Change) -> &'static str {
    match change {
        Change::Created => "created",
        Change::Changed => "changed",
        Change::Unchanged => "unchanged",
    }
}
