//! Plan: what a release would change, known before anything does.
//!
//! Reads the manifests, renders them, asks policy, sees whether they lead to each other, and asks the cluster by a dry run
//! of everything. It changes nothing; what it answers is stored with the release, and shown.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::ListParams;
use serde_json::Value;

use super::deploy::{change, namespace_is_there, rules};
use super::{Built, CheckedOut, Scope, StageError, StageResult, foreign_images, limited, removal};
use crate::builds::Cause;
use crate::cluster::apply::{self, Done, Rules};
use crate::cluster::observe::Observer;
use crate::cluster::snapshot::{Kind, Target as Watched};
use crate::cluster::wiring::Replaced;
use crate::cluster::{Cluster, Trouble, diff, observe, ownership, policy, rollout, wiring};
use crate::manifests::render::{self, Places, Target, template_hash};
use crate::manifests::{self, Manifest, api_version, display_name, files, kind, name, text};
use crate::pipeline::Pipeline;
use crate::release::{AppliedObject, Change, Planned, Release, Unwell};

/// Of those that a Service selects.
const PODS_LOOKED_AT: u32 = 100;
/// Of a dry run of 500 objects on a slow server.
const LIMIT: Duration = Duration::from_secs(600);

/// A pod that has not been ready for so long is not about to be.
const UNWELL_MIN: Duration = Duration::from_secs(60);

/// What the store knows of an environment.
#[derive(Debug, Default)]
pub struct Ground {
    /// The release that serves.
    pub serving: Option<Release>,
    /// The last build that changed anything ended with a release that was proved, or none did: what fails now is no other
    /// build's doing.
    pub is_at_rest: bool,
    /// What releases of this environment created, and nobody has removed.
    pub created: Vec<AppliedObject>,
}

/// What a release would come to.
#[derive(Debug)]
pub struct Plan {
    /// Its `id` is 0: it is the runner's to store.
    pub release: Release,
    /// What stands there already, as a release that can be put back; only for an environment's first.
    pub found: Option<Release>,
}

/// Everything that can be known before the first mutation.
pub async fn run(
    scope: &Scope<'_>,
    checked_out: &CheckedOut,
    built: &Built,
    ground: &Ground,
) -> StageResult<Plan> {
    let manifests = read(scope, checked_out).await?;
    let repositories = repositories(&checked_out.pipeline, built);
    let foreign = render::foreign_images(&repositories, &manifests);
    let kept = ground.serving.as_ref().map(|release| &release.pinned);
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
    let cluster = scope.cluster().await?;
    let pipeline = &checked_out.pipeline;
    let mut release = Release {
        id: 0,
        environment: scope.environment.name.clone(),
        build_id: scope.build.id,
        commit: checked_out.commit.clone(),
        image: built.reference(),
        namespace: scope.environment.namespace.clone(),
        objects: rendered.objects,
        plan: Vec::new(),
        prune: Vec::new(),
        unwell: Vec::new(),
        pinned,
        smoke_tests: pipeline.smoke_test.clone(),
        verify: pipeline.verify.clone(),
        rollback: pipeline.rollback,
        first_release: pipeline.first_release,
        set_hash: rendered.set_hash,
    };
    let created = &ground.created;
    let live = review(scope, &cluster, &mut release, &rendered.places, created).await?;
    let lacking = live.iter().filter(|live| lacks_pods(live));
    let lacking: BTreeSet<String> = lacking.map(display_name).collect();
    let found = match &ground.serving {
        Some(_) => None,
        None => found(&release, live),
    };
    let stands = ground.serving.as_ref().or(found.as_ref());
    if let Some(stands) = stands.filter(|_| ground.is_at_rest) {
        let lacks = |target: &Watched| lacking.contains(&target.display_name());
        let look = unwell(scope, &cluster, stands, lacks);
        release.unwell = limited(scope, "the plan", LIMIT, look).await?;
    }
    Ok(Plan { release, found })
}

