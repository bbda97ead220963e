//! Looking at the cluster: snapshots, a stream that says when to look again, last words of dying containers, and
//! requests through the API server's proxy.
//!
//! Every request has a limit. What cannot be seen is `Unseen` and never a verdict: the caller waits, and gives up as
//! "cannot see the cluster". Nothing here changes anything.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::{BoxStream, SelectAll, select_all};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, PersistentVolumeClaim, Pod};
use kube::api::{Api, ListParams, LogParams};
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use serde::de::DeserializeOwned;

use super::proxy::{self, Asked, Place};
use super::snapshot::{Kind, LastWords, Running, Snapshot, Target, Workload, created};
use super::tables::Listing;
use super::words::{last_seen, message, shortened};
use super::{Cluster, probes};

/// One question to the API server.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// What an API server says in its Retry-After (https://kubernetes.io/docs/concepts/cluster-administration/flow-control/).
const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// Events and autoscalers are asked for no more often than this.
const EVENTS_EVERY: Duration = Duration::from_secs(1);
const AUTOSCALERS_EVERY: Duration = Duration::from_secs(5);
/// More objects of one kind than any rollout needs.
const LIST_MAX: u32 = 2_000;
/// Further workloads are only asked for in turns.
const WATCHES_MAX: usize = 16;
/// A watch ends after this and begins anew: one that went silent is noticed.
const WATCH_SECONDS: u32 = 60;
/// Last words: of so many containers, so many lines and bytes.
const WORDS_CONTAINERS_MAX: usize = 5;
const WORDS_LINES_MAX: i64 = 20;
const WORDS_BYTES_MAX: usize = 8 * 1024;
const WORDS_TRIES_MAX: usize = 3;
/// Other ports of pods whose probe is refused: of so many pods, so many ports, so often, and how long for an answer.
const PORTS_PODS_MAX: usize = 2;
const PORTS_MAX: usize = 4;
const PORTS_TRIES_MAX: usize = 3;
const PORTS_EVERY: Duration = Duration::from_secs(5);
const PORT_LIMIT: Duration = Duration::from_secs(2);

/// The API server did not answer, or not what was asked.
#[derive(Debug)]
pub struct Unseen {
    pub error: anyhow::Error,
    /// Asking again will not help: no permission, or a login that is not valid.
    pub for_good: bool,
}

impl Unseen {
    fn new(what: &str, error: kube::Error) -> Self {
        let for_good =
            matches!(&error, kube::Error::Api(status) if matches!(status.code, 401 | 403));
        Self {
            error: super::plain(error).context(format!("cannot {what}")),
            for_good,
        }
    }
}

/// Asks once, within the limit; again where the server says that it has too much to do: a look is many questions, and one that
/// is never answered would blind it.
pub async fn ask<T, A>(what: &str, mut question: impl FnMut() -> A) -> Result<T, Unseen>
where
    A: Future<Output = kube::Result<T>>,
{
    let begun = Instant::now();
    loop {
        let left = REQUEST_LIMIT.saturating_sub(begun.elapsed());
        match tokio::time::timeout(left, question()).await {
            Ok(Err(kube::Error::Api(status)))
                if status.code == 429 && begun.elapsed() + BUSY_PAUSE < REQUEST_LIMIT =>
            {
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            Ok(answer) => return answer.map_err(|error| Unseen::new(what, error)),
            Err(_) => {
                let error = anyhow::anyhow!(
                    "cannot {what}: no answer within {} s",
                    REQUEST_LIMIT.as_secs()
                );
                return Err(Unseen {
                    error,
                    for_good: false,
                });
            }
        }
    }
}

/// How long the cluster has been out of sight, and how long that is borne.
#[derive(Debug)]
pub struct Sight {
    seen: Instant,
    limit: Duration,
    is_blind: bool,
}

/// How long to wait before the next look, while blind.
pub const BLIND_RETRY: Duration = Duration::from_secs(1);

impl Sight {
    pub fn new(limit: Duration) -> Self {
        Self {
            seen: Instant::now(),
            limit,
            is_blind: false,
        }
    }

    /// The cluster was seen; answers how long it had been out of sight, where it had.
    pub fn seen(&mut self) -> Option<Duration> {
        let away = self.seen.elapsed();
        self.seen = Instant::now();
        std::mem::take(&mut self.is_blind).then_some(away)
    }

    /// The cluster was not seen: true where that is news, an error where it has lasted too long.
    pub fn unseen(&mut self, unseen: Unseen) -> anyhow::Result<bool> {
        let away = self.seen.elapsed();
        if unseen.for_good || away >= self.limit {
            let away = if unseen.for_good {
                String::new()
            } else {
                format!(" for {} s", away.as_secs())
            };
            return Err(unseen
                .error
                .context(format!("cannot see the cluster{away}")));
        }
        Ok(!std::mem::replace(&mut self.is_blind, true))
    }
}

/// Takes snapshots of one namespace's workloads.
pub struct Observer<'a> {
    cluster: &'a Cluster,
    events: Option<(Instant, Vec<Event>)>,
    autoscalers: Option<(Instant, Vec<HorizontalPodAutoscaler>)>,
    last_words: LastWords,
    asked: Vec<(String, String)>,
    listening: BTreeMap<String, i32>,
    /// By the uid of a pod: when its other ports were tried last, and how often.
    ports_tried: BTreeMap<String, (Instant, usize)>,
    /// Read since they were last taken: whose, and what.
    new_words: Vec<(String, String)>,
}

