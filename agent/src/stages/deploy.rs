//! Deploy: puts a planned release into the cluster, object by object, in its order.
//!
//! `hold` takes the right to write, `Applying` writes; whoever drives it records each object before the next. The same
//! release twice is unchanged, and half a release is gone on with. Going back takes every field and runs no Job again.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Scope, StageError, StageResult, job, limited};
use crate::builds::Cause;
use crate::cluster::apply::{self, Done, Rules};
use crate::cluster::lease::{self, Held};
use crate::cluster::observe::Observer;
use crate::cluster::ownership::Taking;
use crate::cluster::snapshot::Target;
use crate::cluster::{Cluster, Resource, Trouble, diff};
use crate::manifests::{api_version, condition, display_name, kind, name, text};
use crate::release::{AppliedObject, Change, Planned, Release};

/// Of all objects, and of the Jobs between them, which have limits of their own.
const APPLY_LIMIT: Duration = Duration::from_secs(3600);
const ESTABLISHED_LIMIT: Duration = Duration::from_secs(30);
/// For an object that somebody has deleted.
const LEAVING_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(250);

impl From<Trouble> for StageError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Refused(cause) => Self::Failed(cause),
            Trouble::Agent(error) => Self::Agent(error),
        }
    }
}

/// Which way a release is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A new one: fields of other controllers are respected, Jobs are run and waited for.
    Forward,
    /// One that served before: it must not stop half-way, so every field is taken; its Jobs have run.
    Back,
    /// As `Back`, after a failure: what is refused is left as it is, for the sake of the workloads behind it.
    Rescue,
}

impl Way {
    pub fn is_back(self) -> bool {
        self != Self::Forward
    }
}

/// Takes the right to write in the environment: its namespace, which is made where it is missing and may be, and the next
/// number of its lease.
pub async fn hold(scope: &Scope<'_>, release: Option<&Release>) -> StageResult<Held> {
    let cluster = scope.cluster().await?;
    if !namespace_is_there(scope, &cluster).await? {
        make_namespace(scope, &cluster, release).await?;
    }
    let holder = format!("build-{}", scope.build.id);
    let environment = &scope.environment.name;
    // A Lease that was lost, or a command by hand, must not lock this environment out.
    let objects = release.map_or(&[][..], |release| &release.objects);
    let labels = lease::newest_label(&cluster, objects).await?;
    let at_least = scope.build.fence.max(labels.saturating_add(1));
    Ok(lease::claim(&cluster, environment, &holder, at_least).await?)
}

/// What is known of Jobs whose own `ttlSecondsAfterFinished` may have taken them away.
#[derive(Debug, Default)]
pub struct KnownJobs {
    /// Names of those that ran to their end.
    pub completed: BTreeSet<String>,
    /// What an attempt of this very build had applied.
    pub begun: Vec<AppliedObject>,
}

/// A release on its way into the cluster.
pub struct Applying<'a> {
    scope: Scope<'a>,
    held: &'a Held,
    release: &'a Release,
    way: Way,
    rules: Rules<'a>,
    next: usize,
    jobs: KnownJobs,
    /// Something of the release stands here already: this is the cluster that its Jobs ran in.
    is_known_place: bool,
    /// A Job that was applied and is to be waited for before anything else.
    job: Option<AppliedObject>,
    deadline: Instant,
    /// Beyond what an attempt before has noted, and the one after it.
    is_past_the_noted: bool,
    /// What a rescue could not put back, in a sentence each.
    pub refused: Vec<String>,
}

impl<'a> Applying<'a> {
    /// Writes our number on every object of the release that is there: from then on an older holder writes none of them.
    pub async fn begin(
        scope: &Scope<'a>,
        held: &'a Held,
        release: &'a Release,
        way: Way,
    ) -> StageResult<Self> {
        let mut is_known_place = false;
        for object in release
            .objects
            .iter()
            .filter(|object| kind(object) != "Namespace")
        {
            // A kind that comes with this very release has no objects yet.
            if let Some(resource) = held.cluster.resource(object).await? {
                is_known_place |= lease::fence(held, &resource, object).await?.is_some();
            }
        }
        let mut rules = rules(scope, &held.cluster, &release.objects).await?;
        rules.taking.all = way.is_back();
        rules.held = Some(held);
        Ok(Self {
            scope: *scope,
            held,
            release,
            way,
            rules,
            next: 0,
            jobs: KnownJobs::default(),
            is_known_place,
            job: None,
            deadline: Instant::now() + APPLY_LIMIT,
            is_past_the_noted: false,
            refused: Vec::new(),
        })
    }

    /// Jobs that have run and are gone by themselves run no second time.
    #[must_use]
    pub fn knowing(mut self, jobs: KnownJobs) -> Self {
        self.jobs = jobs;
        self
    }

