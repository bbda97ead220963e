//! Smoke test: ask every new pod, then the Service.
//!
//! Requests go through the API server's proxy (`cluster::proxy`), or to an address outside that agent.yaml lists. A test
//! repeats until it is good; what the API server itself answers is blindness and never a wrong answer.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ListParams;
use tokio::time::Instant;

use super::expect::{self, Wrong};
use super::{Live, RolledOut, Scope, StageError, StageResult};
use crate::builds::Cause;
use crate::cluster::Cluster;
use crate::cluster::observe::{Observer, Unseen, ask};
use crate::cluster::proxy::{self, Answer, Asked, Place};
use crate::cluster::rollout::{self, Standing};
use crate::cluster::snapshot::{self, Snapshot, Target};
use crate::cluster::wiring;
use crate::manifests::display_name;
use crate::pipeline::SmokeTest;
use crate::release::{Evidence, Release};

/// An answer that is wrong for so long is wrong. The Service still leads to old pods for up to a second after the
/// rollout, so nothing is judged earlier.
const WRONG_FOR: Duration = Duration::from_secs(5);
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The Service picks a pod anew for each request.
const SERVICE_ANSWERS: u32 = 3;
const REDIRECT_HINT: &str = "redirects are not followed: ask the address that it leads to";

/// Runs the release's smoke tests in their order. The last answer to a request that failed is added to `evidence`.
pub async fn run(
    scope: &Scope<'_>,
    release: &Release,
    rolled_out: &RolledOut,
    evidence: &mut Vec<Evidence>,
) -> StageResult<Live> {
    let cluster = scope.cluster().await?;
    let targets = Target::serving(release);
    let mut tester = Tester {
        scope,
        release,
        cluster: &cluster,
        targets: &targets,
        standing: &rolled_out.standing,
        requests: 0,
        evidence,
    };
    if release.smoke_tests.is_empty() {
        scope.log.line("pipeline.yaml has no smoke test.");
    }
    let tested = tokio::select! {
        biased;
        () = scope.cancel.cancelled() => Err(StageError::Canceled),
        tested = tester.all() => tested,
    };
    let requests = tester.requests;
    tested.map_err(|error| error.masked(scope.log))?;
    Ok(Live {
        release_id: rolled_out.release_id,
        requests,
    })
}

struct Tester<'a> {
    scope: &'a Scope<'a>,
    release: &'a Release,
    cluster: &'a Cluster,
    targets: &'a [Target],
    standing: &'a BTreeMap<String, Standing>,
    requests: u64,
    evidence: &'a mut Vec<Evidence>,
}

/// The pods of a release's workloads.
#[derive(Default)]
struct Pods {
    /// The release's own that are to stay.
    new: Vec<Pod>,
    /// Uids of older ones, on their way out.
    old: Vec<String>,
    /// Older ones that a partition keeps.
    held_back: Vec<Pod>,
    /// Some workload behind the Service is to have pods.
    are_wanted: bool,
}

impl Pods {
    fn are_none(&self) -> bool {
        self.new.is_empty() && self.held_back.is_empty()
    }
}

/// One request to be repeated: where, and until when.
struct Question<'a> {
    test: &'a SmokeTest,
    /// `GET /health of pod hello-axum-5d9-x2v`.
    what: String,
    deadline: Instant,
    /// So many good answers in a row.
    answers: u32,
}