impl<'a> Observer<'a> {
    pub fn new(cluster: &'a Cluster) -> Self {
        Self {
            cluster,
            events: None,
            autoscalers: None,
            last_words: LastWords::new(),
            asked: Vec::new(),
            listening: BTreeMap::new(),
            ports_tried: BTreeMap::new(),
            new_words: Vec::new(),
        }
    }

    /// One workload and all that belongs to it; None where the workload does not exist.
    pub async fn snapshot(&mut self, target: &Target) -> Result<Option<Snapshot>, Unseen> {
        let Some(workload) = self.workload(target).await? else {
            return Ok(None);
        };
        let labels = workload.match_labels();
        let selector: Vec<String> = labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let by_labels = ListParams::default()
            .labels(&selector.join(","))
            .limit(LIST_MAX);
        let replica_sets = async {
            match target.kind {
                Kind::Deployment => self.list("list replicasets", &by_labels).await,
                _ => Ok(Vec::new()),
            }
        };
        let pods = self.list::<Pod>("list pods", &by_labels);
        let (replica_sets, pods) = futures_util::try_join!(replica_sets, pods)?;
        self.hear_last_words(target, &pods).await;
        let events = self.events().await?;
        self.try_other_ports(&pods, &events).await;
        let autoscaled = self.autoscaled(target).await?;
        let last_words = self.last_words.clone();
        Ok(Some(Snapshot {
            now: Timestamp::now(),
            workload,
            replica_sets,
            pods,
            events,
            autoscaled,
            last_words,
            others_are_leaving: false,
            listening: self.listening.clone(),
        }))
    }