    /// Applies the next object; its place in the release, and what became of it. None after the last. A Job is waited for
    /// when the next one is asked for, so that it is recorded before.
    pub async fn next(&mut self) -> StageResult<Option<(usize, AppliedObject)>> {
        if let Some(job) = self.job.take() {
            job::completed(&self.scope, &self.held.cluster, self.release, &job).await?;
        }
        let (scope, release) = (self.scope, self.release);
        while let Some(object) = release.objects.get(self.next) {
            let ordinal = self.next;
            self.next += 1;
            let left = self.deadline.saturating_duration_since(Instant::now());
            let one = limited(&scope, "applying the release", left, self.one(object));
            if let Some(applied) = one.await? {
                self.job = (applied.kind == "Job").then(|| applied.clone());
                return Ok(Some((ordinal, applied)));
            }
        }
        Ok(None)
    }

    async fn one(&mut self, object: &Value) -> StageResult<Option<AppliedObject>> {
        match (kind(object), self.way) {
            // Of a namespace that exists nothing is changed, and `hold` has made the one that did not.
            ("Namespace", _) | ("Job", Way::Back | Way::Rescue) => Ok(None),
            ("Job", Way::Forward) => self.job(object).await,
            _ => match self.apply(object).await {
                // A claim does not shrink, what was made immutable stays so.
                Err(StageError::Failed(cause))
                    if self.way == Way::Rescue
                        && !crate::manifests::render::is_workload(kind(object)) =>
                {
                    let left = self.as_it_is(object).await?;
                    let stays = left.as_ref().map_or("is missing", |_| "stays as it is");
                    let told = format!(
                        "{} cannot be put back as it was and {stays}: {}",
                        display_name(object),
                        cause.sentence
                    );
                    self.scope.log.line(&told);
                    self.refused.push(told);
                    Ok(left)
                }
                applied => applied.map(Some),
            },
        }
    }

    /// What is there of an object; None where nothing is.
    async fn as_it_is(&self, object: &Value) -> StageResult<Option<AppliedObject>> {
        Ok(self.live(object).await?.map(|live| {
            applied_object(&Done {
                before: Some(live.clone()),
                after: live,
                notes: Vec::new(),
            })
        }))
    }

    /// What is on its way out would take the apply with it: first it must be gone. A claim may leave only with its pods.
    async fn apply_anew(&self, object: &Value) -> StageResult<Done> {
        let begun = Instant::now();
        loop {
            let done = apply::apply(&self.held.cluster, &self.rules, object, false).await?;
            let is_leaving = done.after.pointer("/metadata/deletionTimestamp").is_some();
            if !is_leaving || kind(object) == "PersistentVolumeClaim" {
                return Ok(done);
            }
            let shown = display_name(object);
            self.scope.log.line(format!(
                "{shown} is being deleted, waiting until it is gone"
            ));
            let uid = text(&done.after, "/metadata/uid");
            while let Some(live) = self.live(object).await?
                && text(&live, "/metadata/uid") == uid
            {
                if begun.elapsed() >= LEAVING_LIMIT {
                    let seconds = LEAVING_LIMIT.as_secs();
                    let sentence =
                        format!("{shown} is being deleted, and is not gone after {seconds} s");
                    let cause = Cause::new("object_is_leaving", sentence)
                        .object(shown)
                        .hint("see its finalizers: `kubectl get -o yaml` shows who is waited for");
                    return Err(StageError::Failed(cause));
                }
                tokio::time::sleep(POLL).await;
            }
        }
    }

    async fn live(&self, object: &Value) -> StageResult<Option<Value>> {
        let Some(resource) = self.held.cluster.resource(object).await? else {
            return Ok(None);
        };
        let live = self.held.cluster.get(&resource, name(object)).await;
        Ok(live.map_err(|answer| answer.into_error(&format!("read {}", display_name(object))))?)
    }

    async fn apply(&mut self, object: &Value) -> StageResult<AppliedObject> {
        let log = self.scope.log;
        let done = self.apply_anew(object).await?;
        let mut applied = applied_object(&done);
        if applied.change == Change::Unchanged && self.scope.build.attempt > 1 {
            // An attempt of this very build wrote it, and was killed before it could say so.
            applied.change = self.planned(object);
        }
        let shown = applied.display_name();
        for note in &done.notes {
            log.line(format!("{shown}: {note}"));
        }
        log.line(format!("{shown} {}", applied.change));
        if applied.kind == "CustomResourceDefinition" && applied.change != Change::Unchanged {
            wait_established(&self.held.cluster, object).await?;
        }
        Ok(applied)
    }