impl Tester<'_> {
    async fn all(&mut self) -> StageResult<()> {
        let release = self.release;
        for test in &release.smoke_tests {
            let deadline = Instant::now() + Duration::from_secs(test.timeout_seconds);
            match (&test.url, &test.get, &test.service) {
                (Some(url), _, _) => self.outside(test, url, deadline).await?,
                (None, Some(path), Some(service)) => {
                    self.inside(test, path, service, deadline).await?
                }
                _ => {
                    return Err(anyhow::anyhow!(
                        "a smoke test has neither `url` nor `get` with `service`"
                    )
                    .into());
                }
            }
        }
        Ok(())
    }

    async fn inside(
        &mut self,
        test: &SmokeTest,
        path: &str,
        service: &str,
        deadline: Instant,
    ) -> StageResult<()> {
        if !proxy::is_plain_path(path) {
            return Err(StageError::failed(
                "smoke_path",
                format!("{path:?} is no path that a smoke test may ask for"),
            ));
        }
        let Some(live) = self.retried(deadline, || self.service(service)).await? else {
            let cause = Cause::new(
                "smoke_no_endpoint",
                format!("service/{service} does not exist"),
            );
            return Err(StageError::Failed(
                cause.hint("name a Service of the manifests in `smoke_test: service`"),
            ));
        };
        let selector = live
            .spec
            .as_ref()
            .and_then(|spec| spec.selector.clone())
            .unwrap_or_default();
        let pods = self.pods_behind(&selector, deadline).await?;
        if pods.are_none() && !selector.is_empty() {
            if wiring::selects_a_template(&self.release.objects, &selector) && !pods.are_wanted {
                self.scope.log.line(format!(
                    "GET {path} of service/{service}: no pod is wanted behind it, so none is asked"
                ));
                return Ok(());
            }
            let slices = self.retried(deadline, || self.slices(service)).await?;
            if !pods.are_wanted && !leads_to_a_ready_pod(&slices) {
                return Err(selects_nothing(service, &selector));
            }
        }
        let ready: Vec<&Pod> = pods
            .new
            .iter()
            .filter(|pod| snapshot::is_ready(pod))
            .collect();
        for pod in &ready {
            let name = snapshot::name(pod).to_owned();
            let question = Question {
                test,
                what: format!("GET {path} of pod {name}"),
                deadline,
                answers: 1,
            };
            let place = Place::of_pod(&live, pod);
            let cluster = self.cluster;
            self.repeat(&question, || proxy::get(cluster, &place, path))
                .await?;
        }
        self.old_endpoints_gone(service, &pods.old, deadline)
            .await?;
        let what = format!("GET {path} of service/{service}");
        if expect::names_commit(&test.expect) && !pods.held_back.is_empty() {
            self.scope.log.line(format!(
                "{what}: not asked for its commit, for it leads to pods too that a partition keeps as they were"
            ));
            return Ok(());
        }
        let question = Question {
            test,
            what,
            deadline,
            answers: SERVICE_ANSWERS,
        };
        let (cluster, place) = (self.cluster, Place::of_service(&live));
        let place = place.by_way_of(ready.iter().map(|pod| Place::of_pod(&live, pod)));
        self.repeat(&question, || proxy::get(cluster, &place, path))
            .await
    }

    async fn outside(&mut self, test: &SmokeTest, url: &str, deadline: Instant) -> StageResult<()> {
        let Some(address) = allowed_address(url, &self.scope.environment.smoke_test_hosts) else {
            let cause = Cause::new(
                "smoke_host_not_allowed",
                format!("the smoke test may not ask {url}"),
            )
            .hint("the operator lists hosts in `smoke_test_hosts` of agent.yaml");
            return Err(StageError::Failed(cause));
        };
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(proxy::REQUEST_LIMIT)
            .no_proxy()
            .build()
            .map_err(|error| {
                anyhow::Error::new(error).context("cannot set up requests to the outside")
            })?;
        let question = Question {
            test,
            what: format!("GET {address}"),
            deadline,
            answers: 1,
        };
        self.repeat(&question, || get_outside(&client, address.clone()))
            .await
    }

    /// Asks until the answer is good so many times, wrong for long enough, or time is up.
    async fn repeat<F>(&mut self, question: &Question<'_>, ask: impl Fn() -> F) -> StageResult<()>
    where
        F: Future<Output = Asked>,
    {
        let unreachable = Duration::from_secs(self.scope.environment.limits.unreachable_seconds);
        let (mut good, mut wrong_since, mut pause, mut seen) =
            (0, None, PAUSE_FIRST, Instant::now());
        let mut told = String::new();
        loop {
            let asked = ask().await;
            self.requests += 1;
            if !matches!(asked, Asked::Blind(_) | Asked::Unreached(_)) {
                seen = Instant::now();
            }
            let judged = expect::judge(&question.test.expect, &self.release.commit, &asked);
            let line = format!("{}: {}", question.what, expect::outcome(&asked, &judged));
            if told != expect::without_time(&line) {
                self.scope.log.line(&line);
                told = expect::without_time(&line).to_owned();
            }
            let wrong = match judged {
                Ok(()) => {
                    good += 1;
                    if good >= question.answers {
                        return Ok(());
                    }
                    wrong_since = None;
                    continue;
                }
                Err(wrong) => wrong,
            };
            good = 0;
            let since: Instant = *wrong_since.get_or_insert_with(Instant::now);
            let is_late = Instant::now() >= question.deadline;
            match wrong {
                Wrong::Gone => return Ok(()),
                Wrong::Forbidden(why) => {
                    return Err(anyhow::anyhow!("cannot run the smoke test: {why}").into());
                }
                Wrong::Blind(why) if is_late && seen.elapsed() >= unreachable => {
                    let error = anyhow::anyhow!("{why}")
                        .context(format!("cannot see the answer to {}", question.what));
                    return Err(StageError::Agent(error));
                }
                Wrong::Blind(_) => wrong_since = None,
                Wrong::Settled(cause) if is_late || since.elapsed() >= WRONG_FOR => {
                    return Err(self.wrong(cause, question, &asked));
                }
                Wrong::NotYet(cause) if is_late => {
                    return Err(self.wrong(cause, question, &asked));
                }
                Wrong::Settled(_) | Wrong::NotYet(_) => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn wrong(&mut self, cause: Cause, question: &Question<'_>, asked: &Asked) -> StageError {
        self.evidence.push(Evidence {
            title: format!("{}: the last answer", question.what),
            body: expect::in_full(asked),
        });
        StageError::Failed(finished(cause, question))
    }

    /// Waits until the Service leads to new pods only; those that drain do not count.
    async fn old_endpoints_gone(
        &self,
        service: &str,
        old: &[String],
        deadline: Instant,
    ) -> StageResult<()> {
        loop {
            let slices = self.retried(deadline, || self.slices(service)).await?;
            let endpoints: Vec<_> = slices.iter().flat_map(|slice| &slice.endpoints).collect();
            let condition = |value: Option<bool>| value.unwrap_or_default();
            let is_old = |endpoint: &&&k8s_openapi::api::discovery::v1::Endpoint| {
                let uid = endpoint
                    .target_ref
                    .as_ref()
                    .and_then(|pod| pod.uid.as_ref());
                let leaves = endpoint
                    .conditions
                    .as_ref()
                    .is_some_and(|it| condition(it.terminating));
                uid.is_some_and(|uid| old.contains(uid)) && !leaves
            };
            let ready = leads_to_a_ready_pod(&slices);
            let old_ones = endpoints.iter().filter(is_old).count();
            if ready && old_ones == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let sentence = match ready {
                    true => format!("service/{service} still leads to {old_ones} old pods"),
                    false => format!("service/{service} leads to no pod that is ready"),
                };
                let hint = format!(
                    "compare its selector and targetPort with the pods: `kubectl describe service {service}`"
                );
                return Err(StageError::Failed(
                    Cause::new("smoke_no_endpoint", sentence)
                        .object(format!("service/{service}"))
                        .hint(hint),
                ));
            }
            tokio::time::sleep(PAUSE_FIRST).await;
        }
    }

    /// The pods that a Service selects, and all old ones. Where some are wanted and none is there (one was just taken away, and
    /// the next is not made yet), it waits.
    async fn pods_behind(
        &self,
        selector: &BTreeMap<String, String>,
        deadline: Instant,
    ) -> StageResult<Pods> {
        let is_selected = |pod: &Pod| {
            let mut labels = selector.iter();
            !selector.is_empty()
                && labels.all(|(key, value)| snapshot::label(&pod.metadata, key) == Some(value))
        };
        loop {
            let mut pods = self.pods(selector, deadline).await?;
            pods.new.retain(is_selected);
            pods.held_back.retain(is_selected);
            if !pods.are_none() || !pods.are_wanted || Instant::now() >= deadline {
                return Ok(pods);
            }
            tokio::time::sleep(PAUSE_FIRST).await;
        }
    }

    async fn pods(
        &self,
        selector: &BTreeMap<String, String>,
        deadline: Instant,
    ) -> StageResult<Pods> {
        let mut pods = Pods::default();
        let targets = self.targets;
        for target in targets {
            let seen = self.retried(deadline, || self.snapshot(target)).await?;
            let proved = self.standing.get(&target.display_name());
            if let Some(cause) = rollout::taken_over(target, proved, seen.as_ref()) {
                return Err(StageError::Failed(cause));
            }
            let Some(snapshot) = seen else {
                continue;
            };
            pods.new.extend(
                snapshot
                    .new_pods()
                    .into_iter()
                    .filter(|pod| !snapshot::has_ended(pod))
                    .cloned(),
            );
            let is_it = |object: &&serde_json::Value| display_name(object) == target.display_name();
            let own = self.release.objects.iter().find(is_it);
            pods.are_wanted |= !selector.is_empty()
                && snapshot.wants_pods()
                && wiring::selects_a_template(own, selector);
            for pod in snapshot.old_pods().0 {
                if snapshot.is_held_back(pod) {
                    pods.held_back.push(pod.clone());
                } else {
                    pods.old.push(snapshot::uid(pod).to_owned());
                }
            }
        }
        Ok(pods)
    }

    /// Looks until it sees; gives up when the cluster was out of sight for too long, whatever the test's own limit.
    async fn retried<T, F>(&self, deadline: Instant, look: impl Fn() -> F) -> StageResult<T>
    where
        F: Future<Output = Result<T, Unseen>>,
    {
        let unreachable = Duration::from_secs(self.scope.environment.limits.unreachable_seconds);
        let give_up = deadline.max(Instant::now() + unreachable);
        loop {
            match look().await {
                Ok(seen) => return Ok(seen),
                Err(unseen) if unseen.for_good || Instant::now() >= give_up => {
                    return Err(StageError::Agent(
                        unseen.error.context("cannot see the cluster"),
                    ));
                }
                Err(_) => tokio::time::sleep(PAUSE_MAX).await,
            }
        }
    }

    async fn snapshot(&self, target: &Target) -> Result<Option<Snapshot>, Unseen> {
        Observer::new(self.cluster).snapshot(target).await
    }

    async fn service(&self, name: &str) -> Result<Option<Service>, Unseen> {
        let services = self.cluster.api::<Service>();
        ask(&format!("read service/{name}"), || services.get_opt(name)).await
    }

    async fn slices(&self, service: &str) -> Result<Vec<EndpointSlice>, Unseen> {
        let of_service =
            ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
        let slices = self.cluster.api::<EndpointSlice>();
        Ok(ask("list endpointslices", || slices.list(&of_service))
            .await?
            .items)
    }
}

fn leads_to_a_ready_pod(slices: &[EndpointSlice]) -> bool {
    let mut endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
    // Absent means ready.
    endpoints.any(|it| {
        let conditions = it.conditions.as_ref();
        conditions.is_none_or(|it| it.ready.unwrap_or(true))
    })
}

fn finished(cause: Cause, question: &Question<'_>) -> Cause {
    let mut cause = Cause {
        sentence: format!("{} {}", question.what, cause.sentence),
        ..cause
    };
    if cause.sentence.contains(" answered 3") {
        cause.hint = Some(REDIRECT_HINT.to_owned());
    }
    cause
}

fn selects_nothing(
    service: &str,
    selector: &std::collections::BTreeMap<String, String>,
) -> StageError {
    let selector: Vec<String> = selector
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let sentence = format!(
        "service/{service} selects {}, and no pod of this release carries that",
        selector.join(",")
    );
    let hint = "let the Service's selector match the labels of the pod template";
    StageError::Failed(
        Cause::new("smoke_no_endpoint", sentence)
            .object(format!("service/{service}"))
            .hint(hint),
    )
}

/// The address of a `url:`, where one of the allowed hosts (with or without a port) is its; None where a test may not ask it.
pub fn allowed_address(url: &str, allowed: &[String]) -> Option<url::Url> {
    let url = url::Url::parse(url).ok()?;
    let host = url.host_str().unwrap_or_default();
    let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
    let mut allowed = allowed.iter();
    let is_allowed =
        allowed.any(|it| it.eq_ignore_ascii_case(host) || it.eq_ignore_ascii_case(&with_port));
    let is_plain = matches!(url.scheme(), "http" | "https")
        && url.username().is_empty()
        && url.password().is_none();
    (is_allowed && is_plain).then_some(url)
}

async fn get_outside(client: &reqwest::Client, address: url::Url) -> Asked {
    let begun = Timestamp::now();
    let took = || Duration::try_from(Timestamp::now().duration_since(begun)).unwrap_or_default();
    let mut response = match client.get(address).send().await {
        Ok(response) => response,
        // The address is in the line already.
        Err(error) => return nobody_there(error),
    };
    let (status, mut body) = (response.status().as_u16(), Vec::new());
    while body.len() < proxy::BODY_BYTES_MAX {
        match response.chunk().await {
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => break,
            Err(error) => return nobody_there(error),
        }
    }
    body.truncate(proxy::BODY_BYTES_MAX);
    Asked::Answered(Answer {
        status,
        body,
        took: took(),
        forwarded: false,
    })
}

/// In the network's own words.
fn nobody_there(error: reqwest::Error) -> Asked {
    let error = anyhow::Error::new(error.without_url());
    Asked::NobodyThere(error.root_cause().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A build runs as a task; a closure that borrows for any lifetime would forbid it, and say so far from here.
    #[test]
    fn the_stage_can_run_as_a_task() {
        fn run_as_task<'a>(
            scope: &'a Scope<'a>,
            release: &'a Release,
            rolled_out: &'a RolledOut,
            evidence: &'a mut Vec<Evidence>,
        ) -> impl Send + 'a {
            run(scope, release, rolled_out, evidence)
        }
        let _ = run_as_task;
    }
}