/// What a rendered release would change and remove, by the cluster's word; a refusal names the place of its object. Answers
/// with what stands there of it.
pub async fn review(
    scope: &Scope<'_>,
    cluster: &Cluster,
    release: &mut Release,
    places: &Places,
    created: &[AppliedObject],
) -> StageResult<Vec<Value>> {
    scope
        .log
        .also_mask(&manifests::secret_values(&release.objects));
    let prune = prune(scope, &release.objects, created);
    let work = dry_run(scope, cluster, release, places, &prune);
    let (plan, live) = limited(scope, "the plan", LIMIT, work).await?;
    release.plan = plan;
    let removed = prune.iter().map(|object| Planned {
        object: object.display_name(),
        change: Change::Removed,
        lines: Vec::new(),
        notes: Vec::new(),
    });
    release.plan.extend(removed);
    release.prune = prune;
    Ok(live)
}

/// Which workloads of the release that serves are not well already; before anything is brought back, for which nothing is
/// planned anew.
pub async fn unwell_now(scope: &Scope<'_>, serving: &Release) -> StageResult<Vec<Unwell>> {
    let cluster = scope.cluster().await?;
    let look = unwell(scope, &cluster, serving, |_| true);
    limited(scope, "the look at what serves", LIMIT, look).await
}

/// Of those that may lack pods.
async fn unwell(
    scope: &Scope<'_>,
    cluster: &Cluster,
    serving: &Release,
    lacks: impl Fn(&Watched) -> bool,
) -> StageResult<Vec<Unwell>> {
    let mut unwell = Vec::new();
    for target in Watched::serving(serving) {
        if !lacks(&target) {
            continue;
        }
        let look = || async { Observer::new(cluster).snapshot(&target).await };
        let snapshot = seen(scope, look).await?;
        let trouble =
            snapshot.and_then(|snapshot| rollout::trouble(&target, &snapshot, UNWELL_MIN));
        let Some(trouble) = trouble else {
            continue;
        };
        scope.log.line(format!(
            "{} was not well before this release: {}",
            target.display_name(),
            trouble.sentence
        ));
        unwell.push(Unwell {
            object: target.display_name(),
            template: target.release.clone().unwrap_or_default(),
            causes: trouble.causes,
            ready: trouble.ready,
        });
    }
    Ok(unwell)
}

/// By the status of a live workload.
fn lacks_pods(live: &Value) -> bool {
    let number = |pointer| live.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
    let (there, wanted) = match Kind::of(kind(live)) {
        Some(Kind::Deployment) => ("/status/availableReplicas", "/spec/replicas"),
        Some(Kind::StatefulSet) => ("/status/readyReplicas", "/spec/replicas"),
        Some(Kind::DaemonSet) => ("/status/numberAvailable", "/status/desiredNumberScheduled"),
        Some(Kind::Job) | None => return false,
    };
    number(there) < number(wanted)
}

/// What is to be removed once the release is live; too much of it is left, and said.
fn prune(scope: &Scope<'_>, objects: &[Value], created: &[AppliedObject]) -> Vec<AppliedObject> {
    let prunable = removal::prunable(scope, created, objects);
    let prunable = removal::capped(scope, prunable, created);
    for object in &prunable {
        let name = object.display_name();
        scope.log.line(format!(
            "{name} will be removed once the release is live: the manifests hold it no more"
        ));
    }
    prunable
}