    /// The way back has no plan: what the attempt before has noted, and of the first that it has not whatever it may have done.
    fn planned(&mut self, object: &Value) -> Change {
        if self.way.is_back() {
            let noted = self
                .jobs
                .begun
                .iter()
                .find(|begun| begun.is_named_by(object));
            return match noted {
                Some(noted) => noted.change,
                None if std::mem::replace(&mut self.is_past_the_noted, true) => Change::Unchanged,
                None => Change::Changed,
            };
        }
        let shown = display_name(object);
        let planned = |planned: &&Planned| planned.object == shown;
        let planned = self.release.plan.iter().find(planned);
        planned.map_or(Change::Unchanged, |planned| planned.change)
    }

    /// A Job runs once for one content, by its name: where it is there already, only its end is awaited.
    async fn job(&mut self, object: &Value) -> StageResult<Option<AppliedObject>> {
        let Some(live) = self.live(object).await? else {
            if self.is_gone_by_itself(object).await? {
                let shown = display_name(object);
                self.scope
                    .log
                    .line(format!("{shown} has run before, and is not run again"));
                return Ok(None);
            }
            return self.apply(object).await.map(Some);
        };
        let mut applied = applied_object(&Done {
            before: Some(live.clone()),
            after: live,
            notes: Vec::new(),
        });
        if self.scope.build.attempt > 1 {
            applied.change = self.planned(object);
        }
        Ok(Some(applied))
    }

    /// Whether a Job that is absent has run, and was taken away by its own `ttlSecondsAfterFinished`; one that a person
    /// deleted, or that went with its namespace, has not.
    async fn is_gone_by_itself(&self, job: &Value) -> StageResult<bool> {
        let leaves = job.pointer("/spec/ttlSecondsAfterFinished").is_some();
        if !leaves || !self.is_known_place {
            return Ok(false);
        }
        if self.jobs.completed.contains(name(job)) {
            return Ok(true);
        }
        let begun = self.jobs.begun.iter().find(|begun| begun.is_named_by(job));
        let Some(target) = begun
            .and_then(|begun| Target::applied(self.release, std::slice::from_ref(begun)).pop())
        else {
            return Ok(false);
        };
        let mut observer = Observer::new(&self.held.cluster);
        let completed = observer.has_completed(&target).await;
        completed.map_err(|unseen| StageError::Agent(unseen.error))
    }
}

/// The commands of kubectl that bring back what was before, for a build that left a failed release.
pub fn undo_hint(namespace: &str, applied: &[AppliedObject]) -> Option<String> {
    let commands: Vec<String> = applied
        .iter()
        .filter(|object| crate::manifests::render::is_workload(&object.kind))
        .filter_map(|object| match object.change {
            Change::Created => Some(format!(
                "kubectl -n {namespace} delete {}",
                object.display_name()
            )),
            Change::Changed => Some(format!(
                "kubectl -n {namespace} rollout undo {}",
                object.display_name()
            )),
            Change::Unchanged | Change::Removed => None,
        })
        .collect();
    (!commands.is_empty()).then(|| commands.join(" && "))
}

/// Of a namespace that exists, differences are only said: its labels are the operator's.
pub(super) async fn namespace_differences(
    cluster: &Cluster,
    object: &Value,
) -> Result<Vec<String>, Trouble> {
    let Some(live) = apply::namespace(cluster).await? else {
        return Ok(Vec::new());
    };
    let mut differences = Vec::new();
    for field in ["labels", "annotations"] {
        let wanted = object
            .pointer(&format!("/metadata/{field}"))
            .and_then(Value::as_object);
        for (key, value) in wanted.into_iter().flatten() {
            let is = live
                .get("metadata")
                .and_then(|metadata| metadata.get(field)?.get(key));
            if is != Some(value) {
                let is = is.map_or("missing".to_owned(), Value::to_string);
                differences.push(format!("{field}.{key} is {is}, the manifest says {value}; a namespace that exists is not changed"));
            }
        }
    }
    Ok(differences)
}

/// False where it is missing and may be made.
pub(super) async fn namespace_is_there(scope: &Scope<'_>, cluster: &Cluster) -> StageResult<bool> {
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

pub(super) async fn rules<'a>(
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
        held: None,
    })
}

async fn make_namespace(
    scope: &Scope<'_>,
    cluster: &Cluster,
    release: Option<&Release>,
) -> StageResult<()> {
    let mut objects = release.into_iter().flat_map(|release| &release.objects);
    let own = objects.find(|object| kind(object) == "Namespace");
    let bare =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.namespace}});
    apply::apply(cluster, &Rules::default(), own.unwrap_or(&bare), false).await?;
    scope
        .log
        .line(format!("namespace/{} created", cluster.namespace));
    Ok(())
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

pub(super) fn change(done: &Done) -> Change {
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