    /// Last words that were read since the last call: who died, and what it said.
    pub fn take_new_words(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.new_words)
    }

    /// Whether the events say that this Job, which is gone, had run to its end.
    pub async fn has_completed(&mut self, job: &Target) -> Result<bool, Unseen> {
        self.events = None;
        let events = self.events().await?;
        Ok(events.iter().any(|event| {
            event.involved_object.uid == job.uid
                && job.uid.is_some()
                && event.reason.as_deref() == Some("Completed")
        }))
    }

    /// Those of these claims that are not bound, each with what was last said of it.
    pub async fn unbound_claims(
        &mut self,
        names: &[&str],
    ) -> Result<Vec<(String, String)>, Unseen> {
        let mut unbound = Vec::new();
        for name in names {
            let Some(claim) = self.get::<PersistentVolumeClaim>(name).await? else {
                continue;
            };
            let phase = claim.status.and_then(|status| status.phase);
            if phase.as_deref() == Some("Bound") {
                continue;
            }
            let events = self.events().await?;
            let last = events
                .iter()
                .filter(|event| event.involved_object.uid == claim.metadata.uid)
                .max_by_key(|event| last_seen(event));
            let said = last.map_or(String::new(), |event| shortened(message(event)));
            unbound.push(((*name).to_owned(), said));
        }
        Ok(unbound)
    }

    async fn workload(&self, target: &Target) -> Result<Option<Workload>, Unseen> {
        let name = &target.name;
        Ok(match target.kind {
            Kind::Deployment => self
                .get::<Deployment>(name)
                .await?
                .map(|it| Workload::Deployment(Box::new(it))),
            Kind::StatefulSet => self
                .get::<StatefulSet>(name)
                .await?
                .map(|it| Workload::StatefulSet(Box::new(it))),
            Kind::DaemonSet => self
                .get::<DaemonSet>(name)
                .await?
                .map(|it| Workload::DaemonSet(Box::new(it))),
            Kind::Job => self
                .get::<Job>(name)
                .await?
                .map(|it| Workload::Job(Box::new(it))),
        })
    }

    async fn get<K>(&self, name: &str) -> Result<Option<K>, Unseen>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
        K: Clone + std::fmt::Debug + DeserializeOwned,
    {
        let api = self.cluster.api::<K>();
        ask(
            &format!("read {}/{name}", K::kind(&()).to_lowercase()),
            || api.get_opt(name),
        )
        .await
    }

    async fn list<K>(&self, what: &str, parameters: &ListParams) -> Result<Vec<K>, Unseen>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
        K: Clone + std::fmt::Debug + DeserializeOwned,
    {
        let api = self.cluster.api::<K>();
        Ok(ask(what, || api.list(parameters)).await?.items)
    }

    /// Events only explain: without the right to read them we judge without.
    async fn events(&mut self) -> Result<Vec<Event>, Unseen> {
        if let Some((at, events)) = &self.events
            && at.elapsed() < EVENTS_EVERY
        {
            return Ok(events.clone());
        }
        let listed = self
            .list::<Event>("list events", &ListParams::default().limit(LIST_MAX))
            .await;
        let events = unless_forbidden(listed)?;
        self.events = Some((Instant::now(), events.clone()));
        Ok(events)
    }

    async fn autoscaled(&mut self, target: &Target) -> Result<bool, Unseen> {
        let is_old = self
            .autoscalers
            .as_ref()
            .is_none_or(|(at, _)| at.elapsed() >= AUTOSCALERS_EVERY);
        if is_old {
            let what = "list horizontalpodautoscalers";
            let listed = self
                .list::<HorizontalPodAutoscaler>(what, &ListParams::default().limit(LIST_MAX))
                .await;
            self.autoscalers = Some((Instant::now(), unless_forbidden(listed)?));
        }
        let autoscalers = self
            .autoscalers
            .iter()
            .flat_map(|(_, autoscalers)| autoscalers);
        let mut of =
            autoscalers.filter_map(|autoscaler| Some(&autoscaler.spec.as_ref()?.scale_target_ref));
        Ok(of.any(|of| Kind::of(&of.kind) == Some(target.kind) && of.name == target.name))
    }

    /// Reads the log of whatever has died, once: at the first death it is there, later it may be gone.
    async fn hear_last_words(&mut self, target: &Target, pods: &[Pod]) {
        // Of the newest first: an old pod may have died last week.
        let mut pods: Vec<&Pod> = pods.iter().collect();
        pods.sort_by_key(|pod| Reverse(created(&pod.metadata)));
        for container in pods.into_iter().flat_map(Running::all) {
            let key = container.key();
            let tries = self.asked.iter().filter(|asked| **asked == key).count();
            let of_interest = target.changed || !container.status.ready;
            let Some(death) = container.death().filter(|_| of_interest) else {
                continue;
            };
            let known: HashSet<_> = self.asked.iter().collect();
            let is_enough = !known.contains(&key) && known.len() >= WORDS_CONTAINERS_MAX;
            if self.last_words.contains_key(&key) || tries >= WORDS_TRIES_MAX || is_enough {
                continue;
            }
            self.asked.push(key.clone());
            let Some(words) = last_words(self.cluster, &container, death.is_previous).await else {
                continue;
            };
            let ended = if death.reason == "OOMKilled" {
                ", killed for memory"
            } else {
                ""
            };
            let who = format!(
                "{} (exit code {}{ended})",
                container.display_name(),
                death.exit_code
            );
            self.new_words.push((who, words.clone()));
            self.last_words.insert(key, words);
        }
    }
}

impl Observer<'_> {
    /// Where a probe is refused, the program may listen on another of its declared ports: asked a few times, since it may
    /// still be on its way.
    async fn try_other_ports(&mut self, pods: &[Pod], events: &[Event]) {
        for pod in pods {
            let ports = probes::other_ports(pod, events);
            let uid = super::snapshot::uid(pod);
            let (last, tries) = self.ports_tried.get(uid).copied().unzip();
            let is_known = self.listening.contains_key(uid) || ports.is_empty();
            let is_enough = tries.unwrap_or_default() >= PORTS_TRIES_MAX
                || last.is_some_and(|last| last.elapsed() < PORTS_EVERY)
                || (last.is_none() && self.ports_tried.len() >= PORTS_PODS_MAX);
            if is_known || is_enough {
                continue;
            }
            let again = (Instant::now(), tries.unwrap_or_default() + 1);
            self.ports_tried.insert(uid.to_owned(), again);
            for port in ports.into_iter().take(PORTS_MAX) {
                let place = Place::of_pod_port(pod, port, false);
                let asked = tokio::time::timeout(PORT_LIMIT, proxy::get(self.cluster, &place, "/"));
                if let Ok(Asked::Answered(_)) = asked.await {
                    self.listening.insert(uid.to_owned(), port);
                    break;
                }
            }
        }
    }
}