/// What people or another tool had put there before the first release: release 0.
pub fn found(release: &Release, live: Vec<Value>) -> Option<Release> {
    (!live.is_empty()).then(|| Release {
        commit: String::new(),
        image: String::new(),
        objects: live.into_iter().map(render::as_found).collect(),
        plan: Vec::new(),
        unwell: Vec::new(),
        pinned: std::collections::BTreeMap::new(),
        smoke_tests: Vec::new(),
        set_hash: String::new(),
        ..release.clone()
    })
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

/// The whole set against the cluster, changing nothing; every refusal is logged, the first one is the cause. With it comes
/// what is live of the set.
async fn dry_run(
    scope: &Scope<'_>,
    cluster: &Cluster,
    release: &Release,
    places: &Places,
    prune: &[AppliedObject],
) -> StageResult<(Vec<Planned>, Vec<Value>)> {
    let objects = &release.objects;
    if !namespace_is_there(scope, cluster).await? {
        let namespace = &cluster.namespace;
        scope.log.line(format!(
            "namespace/{namespace} will be created; what goes into it cannot be checked before"
        ));
        let planned = objects.iter().map(|object| Planned {
            object: display_name(object),
            change: Change::Created,
            lines: Vec::new(),
            notes: vec!["not checked before".to_owned()],
        });
        return Ok((planned.collect(), Vec::new()));
    }
    let rules = rules(scope, cluster, objects).await?;
    let mut unsettled = BTreeSet::new();
    let (mut planned, mut found) = (Vec::new(), Vec::new());
    let mut replaced = Vec::new();
    let mut refused: Vec<Cause> = Vec::new();
    let mut refuse = |cause: Cause| {
        let cause = placed(cause, places);
        scope.log.line(format!("refused: {}", cause.sentence));
        refused.push(cause);
    };
    for object in objects {
        match plan_one(scope, cluster, &rules, object, &mut unsettled).await {
            Ok((one, done)) => {
                log_plan(scope, &one);
                planned.push(one);
                let Some(Done {
                    before: Some(before),
                    after,
                    ..
                }) = done
                else {
                    continue;
                };
                if render::is_workload(kind(object)) {
                    let before = before.clone();
                    replaced.push(Replaced { before, after });
                }
                found.push(before);
            }
            Err(Trouble::Refused(cause)) => refuse(cause),
            Err(Trouble::Agent(error)) => return Err(StageError::Agent(error)),
        }
    }
    for cause in leads_nowhere(scope, cluster, release, replaced, prune).await? {
        refuse(cause);
    }
    let more = refused.len().saturating_sub(1);
    match refused.into_iter().next() {
        None => Ok((planned, found)),
        Some(mut first) => {
            if more > 0 {
                first.sentence = format!("{} (and {more} more, in the log)", first.sentence);
            }
            Err(StageError::Failed(first))
        }
    }
}

fn placed(cause: Cause, places: &Places) -> Cause {
    let place = cause.object.as_ref().and_then(|object| places.get(object));
    let sentence = match place {
        Some(place) => format!("{place}: {}", cause.sentence),
        None => cause.sentence,
    };
    Cause { sentence, ..cause }
}

async fn plan_one(
    scope: &Scope<'_>,
    cluster: &Cluster,
    rules: &Rules<'_>,
    object: &Value,
    unsettled: &mut BTreeSet<(String, String)>,
) -> Result<(Planned, Option<Done>), Trouble> {
    let mut planned = Planned {
        object: display_name(object),
        change: Change::Unchanged,
        lines: Vec::new(),
        notes: Vec::new(),
    };
    let group = api_version(object)
        .split_once('/')
        .map_or("", |(group, _)| group);
    if unsettled.contains(&(group.to_owned(), kind(object).to_owned())) {
        planned.change = Change::Changed;
        let note = "not checked: its CustomResourceDefinition is part of this release";
        planned.notes.push(note.to_owned());
        return Ok((planned, None));
    }
    if kind(object) == "Namespace" {
        planned.notes = super::deploy::namespace_differences(cluster, object).await?;
        return Ok((planned, None));
    }
    let done = apply::apply(cluster, rules, object, true).await?;
    if let ("ServiceAccount", Some(live)) = (kind(object), &done.before) {
        policy::check_live_account(scope.environment, name(object), live)
            .map_err(Trouble::Refused)?;
    }
    planned.change = change(&done);
    if planned.change == Change::Changed {
        let before = done.before.iter();
        planned.lines = before
            .flat_map(|before| diff::lines(before, &done.after))
            .collect();
    }
    if kind(object) == "CustomResourceDefinition" && planned.change != Change::Unchanged {
        let kind = (
            text(object, "/spec/group").to_owned(),
            text(object, "/spec/names/kind").to_owned(),
        );
        unsettled.insert(kind);
    }
    planned.notes.extend(done.notes.iter().cloned());
    let before = done.before.as_ref();
    let gone = before.map_or_else(Vec::new, |before| ownership::let_go(before, &done.after));
    if !gone.is_empty() {
        planned.change = Change::Changed;
    }
    let told =
        |field| format!("{field}: removed, kubectl had set it and the manifests do not hold it");
    planned.notes.extend(gone.into_iter().map(told));
    let rolls = before.is_none_or(|live| template_hash(live) != template_hash(object));
    if rolls {
        planned
            .notes
            .extend(apply::dry_run_pod(cluster, object, before).await?);
    }
    Ok((planned, Some(done)))
}

fn log_plan(scope: &Scope<'_>, planned: &Planned) {
    let Planned {
        object,
        change,
        lines,
        notes,
    } = planned;
    let becomes = match change {
        Change::Created => "will be created",
        Change::Unchanged => "is unchanged",
        Change::Changed => "will be changed",
        Change::Removed => "will be removed",
    };
    scope.log.line(format!("{object} {becomes}"));
    for line in lines.iter().chain(notes) {
        scope.log.line(format!("  {line}"));
    }
}

/// What would be rolled out and never be reached.
async fn leads_nowhere(
    scope: &Scope<'_>,
    cluster: &Cluster,
    release: &Release,
    mut replaced: Vec<Replaced>,
    prune: &[AppliedObject],
) -> StageResult<Vec<Cause>> {
    let objects = &release.objects;
    let goes = |service: &str| {
        let mut prune = prune.iter();
        prune.any(|object| object.kind == "Service" && object.name == service)
    };
    let mut causes = wiring::unknown_ports(objects);
    let (pods, services) = (cluster.api::<Pod>(), cluster.api::<Service>());
    let unmatched = wiring::unmatched_services(objects);
    if !unmatched.is_empty() {
        replaced.extend(removed(cluster, prune).await?);
    }
    for unmatched in unmatched {
        let by_selector = ListParams::default()
            .labels(&unmatched.selector)
            .limit(PODS_LOOKED_AT);
        let live = seen(scope, || {
            observe::ask("list pods", || pods.list(&by_selector))
        });
        let stays = |pod: &Pod| {
            let labels = pod.metadata.labels.clone().unwrap_or_default();
            let mut workloads = replaced.iter();
            !workloads.any(|it| it.takes_away(&unmatched.selector, &labels))
        };
        if !live.await?.items.iter().any(stays) {
            causes.push(wiring::selects_nothing(&unmatched));
        }
    }
    let asked = release
        .smoke_tests
        .iter()
        .filter_map(|test| test.service.as_deref());
    let asked: BTreeSet<&str> = asked.filter(|service| goes(service)).collect();
    causes.extend(asked.into_iter().map(wiring::asked_and_removed));
    let (outside, missing) = wiring::backends(objects);
    causes.extend(missing);
    for backend in outside {
        if goes(&backend.service) {
            causes.push(wiring::backend_removed(&backend));
            continue;
        }
        let service = seen(scope, || {
            observe::ask("read a service", || services.get_opt(&backend.service))
        });
        if service.await?.is_none() {
            causes.push(wiring::backend_missing(&backend));
        }
    }
    Ok(causes)
}

/// The workloads that go once the release is live, and their pods with them.
async fn removed(cluster: &Cluster, prune: &[AppliedObject]) -> StageResult<Vec<Replaced>> {
    let mut removed = Vec::new();
    for object in prune.iter().filter(|it| render::is_workload(&it.kind)) {
        let named = serde_json::json!({
            "apiVersion": object.api_version, "kind": object.kind, "metadata": {"name": object.name},
        });
        let Some(resource) = cluster.resource(&named).await? else {
            continue;
        };
        let live = cluster.get(&resource, &object.name).await;
        let what = format!("read {}", object.display_name());
        let live = live.map_err(|answer| answer.into_error(&what))?;
        removed.extend(live.map(|before| Replaced {
            before,
            after: Value::Null,
        }));
    }
    Ok(removed)
}

/// Asks until the cluster is seen, for as long as it may be away.
async fn seen<T, F>(scope: &Scope<'_>, look: impl Fn() -> F) -> StageResult<T>
where
    F: Future<Output = Result<T, observe::Unseen>>,
{
    let mut sight = observe::Sight::new(Duration::from_secs(
        scope.environment.limits.unreachable_seconds,
    ));
    loop {
        match look().await {
            Ok(seen) => return Ok(seen),
            Err(unseen) => drop(sight.unseen(unseen)?),
        }
        tokio::time::sleep(observe::BLIND_RETRY).await;
    }
}