fn unless_forbidden<T>(listed: Result<Vec<T>, Unseen>) -> Result<Vec<T>, Unseen> {
    match listed {
        Err(unseen) if unseen.for_good => Ok(Vec::new()),
        other => other,
    }
}

/// The last lines of a container's log; None where there are none (any more).
pub async fn last_words(
    cluster: &Cluster,
    container: &Running<'_>,
    previous: bool,
) -> Option<String> {
    let parameters = LogParams {
        container: Some(container.status.name.clone()),
        previous,
        tail_lines: Some(WORDS_LINES_MAX),
        // Counted from the front: enough for twenty long lines, of which the end is kept.
        limit_bytes: Some(256 * 1024),
        ..LogParams::default()
    };
    let api = cluster.api::<Pod>();
    let text = ask("read a log", || {
        api.logs(super::snapshot::name(container.pod), &parameters)
    })
    .await
    .ok()?;
    // The kubelet answers like this, with status 200, where the log is gone.
    let is_gone = text.starts_with("unable to retrieve container logs");
    let mut cut = text.len().saturating_sub(WORDS_BYTES_MAX);
    while !text.is_char_boundary(cut) {
        cut += 1;
    }
    let words = text.get(cut..).unwrap_or_default().trim_end();
    (!is_gone && !words.trim().is_empty()).then(|| words.to_owned())
}

/// What is shown of a namespace at the end of a rollout.
pub async fn listing(cluster: &Cluster) -> Result<Listing, Unseen> {
    let observer = Observer::new(cluster);
    let all = ListParams::default().limit(LIST_MAX);
    let autoscalers = observer.list("list horizontalpodautoscalers", &all).await;
    Ok(Listing {
        pods: observer.list("list pods", &all).await?,
        services: unless_forbidden(observer.list("list services", &all).await)?,
        deployments: observer.list("list deployments", &all).await?,
        replica_sets: observer.list("list replicasets", &all).await?,
        autoscalers: unless_forbidden(autoscalers)?,
    })
}

/// Says when something moved; it may say so for nothing, and a caller must not rely on it alone.
pub struct Changes(SelectAll<BoxStream<'static, ()>>);

impl Changes {
    /// Watches the workloads of these snapshots and their pods. Lost watches come again by themselves, also after 410.
    pub fn of<'a>(cluster: &Cluster, snapshots: impl Iterator<Item = &'a Snapshot>) -> Self {
        let mut streams = Vec::new();
        for snapshot in snapshots.take(WATCHES_MAX) {
            let labels: Vec<String> = snapshot
                .workload
                .match_labels()
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            let pods = watcher::Config::default()
                .labels(&labels.join(","))
                .timeout(WATCH_SECONDS);
            streams.push(stream::<Pod>(cluster, pods));
            let name = snapshot
                .workload
                .metadata()
                .name
                .clone()
                .unwrap_or_default();
            let one = watcher::Config::default()
                .fields(&format!("metadata.name={name}"))
                .timeout(WATCH_SECONDS);
            streams.push(match &snapshot.workload {
                Workload::Deployment(_) => stream::<Deployment>(cluster, one),
                Workload::StatefulSet(_) => stream::<StatefulSet>(cluster, one),
                Workload::DaemonSet(_) => stream::<DaemonSet>(cluster, one),
                Workload::Job(_) => stream::<Job>(cluster, one),
            });
        }
        Self(select_all(streams))
    }

    /// Waits for a change, at most so long; what comes within a moment of it is one change.
    pub async fn next(&mut self, limit: Duration) {
        const MOMENT: Duration = Duration::from_millis(50);
        if self.0.is_empty() {
            tokio::time::sleep(limit).await;
            return;
        }
        if tokio::time::timeout(limit, self.0.next()).await.is_ok() {
            tokio::time::sleep(MOMENT).await;
            while let Some(Some(())) = futures_util::FutureExt::now_or_never(self.0.next()) {}
        }
    }
}

fn stream<K>(cluster: &Cluster, config: watcher::Config) -> BoxStream<'static, ()>
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    K: Clone + std::fmt::Debug + Send + Sync + 'static,
{
    let api = Api::<PartialObjectMeta<K>>::namespaced(cluster.client.clone(), &cluster.namespace);
    let changes = watcher(api, config).default_backoff();
    // What it cannot see we do not see by asking either; only that is told.
    changes
        .filter_map(|change| std::future::ready(change.ok().map(|_| ())))
        .boxed()
}
